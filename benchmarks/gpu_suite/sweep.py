"""Is a layer launched in the right way? The question behind ``configurations.py``."""

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
from grinqh_ao.ops.triton.configurations import Configuration

SHAPES = [(1024, 4096), (4096, 4096), (6144, 4096), (14336, 4096), (28672, 4096), (4096, 14336)]
# What is chosen, and that with one thing changed.
VARIANTS: dict[str, dict[str, Any]] = {
    "chosen": {},
    **{f"chunk {chunk}": {"chunk": chunk} for chunk in configurations.CHUNKS},
    **{f"unseen {channels}": {"unseen": channels} for channels in (0, 32, 64, 128)},
    "few": {"few": True},
    "many": {"few": False},
    "not early": {"early": False},
}


def configured(weight: GrinqhTensor, variant: str) -> Configuration:
    gpu = decode.gpu_of(weight.device.index or 0)
    tiles, _, words = weight.slices.shape
    change = VARIANTS[variant]
    chunk = change.get("chunk")
    chosen = configurations.configure(gpu, "mma", 1, words, tiles, weight.shape[1], chunk)
    return chosen._replace(**change)


def launches(
    weights: list[GrinqhTensor], x: torch.Tensor, variant: str
) -> list[Callable[[], list[torch.Tensor]]]:
    chosen = configured(weights[0], variant)

    def launch(w: GrinqhTensor) -> list[torch.Tensor]:
        part = decode.Weight(w.slices, w.scales, w.vectors, None, w.low)
        return decode.launch(x, [part], w.levels, chosen, arrivals(len(w.slices), x.device))

    return [lambda w=w: launch(w) for w in weights]


@torch.no_grad()
def compile_one(job: tuple[int, int, str]) -> None:
    n, k, variant = job
    weight = GrinqhTensor.from_hp(torch.randn(n, k, device=timing.DEVICE).bfloat16())
    launches([weight], laplace(1, k).bfloat16(), variant)[0]()


def jobs() -> list[tuple[int, int, str]]:
    """Everything that :func:`sweep` needs compiled."""
    return [(n, k, variant) for n, k in SHAPES for variant in VARIANTS]


@torch.no_grad()
def sweep() -> list[dict[str, Any]]:
    """Microseconds at 3 bits with thresholds relative to the mean of |x| and with absolute ones,
    at 2 bits with absolute ones, and with all channels skipped: what a launch costs that reads
    nothing."""
    torch.manual_seed(0)
    rows = []
    for n, k in SHAPES:
        x = laplace(1, k).bfloat16()
        relative = GrinqhTensor.from_hp(torch.randn(n, k, device=timing.DEVICE).bfloat16(), 3)
        absolute, nothing = kernels.calibrated(relative, x), relative.clone()
        nothing.thresholds[0] = torch.finfo(torch.float32).max
        nothing.thresholds[1] = 0
        two = relative.clone()
        two.set_bits(2)
        two = kernels.calibrated(two, x)
        number = timing.copies_for(kernels.needed_bytes(n, k, 3))
        us: dict[str, dict[str, float]] = {variant: {} for variant in VARIANTS}
        weights = {"3 bits": absolute, "relative": relative, "2 bits": two, "nothing": nothing}
        for name, weight in weights.items():
            copies = [weight, *(weight.clone() for _ in range(number - 1))]
            times = timing.compare({v: launches(copies, x, v) for v in VARIANTS})
            for variant, time in times.items():
                us[variant][name] = time
        rows.append({"shape": [n, k], "us": us})
        table = [{f"{n}x{k}": variant, **times} for variant, times in us.items()]
        print(tabulate(table, "keys", floatfmt=".2f"), flush=True)
    return rows
