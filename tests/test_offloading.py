"""Models whose weights accelerate keeps elsewhere and brings to their device when needed."""

import copy

import pytest
import torch
from test_calibration import batches
from torchao.quantization import quantize_

from grinqh_ao import GrinqhConfig, calibrate, decode_every_row, measure, set_bits, summary
from grinqh_ao.model import quantized_linears
from models import tiny_model

accelerate = pytest.importorskip("accelerate")


@pytest.fixture
def pair():
    """The same model, at hand and offloaded."""
    model = tiny_model("llama", tied=False)
    quantize_(model, GrinqhConfig(bits=3))
    offloaded = copy.deepcopy(model)
    accelerate.cpu_offload(offloaded, execution_device=torch.device("cpu"))
    assert offloaded.model.layers[0].mlp.up_proj.weight.is_meta
    return model, offloaded


def tokens_of(model):
    ids = batches(count=1)[0][:, :20]
    return model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)


def test_it_decodes_alike_at_any_bits(pair):
    model, offloaded = pair
    for bits in (2.0, 3.0):
        set_bits(model, bits)
        set_bits(offloaded, bits)
        assert torch.equal(tokens_of(offloaded), tokens_of(model))
        assert summary(offloaded).bits == pytest.approx(bits, abs=1e-3)


@pytest.mark.parametrize("options", [{}, {"stored_bits": 5.0}, {"importance": False}], ids=str)
def test_it_is_calibrated_alike(pair, options):
    for model in pair:
        calibrate(model, batches(), bits=2.5, **options)
    model, offloaded = pair
    for (_, _, one), (_, _, other) in zip(
        quantized_linears(model), quantized_linears(offloaded), strict=True
    ):
        assert not other.is_meta
        assert torch.equal(one.curve, other.curve)
        assert torch.equal(one.thresholds, other.thresholds)
    assert torch.equal(tokens_of(offloaded), tokens_of(model))
    assert summary(offloaded).stored_bytes == summary(model).stored_bytes


def test_tied_weights_stay_one():
    model = tiny_model("llama", tied=True)
    quantize_(model, GrinqhConfig(bits=3))
    expected = summary(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    found = summary(model)
    assert found.tied == expected.tied
    assert found.weights == expected.weights
    assert found.stored_bytes == expected.stored_bytes


def test_it_is_measured_alike(pair):
    found = []
    for model in pair:
        with torch.no_grad(), measure(model) as read, decode_every_row(16):
            model(batches(count=1)[0])
        found.append(read.total)
    assert found[0] == found[1]
