"""A short search of ``benchmarks/worst_case.py``; docs/reliability.md has a long one."""

import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import worst_case


# In units of rounding to the dtype. Half of one is the rounding of the output itself.
@pytest.mark.parametrize(
    ("dtype", "stated"), [(torch.float32, 32), (torch.bfloat16, 0.6), (torch.float16, 0.6)], ids=str
)
def test_errors_stay_within_what_is_stated(dtype, stated):
    layer = worst_case.Layer(128, 48, dtype, seed=1)
    found = worst_case.search(layer, random.Random(0), most=2000)
    assert 0 < found["decoded"] < stated


@pytest.mark.parametrize(
    ("shape", "dtype", "stated"),
    [
        ((128, 48), torch.float32, 32),
        ((256, 300), torch.bfloat16, 1.1),  # Triton's interpreter does not round, it truncates
        ((256, 300), torch.float16, 1),
    ],
    ids=str,
)
def test_kernels_for_gpus_interpreted(shape, dtype, stated):
    pytest.importorskip("triton")
    layer = worst_case.Layer(*shape, dtype, 1, worst_case.interpreted)
    found = worst_case.search(layer, random.Random(0), candidates=8, most=16)
    assert 0 < found["decoded"] < stated


def test_a_wrong_result_is_seen():
    layer = worst_case.Layer(128, 48, torch.float32, seed=1)
    layer.exact[3, 5] += 0.01
    assert worst_case.search(layer, random.Random(0), most=500)["decoded"] > 100
