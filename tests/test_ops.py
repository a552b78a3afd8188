"""The ops against the rule written down in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import plain
from grinqh_ao import GrinqhTensor, ops
from grinqh_ao.grading import ALL_LEVELS
from grinqh_ao.ops import oracle
from grinqh_ao.slices import drop_low

LEVEL_SETS = [ALL_LEVELS, (0, 2, 4, 8), (0, 2, 4), (2, 4, 8), (0, 8), (4,)]


def arguments(weight: GrinqhTensor, bias: torch.Tensor | None = None) -> tuple:
    return (
        weight.slices,
        weight.scales,
        weight.vectors,
        bias,
        weight.low,
        weight.levels,
    )


@st.composite
def cases(draw):
    n, k = draw(st.integers(1, 200)), draw(st.integers(1, 40))
    levels = draw(st.sampled_from(LEVEL_SETS))
    bits = draw(st.floats(max(levels[0], 0.1), levels[-1]))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    weight = GrinqhTensor.from_hp(torch.randn(n, k), bits, levels)
    if weight.can_be_compact and draw(st.booleans()):
        weight.slices, weight.low = drop_low(weight.slices, torch.rand(k) < draw(st.floats(0, 1)))
    if draw(st.booleans()):  # calibrated thresholds are absolute
        weight.thresholds[0] = weight.thresholds[1].clamp(max=1e30)
        weight.thresholds[1] = 0
    x = torch.distributions.Laplace(0.0, 1.0).sample((draw(st.integers(1, 4)), k))
    x = x.to(draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])))
    return weight, x, torch.randn(n) if draw(st.booleans()) else None


@given(cases())
def test_decode_linear(case):
    weight, x, bias = case
    found = ops.decode_linear(x, *arguments(weight, bias))
    expected = plain.decode_together(x, weight, bias)
    tolerance = {
        torch.float64: 1e-6,
        torch.float32: 1e-5,
        torch.float16: 2e-3,
        torch.bfloat16: 2e-2,
    }
    size = float(expected.abs().max()) + 1e-6
    assert found.shape == (len(x), weight.shape[0])
    assert found.dtype == x.dtype
    assert (found.double() - expected).abs().max() <= tolerance[x.dtype] * size


@given(cases())
def test_dequantize(case):
    weight, x, _ = case
    for level in weight.levels:
        found = weight.dequantize(x.dtype, level)
        expected = plain.dense_at(weight, level)
        assert found.dtype == x.dtype
        torch.testing.assert_close(found, expected.to(x.dtype), rtol=1e-2, atol=1e-6)
        if x.dtype == torch.float64:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("n", [7, 192, 1024])
def test_prefix_codes_are_the_codes_of_lower_levels(n):
    """Reading fewer slices of an 8-bit weight is reading the 4-bit weight inside it."""
    weight = GrinqhTensor.from_hp(torch.randn(n, 20), bits=8)
    weight.slices[:, 2 * 20 :] = 0x5A5A5A5A  # what a level does not read cannot matter
    changed = weight.dequantize(level=8)
    expected = plain.dense_at(weight, 4)
    torch.testing.assert_close(weight.dequantize(level=4).double(), expected, rtol=5e-7, atol=0)
    assert not torch.allclose(changed, weight.dequantize(level=4))


def test_opcheck():
    """Schema, fake kernel and autograd registration, by PyTorch's own checks."""
    weight = GrinqhTensor.from_hp(torch.randn(70, 9))
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for bias in (None, torch.randn(70)):
        for shape in [(9,), (1, 9), (1, 1, 9), (2, 3, 9)]:
            torch.library.opcheck(
                ops.decode_linear, (torch.randn(shape), *arguments(weight, bias)), test_utils=tests
            )
    torch.library.opcheck(
        ops.dequantize,
        (weight.slices, weight.scales, weight.vectors, None, 6, torch.bfloat16),
        test_utils=tests,
    )
    slices, low = drop_low(weight.slices, torch.arange(9) % 3 == 0)
    torch.library.opcheck(
        ops.dequantize,
        (slices, weight.scales, weight.vectors, low, 8, torch.bfloat16),
        test_utils=tests,
    )


def test_all_channels_skipped():
    weight = GrinqhTensor.from_hp(torch.randn(70, 9))
    weight.thresholds[0] = 1e30
    bias = torch.randn(70)
    x = torch.randn(1, 9)
    assert not ops.decode_linear(x, *arguments(weight)).any()
    assert torch.equal(ops.decode_linear(x, *arguments(weight, bias))[0], bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_oracle_adds_up_in_float32_under_autocast(dtype):
    weight = GrinqhTensor.from_hp(torch.randn(70, 400))
    arguments = weight.slices, weight.scales, weight.vectors, None, None, weight.levels
    x = 100 * torch.randn(1, 400, dtype=dtype)
    expected = oracle.decode_linear(x, *arguments)
    with torch.autocast("cpu", dtype):
        assert torch.equal(oracle.decode_linear(x, *arguments), expected)
