"""Parts of a weight are read as the whole is."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import plain
from grinqh_ao import GrinqhTensor, ops
from grinqh_ao.slices import drop_low
from grinqh_ao.tails import formula_curve


@st.composite
def weights(draw) -> GrinqhTensor:
    n, k = draw(st.integers(1, 700)), draw(st.integers(2, 60))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    levels = draw(st.sampled_from([(0, 2, 4, 6, 8), (0, 2, 4), (2, 6), (2,)]))
    weight = GrinqhTensor.from_hp(torch.randn(n, k), bits=levels[-1] * 0.6 + 0.8, levels=levels)
    weight.sensitivity.copy_(torch.rand(k))
    if weight.can_be_compact and draw(st.booleans()):
        weight.slices, weight.low = drop_low(weight.slices, torch.rand(k) < 0.4)
    return weight


@given(weights(), st.data())
def test_outputs(weight, data):
    n, k = weight.shape
    cuts = [*range(0, n, 64), n]
    start = data.draw(st.sampled_from(cuts[:-1]))
    stop = data.draw(st.sampled_from([cut for cut in cuts if cut > start]))
    some = weight[start:stop]
    assert some.shape == (stop - start, k)
    for level in weight.levels:
        assert torch.equal(some.dequantize(level=level), weight.dequantize(level=level)[start:stop])
    x = plain.laplace(2, k)
    assert torch.equal(some.grade(x), weight.grade(x))
    torch.testing.assert_close(F.linear(x, some), F.linear(x, weight)[:, start:stop])


@given(weights(), st.data())
def test_inputs(weight, data):
    k = weight.shape[1]
    start = data.draw(st.integers(0, k - 1))
    stop = data.draw(st.integers(start + 1, k))
    some = weight[:, start:stop]
    for level in weight.levels:
        whole = weight.dequantize(level=level)
        assert torch.equal(some.dequantize(level=level), whole[:, start:stop])


@given(weights(), st.integers(1, 3), st.booleans(), st.data())
def test_parts_add_up_to_the_whole(weight, rows, in_plain_pytorch, data):
    """Levels are those of the whole where the mean is given that relative thresholds refer to."""
    k = weight.shape[1]
    cut = data.draw(st.integers(1, k - 1))
    x = plain.laplace(rows, k)
    mean = (x.abs() * weight.sensitivity).mean(1)
    op = torch.ops.grinqh.decode_linear
    decode = op.oracle if in_plain_pytorch else op.default
    y = torch.zeros(rows, weight.shape[0])
    for some in (slice(0, cut), slice(cut, k)):
        w = weight[:, some]
        y += decode(x[:, some], w.slices, w.scales, w.vectors, None, w.low, w.levels, mean)
    expected = F.linear(x, weight)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_calibrated_data_stays():
    weight = GrinqhTensor.from_hp(torch.randn(128, 40))
    weight.calibrate(formula_curve(), 2.5)
    for some in (weight[64:], weight[:, 10:]):
        assert some.bits == pytest.approx(2.5)
        some.set_bits(3)
        assert some.bits == pytest.approx(3)
        assert weight.bits == pytest.approx(2.5)


def test_all_of_it():
    weight = GrinqhTensor.from_hp(torch.randn(70, 40))
    assert torch.equal(weight[:], weight)
    assert torch.equal(weight[0:70, 0:40], weight)


def test_what_cannot_be_cut():
    weight = GrinqhTensor.from_hp(torch.randn(200, 40))
    for some in (slice(0, 100), slice(100, 200), slice(64, 65)):
        with pytest.raises(ValueError, match=f"outputs {some.start}:{some.stop} of 200: .*64"):
            weight[some]
    with pytest.raises(ValueError, match="part 64:64 of dimension 0"):
        weight[64:64]
    with pytest.raises(TypeError, match="step"):
        weight[::2]
    with pytest.raises(TypeError, match="experts"):
        GrinqhTensor.stack([weight, weight])[:, 64:]


def test_a_wrong_mean_is_refused():
    w = GrinqhTensor.from_hp(torch.randn(70, 40))
    with pytest.raises(RuntimeError, match="mean does not fit 2 rows"):
        ops.decode_linear(
            torch.randn(2, 40), w.slices, w.scales, w.vectors, None, None, w.levels, torch.ones(3)
        )
