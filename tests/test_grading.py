"""Levels from activations, thresholds from bits."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grinqh_ao.grading import (
    ALL_LEVELS,
    bits_of,
    check_bits,
    check_levels,
    expected_bits,
    grade,
    level_shares,
    threshold_ratios,
    thresholds_for,
)

EVEN = torch.ones(1)  # all channels weigh the same
LEVEL_SETS = [
    levels
    for size in range(1, 6)
    for levels in itertools.combinations(ALL_LEVELS, size)
    if any(levels)
]
level_sets = st.sampled_from(LEVEL_SETS)


@st.composite
def levels_and_bits(draw):
    levels = draw(level_sets)
    low = max(levels[0], 0.05)
    return levels, draw(st.floats(low, levels[-1]))


def bits_read(x: torch.Tensor, thresholds: torch.Tensor, levels) -> float:
    return float(grade(x, EVEN, thresholds, levels).double().mean())


@given(levels_and_bits())
def test_bits_solved_are_bits_measured_on_laplace_activations(case):
    levels, bits = case
    uniform = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    x = -uniform.log()  # exact quantiles of |x| for a Laplace x
    assert bits_read(x, thresholds_for(bits, levels), levels) == pytest.approx(bits, abs=0.01)


@given(levels_and_bits(), st.sampled_from([1e-20, 1e-3, 1.0, 1e4, 1e30]))
def test_the_scale_of_a_token_does_not_matter(case, scale):
    levels, bits = case
    x = torch.distributions.Laplace(0.0, 1.0).sample((3, 500))
    thresholds = thresholds_for(bits, levels)
    changed = grade(x, EVEN, thresholds, levels) != grade(x * scale, EVEN, thresholds, levels)
    assert changed.float().mean() < 0.01  # only what rounds across a threshold


@pytest.mark.parametrize("levels", LEVEL_SETS, ids=str)
def test_ratios_grow_and_expected_bits_fall(levels):
    ratios = threshold_ratios(levels)
    assert ratios == sorted(ratios)
    assert ratios[:1] in ([], [1.0])
    bits = [expected_bits(t, levels) for t in (0.0, 0.1, 1.0, 10.0)]
    assert bits[0] == levels[-1]
    assert bits == sorted(bits, reverse=True)


def test_constants_of_the_documentation():
    assert thresholds_for(3, ALL_LEVELS)[1, 0] == pytest.approx(0.218, abs=0.0005)
    assert thresholds_for(2, ALL_LEVELS)[1, 0] == pytest.approx(0.430, abs=0.0005)


@pytest.mark.parametrize("levels", LEVEL_SETS, ids=str)
def test_ends_of_the_range_are_exact(levels):
    x = torch.randn(4, 1000) * 100
    assert bits_read(x, thresholds_for(levels[-1], levels), levels) == levels[-1]
    if levels[0] > 0:
        assert bits_read(x, thresholds_for(levels[0], levels), levels) == levels[0]


def test_what_is_not_finite_is_read_in_full():
    for bits in (0.5, 3, 8):
        thresholds = thresholds_for(bits, ALL_LEVELS)
        for value in (math.nan, math.inf, -math.inf):
            x = torch.tensor([0.1, value, 3.0])
            assert grade(x, EVEN, thresholds, ALL_LEVELS)[1] == 8


def test_zeros_are_not_read():
    for bits in (0.5, 3, 8):
        x = torch.tensor([0.0, -0.0, 1.0])
        assert grade(x, EVEN, thresholds_for(bits, ALL_LEVELS), ALL_LEVELS).tolist()[:2] == [0, 0]
        assert not grade(torch.zeros(5), EVEN, thresholds_for(bits, ALL_LEVELS), ALL_LEVELS).any()


def test_absolute_thresholds_and_ties():
    thresholds = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0]])
    x = torch.tensor([0.5, -1.0, 1.5, 2.5, -3.5, 4.0, 4.5])
    assert grade(x, EVEN, thresholds, ALL_LEVELS).tolist() == [0, 0, 2, 4, 6, 6, 8]


def test_only_channels_with_low_slices_are_read_beyond_four_bits():
    low = torch.tensor([0, -1, 1, -1])  # where low slices lie, the first at 0
    thresholds = torch.zeros(2, 4)
    assert grade(torch.ones(4), EVEN, thresholds, ALL_LEVELS, low).tolist() == [8, 4, 8, 4]


@pytest.mark.parametrize("level", [2, 4, 8])
def test_a_single_level_has_no_thresholds(level):
    thresholds = thresholds_for(level, (level,))
    assert thresholds.shape == (2, 0)
    assert bits_of(thresholds, (level,)) == level


def test_rows_are_graded_on_their_own():
    x = torch.stack([torch.randn(64), 1000 * torch.randn(64)])
    thresholds = thresholds_for(3, ALL_LEVELS)
    rows = torch.stack([grade(row, EVEN, thresholds, ALL_LEVELS) for row in x])
    assert torch.equal(grade(x, EVEN, thresholds, ALL_LEVELS), rows)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_graded_in_float32_whatever_the_dtype(dtype):
    x = torch.randn(1000).to(dtype)
    thresholds = thresholds_for(3, ALL_LEVELS)
    assert torch.equal(
        grade(x, EVEN, thresholds, ALL_LEVELS), grade(x.float(), EVEN, thresholds, ALL_LEVELS)
    )


@pytest.mark.parametrize(
    "levels",
    [(), (0,), (2, 0), (0, 2, 2), (0, 3), (0, 16), (0, 2.0), ("0", "2"), (0, None)],
    ids=str,
)
def test_bad_levels(levels):
    with pytest.raises(ValueError, match=r"levels=.*expected ascending"):
        check_levels(levels)


@pytest.mark.parametrize("bits", [0, -1, 8.5, math.nan, math.inf, "3", None, True])
def test_bad_bits(bits):
    with pytest.raises(ValueError, match=r"bits=.*above 0 and at most 8"):
        check_bits(bits, ALL_LEVELS)
    with pytest.raises(ValueError, match="at least 2"):
        check_bits(1.5, (2, 4))


@pytest.mark.parametrize("bits", [0.5, 2, 3, 4.5, 8])
def test_shares_of_levels_average_to_the_bits(bits):
    shares = level_shares(bits)
    assert sum(shares.values()) == pytest.approx(1)
    assert sum(level * share for level, share in shares.items()) == pytest.approx(bits)
