"""What the kernels compile to, for every GPU generation, without a GPU."""

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


def test_registers_leave_room_for_four_blocks_of_128_threads(reports):
    for report in reports:
        assert report["registers"] <= 128, report


def test_instructions_per_weight_are_those_of_the_documentation(reports):
    for report in reports:
        assert report["instructions"] / report["weights_per_thread"] < 21, report


def test_words_are_loaded_and_results_stored_in_vectors(reports):
    for report in reports:
        assert report["loads_128_bit"] > 0, report
        assert report["stores_128_bit"] > 0, report
