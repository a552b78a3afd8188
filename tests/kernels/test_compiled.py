"""What the kernels compile to, for every GPU generation, without a GPU."""

import importlib.metadata
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from grinqh_ao.grading import level_shares
from grinqh_ao.ops.triton.configurations import FEW_PROGRAMS_PER_SM, WARPS

pytest.importorskip("triton")

VERSION = ".".join(importlib.metadata.version("triton").split(".")[:2])
KNOWN = pytest.mark.skipif(
    VERSION not in ("3.6", "3.7", "3.8", "3.9"),
    reason=f"nobody has looked at what Triton {VERSION} makes of the kernels",
)


@pytest.fixture(scope="module")
def reports() -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("aot.py")
    run = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment, check=False
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.fixture(scope="module")
def decoders(reports) -> list[dict]:
    return [report for report in reports if report["form"].startswith("decode")]


def per_weight_and_slice(report: dict, bits: float = 3.0) -> float:
    """Instructions, averaged over pairs of slices and single ones as they occur."""
    shares = level_shares(bits)
    pairs = shares[4] + shares[6] + 2 * shares[8]
    singles = shares[2] + shares[6]
    total = 2 * pairs * report["pairs"]["instructions"] / report["work"]["pairs"]
    total += singles * report["singles"]["instructions"] / report["work"]["singles"]
    return total / (2 * pairs + singles)


def test_every_generation_compiles(reports):
    since_ampere = {80, 86, 89, 90, 100, 120}
    for form, expected in {
        "decode, mma, rows 1, tile 512": since_ampere,
        "decode, fma, rows 1, tile 512": since_ampere | {75},
        "dequantize, 4": since_ampere | {75},
    }.items():
        found = {r["capability"] for r in reports if r["form"].startswith(form)}
        assert found == expected, form


def is_mma_of_many(report: dict) -> bool:
    """Of one row, in large layers."""
    return "mma, rows 1, tile 512" in report["form"] and "few" not in report["form"]


# By version of Triton, where registers are limited: in all, and in a loop (see docs/kernel.md).
SPILLS = {"3.6": (8, 1), "3.7": (8, 1), "3.8": (8, 3), "3.9": (16, 6)}


@KNOWN
def test_hardly_anything_spills(reports):
    """Most where four programs must fit (configurations.py), some by ptxas's own choice."""
    for report in reports:
        limited = report["capability"] == 90 and "mma, rows 1, tile 512" in report["form"]
        most, most_in_a_loop = SPILLS[VERSION] if limited else (4, 0)
        assert report["all"]["spills"] <= most, report
        assert all(loop["spills"] <= most_in_a_loop for loop in report["loops"]), report
        assert report["local"] == 0, report


# Of a multiprocessor, in KiB.
SHARED_MEMORY = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}


@KNOWN
def test_programs_of_one_row_fit_on_a_multiprocessor(decoders):
    """As many as configurations.py counts on."""
    for report in decoders:
        if "mma, rows 1, tile 512" in report["form"]:
            four = report["capability"] in (80, 90) and is_mma_of_many(report)
            programs = 4 if four else math.ceil(FEW_PROGRAMS_PER_SM)
            registers = 8 * -(-report["registers"] // 8) * 32 * WARPS
            assert programs * registers <= 1 << 16, report
            assert programs * (report["shared"] + 1024) <= SHARED_MEMORY[report["capability"]] << 10
        assert report["shared"] <= 48 << 10, report  # what there is without asking


@KNOWN
def test_instructions_are_no_more_than_those_of_the_design(decoders):
    limits = {
        "mma, rows 1, tile 512": 1.04,
        "mma, rows 1, tile 256": 1.2,
        "mma, rows 4": 1.3,
        "mma, rows 8": 1.6,
        "fma, rows 1": 2.47,
    }
    for report in decoders:
        for form, limit in limits.items():
            if form in report["form"]:
                assert per_weight_and_slice(report) <= limit, report


@KNOWN
def test_words_are_loaded_in_vectors_and_stay_in_registers(decoders):
    for report in decoders:
        for loop in (report["pairs"], report["singles"]):
            one_row = "rows 1" in report["form"]
            if "tile 512" in report["form"] and (one_row or "mma" in report["form"]):
                assert loop["loads_128_bit"] >= 2, report
            assert loop["exchanges"] == 0, report
            most = 0 if "fma" in report["form"] else 16 if one_row else 28
            assert loop["shared_loads"] <= most, report


def test_only_prefetches_do_not_wait_for_the_kernel_in_front(decoders):
    """On tensor cores, but for experts: what those are, other kernels find out."""
    for report in decoders:
        early = report["before_waiting"]
        waits = report["capability"] >= 90 and "mma" in report["form"]
        assert (early["prefetches"] > 0) == (waits and "experts" not in report["form"]), report
        assert early["loads"] == 0, report
        assert (early["instructions"] > 0) == (report["capability"] >= 90), report


def test_lanes_hold_the_fragments_that_tensor_cores_expect(decoders):
    """Thread i has row i; what else there is it holds in registers."""
    for report in decoders:
        assert bool(report["mma_layouts"]) == ("mma" in report["form"])
        for layout in report["mma_layouts"]:
            of_threads = r"sizePerThread = \[1, [124]\], threadsPerWarp = \[32, 1\]"
            assert re.search(of_threads + r", warpsPerCTA = \[4, 1\]", layout), layout


def test_lanes_of_a_warp_vote_for_neighbouring_channels(decoders):
    for report in decoders:
        assert bool(report["vote_layouts"]) == ("mma" in report["form"])
        for layout in report["vote_layouts"]:
            expected = r"sizePerThread = \[1\], threadsPerWarp = \[32\], warpsPerCTA = \[4\]"
            assert re.search(expected, layout), layout


def test_subnormal_codes_are_not_flushed(decoders):
    for report in decoders:
        assert report["all"]["flushing"] == 0, report


# Registers and instructions per weight, by version of Triton, as in docs/kernel.md.
# Compact storage takes some more.
DEQUANTIZE_LIMITS = {"3.6": (200, 32), "3.7": (128, 21), "3.8": (152, 20), "3.9": (152, 20)}
DEQUANTIZE_COMPACT_LIMITS = {
    "3.6": (224, 34), "3.7": (160, 21.5), "3.8": (152, 21), "3.9": (152, 21),
}  # fmt: skip


@KNOWN
def test_dequantize(reports):
    for report in reports:
        if report["form"].startswith("dequantize"):
            compact = report["form"].endswith("compact")
            limits = DEQUANTIZE_COMPACT_LIMITS if compact else DEQUANTIZE_LIMITS
            registers, instructions = limits[VERSION]
            if report["capability"] == 75:
                instructions *= 1.25  # its bfloat16 is made of integers
            assert report["registers"] <= registers, report
            assert report["all"]["instructions"] / report["work"]["all"] < instructions, report
            assert report["all"]["loads_128_bit"] > 0, report
            assert report["all"]["stores_128_bit"] > 0, report
