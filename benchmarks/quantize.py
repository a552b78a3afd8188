"""How long quantizing takes, and how much memory beyond the model itself.

    python benchmarks/quantize.py [--model ...]

Memory is the resident set of the process, sampled every millisecond while quantizing.
"""

from __future__ import annotations

import argparse
import gc
import threading
import time

import psutil
from torch import nn
from torchao.quantization import quantize_

from grinqh_ao import GrinqhConfig, demo, summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="as for the demo")
    arguments = parser.parse_args()
    model, _ = demo.load(arguments.model)
    layers = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    largest = max(weight.nbytes for weight in layers)
    weights = sum(weight.numel() for weight in layers)
    del layers
    gc.collect()

    process, samples, done = psutil.Process(), [], threading.Event()

    def sample() -> None:
        while not done.wait(0.001):
            samples.append(process.memory_info().rss)

    before = process.memory_info().rss
    thread = threading.Thread(target=sample)
    thread.start()
    started = time.perf_counter()
    quantize_(model, GrinqhConfig(bits=3))
    seconds = time.perf_counter() - started
    done.set()
    thread.join()
    print(summary(model))
    print(f"{seconds:.2f} s, {weights / seconds / 1e6:.1f} million weights per second")
    extra = (max(samples) - before) / 1e6
    print(f"peak extra memory {extra:.0f} MB; the largest layer takes {largest / 1e6:.0f} MB")
    print(demo.describe_machine())


if __name__ == "__main__":
    main()
