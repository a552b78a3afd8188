"""GrinqhTensor: TorchAO's generic suites, ops, dispatch, serialization."""

import copy
import io
import itertools
import math
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torchao.testing import utils as torchao_tests
from torchao.utils import TorchAOBaseTensor

from grinqh_ao import GrinqhTensor, aten_ops, decode_every_row, ops
from grinqh_ao.tails import formula_curve

NEEDS_CUDA = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="TorchAO's test calls .cuda() unconditionally"
)


class TestTorchAOBasics(torchao_tests.TorchAOBasicTestCase):
    TENSOR_SUBCLASS = GrinqhTensor
    FACTORY_FN = staticmethod(GrinqhTensor.from_hp)
    kwargs = {}
    LINEAR_MIN_SQNR = 38  # the dense path reads level 8


class TestTorchAOCompile(torchao_tests.TorchAOCompileTestCase):
    TENSOR_SUBCLASS = GrinqhTensor
    FACTORY_FN = staticmethod(GrinqhTensor.from_hp)
    kwargs = {}
    LINEAR_MIN_SQNR = 38
    COMPILE_MIN_SQNR = 50


for _name in list(vars(torchao_tests.TorchAOBasicTestCase)):
    if _name.startswith("test_device1_to_device2"):
        setattr(
            TestTorchAOBasics, _name, NEEDS_CUDA(vars(torchao_tests.TorchAOBasicTestCase)[_name])
        )


@pytest.fixture
def weight() -> GrinqhTensor:
    return GrinqhTensor.from_hp(torch.randn(96, 40))


def test_up_to_eight_rows_decode_and_more_are_dense(weight):
    x = torch.randn(9, 40)
    dense = weight.dequantize()
    torch.testing.assert_close(F.linear(x, weight), x @ dense.t())
    for shape in [(40,), (1, 40), (1, 1, 40), (2, 40), (8, 1, 40), (2, 3, 40)]:
        rows = x.flatten()[: math.prod(shape)].view(shape)
        expected = ops.decode_linear(
            rows, weight.slices, weight.scales, weight.vectors, None, None, weight.levels,
        )  # fmt: skip
        found = F.linear(rows, weight)
        assert found.shape == (*shape[:-1], 96)
        assert torch.equal(found, expected)
        assert not torch.allclose(found, F.linear(rows, dense))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [1, 3, 9])
def test_output_has_the_dtype_of_the_input(weight, dtype, rows):
    assert F.linear(torch.randn(rows, 40, dtype=dtype), weight).dtype == dtype


def test_bias_by_position_and_by_keyword(weight):
    bias = torch.randn(96)
    for rows in (1, 3, 9):
        x = torch.randn(rows, 40)
        expected = F.linear(x, weight) + bias
        torch.testing.assert_close(F.linear(x, weight, bias), expected)
        torch.testing.assert_close(F.linear(input=x, weight=weight, bias=bias), expected)


def test_gradients_take_the_dense_path(weight):
    dense = weight.dequantize()
    for rows in (1, 3, 9):
        for requires_grad in ("x", "bias"):
            x = torch.randn(rows, 40, requires_grad=requires_grad == "x")
            bias = torch.randn(96, requires_grad=requires_grad == "bias")
            y = F.linear(x, weight, bias)
            torch.testing.assert_close(y, F.linear(x, dense, bias))
            y.square().sum().backward()
            wanted = x if requires_grad == "x" else bias
            (expected,) = torch.autograd.grad(F.linear(x, dense, bias).square().sum(), wanted)
            torch.testing.assert_close(wanted.grad, expected)


def test_between_forward_and_backward_there_is_no_dense_weight(weight, monkeypatch):
    made = []
    dequantize = GrinqhTensor.dequantize

    def remember(self, *arguments):
        dense = dequantize(self, *arguments)
        made.append(weakref.ref(dense))
        return dense

    monkeypatch.setattr(GrinqhTensor, "dequantize", remember)
    x = torch.randn(9, 40, requires_grad=True)
    y = F.linear(x, weight, torch.randn(96))
    assert [reference() for reference in made] == [None]
    y.sum().backward()
    assert len(made) == 2


def test_no_gradient_wanted_under_no_grad(weight):
    x = torch.randn(1, 40, requires_grad=True)
    with torch.no_grad():
        assert torch.equal(F.linear(x, weight), F.linear(x.detach(), weight))


@pytest.mark.parametrize("shape", [(0, 40), (2, 0, 40)])
def test_empty_batches(weight, shape):
    y = F.linear(torch.empty(shape), weight)
    assert y.shape == (*shape[:-1], 96)
    with decode_every_row():
        assert F.linear(torch.empty(shape), weight).shape == (*shape[:-1], 96)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_reaches_the_output(weight, value):
    x = torch.randn(1, 40)
    x[0, 7] = value
    dense = F.linear(x, weight.dequantize())
    decoded = F.linear(x, weight)
    assert torch.equal(decoded.isnan(), dense.isnan())
    assert torch.equal(decoded.isinf(), dense.isinf())


def test_wrong_input_width(weight):
    with pytest.raises(ValueError, match=r"input of shape \(1, 39\): expected \[\.\.\., 40\]"):
        F.linear(torch.randn(1, 39), weight)


def test_wrong_input_dtype(weight):
    with pytest.raises(TypeError, match=r"input of dtype torch\.int64: expected floating point"):
        F.linear(torch.ones(1, 40, dtype=torch.int64), weight)


def test_from_hp_says_what_is_wrong():
    with pytest.raises(ValueError, match="bits=9"):
        GrinqhTensor.from_hp(torch.randn(4, 4), bits=9)
    with pytest.raises(ValueError, match="levels="):
        GrinqhTensor.from_hp(torch.randn(4, 4), levels=(0, 3))
    with pytest.raises(ValueError, match=r"shape \(4,\)"):
        GrinqhTensor.from_hp(torch.randn(4))
    with pytest.raises(TypeError, match=r"torch\.int8"):
        GrinqhTensor.from_hp(torch.zeros(4, 4, dtype=torch.int8))


@pytest.mark.parametrize("levels", [(0, 2, 4), (2, 4), (4,), (0, 6)], ids=str)
def test_stores_no_slice_above_the_highest_level(levels):
    weight = GrinqhTensor.from_hp(torch.randn(96, 40), bits=levels[-1], levels=levels)
    assert weight.slices.shape[1] == levels[-1] // 2 * weight.shape[1]
    x = torch.randn(2, 40)
    with decode_every_row():
        torch.testing.assert_close(F.linear(x, weight), F.linear(x, weight.dequantize()))


@pytest.mark.parametrize("level", [-2, 3, 6, 8])
def test_levels_that_are_not_stored_cannot_be_read(level):
    weight = GrinqhTensor.from_hp(torch.randn(96, 40), levels=(0, 2, 4))
    with pytest.raises(ValueError, match=f"level={level}: .* at most 4"):
        weight.dequantize(level=level)


def test_set_bits_and_back_is_bit_identical(weight):
    x = torch.randn(1, 40)
    before = F.linear(x, weight)
    assert weight.bits == pytest.approx(3)
    weight.set_bits(6)
    assert weight.bits == pytest.approx(6)
    assert not torch.equal(F.linear(x, weight), before)
    weight.set_bits(3)
    assert torch.equal(F.linear(x, weight), before)
    with pytest.raises(ValueError, match="bits=0"):
        weight.set_bits(0)
    assert torch.equal(F.linear(x, weight), before)


def test_set_bits_on_a_tensor_made_in_inference_mode():
    with torch.inference_mode():
        weight = GrinqhTensor.from_hp(torch.randn(96, 40))
    weight.set_bits(2)
    assert weight.bits == pytest.approx(2)


def test_min_bits_is_a_floor():
    weight = GrinqhTensor.from_hp(torch.randn(96, 40), bits=3, min_bits=6)
    assert weight.bits == pytest.approx(6)
    weight.set_bits(2)
    assert weight.bits == pytest.approx(6)
    weight.set_bits(7)
    assert weight.bits == pytest.approx(7)


@pytest.mark.parametrize("n", [96, 200, 600])
def test_embedding_is_the_dense_row(n):
    weight = GrinqhTensor.from_hp(torch.randn(n, 40))
    indices = torch.randint(0, n, (2, 5))
    expected = F.embedding(indices, weight.dequantize())
    # Rows and whole weights are dequantized by different code: equal but for float32 rounding.
    torch.testing.assert_close(F.embedding(indices, weight), expected, rtol=5e-7, atol=0)
    for index in (n, -1):
        with pytest.raises(IndexError):
            F.embedding(torch.tensor([index]), weight)


def test_to_changes_the_dtype_it_presents(weight):
    moved = weight.to(torch.bfloat16)
    assert moved.dtype == torch.bfloat16
    assert moved.dequantize().dtype == torch.bfloat16
    assert torch.equal(moved.slices, weight.slices)
    with pytest.raises(TypeError, match=r"torch\.int8"):
        weight.to(torch.int8)
    linear = nn.Linear(40, 96)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    assert linear.half().weight.dtype == torch.float16


def test_stored_size_is_what_is_held():
    weight = GrinqhTensor.from_hp(torch.randn(512, 1024))
    codes, scales, vectors = 512 * 1024, 512 // 64 * 1024, 4 * (8 + 4 + 1024 + 512)
    assert weight.stored_bytes == codes + scales + vectors


def linear_with(weight: GrinqhTensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear.requires_grad_(False)


def test_pickle_deepcopy_and_state_dict(weight):
    linear, x = linear_with(weight), torch.randn(1, 40)
    expected = linear(x)
    for duplicate in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        assert torch.equal(duplicate(x), expected)
        duplicate.weight.set_bits(8)  # nothing is shared
        assert torch.equal(linear(x), expected)

    file = io.BytesIO()
    torch.save(linear.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = linear_with(GrinqhTensor.from_hp(torch.randn(96, 40), bits=5))
    other.load_state_dict(state)
    assert torch.equal(other(x), expected)
    fresh = nn.Linear(40, 96)
    fresh.load_state_dict(state, assign=True)
    assert torch.equal(fresh.requires_grad_(False)(x), expected)


def test_loading_across_types_names_the_remedy(weight):
    quantized, dense = linear_with(weight), nn.Linear(40, 96)
    for target, source in ((dense, quantized), (quantized, dense)):
        with pytest.raises(RuntimeError, match="assign=True"):
            target.load_state_dict(source.state_dict())


def test_loading_across_calibrations_names_the_remedy(weight):
    calibrated = GrinqhTensor.from_hp(weight.dequantize())
    calibrated.calibrate(formula_curve())
    assert ", calibrated" in repr(calibrated)
    for target, source in itertools.permutations(map(linear_with, (weight, calibrated))):
        before = target.weight.dequantize()
        with pytest.raises(RuntimeError, match=r"only one of them is calibrated.*assign=True"):
            target.load_state_dict(source.state_dict())
        assert torch.equal(target.weight.dequantize(), before)
    target.load_state_dict(source.state_dict(), assign=True)


@pytest.mark.parametrize("rows", [1, 3, 9])
def test_autocast(weight, rows):
    x = torch.randn(rows, 40)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(x, weight).dtype == torch.bfloat16
        assert F.linear(x.double(), weight).dtype == torch.float64


def test_flattens_as_torchao_does(weight):
    """It is written out for speed; here the inherited one says what is meant."""
    for name in (None, "curve", "low"):
        if name:
            setattr(weight, name, torch.zeros(3))
        assert weight.__tensor_flatten__() == TorchAOBaseTensor.__tensor_flatten__(weight)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_transposed(weight, mode):
    x, dense = torch.randn(3, 40), weight.dequantize()
    with mode():
        for transposed in (weight.t(), weight.T, weight.mT, weight.transpose(0, 1)):
            assert torch.equal(x @ transposed, x @ dense.t())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "product",
    [
        lambda w: w @ torch.ones(w.shape[1]),
        lambda w: w @ torch.ones(w.shape[1], 3),
        lambda w: w @ torch.ones(2, w.shape[1], 3),
        lambda w: torch.ones(2, 3, w.shape[0]) @ w,
        lambda w: torch.einsum("nk, bk -> bn", w, torch.ones(3, w.shape[1])),
    ],
)
def test_other_products_take_the_dense_path(weight, product, mode):
    with mode():
        assert torch.equal(product(weight), product(weight.dequantize()))


def test_meta_device(weight):
    for rows in (1, 3, 9):
        y = F.linear(torch.empty(rows, 40, device="meta"), weight.to("meta"))
        assert y.shape == (rows, 96)


@pytest.mark.parametrize("rows", [1, 3, 9])
def test_a_bias_of_another_dtype(weight, rows):
    bias = torch.randn(96)
    y = F.linear(torch.randn(rows, 40, dtype=torch.bfloat16), weight, bias)
    assert y.dtype == torch.bfloat16


def test_largest_half_precision_weights_stay_finite():
    weight = GrinqhTensor.from_hp(torch.full((70, 9), 65504.0, dtype=torch.float16))
    assert torch.isfinite(weight.dequantize()).all()


def test_operands_it_cannot_be(weight):
    with pytest.raises(TypeError, match="weight of a linear layer"):
        F.linear(weight, torch.randn(3, 40))


def test_prints_what_it_is(weight):
    assert "levels=(0, 2, 4, 6, 8)" in repr(weight)
    assert "shape=(96, 40)" in repr(nn.Parameter(weight, requires_grad=False))


def test_memory_can_be_shared_between_processes():
    weight = GrinqhTensor.from_hp(torch.randn(64, 64))
    model = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False))
    model[0].weight = torch.nn.Parameter(weight, requires_grad=False)
    assert not model[0].weight.is_shared()
    assert not model[0].weight.is_pinned()
    model.share_memory()
    assert model[0].weight.is_shared()
    assert model[0].weight.slices.is_shared()


def test_equal():
    weight = GrinqhTensor.from_hp(torch.randn(64, 64))
    assert torch.equal(weight, weight.clone())
    assert not torch.equal(weight, GrinqhTensor.from_hp(torch.randn(64, 64)))
    assert not torch.equal(weight, weight.dequantize())
    other = weight.clone()
    other.set_bits(2)
    assert not torch.equal(weight, other)


def test_symbolic_sizes_are_its_own():
    """As with dynamic=True: not what follows from those of the inner tensors."""
    weight = GrinqhTensor.from_hp(torch.randn(160, 96))
    mode = FakeTensorMode(shape_env=ShapeEnv())
    fake = mode.from_tensor(weight, source=ConstantSource("weight"))
    assert all(size.node.expr.is_Symbol for size in fake.shape)


def test_data_is_replaced_as_a_whole():
    """As PEFT does: p.data = p.data.to(dtype). PyTorch alone would leave codes as they are."""
    linear = linear_with(GrinqhTensor.from_hp(torch.randn(96, 40)))
    other = GrinqhTensor.from_hp(torch.randn(96, 40), 2, (0, 2, 4))
    x = torch.randn(1, 40)
    linear(x)
    linear.weight.data = other
    assert torch.equal(linear(x), F.linear(x, other, linear.bias))
    assert linear.weight.levels == (0, 2, 4)
    linear.weight.data = linear.weight.data.to(torch.bfloat16)
    assert linear.weight.dtype == linear.weight.dequantize().dtype == torch.bfloat16
    with pytest.raises(TypeError, match="cannot make a Tensor the data of a GrinqhTensor"):
        linear.weight.data = torch.zeros(96, 40)


def test_codes_are_not_trained(caplog):
    weight = nn.Parameter(GrinqhTensor.from_hp(torch.randn(96, 40)), requires_grad=False)
    aten_ops._say_that_codes_are_not_trained.cache_clear()  # in a test before
    weight.requires_grad_(False)
    weight.requires_grad = False
    assert not caplog.text
    weight.requires_grad_()
    weight.requires_grad = True
    assert not weight.requires_grad
    assert caplog.text.count("requires_grad=True has no effect on a GrinqhTensor") == 1


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("shape", [(95,), (1,), (), (97,)])
def test_a_bias_that_does_not_fit(weight, shape, rows):
    with pytest.raises((ValueError, RuntimeError), match="bias"):
        F.linear(torch.randn(rows, 40), weight, torch.zeros(shape))


def test_arguments_that_make_no_sense(weight):
    for min_bits in (9, -1, "6"):
        with pytest.raises(ValueError, match=f"min_bits={min_bits!r}: expected a number from 0 to"):
            GrinqhTensor.from_hp(torch.randn(96, 40), min_bits=min_bits)
    with pytest.raises(TypeError, match=r"output_dtype=torch.int32: expected floating point"):
        weight.dequantize(torch.int32)
    with pytest.raises(ValueError, match=r"input of shape \(\): expected \[\.\.\., 40\]"):
        F.linear(torch.tensor(3.0), weight)
    for rows in (1, 9):
        with pytest.raises(TypeError, match="float8_e4m3fn: expected floating point of 16 bits"):
            F.linear(torch.zeros(rows, 40).to(torch.float8_e4m3fn), weight)
