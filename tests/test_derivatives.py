"""Derivatives forwards, and torch.func's: those of a dense layer of the same weight."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torchao.quantization import quantize_

from grinqh_ao import GrinqhConfig, fuse_projections
from grinqh_ao.experts import ExpertLinears
from grinqh_ao.torchao_tensor import GrinqhTensor


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(40, 70), nn.Linear(40, 70, bias=False)

    def forward(self, x):
        return self.gate_proj(x).tanh() * self.up_proj(x)


def blocks(fused: bool) -> tuple[nn.Module, nn.Module]:
    """Quantized, and dense with the same weights."""
    block = Block().requires_grad_(False)
    quantize_(block, GrinqhConfig(bits=8))
    dense = copy.deepcopy(block)
    for layer in dense.children():
        layer.weight = nn.Parameter(layer.weight.dequantize(), requires_grad=False)
    if fused:
        fuse_projections(block)
    return block, dense


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("fused", [False, True])
def test_forwards(fused, rows):
    block, dense = blocks(fused)
    x, tangent = torch.randn(2, rows, 40)
    found = torch.func.jvp(block, (x,), (tangent,))
    expected = torch.func.jvp(dense, (x,), (tangent,))
    assert expected[1].abs().max() > 0.1
    torch.testing.assert_close(found, expected)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(block(forward_ad.make_dual(x, tangent)))
        torch.testing.assert_close(tuple(dual), expected)
        block(x)  # without a tangent
    torch.testing.assert_close(block(x), expected[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("transform", ["grad", "jacrev", "hessian"])
def test_of_functions(transform, fused, rows):
    block, dense = blocks(fused)
    x = torch.randn(rows, 40)

    def derivative(module):
        scalar = transform != "jacrev"
        of_sum = lambda x: module(x).sum()  # noqa: E731
        return getattr(torch.func, transform)(of_sum if scalar else module)(x)

    torch.testing.assert_close(derivative(block), derivative(dense), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_vmap(fused):
    block, _ = blocks(fused)
    x = torch.randn(5, 2, 40)
    expected = torch.stack([block(rows) for rows in x])
    torch.testing.assert_close(torch.vmap(block)(x), expected)


def test_of_a_bias():
    weight = GrinqhTensor.from_hp(torch.randn(70, 40), 8)
    x, bias = torch.randn(2, 40), torch.randn(70)
    found = torch.func.grad(lambda bias: F.linear(x, weight, bias).square().sum())(bias)
    expected = torch.func.grad(lambda bias: F.linear(x, weight.dequantize(), bias).square().sum())
    torch.testing.assert_close(found, expected(bias))


def test_experts_forwards():
    weight = GrinqhTensor.stack([GrinqhTensor.from_hp(torch.randn(70, 40), 8) for _ in range(3)])
    experts = torch.tensor([[0, 2], [1, 2]])
    x, tangent = torch.randn(2, 2, 2, 40)
    layers = ExpertLinears(weight)
    _, found = torch.func.jvp(lambda x: layers(x, experts), (x,), (tangent,))
    expected = torch.einsum("trk,trnk->trn", tangent, weight.dequantize()[experts])
    torch.testing.assert_close(found, expected)
