"""Models that are quantized, moved, cast or loaded in inference mode."""

import copy

import pytest
import torch
from torchao.quantization import quantize_

import grinqh_ao
from grinqh_ao import GrinqhConfig, GrinqhTensor
from grinqh_ao.model import quantized_linears
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


@pytest.mark.parametrize("quantized_within", [True, False])
@pytest.mark.parametrize("used_within", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_everything_else(family, quantized_within, used_within, tmp_path):
    model = tiny_model(family, tied=False).requires_grad_(False)
    ids = torch.arange(3, 9)[None]
    with torch.inference_mode(quantized_within):
        quantize_(model, GrinqhConfig(bits=3))
    with torch.inference_mode(used_within):
        grinqh_ao.set_bits(model, 2)
        assert "2.00" in str(grinqh_ao.summary(model))
        grinqh_ao.fuse_projections(model)
        with grinqh_ao.measure(model) as measured:
            model(ids)
        assert measured.total.bits > 0
        grinqh_ao.save(model, tmp_path / "model")
    if not quantized_within:
        grinqh_ao.calibrate(model, torch.randint(0, 320, (1, 64)), importance=False)
        assert all(weight.curve is not None for *_, weight in quantized_linears(model))
    found = grinqh_ao.load(tmp_path / "model")
    body = [weight for *_, weight in quantized_linears(found) if not weight.min_bits]
    assert body
    assert all(weight.bits == pytest.approx(2) for weight in body)


@pytest.mark.parametrize("within", [True, False])
def test_parts_of_a_weight(within):
    weight = GrinqhTensor.from_hp(torch.randn(128, 40))
    stack = GrinqhTensor.stack([weight, weight])
    with torch.inference_mode(within):
        parts = [weight[:], weight[:64], weight[:, 3:], weight.detach(), stack[0], *stack.unbind()]
        parts += [*weight.split(64), torch.ops.aten.alias(weight)]
    assert not any(part.is_inference() for part in parts)
    assert all(isinstance(part, GrinqhTensor) for part in parts)
    assert torch.equal(stack[0], weight)


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
    other.lm_head.weight.slices.zero_()
    with torch.inference_mode(within):
        other.load_state_dict(dense.state_dict())
    assert other.lm_head.weight.dtype == torch.float16
    assert torch.equal(other.lm_head.weight.slices, dense.lm_head.weight.slices)
