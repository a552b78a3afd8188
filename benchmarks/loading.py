"""Memory and time of quantizing a model while it is loaded, in a process of its own.

    python benchmarks/loading.py [--model smollm2 | --random-billions 1.2] [--json FILE]

Memory is what the process allocates (RssAnon), sampled every millisecond, beyond what it had after
its imports and a first, tiny model. Pages of the checkpoint that the system has mapped into it
(RssFile), which it can drop at any time, are reported beside it.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from grinqh_ao import GrinqhHfConfig, running, summary
from grinqh_ao.model import quantized_modules


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=running.SMOLLM2, help="as for the demo")
    parser.add_argument("--random-billions", type=float, help="a random Llama of about this size")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child)))
        return
    with tempfile.TemporaryDirectory() as directory:
        name = save_dense(arguments, Path(directory))
        command = [sys.executable, __file__, "--child", directory]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    report = {"machine": running.describe_machine(), "model": name, "dtype": arguments.dtype}
    report |= json.loads(output.splitlines()[-1])
    print(json.dumps(report, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


def save_dense(arguments: argparse.Namespace, directory: Path) -> str:
    """Writes the model in full precision, in shards."""
    dtype = getattr(torch, arguments.dtype)
    if arguments.random_billions:
        config = transformers.LlamaConfig(
            vocab_size=32000,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=max(1, round((arguments.random_billions * 1e9 - 131e6) / 60.8e6)),
            num_attention_heads=32,
            num_key_value_heads=8,
            dtype=dtype,
        )
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(config).to(dtype)
        model.to_empty(device="cpu")
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.02, generator=generator)
        name = f"random Llama, {sum(p.numel() for p in model.parameters()) / 1e9:.2f}B weights"
    else:
        model, _ = running.load(arguments.model, dtype=dtype)
        name = arguments.model
    model.save_pretrained(directory, max_shard_size="500MB")
    return name


def measure(directory: Path) -> dict[str, Any]:
    """Quantizes what is in ``directory`` and says what that took."""
    samples: list[tuple[int, int]] = []
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.001):
            samples.append(resident())

    warm_up()
    before = resident()
    thread = threading.Thread(target=sample)
    thread.start()
    started = time.perf_counter()
    model = load_quantized(directory)
    seconds = time.perf_counter() - started
    done.set()
    thread.join()
    weights = {id(w): w for _, _, w in quantized_modules(model)}.values()
    largest = max(weight.numel() for weight in weights) * model.dtype.itemsize
    peak = max(anonymous for anonymous, _ in samples) - before[0]
    quantized = summary(model).stored_bytes
    return {
        "weights": sum(weight.numel() for weight in weights),
        "seconds": seconds,
        "million_weights_per_second": sum(w.numel() for w in weights) / seconds / 1e6,
        "full_precision_mb": summary(model).dense_bytes / 1e6,
        "quantized_mb": quantized / 1e6,
        "largest_layer_mb": largest / 1e6,
        "peak_mb": peak / 1e6,
        "peak_mapped_mb": (max(mapped for _, mapped in samples) - before[1]) / 1e6,
        "peak_beyond_largest_layer_over_quantized": (peak - largest) / quantized,
    }


def warm_up() -> None:
    """Whatever is imported and set up for the first model only."""
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        transformers.LlamaForCausalLM(config).save_pretrained(directory)
        load_quantized(directory)
    gc.collect()


def load_quantized(directory: str | Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=GrinqhHfConfig(bits=3)
    )


def resident() -> tuple[int, int]:
    """Bytes allocated, and bytes of mapped files."""
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key in ("RssAnon", "RssFile"):
            found[key] = int(value.split()[0]) * 1024
    return found["RssAnon"], found["RssFile"]


if __name__ == "__main__":
    main()
