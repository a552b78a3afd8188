"""Curves: what calibration keeps of a layer's activations."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grinqh_ao.grading import ALL_LEVELS, bits_of, grade, thresholds_for
from grinqh_ao.tails import (
    CURVE_LENGTH,
    LOWEST,
    PER_OCTAVE,
    POINTS,
    Histogram,
    check_curve,
    common_curves,
    laplace,
    measured,
)

EVEN = torch.ones(1)  # all channels weigh the same
LEVEL_SETS = [levels for size in range(2, 6) for levels in itertools.combinations(ALL_LEVELS, size)]


def curve_of(x: torch.Tensor, relative: float) -> torch.Tensor:
    histogram = Histogram(relative)
    histogram.add(x)
    return common_curves([histogram], [1], [1.0])[0]


def activations(kind: str, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    x = torch.randn(300, 512)
    if kind == "outliers":
        x[:, 7] *= 1000
    elif kind == "heavy":
        x = x * torch.randn(512).exp() * torch.randn(300, 1).exp()
    elif kind == "gated":
        x = x * torch.randn_like(x).relu()
    return x


@given(
    st.sampled_from(["normal", "outliers", "heavy", "gated"]),
    st.sampled_from(LEVEL_SETS),
    st.sampled_from([0.0, 0.25, 1.0]),
    st.floats(0.02, 0.98),
)
def test_bits_solved_are_bits_read(kind, levels, relative, share):
    x = activations(kind)
    bits = levels[0] + share * (levels[-1] - levels[0])
    thresholds = thresholds_for(bits, levels, curve_of(x, relative))
    read = grade(x, EVEN, thresholds, levels).double().mean()
    zeros = float((x == 0).double().mean())  # are never read
    reachable = min(bits, levels[0] * zeros + levels[-1] * (1 - zeros))
    assert float(read) == pytest.approx(reachable, abs=0.03)
    said = bits_of(thresholds, levels, curve_of(x, relative))
    assert said == pytest.approx(reachable, abs=1e-3)


def test_relative_curves_know_no_scale_of_tokens():
    x = activations("normal")
    scaled = x * torch.rand(300, 1).exp2()
    assert torch.allclose(curve_of(x, 1.0), curve_of(scaled, 1.0), atol=1e-4)
    for relative in (0.0, 0.25):
        unscaled = curve_of(x, relative)[2:]
        assert not torch.allclose(unscaled, curve_of(scaled, relative)[2:], atol=1e-3)


def test_the_tail_of_laplace_activations_is_the_formula():
    x = torch.distributions.Laplace(0.0, 1.0).sample((200, 4096))
    tail = measured(curve_of(x, 1.0)[2:].tolist())
    for threshold in (0.01, 0.1, 0.5, 1.0, 3.0, 6.0):
        assert tail(threshold) == pytest.approx(laplace(threshold), abs=0.005)


def test_between_points_a_tail_is_straight_beyond_them_flat():
    shares = [0.9 - 0.8 * i / (POINTS - 1) for i in range(POINTS)]
    shares[1] -= 0.005  # not just one line
    tail = measured(shares)
    assert tail(0.0) == 1
    assert measured(shares, 0.95)(0.0) == 0.95
    at = [2.0 ** (LOWEST + i / PER_OCTAVE) for i in range(POINTS)]
    assert [tail(threshold) for threshold in at] == pytest.approx(shares)
    between = [tail((a * b) ** 0.5) for a, b in itertools.pairwise(at)]
    assert between == pytest.approx([(a + b) / 2 for a, b in itertools.pairwise(shares)])
    assert tail(at[0] / 1000) == shares[0]
    assert tail(at[-1] * 1000) == shares[-1]


def test_layers_of_one_model_read_the_bits_together():
    layers = [activations("normal"), 100 * activations("heavy"), activations("gated") / 50]
    histograms = [Histogram(0.0) for _ in layers]
    for histogram, x in zip(histograms, layers, strict=True):
        histogram.add(x)
    sizes, units = [1000, 3000, 2000], [1.0, 2.0, 0.5]
    read = 0.0
    for x, size, unit, curve in zip(
        layers, sizes, units, common_curves(histograms, sizes, units), strict=True
    ):
        bits = grade(x, EVEN, thresholds_for(3, ALL_LEVELS, curve), ALL_LEVELS)
        read += size * float(bits.double().mean())
        average = float(x.abs().mean())
        assert curve[0] == pytest.approx(unit * average, rel=1e-4)
    assert read / sum(sizes) == pytest.approx(3, abs=0.03)


def test_extremes():
    curve = curve_of(activations("normal"), 1.0)
    x = activations("normal", seed=1)
    assert (grade(x, EVEN, thresholds_for(8, ALL_LEVELS, curve), ALL_LEVELS) == 8).all()
    assert (grade(x, EVEN, thresholds_for(2, (2, 4, 8), curve), (2, 4, 8)) == 2).all()


def test_what_is_not_finite_or_all_zero_is_not_counted():
    x = activations("normal")
    spoiled = torch.cat([x, torch.full((1, 512), torch.nan), x[:1] / 0, torch.zeros(5, 512)])
    for relative in (0.0, 0.25, 1.0):
        assert torch.equal(curve_of(x, relative), curve_of(spoiled, relative))
    histogram = Histogram(1.0)
    histogram.add(torch.zeros(4, 512))
    assert histogram.empty


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: c[1:], rf"expected float32 \[{CURVE_LENGTH}\]"),
        (lambda c: c.double(), "float64"),
        (lambda c: c.flip(0), "weights"),
        (lambda c: torch.cat([c[:2], c[2:].flip(0)]), "do not fall"),
        (lambda c: torch.cat([c[:2], c[2:] * torch.nan]), "do not fall"),
        (lambda c: torch.cat([c[:2], c[2:] + 0.1]), "do not fall"),
    ],
)
def test_what_is_no_curve(spoil, message):
    curve = curve_of(activations("normal"), 1.0)
    check_curve(curve)
    with pytest.raises(ValueError, match=message):
        check_curve(spoil(curve))
