"""The CPU kernels of ``grinqh::decode_linear`` and its like against float64."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import plain
from grinqh_ao import GrinqhTensor, ops
from grinqh_ao.experts import ExpertLinears
from grinqh_ao.ops.cpu import build, dequantize
from grinqh_ao.slices import drop_low
from plain import absolute, laplace

LEVEL_SETS = [(0, 2, 4, 6, 8), (0, 2, 4, 8), (2, 4, 8), (0, 2), (4,), (0, 6)]
# Of the largest output.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# Instructions that this processor may not be asked for otherwise, as torch.cpu names them.
OTHER_MACHINES = {
    "avx512": ("avx512_bw", "avx512_dq"),
    "avx_vnni": ("avx2", "fma3", "avx_vnni"),
    "avx2": ("avx2", "fma3", "f16c"),
    "portable": (),
}


def options(machine: str) -> list[str]:
    names = [name.replace("_", "").replace("fma3", "fma") for name in OTHER_MACHINES[machine]]
    return ["-Og", *(f"-m{name}" for name in names)]  # -Og compiles faster than -O3


@pytest.fixture(scope="module", params=["native", *OTHER_MACHINES])
def machine(request, tmp_path_factory):
    """The kernels as compiled for one kind of processor, in place of this one's."""
    assert build.kernels() is not None
    if request.param == "native":
        yield request.param
        return
    has = torch.cpu.get_capabilities()
    if not all(has.get(name) for name in OTHER_MACHINES[request.param]):
        pytest.skip("this processor has no such instructions")
    library = tmp_path_factory.mktemp("kernels") / "kernels.so"
    build.compile_library(library, options(request.param))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one kernel takes another's place
        kernels = build.Kernels(library)
    yield request.param
    kernels.unregister()


def decoded(x, weight, bias=None):
    return ops.decode_linear(
        x, weight.slices, weight.scales, weight.vectors, bias, weight.low, weight.levels,
    )  # fmt: skip


def assert_decoded(x, weight, bias=None):
    found = decoded(x, weight, bias)
    expected = plain.decode_together(x, weight, bias)
    assert found.dtype == x.dtype
    assert found.shape == expected.shape
    allowed = TOLERANCE[x.dtype] * float(expected.abs().max())
    allowed += torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps
    assert float((found.double() - expected).abs().max()) <= allowed


@st.composite
def cases(draw):
    n, k = draw(st.integers(1, 1100)), draw(st.integers(1, 200))
    levels = draw(st.sampled_from(LEVEL_SETS))
    bits = draw(st.floats(max(levels[0], 0.5), levels[-1]))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dense = torch.randn(n, k) * torch.rand(k)
    dense[:, draw(st.integers(0, k - 1))] = 0
    weight = GrinqhTensor.from_hp(dense, bits, levels)
    if weight.can_be_compact and draw(st.booleans()):
        share = draw(st.sampled_from([0.0, 0.1, 0.6]))
        weight.slices, weight.low = drop_low(weight.slices, torch.rand(k) < share)
    if draw(st.booleans()):
        absolute(weight, *weight.thresholds[1].clamp(max=1e30))
        weight.sensitivity.copy_(torch.rand(k) * 2)
    x = laplace(draw(st.integers(1, 8)), k) * draw(st.sampled_from([1e-4, 1.0, 1e3]))
    x = x.to(draw(st.sampled_from(list(TOLERANCE))))
    bias = torch.randn(n).to(x.dtype) if draw(st.booleans()) else None
    return weight, x, bias


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(case=cases())
def test_decode(machine, case):
    assert_decoded(case[1], case[0], case[2])


@pytest.mark.parametrize("n", [64, 128, 256, 512])
@pytest.mark.parametrize("rows", [1, 2, 4, 8])
def test_every_compiled_form(machine, n, rows):
    """Tiles of every width; more channels than are multiplied together at a time."""
    weight = GrinqhTensor.from_hp(torch.randn(n, 301), bits=5)
    assert weight.tile == n
    for dtype in (torch.float32, torch.bfloat16):
        assert_decoded(laplace(rows, 301).to(dtype), weight)


@pytest.mark.parametrize("threshold", [1e30, 1.0, 0.0])
def test_all_channels_alike(machine, threshold):
    """None is read, or all at 2, or all at 8 bits: one list is empty, or both."""
    x = torch.full((1, 70), 0.5)
    weight = GrinqhTensor.from_hp(torch.randn(130, 70))
    second = 0.0 if threshold == 0.0 else 1e30
    absolute(weight, 0.0 if threshold == 1.0 else threshold, second, second, second)
    assert_decoded(x, weight, torch.randn(130))


def test_one_active_channel_and_zeros(machine):
    weight = GrinqhTensor.from_hp(torch.randn(70, 40), bits=8)
    x = torch.zeros(1, 40)
    x[0, 3] = -0.0
    assert not decoded(x, weight).any()
    x[0, 17] = -2.5
    assert_decoded(x, weight)


def test_a_tie_is_not_above_its_threshold(machine):
    weight = absolute(GrinqhTensor.from_hp(torch.randn(64, 4)), 1.0, 2.0, 3.0, 4.0)
    x = torch.tensor([[1.0, -2.0, 3.0, -4.0]])
    assert plain.levels_of(x[0], weight) == [0, 2, 4, 6]
    assert_decoded(x, weight)
    assert plain.levels_of(x[0] * 1.0001, weight) == [2, 4, 6, 8]
    assert_decoded(x * 1.0001, weight)


@pytest.mark.parametrize("size", [1e-30, 1e-10, 1e10, 1e30])
def test_activations_of_any_size(machine, size):
    """x becomes integers in units of the largest of a block; no unit may overflow or vanish."""
    weight = GrinqhTensor.from_hp(torch.randn(70, 200), bits=8)
    assert_decoded(laplace(2, 200) * size, weight)
    x = laplace(1, 200)
    x[0, 5] = size  # one channel beside which the others are nothing, or the other way round
    assert_decoded(x, weight)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_left_to_the_oracle(machine, value):
    weight = GrinqhTensor.from_hp(torch.randn(70, 200))
    x = laplace(2, 200)
    x[1, 3] = value
    dense = F.linear(x, weight.dequantize())
    assert torch.equal(decoded(x, weight).isfinite(), dense.isfinite())


@pytest.mark.parametrize("shape", [(576, 576), (192, 1600), (2048, 520), (60, 70)])
def test_the_same_for_any_number_of_threads(machine, shape):
    weight = GrinqhTensor.from_hp(torch.randn(shape))
    threads = torch.get_num_threads()
    try:
        for rows in (1, 3, 8):
            x = laplace(rows, shape[1])
            found = []
            for number in (1, 2, 3, 7, 1):
                torch.set_num_threads(number)
                found.append(decoded(x, weight))
            assert all(torch.equal(found[0], other) for other in found)
    finally:
        torch.set_num_threads(threads)


def test_several_weights_in_one_call(machine):
    weights = [GrinqhTensor.from_hp(torch.randn(n, 150), bits) for n, bits in ((70, 2), (600, 4))]
    x = laplace(3, 150)
    biases = [None, torch.randn(600)]
    lists = zip(*((w.slices, w.scales, w.vectors) for w in weights), strict=True)
    found = ops.decode_linears(x, *map(list, lists), biases, [None, None], weights[0].levels)
    for one, weight, bias in zip(found, weights, biases, strict=True):
        assert torch.equal(one, decoded(x, weight, bias))
    assert ops.decode_linears(x, *([[]] * 5), weights[0].levels) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_experts(machine, dtype):
    stack = GrinqhTensor.stack([GrinqhTensor.from_hp(torch.randn(70, 48)) for _ in range(5)])
    x, experts = laplace(3, 1, 48).to(dtype), torch.tensor([[0, 4], [4, 2], [1, 1]])
    found = ExpertLinears(stack)(x, experts)
    for token in range(3):
        for slot, expert in enumerate(experts[token]):
            assert torch.equal(found[token, slot], decoded(x[token], stack[expert])[0])


def test_what_does_not_fit_is_refused(machine):
    """Before anything is read: these are addresses to the kernels."""
    weight, other = (
        GrinqhTensor.from_hp(torch.randn(70, 40)),
        GrinqhTensor.from_hp(torch.ones(200, 9)),
    )
    with pytest.raises(RuntimeError, match="x has 41 channels, the weight 40"):
        decoded(torch.randn(1, 41), weight)
    for name in ("slices", "scales", "vectors"):
        wrong = weight.with_data(lambda data: data)
        setattr(wrong, name, getattr(other, name))
        with pytest.raises(RuntimeError, match=r"channels|not fit"):
            decoded(torch.randn(1, 40), wrong)
    with pytest.raises(RuntimeError, match="bias does not fit 70 outputs"):
        decoded(torch.randn(1, 40), weight, torch.randn(71))
    for name, dtype in (("slices", "Int"), ("scales", "Byte"), ("vectors", "Float")):
        wrong = weight.with_data(lambda data: data)
        setattr(wrong, name, getattr(weight, name).double())
        with pytest.raises(RuntimeError, match=rf"expected scalar type (.*::)?{dtype} "):
            decoded(torch.randn(1, 40), wrong)
    wide = GrinqhTensor.from_hp(torch.randn(192, 40))
    for name in ("slices", "scales"):  # tiles of 192 outputs
        setattr(wide, name, getattr(wide, name).permute(1, 0, 2).flatten(1)[None])
    with pytest.raises(RuntimeError, match="tiles of 192 outputs: expected 64, 128, 256 or 512"):
        decoded(torch.randn(1, 40), wide)
    for levels in ((8, 4), (0, 2, 2), (0, 3), (0, 10), (-2, 8), ()):
        with pytest.raises(RuntimeError, match="level"):
            ops.decode_linear(
                torch.randn(1, 40), weight.slices, weight.scales, weight.vectors, None, None, levels
            )
    stack = GrinqhTensor.stack([weight, weight])
    with pytest.raises(RuntimeError, match="expert 2: expected 0 to 1"):
        ExpertLinears(stack)(torch.randn(1, 1, 40), torch.tensor([[2]]))
    with pytest.raises(RuntimeError, match="those of one weight"):
        decoded(torch.randn(1, 40), stack)
    x, chosen = torch.randn(3, 40), torch.tensor([0, 1, 0])
    inner = stack.slices, stack.scales, stack.vectors
    for wrong_x, wrong in ((x, chosen[:2]), (x[0], chosen), (x[:, None], chosen)):
        with pytest.raises((RuntimeError, IndexError), match=r"expected x \[S, K\]"):
            ops.decode_experts(wrong_x, wrong, *inner, stack.levels)
    for i in range(3):
        wrong = [data[:1] if j == i else data for j, data in enumerate(inner)]
        with pytest.raises(RuntimeError, match="do not fit each other"):
            ops.decode_experts(x, chosen, *wrong, stack.levels)


@pytest.mark.parametrize(
    ("shape", "first", "transposed"),
    [
        ((140, 40), 0, True),  # not whole tiles
        ((40, 256), 0, True),  # more than there are
        ((40, 64), 3, True),
        ((40, 64), -1, True),
        ((41, 64), 0, True),
        ((140, 41), 0, False),
        ((192, 40), 0, False),  # outputs that do not exist
        ((13, 40), 1, False),
        ((128,), 0, True),
    ],
)
def test_a_place_that_does_not_fit_is_refused(machine, shape, first, transposed):
    weight = GrinqhTensor.from_hp(torch.randn(140, 40))
    assert weight.tile == 64
    out = torch.zeros(shape)
    with pytest.raises(RuntimeError, match="out does not fit the weight"):
        torch.ops.grinqh.dequantize_into(
            weight.slices, weight.scales, weight.vectors, None, 8, 8, first, transposed, out
        )
    assert not out.any()


def test_strided_data(machine):
    """What a user sliced out of something larger."""
    weight = GrinqhTensor.from_hp(torch.randn(70, 40))
    x = laplace(1, 80)[:, ::2]
    strided = weight.with_data(lambda data: torch.stack([data, data], -1)[..., 0])
    assert not strided.scales.is_contiguous()
    assert torch.equal(decoded(x, strided), decoded(x.contiguous(), weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(60, 33), (600, 90), (250, 64), (1000, 20)])
def test_dequantize(machine, dtype, shape, monkeypatch):
    monkeypatch.setattr(dequantize, "BLOCK_WEIGHTS", 1 << 14)  # in several blocks
    for compact in (False, True):
        weight = GrinqhTensor.from_hp(torch.randn(shape))
        if compact:
            weight.slices, weight.low = drop_low(weight.slices, torch.rand(shape[1]) < 0.3)
        for level in (0, 2, 4, 6, 8):
            expected = plain.dense_at(weight, level)
            found = weight.dequantize(dtype, level)
            assert found.dtype == dtype
            rtol = max(5e-7, torch.finfo(dtype).eps)
            torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=1e-7)
            assert torch.equal(found, weight.dequantize(torch.float32, level).to(dtype))
            if level:
                stored = weight.slices, weight.scales, weight.vectors, weight.low
                blocks = [
                    transposed.t().clone()
                    for _, transposed in dequantize._blocks(*stored, level, dtype)
                ]
                assert len(blocks) > 1 or weight.slices.shape[0] == 1
                assert torch.equal(torch.cat(blocks), found)
        x, bias = laplace(12, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
        dense = F.linear(x.double(), weight.dequantize(torch.float64), bias.double())
        found = F.linear(x, weight, bias)
        size = float(dense.abs().max())
        assert float((found.double() - dense).abs().max()) <= 2 * TOLERANCE[dtype] * size


def test_the_largest_values_stay_finite(machine):
    """Rounding up must not turn float16's largest into infinity."""
    weight = GrinqhTensor.from_hp(torch.full((70, 9), 65504.0) * torch.tensor([-1.0, 1, 1] * 3))
    dense = weight.dequantize(torch.float32)
    assert float(dense.abs().max()) > 65504
    assert torch.equal(weight.dequantize(torch.float16), dense.clamp(-65504, 65504).half())


def test_some_tiles(machine):
    weight = GrinqhTensor.from_hp(torch.randn(300, 70))
    stored = weight.slices, weight.scales, weight.vectors, None
    whole = weight.dequantize()
    for first in range(weight.slices.shape[0]):
        from_there = whole[first * weight.tile :]
        out = torch.empty_like(from_there)
        torch.ops.grinqh.dequantize_into(*stored, 8, 8, first, False, out)
        assert torch.equal(out, from_there)


def test_a_prompt_takes_memory_for_a_block_only(machine, monkeypatch):
    """Beside inputs and outputs, no tensor as large as a dense layer is ever made."""
    weight = GrinqhTensor.from_hp(torch.randn(2048, 256))
    monkeypatch.setattr(dequantize, "BLOCK_WEIGHTS", 1 << 18)
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    x = torch.randn(9, 256)
    with Sizes():  # not the op: what it calls would not be seen
        dequantize.dense_linear(x, weight.slices, weight.scales, weight.vectors, None, None, 8)
    assert largest == 4 * (1 << 18)
