"""How fast are the kernels? Against cuBLAS, TorchAO and GemLite, on layers of 8B models."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import nn
from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

from gpu_suite import timing
from gpu_suite.checks import laplace
from grinqh_ao import GrinqhTensor, fuse_projections
from grinqh_ao.grading import level_shares

BITS = (2.0, 2.5, 3.0, 3.5, 4.0, 8.0)
# Llama-3-8B and Qwen3-8B, gate and up also as one weight: [out, in].
SHAPES = [
    (1024, 4096), (4096, 4096), (6144, 4096), (12288, 4096), (14336, 4096), (24576, 4096),
    (28672, 4096), (4096, 12288), (4096, 14336),
]  # fmt: skip
COMPARED = [(4096, 4096), (28672, 4096)]  # with all others' kernels too
# Decoder layers of Qwen3-8B, 36 of them: how often each shape occurs.
QWEN3_8B = {(4096, 4096): 2, (1024, 4096): 2, (12288, 4096): 2, (4096, 12288): 1}
QWEN3_8B_FUSED = {(6144, 4096): 1, (4096, 4096): 1, (24576, 4096): 1, (4096, 12288): 1}
QWEN3_LAYERS = 36
ROWS_SHAPE = (14336, 4096)
COPY_BYTES = 2 << 30
_measured: dict[str, Any] = {}


def bandwidth() -> dict[str, float]:
    """What a plain copy moves, read and written: the ceiling that others are held against."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=timing.DEVICE)
    target = torch.empty_like(source)
    microseconds = timing.compare({"copy": [lambda: target.copy_(source)]})["copy"]
    _measured["bytes_per_us"] = 2 * COPY_BYTES / microseconds
    print(f"copy: {_measured['bytes_per_us'] / 1e3:.0f} GB/s")
    return {"copy_gb_per_s": _measured["bytes_per_us"] / 1e3}


def needed_bytes(n: int, k: int, bits: float) -> float:
    """Codes and scales of the channels that are read."""
    active = 1 - level_shares(bits)[0]
    return n * k * (bits + active * 8 / 64) / 8


def static(weight: GrinqhTensor, x: torch.Tensor) -> GrinqhTensor:
    """A copy with static thresholds, as calibrate leaves them: they need no mean."""
    copy = weight.clone()
    mean = (x.abs().float() * weight.sensitivity).mean()
    copy.thresholds[0] = (weight.thresholds[1] * mean).clamp(max=torch.finfo(torch.float32).max)
    copy.thresholds[1] = 0
    return copy


def linears(weights: list[torch.Tensor], x: torch.Tensor) -> list[Callable[[], object]]:
    return [lambda w=w: F.linear(x, w) for w in weights]


def copies(weight: GrinqhTensor, number: int) -> list[torch.Tensor]:
    return [weight, *(weight.clone() for _ in range(number - 1))]


def peers(n: int, k: int, x: torch.Tensor) -> dict[str, list[Callable[[], object]]]:
    """Other libraries' layers of the same shape, with as many copies as defeat the caches."""
    found: dict[str, list[Callable[[], object]]] = {}
    dense = torch.randn(n, k, device=timing.DEVICE, dtype=torch.bfloat16)
    number = timing.copies_for(dense.nbytes)
    weights = [dense, *(dense.clone() for _ in range(number - 1))]
    found["bf16"] = linears(weights, x)
    halves = [w.half() for w in weights]
    found["fp16"] = linears(halves, x.half())

    def torchao(config: Any, bits: int) -> list[Callable[[], object]]:
        layers = []
        for _ in range(timing.copies_for(n * k * bits / 8)):
            layer = nn.Linear(k, n, bias=False, device=timing.DEVICE, dtype=torch.bfloat16)
            quantize_(layer, config)
            layers.append(layer.requires_grad_(False))
        if bits == 8:  # in eager mode it would dequantize first
            compiled = torch.compile(F.linear)
            return [lambda w=layer.weight: compiled(x, w) for layer in layers]
        return linears([layer.weight for layer in layers], x)

    def gemlite(bits: int) -> list[Callable[[], object]]:
        from gemlite import helper

        make = {4: helper.A16W4_HQQ_INT, 2: helper.A16W2_HQQ_INT}[bits](device=timing.DEVICE)
        layers = []
        for _ in range(timing.copies_for(n * k * bits / 8)):
            codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, device=timing.DEVICE)
            scales = torch.rand(n * k // 128, 1, device=timing.DEVICE, dtype=torch.bfloat16)
            layers.append(
                make.from_weights(codes, scales, torch.full_like(scales, 2 ** (bits - 1)))
            )
        return [lambda layer=layer: layer(x) for layer in layers]

    int4 = Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d")
    for name, build in {
        "torchao int4": lambda: torchao(int4, 4),
        "torchao int8, compiled": lambda: torchao(Int8WeightOnlyConfig(), 8),
        "GemLite 4-bit": lambda: gemlite(4),
        "GemLite 2-bit": lambda: gemlite(2),
    }.items():
        try:
            calls = build()
            calls[0]()
            timing.wait()
            found[name] = calls
        except Exception as error:  # not installed, or not for this GPU
            _measured.setdefault("without", {})[name] = f"{type(error).__name__}: {error}"[:300]
    return found


@torch.no_grad()
def speed() -> dict[str, object]:
    torch.manual_seed(0)
    rows = []
    for n, k in SHAPES:
        x = laplace(1, k).bfloat16()
        candidates = peers(n, k, x) if (n, k) in COMPARED else {}
        if not candidates:
            dense = torch.randn(n, k, device=timing.DEVICE, dtype=torch.bfloat16)
            number = timing.copies_for(dense.nbytes)
            candidates["bf16"] = linears([dense, *(dense.clone() for _ in range(number - 1))], x)
        weight = GrinqhTensor.from_hp(torch.randn(n, k, device=timing.DEVICE, dtype=torch.bfloat16))
        for bits in BITS:
            weight.set_bits(bits)  # the candidates' clones keep their own thresholds
            number = timing.copies_for(needed_bytes(n, k, bits))
            candidates[f"grinqh {bits:g}"] = linears(copies(static(weight, x), number), x)
            if bits == 3:
                candidates["grinqh 3, relative"] = linears(copies(weight.clone(), number), x)
        times = timing.compare(candidates)
        ideal_int4 = n * k * 4.125 / 8 / _measured["bytes_per_us"]
        row = {"shape": [n, k], "us": times, "ideal_int4_us": ideal_int4}
        row["share_of_bandwidth"] = {
            f"{bits:g}": needed_bytes(n, k, bits)
            / _measured["bytes_per_us"]
            / times[f"grinqh {bits:g}"]
            for bits in BITS
        }
        rows.append(row)
        del candidates, weight
        gc.collect()
        torch.cuda.empty_cache()
    by_shape = {tuple(row["shape"]): row for row in rows}
    print(tabulate([{"shape": r["shape"], **r["us"]} for r in rows], "keys", floatfmt=".1f"))
    print(tabulate([{"shape": r["shape"], **r["share_of_bandwidth"]} for r in rows], "keys",
                   floatfmt=".2f"))  # fmt: skip
    return {
        "rows": rows,
        "not_compared": _measured.get("without", {}),
        "qwen3_8b_token_us": paper_axis(by_shape),
    }


def paper_axis(by_shape: dict[tuple[int, ...], dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Per-token time of all matrix-vector products in the decoder layers of Qwen3-8B."""

    names = ["bf16", *(f"grinqh {bits:g}" for bits in BITS)]
    result: dict[str, dict[str, float]] = {}
    for label, layout in (("separate", QWEN3_8B), ("fused", QWEN3_8B_FUSED)):
        rows = [(QWEN3_LAYERS * count, by_shape[shape]) for shape, count in layout.items()]
        result[label] = {
            name: sum(count * row["us"][name] for count, row in rows) for name in names
        }
        result[label]["ideal int4"] = sum(count * row["ideal_int4_us"] for count, row in rows)
    print("Qwen3-8B, us per token:", result)
    return result


@torch.no_grad()
def fused_projections(hidden: int = 4096, scale: int = 1) -> list[dict[str, object]]:
    """q/k/v and gate/up of Llama-3-8B at 3 bits, as they are and in one launch."""
    torch.manual_seed(0)
    results = []
    for names, sizes in (
        (("q_proj", "k_proj", "v_proj"), (4096, 1024, 1024)),
        (("gate_proj", "up_proj"), (14336, 14336)),
    ):
        sizes = tuple(size // scale for size in sizes)
        x = laplace(1, hidden).bfloat16()
        blocks = []
        for _ in range(timing.copies_for(needed_bytes(sum(sizes), hidden, 3))):
            block = nn.Module()
            for name, size in zip(names, sizes, strict=True):
                dense = torch.randn(size, hidden, device=timing.DEVICE, dtype=torch.bfloat16)
                layer = nn.Linear(hidden, size, bias=False, device="meta")
                layer.weight = nn.Parameter(GrinqhTensor.from_hp(dense), requires_grad=False)
                setattr(block, name, layer)
            blocks.append(block)

        def calls(blocks: list[nn.Module], names: tuple[str, ...], x: torch.Tensor) -> list[Any]:
            return [lambda b=b: [getattr(b, name)(x) for name in names] for b in blocks]

        separate = timing.compare({"separate": calls(blocks, names, x)})["separate"]
        for block in blocks:
            fuse_projections(block)
        fused = timing.compare({"fused": calls(blocks, names, x)})["fused"]
        results.append({"sizes": sizes, "separate_us": separate, "fused_us": fused})
    print(tabulate(results, "keys", floatfmt=".1f"))
    return results


@torch.no_grad()
def compile_one(job: tuple[int, int, int]) -> None:
    n, k, number = job
    weight = GrinqhTensor.from_hp(torch.randn(n, k, device=timing.DEVICE).bfloat16())
    F.linear(laplace(number, k).bfloat16(), weight)


def jobs() -> list[tuple[int, int, int]]:
    """What :func:`speed` and :func:`rows` need compiled."""
    return [(*shape, 1) for shape in SHAPES] + [(*ROWS_SHAPE, number) for number in (2, 4, 8)]


@torch.no_grad()
def rows() -> list[dict[str, object]]:
    """Where decoding a few rows together stops to pay: against bf16 and the dense path."""
    torch.manual_seed(0)
    n, k = ROWS_SHAPE
    weight = GrinqhTensor.from_hp(torch.randn(n, k, device=timing.DEVICE).bfloat16())
    dense = torch.randn(n, k, device=timing.DEVICE).bfloat16()
    nested = copies(weight, timing.copies_for(needed_bytes(n, k, 3)))
    plain = [dense, *(dense.clone() for _ in range(timing.copies_for(dense.nbytes) - 1))]
    results = []
    for number in (1, 2, 3, 4, 5, 6, 7, 8):
        x = laplace(number, k).bfloat16()
        candidates = {
            "decode": linears(nested, x),
            "dense path": [lambda w=w, x=x: F.linear(x, w.dequantize(x.dtype)) for w in nested[:8]],
            "bf16": linears(plain, x),
        }
        results.append({"rows": number, **timing.compare(candidates)})
    print(tabulate(results, "keys", floatfmt=".1f"))
    return results
