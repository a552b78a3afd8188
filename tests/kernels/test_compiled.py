"""What the kernels compile to, for every GPU generation, without a GPU."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def reports() -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("aot.py")
    run = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment, check=False
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_every_generation_compiles(reports):
    assert {report["capability"] for report in reports} == {80, 86, 89, 90, 100, 120}


def test_nothing_spills(reports):
    for report in reports:
        assert report["stack"] == report["local"] == report["spill_stores"] == 0, report


# Registers and instructions per weight, by version of Triton; docs/kernel.md has the newest's.
LIMITS = {"3.6": (200, 32), "3.7": (128, 21)}


def test_registers_and_instructions_are_those_of_the_documentation(reports):
    version = ".".join(importlib.metadata.version("triton").split(".")[:2])
    if version not in LIMITS:
        pytest.skip(f"nobody has looked at what Triton {version} makes of the kernels")
    registers, instructions = LIMITS[version]
    for report in reports:
        assert report["registers"] <= registers, report
        assert report["instructions"] / report["weights_per_thread"] < instructions, report


def test_words_are_loaded_and_results_stored_in_vectors(reports):
    for report in reports:
        assert report["loads_128_bit"] > 0, report
        assert report["stores_128_bit"] > 0, report
