"""In which dtype dense products are computed where a processor lacks fast ones of 16 bits."""

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torchao.quantization import quantize_

from grinqh_ao import GrinqhConfig, GrinqhTensor, ops
from grinqh_ao.ops import dense_products, oracle
from grinqh_ao.ops.cpu import dequantize
from plain import laplace

HALVES = [torch.float16, torch.bfloat16]
# The block by block one, and the one that works without a compiler.
DENSE_LINEARS = [dequantize.dense_linear, oracle.dense_linear]


class Products(TorchDispatchMode):
    """Of which dtypes they are. Calls of ops are not looked into, but those of their functions."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.dtypes.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=[False, True], ids=["slow", "fast"])
def fast(request, monkeypatch):
    for dtype in HALVES:
        monkeypatch.setitem(dense_products._ONEDNN_MULTIPLIES, dtype, request.param)
    return request.param


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_onednn_is_asked(monkeypatch, name):
    assert {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    } == dense_products._ONEDNN_MULTIPLIES
    for answer in (False, True):
        monkeypatch.setattr(
            torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", lambda answer=answer: answer
        )
        assert dense_products._onednn_multiplies(name) == answer
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not dense_products._onednn_multiplies(name)


def test_other_devices_multiply_in_any_dtype(monkeypatch):
    monkeypatch.setitem(dense_products._ONEDNN_MULTIPLIES, torch.bfloat16, False)
    x = torch.empty(2, dtype=torch.bfloat16)
    assert dense_products.product_dtype(x) == torch.float32
    assert dense_products.product_dtype(x.to("meta")) == torch.bfloat16


@pytest.fixture
def weight():
    return GrinqhTensor.from_hp(torch.randn(300, 90))


def assert_close_to(expected, found):
    """As close as ``found``'s dtype, in which weights may be rounded as well."""
    allowed = 4 * torch.finfo(found.dtype).eps * float(expected.abs().max())
    assert float((found.double() - expected).abs().max()) <= allowed


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dense_linear", DENSE_LINEARS, ids=["blocks", "oracle"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_prompts(fast, weight, dtype, dense_linear, biased, autocast):
    x, bias = laplace(2, 6, 90).to(dtype), torch.randn(300).to(dtype) if biased else None
    with Products() as seen, torch.autocast("cpu", dtype, enabled=autocast and dtype in HALVES):
        found = dense_linear(x, weight.slices, weight.scales, weight.vectors, bias, None, 8)
    assert seen.dtypes == {torch.float32 if dtype in HALVES and not fast else dtype}
    assert found.dtype == dtype
    expected = F.linear(
        x.double(), weight.dequantize(torch.float64), bias.double() if biased else None
    )
    assert_close_to(expected, found)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gradients(fast, weight, dtype):
    x = laplace(12, 90).to(dtype).requires_grad_()
    with Products() as seen:
        y = F.linear(x, weight)
        y.float().sum().backward()
    assert seen.dtypes == {dtype if fast else torch.float32}
    assert y.dtype == x.grad.dtype == dtype
    dense = weight.dequantize(torch.float64)
    assert_close_to(x.detach().double() @ dense.t(), y.detach())
    assert_close_to(dense.sum(0).expand(12, -1), x.grad)


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_of_a_compiled_model(fast, autocast):
    model = nn.Sequential(nn.Linear(90, 300, bias=False)).requires_grad_(False)
    quantize_(model, GrinqhConfig(bits=3))
    products = []

    def backend(graph, inputs):
        def forward(graph, inputs):
            for node in graph.graph.nodes:
                if node.target is torch.ops.aten.mm.default:
                    products.append(node.args[0].meta["val"].dtype)
            return make_boxed_func(graph.forward)

        return aot_autograd(fw_compiler=forward)(graph, inputs)

    x = laplace(12, 90).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = torch.compile(model, fullgraph=True, backend=backend)(x)
    (gradient,) = torch.autograd.grad(y.float().sum(), x)
    expected = [torch.bfloat16 if fast else torch.float32] * 2  # forward and backward
    if autocast:
        expected[1] = torch.bfloat16  # AOTAutograd traces the backward pass with it on
    assert products == expected
    assert y.dtype == gradient.dtype == torch.bfloat16
    dense = model[0].weight.dequantize(torch.float64)
    assert_close_to(x.detach().double() @ dense.t(), y.detach())
    assert_close_to(dense.sum(0).expand(12, -1), gradient)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_experts_take_the_same_path(fast, dtype):
    stack = GrinqhTensor.stack([GrinqhTensor.from_hp(torch.randn(70, 40)) for _ in range(3)])
    x, experts = laplace(12, 40).to(dtype), torch.arange(12) % 3
    found = ops.dense_experts(x, experts, stack.slices, stack.scales, stack.vectors, 8)
    for i, w in enumerate(stack.unbind()):
        rows = experts == i
        expected = ops.dense_linear(x[rows], w.slices, w.scales, w.vectors, None, None, 8)
        assert torch.equal(found[rows], expected)
    dense = stack.dequantize(torch.float64)
    assert_close_to(torch.einsum("snk,sk->sn", dense[experts], x.double()), found)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_nothing_is_rounded_twice_where_it_is_slow(monkeypatch, weight, dtype):
    """Weights keep their float32 values: only the result is rounded."""
    monkeypatch.setitem(dense_products._ONEDNN_MULTIPLIES, dtype, False)
    x = laplace(12, 90).to(dtype)
    expected = F.linear(x.float(), weight.dequantize(torch.float32)).to(dtype)
    torch.testing.assert_close(
        F.linear(x, weight), expected, rtol=torch.finfo(dtype).eps, atol=1e-5
    )
