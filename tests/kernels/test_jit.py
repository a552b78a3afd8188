"""Triton's own way from a launch to machine code, without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_what_is_launched_compiles(tmp_path):
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    script = Path(__file__).with_name("jit.py")
    run = subprocess.run(
        [sys.executable, str(script), "90"],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    launches = [json.loads(line) for line in run.stdout.splitlines()]
    mma, fma, dense = "decode_mma_kernel", "decode_fma_kernel", "dequantize_kernel"
    assert [(each["name"], each["grid"]) for each in launches] == [
        (fma, [1, 1, 1]), (dense, [1, 1, 1]),
        (fma, [1, 1, 1]), (dense, [1, 1, 1]),
        (mma, [1, 1, 1]), (dense, [1, 1, 1]),
        (mma, [2, 32, 1]), (dense, [2, 64, 1]),
        (mma, [4, 1, 1]), (mma, [1, 1, 2]),
    ]  # fmt: skip
    assert all(each["num_warps"] == 4 and each["enable_fp_fusion"] for each in launches)
    assert all(each["launch_pdl"] == (each["name"] != dense) for each in launches)
