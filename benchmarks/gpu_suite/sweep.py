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
# What is chosen; with programs of other lengths, or told otherwise whether they are few, and all
# that comes with it; and with one thing changed.
PROGRAMS: dict[str, dict[str, Any]] = {
    **{f"chunk {chunk}": {"chunk": chunk} for chunk in configurations.CHUNKS},
    "few": {"few": True},
    "many": {"few": False},
}
CHANGES: dict[str, dict[str, Any]] = {
    **{f"speculative {channels}": {"speculative": channels} for channels in (0, 32, 128)},
    "registers 128": {"registers": 128},
    "registers 168": {"registers": 168},  # as many as three programs on a multiprocessor leave
    "registers free": {"registers": None},
    "not early": {"early": False},
}
VARIANTS = ["chosen", *PROGRAMS, *CHANGES]


def configured(weight: GrinqhTensor, variant: str) -> Configuration:
    gpu = decode.gpu_of(weight.device.index or 0)
    tiles, _, words = weight.slices.shape
    k = weight.shape[1]
    form = configurations.form_of(gpu.capability, weight.dtype, words)
    chosen = configurations.configure(gpu, form, 1, words, tiles, k)
    if variant in PROGRAMS:
        chunk = PROGRAMS[variant].get("chunk", chosen.chunk)
        few = PROGRAMS[variant].get("few", configurations.few(gpu, tiles * -(-k // chunk)))
        return configurations.of_programs(gpu.capability, form, 1, words, chunk, few)
    return chosen._replace(**CHANGES.get(variant, {}))


def variants(weight: GrinqhTensor) -> dict[str, Configuration]:
    """Those that differ."""
    found: dict[str, Configuration] = {}
    for name in VARIANTS:
        configuration = configured(weight, name)
        if configuration not in found.values():
            found[name] = configuration
    return found


def launches(
    weights: list[GrinqhTensor], x: torch.Tensor, configuration: Configuration
) -> list[Callable[[], list[torch.Tensor]]]:
    def launch(w: GrinqhTensor) -> list[torch.Tensor]:
        part = decode.Weight(w.slices, w.scales, w.vectors, None, w.low)
        return decode.launch(x, [part], w.levels, configuration, arrivals(len(w.slices), x.device))

    return [lambda w=w: launch(w) for w in weights]


@torch.no_grad()
def compile_one(job: tuple[int, int, str]) -> None:
    n, k, variant = job
    weight = GrinqhTensor.from_hp(torch.randn(n, k, device=timing.DEVICE).bfloat16())
    if found := variants(weight).get(variant):
        launches([weight], laplace(1, k).bfloat16(), found)[0]()


def jobs() -> list[tuple[int, int, str]]:
    """Everything that :func:`sweep` needs compiled."""
    return [(n, k, variant) for n, k in SHAPES for variant in VARIANTS]


@torch.no_grad()
def sweep() -> list[dict[str, Any]]:
    """Microseconds at 3 bits with thresholds relative to the mean of |x| and with static ones, at 2
    bits with static ones, and with all channels skipped: what a launch costs that reads nothing."""
    torch.manual_seed(0)
    rows = []
    for n, k in SHAPES:
        x = laplace(1, k).bfloat16()
        relative = GrinqhTensor.from_hp(torch.randn(n, k, device=timing.DEVICE).bfloat16(), 3)
        static, nothing = kernels.static(relative, x), relative.clone()
        nothing.thresholds[0] = torch.finfo(torch.float32).max
        nothing.thresholds[1] = 0
        two = relative.clone()
        two.set_bits(2)
        two = kernels.static(two, x)
        number = timing.copies_for(kernels.needed_bytes(n, k, 3))
        found = variants(static)
        us: dict[str, dict[str, float]] = {variant: {} for variant in found}
        weights = {"3 bits": static, "relative": relative, "2 bits": two, "nothing": nothing}
        for name, weight in weights.items():
            copies = [weight, *(weight.clone() for _ in range(number - 1))]
            times = timing.compare({v: launches(copies, x, found[v]) for v in found})
            for variant, time in times.items():
                us[variant][name] = time
        rows.append({"shape": [n, k], "us": us})
        table = [{f"{n}x{k}": variant, **times} for variant, times in us.items()]
        print(tabulate(table, "keys", floatfmt=".2f"), flush=True)
    return rows
