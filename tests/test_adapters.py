"""PEFT's LoRA on quantized weights."""

import copy

import pytest
import torch
from packaging.version import Version
from torchao.quantization import quantize_
from transformers.integrations.peft import MIN_PEFT_VERSION

import grinqh_ao
from grinqh_ao import GrinqhConfig, GrinqhTensor, aten_ops, measure, set_bits, summary
from models import tiny_model

peft = pytest.importorskip("peft")

OWN_ADAPTERS = pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"this transformers takes adapters of PEFT {MIN_PEFT_VERSION} and newer",
)
IDS = torch.arange(48).view(2, 24) * 5 % 320


def quantized():
    model = tiny_model("llama", tied=True)
    quantize_(model, GrinqhConfig(bits=3))
    return model


def adapted(model, **options):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], **options)
    return peft.get_peft_model(model, config)


def test_training_lowers_the_loss_and_leaves_the_weights():
    model = adapted(quantized())
    weight = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    before = weight.slices.clone()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    assert torch.equal(weight.slices, before)


@torch.no_grad()
def test_saved_adapters_load_onto_the_same_model(tmp_path):
    base = quantized()
    model = adapted(copy.deepcopy(base), init_lora_weights=False)
    expected = model(IDS[:1, :1]).logits
    assert not torch.equal(expected, base(IDS[:1, :1]).logits)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(loaded(IDS[:1, :1]).logits, expected)


def test_adapted_models_decode_at_any_bits():
    model = adapted(quantized(), init_lora_weights=False)
    for bits in (2.0, 4.0):
        set_bits(model, bits)
        with measure(model) as measured:
            model.generate(input_ids=IDS[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert measured.body.bits == pytest.approx(bits, abs=0.4)


def test_adapters_that_were_there_before_are_left_to_be_trained(log):
    model = adapted(tiny_model("llama", tied=False), modules_to_save=["lm_head"])
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    quantize_(model, GrinqhConfig(bits=3))
    layers = summary(model).quantized
    assert len(layers) == 15
    assert not any("lora" in name or "modules_to_save" in name for name in layers)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    assert "13 layers of adapters are left dense" in log.text
    model(IDS).logits.sum().backward()
    assert model.base_model.model.lm_head.modules_to_save.default.weight.grad.abs().max() > 0


def test_a_quantized_layer_is_not_said_to_be_trained(log):
    aten_ops._say_that_codes_are_not_trained.cache_clear()  # it is said once
    model = adapted(quantized(), modules_to_save=["lm_head"])
    assert "requires_grad=True has no effect on a GrinqhTensor" in log.text
    assert all("lora" in name for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("how", ["merge_and_unload", "merge_adapter"])
def test_merging_is_refused_before_anything_changes(how):
    model = adapted(quantized(), init_lora_weights=False)
    with torch.no_grad():
        expected = model(IDS).logits
    with pytest.raises(ValueError, match="re-quantize"):
        getattr(model, how)()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected)


def test_unloading_gives_the_quantized_model_back():
    base = quantized()
    with torch.no_grad():
        expected = base(IDS).logits
        model = adapted(base, init_lora_weights=False).unload()
        assert torch.equal(model(IDS).logits, expected)
    assert isinstance(model.model.layers[0].self_attn.q_proj.weight, GrinqhTensor)


def test_merging_as_torchao_does(tmp_path):
    """PEFT dequantizes, merges and quantizes again, where it is told how to: by a TorchAoConfig."""
    from transformers import AutoModelForCausalLM, TorchAoConfig

    tiny_model("llama", tied=False).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=TorchAoConfig(GrinqhConfig(bits=3))
    )
    layers = summary(model).quantized
    model = adapted(model, init_lora_weights=False)
    with torch.no_grad():
        expected = model(IDS).logits
        merged = model.merge_and_unload()
        found = merged(IDS).logits
    assert summary(merged).quantized == layers
    error = (found - expected).square().mean() / expected.square().mean()
    assert error < 0.003  # of weights rounded to 8 bits twice


def test_adding_to_nested_codes_is_refused():
    weight = GrinqhTensor.from_hp(torch.randn(64, 64))
    with pytest.raises(NotImplementedError, match="merge adapters into the full-precision model"):
        weight += torch.randn(64, 64)


@OWN_ADAPTERS
def test_transformers_own_adapters(tmp_path):
    model = quantized()
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("own", [pytest.param(True, marks=OWN_ADAPTERS), False])
def test_save_does_not_lose_the_model_below_adapters(own, tmp_path):
    model = quantized()
    grinqh_ao.save(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    if own:
        model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"]))
    else:
        model = adapted(model)
    with pytest.raises(ValueError, match=r"has adapters: save them with model\.save_pretrained"):
        grinqh_ao.save(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
