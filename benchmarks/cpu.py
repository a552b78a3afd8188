"""On a CPU: single layers against other weight formats, prompts, then a whole model.

    python benchmarks/cpu.py --json benchmarks/results/cpu.json

All are timed in turn, many rounds in one run, and medians are taken: compare ratios. Weights rotate
past the last-level cache. llama.cpp takes part with the models if llama-cpp-python is installed.
``python benchmarks/plot_cpu.py`` draws the result.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import llama_cpp_models
import selected_lines
from grinqh_ao import GrinqhConfig, GrinqhTensor, set_bits
from grinqh_ao.demo import PROMPT
from grinqh_ao.running import SMOLLM2, Clock, describe_machine, load, prompt_inputs

BITS = (2.0, 2.5, 3.0, 3.5, 4.0, 8.0)
# [out, in]: SmolLM2-135M's, then those of 8B models.
SHAPES = [
    (192, 576), (576, 576), (1536, 576), (576, 1536), (49152, 576),
    (4096, 4096), (14336, 4096), (4096, 14336),
]  # fmt: skip
PROMPT_SHAPES = [(1536, 576), (4096, 4096)]
PROMPT_ROWS = (16, 64, 256)
ROTATED = 160 << 20  # bytes of weights of each kind, several times a last-level cache
COPIED = 256 << 20
CALLS = 4
MIN_TURNS = 6
INT4_GROUP = 32
Timed = dict[str, list[Callable[[], object]]]


def compare(timed: Timed, seconds: float) -> dict[str, float]:
    """Median microseconds of a call of each, all in turn in changing order, copies in rotation.

    A turn is a few calls, of which the first is not timed: it brings code and stacks back into the
    caches, as the layer before does in a model. Weights never are in them.
    """
    times: dict[str, list[float]] = {name: [] for name in timed}
    shuffled = random.Random(0)
    turn, end = 0, time.perf_counter() + seconds
    while time.perf_counter() < end or turn < MIN_TURNS:
        for name in shuffled.sample(list(timed), len(timed)):
            calls = timed[name]
            for i in range(CALLS + 1):
                if i == 1:
                    started = time.perf_counter()
                calls[(turn * (CALLS + 1) + i) % len(calls)]()
            times[name].append((time.perf_counter() - started) / CALLS)
        turn += 1
    return {name: 1e6 * statistics.median(values[1:]) for name, values in times.items()}


def copy_bandwidth() -> float:
    """GB/s that a plain copy moves, read and written."""
    source = torch.ones(COPIED, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * COPIED / compare({"copy": [lambda: target.copy_(source)]}, 2.0)["copy"] / 1e3


def copies(weight: Tensor, nbytes: float) -> list[Tensor]:
    """As many as it takes to read ROTATED bytes, of which a call reads ``nbytes``."""
    number = max(2, round(ROTATED / nbytes))
    return [weight, *(weight.clone() for _ in range(number - 1))]


def int8(n: int, k: int, x: Tensor) -> list[Callable[[], object]]:
    """TorchAO's int8 weight-only, compiled: in eager mode it dequantizes all weights first."""
    layer = nn.Linear(k, n, bias=False, dtype=x.dtype)
    quantize_(layer, Int8WeightOnlyConfig())
    torch._dynamo.reset()  # a graph per shape, and no limit to how many
    compiled = torch.compile(F.linear, dynamic=False)
    weights = copies(layer.weight.data, n * k)
    return [lambda w=w: compiled(x, w) for w in weights]


def int4(n: int, k: int, x: Tensor) -> list[Callable[[], object]]:
    """PyTorch's own int4 product for CPUs, which TorchAO's CPU layouts call; random codes."""
    codes = torch.randint(0, 16, (n, k), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.randn(k // INT4_GROUP, n, 2, dtype=x.dtype)
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    weights = copies(packed, n * k / 2)
    return [lambda w=w: multiply(x, w, INT4_GROUP, scales) for w in weights]


def layer(n: int, k: int, seconds: float) -> dict[str, Any]:
    """One shape: microseconds of everything, and the bytes that our levels ask for."""
    torch.manual_seed(0)
    dense = torch.randn(n, k)
    x = torch.distributions.Laplace(0.0, 1.0).sample((1, k))
    half = x.bfloat16()
    timed: Timed = {
        "float32": [lambda w=w: F.linear(x, w) for w in copies(dense, 4 * n * k)],
        "bfloat16": [lambda w=w: F.linear(half, w) for w in copies(dense.bfloat16(), 2 * n * k)],
    }
    for name, make in {"int8 (torchao, compiled)": int8, "int4 (PyTorch)": int4}.items():
        try:
            timed[name] = make(n, k, half)
            timed[name][0]()
        except (RuntimeError, ValueError, AssertionError) as error:
            timed.pop(name, None)
            print(f"{name} of {n}x{k} does not run: {str(error).splitlines()[0]}", file=sys.stderr)
    nested = GrinqhTensor.from_hp(dense)
    needed = {}
    for bits in BITS:
        nested.set_bits(bits)
        levels = nested.grade(half)
        needed[f"{bits:g} bits"] = n * (float(levels.sum()) / 8 + float((levels > 0).sum()) / 64)
    weights = copies(nested, min(needed.values()))
    for i, bits in enumerate(BITS):
        # Thresholds of their own on the same data; in another order, or caches might hold some.
        number = max(2, round(ROTATED / needed[f"{bits:g} bits"]))
        order = [weights[(i + j) % len(weights)] for j in range(number)]
        read = [w.with_data(lambda data: data) for w in order]
        for weight in read:
            weight.vectors = weight.vectors.clone()
            weight.set_bits(bits)
        timed[f"{bits:g} bits"] = [lambda w=w: F.linear(half, w) for w in read]
        timed[f"{bits:g} bits, float32"] = [lambda w=w: F.linear(x, w) for w in read]
        # The same lines without any arithmetic, for comparison.
        if bits == 3.0 and read[0].slices.shape[-1] * 4 >= 64:
            timed["3 bits, only read"] = [selected_lines.reader(w, half) for w in read]
    return {"shape": [n, k], "us": compare(timed, seconds), "needed_bytes": needed}


def report_layers(threads: list[int], seconds: float) -> list[dict[str, Any]]:
    rows = []
    for number in threads:
        torch.set_num_threads(number)
        copied = copy_bandwidth()
        cells = []
        for n, k in SHAPES:
            row = {"threads": number, "copy_gb_per_s": copied, **layer(n, k, seconds)}
            rows.append(row)
            us = row["us"]
            at = {
                bits: row["needed_bytes"][f"{bits:g} bits"] / us[f"{bits:g} bits"] for bits in BITS
            }
            cells.append(
                [f"{n}x{k}", us["bfloat16"]]
                + [us["bfloat16"] / us[f"{bits:g} bits"] for bits in BITS]
                + [us.get(name, float("nan")) / us["3 bits"] for name in list(us)[2:4]]
                + [us["3 bits"] / us["2 bits"], at[3.0] / 1e3]
                + [us["3 bits"] / us.get("3 bits, only read", float("nan"))]
            )
        headers = ["layer", "bf16 us", *(f"{bits:g}" for bits in BITS)]
        headers += ["3 vs int8", "3 vs int4", "2 vs 3", "GB/s at 3", "only read vs 3"]
        print(
            f"\n{number} threads, copy {copied:.1f} GB/s; times as fast as bfloat16 at each bits:"
        )
        print(tabulate(cells, headers, "github", floatfmt=".2f"), flush=True)
    return rows


def report_prompts(seconds: float) -> list[dict[str, Any]]:
    """Microseconds of several rows at once, dense and dequantized, by the dtype of activations."""
    rows = []
    for n, k in PROMPT_SHAPES:
        torch.manual_seed(0)
        dense = torch.randn(n, k)
        nested = copies(GrinqhTensor.from_hp(dense), n * k)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            weights = copies(dense.to(dtype), n * k * dtype.itemsize)
            for number in PROMPT_ROWS:
                x = torch.randn(number, k, dtype=dtype)
                calls = {"dense": weights, "GRINQH": nested}
                timed: Timed = {
                    name: [lambda w=w, x=x: F.linear(x, w) for w in found]
                    for name, found in calls.items()
                }
                us = compare(timed, seconds)
                rows.append({"shape": [n, k], "dtype": str(dtype), "rows": number, "us": us})
    cells = [
        [*row["shape"], row["dtype"], row["rows"], *us.values(), us["dense"] / us["GRINQH"]]
        for row in rows
        for us in [row["us"]]
    ]
    headers = ["out", "in", "dtype", "rows", "dense us", "GRINQH us", "times as fast"]
    print(tabulate(cells, headers, "github", floatfmt=".2f"), flush=True)
    return rows


def report_models(
    rounds: int, new_tokens: int, modes: list[str], dtypes: list[str]
) -> list[dict[str, Any]]:
    """Unchanged generate(): tokens per second after the first, and seconds of the first text.

    "Unchecked": it is not checked whether what was compiled still holds.
    """
    rows = []
    for name in dtypes:
        for mode in modes:
            dense, tokenizer = load(SMOLLM2, dtype=getattr(torch, name))
            nested = copy.deepcopy(dense)
            quantize_(nested, GrinqhConfig(bits=3))
            inputs = prompt_inputs(tokenizer, PROMPT)
            options: dict[str, Any] = {}
            if mode == "compiled":
                options["cache_implementation"] = "static"
                for model in (dense, nested):
                    model.forward = torch.compile(model.forward, fullgraph=True, dynamic=True)

            def speed(model: Any, options=options, inputs=inputs) -> float:
                clock = Clock()
                model.generate(
                    **inputs, **options, max_new_tokens=new_tokens, eos_token_id=None,
                    do_sample=False, streamer=clock, pad_token_id=0,
                )  # fmt: skip
                return clock.tokens_per_second()

            first_text = {}
            for which, model in {"dense": dense, "GRINQH": nested}.items():
                with fresh_cache():  # of compiled graphs, on disk
                    started = time.perf_counter()
                    speed(model)
                    first_text[which] = time.perf_counter() - started
            speeds: dict[str, list[float]] = {}
            ways = ("", ", unchecked") if mode == "compiled" else ("",)
            for turn in range(rounds + 1):  # the first warms up
                for bits, way in itertools.product((None, 2.0, 3.0, 4.0), ways):
                    if bits:
                        set_bits(nested, bits)
                    with torch.compiler.set_stance(skip_guard_eval_unsafe=bool(way)):
                        found = speed(nested if bits else dense)
                    if turn:
                        which = f"{bits:g} bits" if bits else "dense"
                        speeds.setdefault(which + way, []).append(found)
            medians = {which: statistics.median(values) for which, values in speeds.items()}
            rows.append(
                {
                    "dtype": name,
                    "mode": mode,
                    "tokens_per_second": medians,
                    "first_text_s": first_text,
                }
            )
            print(name, mode, {w: round(s, 2) for w, s in medians.items()}, flush=True)
            print("seconds of the first text:", first_text, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--seconds", type=float, default=6.0, help="for each layer or prompt")
    parser.add_argument("--rounds", type=int, default=5, help="for each model")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--modes", nargs="*", default=["eager", "compiled"])
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float32"], help="of models")
    parser.add_argument("--only", nargs="*", choices=["layers", "prompts", "models", "llama.cpp"])
    arguments = parser.parse_args()
    threads = torch.get_num_threads()
    report: dict[str, Any] = {
        "machine": describe_machine(),
        "command": "python " + " ".join(sys.argv),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    print(report["machine"])
    sections: dict[str, Callable[[], object]] = {
        "layers": lambda: report_layers(sorted(set(arguments.threads)), arguments.seconds),
        "prompts": lambda: report_prompts(arguments.seconds),
        "models": lambda: report_models(
            arguments.rounds, arguments.new_tokens, arguments.modes, arguments.dtypes
        ),
        "llama.cpp": lambda: llama_cpp_models.speeds(
            threads, arguments.rounds, arguments.new_tokens
        ),
    }
    for name, section in sections.items():
        if arguments.only and name not in arguments.only:
            continue
        torch.set_num_threads(threads)
        report[name] = section()
        if arguments.json:
            arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
