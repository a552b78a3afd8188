"""How long should a program's chunk of channels be? The question behind ``configurations.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tabulate import tabulate

from gpu_suite import kernels, timing
from gpu_suite.checks import laplace
from grinqh_ao import GrinqhTensor
from grinqh_ao.ops.triton import configurations, decode
from grinqh_ao.ops.triton.arrivals import arrivals

SHAPES = [(1024, 4096), (4096, 4096), (6144, 4096), (14336, 4096), (28672, 4096), (4096, 14336)]
CHUNKS = configurations.CHUNKS


def launches(
    weights: list[GrinqhTensor], x: torch.Tensor, chunk: int
) -> list[Callable[[], list[torch.Tensor]]]:
    def launch(w: GrinqhTensor) -> list[torch.Tensor]:
        part = decode.Weight(w.slices, w.scales, w.vectors, None, w.low)
        counters = arrivals(len(w.slices), x.device)
        gpu = decode.gpu_of(x.device.index)
        return decode.launch(x, [part], w.levels, chunk, counters, gpu)

    return [lambda w=w: launch(w) for w in weights]


@torch.no_grad()
def compile_one(job: tuple[int, int, int]) -> None:
    n, k, chunk = job
    weight = GrinqhTensor.from_hp(torch.randn(n, k, device=timing.DEVICE).bfloat16())
    launches([weight], laplace(1, k).bfloat16(), chunk)[0]()


def jobs() -> list[tuple[int, int, int]]:
    """Everything that :func:`sweep` needs compiled."""
    return [(n, k, chunk) for n, k in SHAPES for chunk in CHUNKS]


@torch.no_grad()
def sweep() -> list[dict[str, Any]]:
    """Microseconds at 3 bits, with thresholds relative to the mean of |x| and with absolute ones,
    and with all channels skipped: what a launch costs that reads nothing."""
    torch.manual_seed(0)
    rows = []
    for n, k in SHAPES:
        x = laplace(1, k).bfloat16()
        relative = GrinqhTensor.from_hp(torch.randn(n, k, device=timing.DEVICE).bfloat16(), 3)
        absolute, nothing = kernels.calibrated(relative, x), relative.clone()
        nothing.thresholds[0] = torch.finfo(torch.float32).max
        nothing.thresholds[1] = 0
        number = timing.copies_for(kernels.needed_bytes(n, k, 3))
        candidates = {
            f"{name}, {chunk}": launches([w, *(w.clone() for _ in range(number - 1))], x, chunk)
            for name, w in (("3 bits", relative), ("absolute", absolute), ("nothing", nothing))
            for chunk in CHUNKS
        }
        rows.append({"shape": [n, k], "us": timing.compare(candidates)})
    print(tabulate([{"shape": r["shape"], **r["us"]} for r in rows], "keys", floatfmt=".1f"))
    return rows
