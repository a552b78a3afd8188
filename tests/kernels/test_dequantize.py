"""The CUDA kernel of ``grinqh::dequantize``, interpreted on the CPU, against the oracle."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from grinqh_ao import GrinqhTensor
from grinqh_ao.ops import oracle
from grinqh_ao.ops.triton.dequantize import dequantize
from grinqh_ao.slices import drop_low


@st.composite
def weights(draw) -> GrinqhTensor:
    n, k = draw(st.integers(1, 200)), draw(st.integers(1, 150))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(n, k)
    weight[:, draw(st.integers(0, k - 1))] = 0
    levels = draw(st.sampled_from([(0, 2, 4, 6, 8), (0, 2, 4), (2,)]))
    nested = GrinqhTensor.from_hp(weight, bits=levels[-1], levels=levels)
    if nested.can_be_compact and draw(st.booleans()):
        nested.slices, nested.low = drop_low(nested.slices, torch.rand(k) < 0.3)
    return nested


def arguments_of(weight: GrinqhTensor) -> tuple:
    return weight.slices, weight.scales, weight.vectors, weight.low


@settings(max_examples=12)
@given(weights(), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_equals_the_oracle(weight, dtype):
    for level in weight.levels:
        expected = oracle.dequantize(*arguments_of(weight), level, dtype)
        found = dequantize(*arguments_of(weight), level, dtype)
        assert found.dtype == dtype
        # One unit in the last place: exp2 may round differently.
        torch.testing.assert_close(found, expected, rtol=torch.finfo(dtype).eps * 2, atol=0)


def test_wide_tiles():
    weight = GrinqhTensor.from_hp(torch.randn(600, 70))
    assert weight.tile == 128
    weight = GrinqhTensor.from_hp(torch.randn(1000, 70))
    assert weight.tile == 512
    arguments = (*arguments_of(weight), 8, torch.float32)
    torch.testing.assert_close(dequantize(*arguments), oracle.dequantize(*arguments))


def test_largest_half_precision_weights_stay_finite():
    weight = GrinqhTensor.from_hp(torch.full((70, 9), 65504.0, dtype=torch.float16))
    assert torch.isfinite(dequantize(*arguments_of(weight), 8, torch.float16)).all()


def test_arguments_need_not_be_contiguous():
    weight = GrinqhTensor.from_hp(torch.randn(100, 30))
    slices = weight.slices.transpose(1, 2).contiguous().transpose(1, 2)
    scales = weight.scales.transpose(1, 2).contiguous().transpose(1, 2)
    arguments = (slices, scales, weight.vectors, None, 8, torch.float32)
    torch.testing.assert_close(dequantize(*arguments), oracle.dequantize(*arguments))
