"""Models as they were saved, and whether what was loaded is the same."""

import torch
from torchao.quantization import quantize_

from grinqh_ao import (
    GrinqhConfig,
    summary,
)
from grinqh_ao.model import quantized_linears
from models import tiny_model

MODELS = [
    ("llama", True),
    ("qwen3", False),
    ("gemma3", True),
    ("qwen3_moe", False),
    ("mixtral", True),
    ("gpt_oss", False),
]
IDS = torch.arange(12)[None] * 7


@torch.no_grad()
def logits(model):
    """Of a prompt, and of a token that is decoded."""
    return torch.cat([model(IDS).logits, model(IDS[:, :1]).logits], dim=1)


def quantized(family="llama", tied=True, bits=3.0, **options):
    model = tiny_model(family, tied=tied)
    quantize_(model, GrinqhConfig(bits=bits, **options))
    return model


def assert_alike(one, other):
    """The same to the last bit, and everything that set_bits needs."""
    assert torch.equal(logits(one), logits(other))
    assert summary(one).tied == summary(other).tied
    layers = [{n: w for n, _, w in quantized_linears(model)} for model in (one, other)]
    assert layers[0].keys() == layers[1].keys()
    for name, weight in layers[0].items():
        same = layers[1][name]
        assert (same.levels, same.min_bits, same.dtype) == (
            weight.levels,
            weight.min_bits,
            weight.dtype,
        )
        assert same.data_names == weight.data_names
        for data in weight.data_names:
            assert torch.equal(getattr(same, data), getattr(weight, data)), f"{name}: {data}"
