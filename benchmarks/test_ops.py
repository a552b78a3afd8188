"""Micro-benchmarks of the codec and the ops: ``make bench``."""

import pytest
import torch
import torch.nn.functional as F

from grinqh_ao import GrinqhTensor

SHAPES = [(1536, 576), (4096, 4096)]


@pytest.fixture(params=SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def weight(request: pytest.FixtureRequest) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(request.param)


def test_quantize(benchmark, weight):
    benchmark(GrinqhTensor.from_hp, weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_decode(benchmark, weight, bits):
    nested = GrinqhTensor.from_hp(weight, bits)
    x = torch.distributions.Laplace(0.0, 1.0).sample((1, weight.shape[1]))
    benchmark(F.linear, x, nested)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decode_dense(benchmark, weight, dtype):
    x = torch.randn(1, weight.shape[1], dtype=dtype)
    benchmark(F.linear, x, weight.to(dtype))


def test_dequantize(benchmark, weight):
    benchmark(GrinqhTensor.from_hp(weight).dequantize)
