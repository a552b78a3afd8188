"""Models that are quantized, moved, cast or loaded in inference mode."""

import copy

import pytest
import torch
from torchao.quantization import quantize_

from grinqh_ao import GrinqhConfig, GrinqhTensor
from models import tiny_model


@pytest.fixture
def dense():
    return tiny_model("llama", tied=True)


def move(model):
    model.cpu().half().float()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32, name
    assert model(torch.arange(3)[None]).logits.isfinite().all()
    assert model.to("meta").lm_head.weight.is_meta


@pytest.mark.parametrize("quantized_within", [True, False])
@pytest.mark.parametrize("moved_within", [True, False])
@torch.no_grad()
def test_models_can_be_moved(dense, quantized_within, moved_within):
    with torch.inference_mode(quantized_within):
        quantize_(dense, GrinqhConfig(bits=3))
    with torch.inference_mode(moved_within):
        move(dense)


@pytest.mark.parametrize("quantized_within", [True, False])
def test_models_can_be_loaded(dense, quantized_within):
    with torch.inference_mode(quantized_within):
        quantize_(dense, GrinqhConfig(bits=3))
    other = copy.deepcopy(dense)
    for parameter in other.parameters():
        if isinstance(parameter, GrinqhTensor):
            with torch.inference_mode():
                parameter.slices.zero_()
    with torch.inference_mode():
        other.load_state_dict(dense.state_dict())
    assert torch.equal(other.lm_head.weight, dense.lm_head.weight)


def test_what_has_that_dtype_and_device_stays_itself(dense):
    quantize_(dense, GrinqhConfig(bits=3))
    weight = dense.lm_head.weight
    with torch.inference_mode():
        assert weight.to(torch.float32) is weight
        assert weight.to("cpu") is weight
        copied = weight.to("cpu", copy=True)
    assert copied.slices.data_ptr() != weight.slices.data_ptr()


@pytest.mark.parametrize("within", [True, False])
def test_codes_are_loaded_whatever_dtype_a_model_has(dense, within):
    quantize_(dense, GrinqhConfig(bits=3))
    other = copy.deepcopy(dense).half()
    with torch.inference_mode(within):
        other.load_state_dict(dense.state_dict())
    assert other.lm_head.weight.dtype == torch.float16
    assert torch.equal(other.lm_head.weight.slices, dense.lm_head.weight.slices)
