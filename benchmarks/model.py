"""What the decode kernels would cost where no GPU is at hand: a model from compiled code.

    python benchmarks/model.py [--bits 3] [--json benchmarks/results/model.json]

Compiles the kernel for each layer and GPU as it would be launched, counts the instructions that
its programs execute (lists, loops with their padding, sums), and holds them against the time that
reading the needed bytes takes. Nothing here is measured: over 100% means that it cannot be done
in the time of the memory, below it that the memory may be what binds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "kernels"))

import aot
import torch
import triton
from tabulate import tabulate

from grinqh_ao.grading import level_shares
from grinqh_ao.ops.triton import configurations, decode
from grinqh_ao.slices import tile_width

SHAPES = [(1024, 4096), (4096, 4096), (4096, 14336), (14336, 4096), (28672, 4096)]
REGISTERS_PER_SM = 1 << 16


@dataclass(frozen=True)
class Gpu:
    """Data sheets; the latency of a loaded memory is an estimate."""

    capability: int
    multiprocessors: int
    gigahertz: float
    gigabytes_per_second: float
    latency_us: float
    shared_kib: int


GPUS = {
    "T4": Gpu(75, 40, 1.59, 320, 0.6, 64),
    "RTX 4090": Gpu(89, 128, 2.52, 1008, 0.6, 100),
    "A100": Gpu(80, 108, 1.41, 2039, 0.6, 164),
    "H100": Gpu(90, 132, 1.755, 3350, 0.7, 228),
    "H200": Gpu(90, 132, 1.755, 4800, 0.7, 228),
}


def model(form: str, name: str, n: int, k: int, bits: float) -> dict[str, object]:
    gpu = GPUS[name]
    tile = tile_width(n)
    tiles, words = -(-n // tile), tile // 16
    card = configurations.Gpu(gpu.capability, gpu.multiprocessors)
    chosen = configurations.configure(card, form, 1, words, tiles, k)
    chunk = chosen.chunk
    splits = -(-k // chunk)
    programs = tiles * splits
    block = triton.next_power_of_2(chunk)
    mean_block = min(triton.next_power_of_2(k), decode.MAX_MEAN_BLOCK)
    at_once = min(triton.next_power_of_2(splits), decode.SPLITS_AT_ONCE)
    job = aot.decode_job(form, 1, words, gpu.capability, block, chosen.few, mean_block, at_once)
    compiled = aot.report(job)
    pair_loop, single_loop = compiled["pairs"], compiled["singles"]
    sums = [loop for loop in compiled["loops"] if loop["loads_of_others"]]
    others = [
        loop
        for loop in compiled["loops"]
        if loop not in (pair_loop, single_loop) and not loop["loads_of_others"]
    ]

    # Entries of a program; a list is padded to whole steps, by half of one on average.
    shares = level_shares(bits)
    channels = k / splits
    per_step = {"pairs": 0.0, "singles": 0.0}
    for kind, slices in (("pairs", 2), ("singles", 1)):
        weights = compiled["work"][kind] * 32 * compiled["warps"]
        per_step[kind] = weights / (slices * tile)
    entries = {
        "pairs": channels * (shares[4] + shares[6] + 2 * shares[8]),
        "singles": channels * (shares[2] + shares[6]),
    }
    steps = {kind: (entries[kind] + (per_step[kind] - 1) / 2) / per_step[kind] for kind in entries}
    useful = sum(entries[kind] * slices for kind, slices in (("pairs", 2), ("singles", 1)))
    read = sum(
        steps[kind] * per_step[kind] * slices for kind, slices in (("pairs", 2), ("singles", 1))
    )

    def executed(count: str) -> float:
        """Per thread of one program."""
        loops = [*others, *sums, pair_loop, single_loop]
        straight = compiled["all"][count] - sum(loop[count] for loop in loops)
        of_slices = steps["pairs"] * pair_loop[count] + steps["singles"] * single_loop[count]
        # The mean of |x| is the first of the others; those of the fma form also scale entries.
        of_others = sum(loop[count] for loop in others[:1]) * -(-k // mean_block)
        of_others += sum(
            loop[count] * entries[kind] / (2048 / (tile // 16))
            for loop, kind in zip(others[1:], ("pairs", "singles"), strict=False)
        )
        # Only the last program of a tile adds up the sums of all, some at a time.
        last = sum(loop[count] for loop in sums) * -(-splits // at_once) / splits
        return straight + of_slices + of_others + last

    of_loops = sum(
        steps[kind] * loop["instructions"]
        for kind, loop in (("pairs", pair_loop), ("singles", single_loop))
    )
    active = 1 - shares[0]
    needed = n * k * (bits + active * 8 / 64) / 8
    dram_us = needed / gpu.gigabytes_per_second / 1e3
    cycles = gpu.multiprocessors * gpu.gigahertz * 1e3  # per microsecond
    threads = programs * 32 * compiled["warps"]
    fit = REGISTERS_PER_SM // (-(-compiled["registers"] // 8) * 8 * 32 * compiled["warps"])
    fit = min(fit, (gpu.shared_kib << 10) // (compiled["shared"] + 1024))
    resident = min(fit, programs / gpu.multiprocessors)
    step = 2048  # bytes of a warp
    in_flight = resident * compiled["warps"] * step * gpu.multiprocessors
    return {
        "gpu": name,
        "layer": f"{n}x{k}",
        "form": form,
        "DRAM us": dram_us,
        "chunk": chunk,
        "programs": programs,
        "resident/SM": resident,
        "in flight, share of need": in_flight / (gpu.gigabytes_per_second * 1e3 * gpu.latency_us),
        "padding": read / useful - 1,
        "issue, share of DRAM": executed("instructions") * threads / (128 * cycles) / dram_us,
        "ALU, share of DRAM": executed("alu") * threads / (64 * cycles) / dram_us,
        "loops alone, issue": of_loops * threads / (128 * cycles) / dram_us,
    }  # fmt: skip


def numbered(job: tuple[str, str, int, int, float]) -> dict[str, object]:
    return model(*job)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bits", type=float, default=3.0)
    parser.add_argument("--forms", nargs="+", default=["mma", "fma"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    jobs = [
        (form, gpu, n, k, arguments.bits)
        for form in arguments.forms
        for n, k in SHAPES
        for gpu in GPUS
        if form == "fma" or GPUS[gpu].capability >= configurations.MIN_CAPABILITY_FOR_MMA
    ]
    with ProcessPoolExecutor() as pool:
        rows = list(pool.map(numbered, jobs))
    print(tabulate(rows, "keys", "github", floatfmt=".2f"))
    if arguments.json:
        report = {
            "bits": arguments.bits,
            "triton": triton.__version__,
            "torch": torch.__version__,
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
