"""Micro-benchmarks of the codec and the ops: ``make bench``, or ``pytest benchmarks``.

Weights stay in the caches here, where they fit; ``benchmarks/cpu.py`` has them come from memory.
"""

import pytest
import torch
import torch.nn.functional as F

from grinqh_ao import GrinqhTensor

SHAPES = [(1536, 576), (4096, 4096)]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def weight(request: pytest.FixtureRequest) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(request.param)


def laplace(rows: int, weight: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.distributions.Laplace(0.0, 1.0).sample((rows, weight.shape[1])).to(dtype)


def test_quantize(benchmark, weight):
    benchmark(GrinqhTensor.from_hp, weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_decode(benchmark, weight, bits, dtype):
    benchmark(F.linear, laplace(1, weight, dtype), GrinqhTensor.from_hp(weight, bits))


@pytest.mark.parametrize("rows", [2, 4, 8])
def test_decode_rows(benchmark, weight, rows):
    benchmark(F.linear, laplace(rows, weight, torch.bfloat16), GrinqhTensor.from_hp(weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_dense(benchmark, weight, dtype):
    benchmark(F.linear, laplace(1, weight, dtype), weight.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prompt(benchmark, weight, dtype):
    benchmark(F.linear, laplace(128, weight, dtype), GrinqhTensor.from_hp(weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prompt_dense(benchmark, weight, dtype):
    benchmark(F.linear, laplace(128, weight, dtype), weight.to(dtype))


def test_dequantize(benchmark, weight):
    benchmark(GrinqhTensor.from_hp(weight).dequantize)
