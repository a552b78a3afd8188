"""How long quantizing takes, and how much memory beyond the model itself.

    python benchmarks/quantize.py [--model ...] [--json FILE]

Memory is the resident set of the process, sampled every millisecond while quantizing.
"""

from __future__ import annotations

import argparse
import gc
import json
import threading
import time
from pathlib import Path

import psutil
from torch import nn
from torchao.quantization import quantize_

from grinqh_ao import GrinqhConfig, running, summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=running.SMOLLM2, help="as for the demo")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model, _ = running.load(arguments.model)
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
    report = {
        "machine": running.describe_machine(),
        "weights": weights,
        "seconds": seconds,
        "million_weights_per_second": weights / seconds / 1e6,
        "peak_extra_mb": (max(samples) - before) / 1e6,
        "largest_layer_mb": largest / 1e6,
    }
    print(summary(model))
    print(json.dumps(report, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
