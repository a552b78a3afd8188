"""Quantizing: errors are bounded at every level, whatever the weights."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grinqh_ao.codec import (
    SCALE_GROUP,
    check_values,
    decode_scales,
    default_gains,
    level_values,
    quantize,
)

LEVELS = (2, 4, 6, 8)
# The largest error in units of the scale, grid of the code table included. Codes are chosen for
# all levels together, which is why they are above half a step (1/256 at level 8).
BOUND = {2: 0.37, 4: 0.08, 6: 0.03, 8: 0.017}


def dequantize(quantized, level: int) -> torch.Tensor:
    """The formula of the module docstring, in float64."""
    codes, scale_codes, row_scale = quantized
    values = level_values(default_gains(), level).double()[(codes >> (8 - level)).int()]
    return values * _scale(scale_codes, len(codes)) * row_scale.double()[:, None]


def _scale(scale_codes: torch.Tensor, n: int) -> torch.Tensor:
    return decode_scales(scale_codes).double().repeat_interleave(SCALE_GROUP, dim=0)[:n]


def relative_error(weight: torch.Tensor, level: int) -> float:
    weight = weight.double()
    error = weight - dequantize(quantize(weight.float()), level)
    return float(error.square().sum() / weight.square().sum())


@st.composite
def weights(draw) -> torch.Tensor:
    """Any shape, dtype and magnitude; constants, outliers, zero rows and channels."""
    n, k = draw(st.integers(1, 150)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(n, k, generator=generator)
    kind = draw(st.sampled_from(["normal", "constant", "heavy", "sparse"]))
    if kind == "constant":
        weight = torch.ones(n, k) * draw(st.sampled_from([-1.0, 1.0]))
    elif kind == "heavy":
        weight = weight**5
    elif kind == "sparse":
        weight = weight * (torch.rand(n, k, generator=generator) < 0.1)
    if draw(st.booleans()):
        weight[draw(st.integers(0, n - 1))] = 0
    if draw(st.booleans()):
        weight[:, draw(st.integers(0, k - 1))] = 0
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    largest = 6e4 if dtype == torch.float16 else 1e30
    smallest = 1e-4 if dtype == torch.float16 else 1e-28
    size = draw(st.sampled_from([1.0, 1e-3, smallest, largest]))
    return (weight / weight.abs().max().clamp_min(1e-9) * size).to(dtype)


@given(weights())
def test_error_of_every_weight_is_bounded_at_every_level(weight):
    quantized = quantize(weight)
    unit = _scale(quantized.scale_codes, len(weight)) * quantized.row_scale.double()[:, None]
    for level in LEVELS:
        error = (weight.double() - dequantize(quantized, level)).abs()
        assert (error <= BOUND[level] * unit * (1 + 1e-6)).all()


@given(weights())
def test_nothing_is_clipped(weight):
    quantized = quantize(weight)
    unit = _scale(quantized.scale_codes, len(weight)) * quantized.row_scale.double()[:, None]
    assert (weight.double().abs() <= unit * (1 + 1e-5)).all()


@given(weights())
def test_scales_are_no_larger_than_they_need_be(weight):
    quantized = quantize(weight)
    groups = torch.nn.functional.pad(weight.double(), (0, 0, 0, -len(weight) % SCALE_GROUP))
    rows = torch.nn.functional.pad(quantized.row_scale.double(), (0, -len(weight) % SCALE_GROUP))
    relative = groups.view(-1, SCALE_GROUP, weight.shape[1]).abs() / rows.view(-1, SCALE_GROUP, 1)
    largest = relative.nan_to_num(nan=0.0).amax(dim=1)  # 0 / 0 in rows of zeros
    scale = decode_scales(quantized.scale_codes).double()
    # The largest factor, rounded up to the next code; the smallest code is a floor.
    assert (
        (scale <= 1.08 * 2 ** (1 / 16) * largest * 1.001)
        .logical_or(quantized.scale_codes <= 1)
        .all()
    )


@given(weights())
def test_zero_rows_and_channels_stay_zero(weight):
    quantized = quantize(weight)
    dense = dequantize(quantized, 8)
    assert not dense[(weight == 0).all(dim=1)].any()
    groups = torch.nn.functional.pad(weight, (0, 0, 0, -len(weight) % SCALE_GROUP))
    zero = (groups.view(-1, SCALE_GROUP, weight.shape[1]) == 0).all(dim=1)
    assert not quantized.scale_codes[zero].any()


@pytest.mark.parametrize("exponent", [-70, -10, 10, 90])
def test_the_size_of_a_layer_does_not_matter(exponent):
    weight = torch.randn(192, 64) * torch.rand(192, 1)
    plain, scaled = quantize(weight), quantize(weight * 2.0**exponent)
    assert torch.equal(plain.codes, scaled.codes)
    assert torch.equal(plain.scale_codes, scaled.scale_codes)
    assert torch.equal(plain.row_scale * 2.0**exponent, scaled.row_scale)


def test_negated_weights_have_mirrored_codes():
    weight = torch.randn(192, 64)
    plus, minus = quantize(weight), quantize(-weight)
    assert torch.equal(plus.scale_codes, minus.scale_codes)
    # All but those in the cell of the code table around zero, which is one code's.
    assert (minus.codes == 255 - plus.codes).float().mean() > 0.998


@given(st.integers(0, 2**31))
def test_error_falls_with_the_level(seed):
    weight = torch.randn(192, 64, generator=torch.Generator().manual_seed(seed))
    errors = [relative_error(weight, level) for level in LEVELS]
    assert errors == sorted(errors, reverse=True)


def test_errors_are_those_the_thresholds_assume():
    from grinqh_ao.grading import RELATIVE_ERROR

    weight = torch.randn(512, 512)
    for level in LEVELS:
        assert relative_error(weight, level) == pytest.approx(RELATIVE_ERROR[level], rel=0.25)


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38])
def test_vanishing_weights_become_zero(value):
    quantized = quantize(torch.full((70, 3), value))
    assert not dequantize(quantized, 8).any()


def test_rejects_what_no_code_expresses():
    for value, message in [(float("nan"), "NaN"), (float("inf"), "NaN or inf"), (2e30, "beyond")]:
        weight = torch.ones(3, 3)
        weight[1, 2] = value
        with pytest.raises(ValueError, match=message):
            check_values(weight)
    check_values(torch.full((3, 3), 1.2e30))


def test_global_settings_leave_no_trace():
    """In a fresh process, first used where tensors are fake, on meta, or bfloat16 by default."""
    script = """
import torch
from grinqh_ao import GrinqhTensor
from torch._subclasses.fake_tensor import FakeTensorMode
torch.set_default_dtype(torch.bfloat16)
for context in (torch.device("meta"), FakeTensorMode()):
    with context:
        try:
            GrinqhTensor.from_hp(torch.empty(8, 8))
        except Exception:
            pass  # nothing to quantize there
torch.set_default_dtype(torch.bfloat16)
weight = GrinqhTensor.from_hp(torch.randn(70, 9))
assert weight.thresholds.dtype == weight.gains.dtype == torch.float32
assert weight.thresholds.device.type == "cpu"
assert torch.isfinite(weight.dequantize()).all()
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_empty(shape):
    quantized = quantize(torch.empty(shape))
    assert quantized.codes.shape == shape
    assert quantized.row_scale.shape == shape[:1]


def test_blocks_of_rows_do_not_change_the_result(monkeypatch):
    weight = torch.randn(300, 17) * torch.rand(17)
    whole = quantize(weight)
    monkeypatch.setattr("grinqh_ao.codec._BLOCK_WEIGHTS", {"cpu": 64})
    for a, b in zip(whole, quantize(weight), strict=True):
        assert torch.equal(a, b)


def test_values_are_symmetric():
    gains = default_gains()
    for level in LEVELS:
        values = level_values(gains, level)
        assert values.shape == (2**level,)
        assert torch.equal(values, -values.flip(0))
        assert (values.diff() > 0).all()
    gains[0] = 7  # a copy of its own for everyone
    assert default_gains()[0] != 7


def test_levels_that_are_not_stored_have_no_say():
    weight = torch.randn(128, 128)

    def cost(max_level: int) -> float:
        quantized = quantize(weight, max_level)
        errors = {b: (weight.double() - dequantize(quantized, b)).square().sum() for b in (2, 4)}
        return float(1 * errors[2] + 8 * errors[4])

    assert cost(4) < cost(8)
