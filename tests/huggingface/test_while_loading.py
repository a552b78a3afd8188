"""Quantizing while transformers loads, by our config and by TorchAO's."""

import json
import logging

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torchao.quantization import FqnToConfig, quantize_
from transformers import AutoModelForCausalLM, Mxfp4Config, TorchAoConfig

import grinqh_ao
from grinqh_ao import (
    GrinqhConfig,
    GrinqhHfConfig,
    calibrate,
    token_batches,
)
from grinqh_ao.model import quantized_linears
from models import layers_of, tiny_model, tiny_tokenizer
from saved import MODELS, assert_alike


@pytest.mark.parametrize(("family", "tied"), [*MODELS, ("llama", False)])
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "50KB"}], ids=["one file", "shards"])
def test_quantized_while_loading_is_the_same(family, tied, options, tmp_path):
    model = tiny_model(family, tied=tied)
    model.save_pretrained(tmp_path, **options)
    quantize_(model, GrinqhConfig(bits=3))
    config = GrinqhHfConfig(bits=3)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert_alike(model, loaded)
    loaded.save_pretrained(tmp_path / "again")
    assert_alike(loaded, AutoModelForCausalLM.from_pretrained(tmp_path / "again"))


def test_gpt_oss_as_it_is_published(tmp_path):
    """In MXFP4, which transformers takes back to bfloat16 first."""
    model = tiny_model("gpt_oss", tied=False, dtype=torch.bfloat16, intermediate_size=64)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        e, k, n = tensors.pop(name).shape
        codes = torch.randint(0, 256, (e, n, k // 32, 16), dtype=torch.uint8)
        exponents = torch.randint(120, 126, (e, n, k // 32), dtype=torch.uint8)
        tensors |= {f"{name}_blocks": codes, f"{name}_scales": exponents}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "config.json").write_text(json.dumps(config))

    published = Mxfp4Config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=published)
    ids = torch.randint(0, 320, (1, 12))
    with torch.no_grad():
        expected = model(ids).logits.float()
        quantize_(model, GrinqhConfig(bits=3))
        found = model(ids).logits.float()
    assert "model.layers.0.mlp.experts.gate_up_proj" in grinqh_ao.summary(model).quantized
    assert (found - expected).norm() < 0.1 * expected.norm()
    model.save_pretrained(tmp_path / "nested")
    assert_alike(model, AutoModelForCausalLM.from_pretrained(tmp_path / "nested"))


def test_biases_of_experts_that_are_missing_are_initialized(tmp_path):
    model = tiny_model("gpt_oss", tied=False)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("_proj_bias")}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    dense = AutoModelForCausalLM.from_pretrained(tmp_path)
    quantize_(dense, GrinqhConfig(bits=3))
    config = GrinqhHfConfig(bits=3)
    assert_alike(dense, AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config))


def test_what_a_config_asks_for(tmp_path):
    tiny_model("llama", tied=False).save_pretrained(tmp_path)
    config = GrinqhHfConfig(
        bits=3.5, levels=[2, 4, 6], head_bits=None, modules_to_not_convert=["down_proj"]
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert {name.rpartition(".")[2] for name in layers_of(loaded)} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
    }  # fmt: skip
    weight = loaded.model.layers[0].mlp.up_proj.weight
    assert weight.levels == (2, 4, 6)
    assert weight.bits == pytest.approx(3.5, abs=1e-3)


def test_dtype_while_loading(tmp_path):
    tiny_model("llama", tied=True).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=GrinqhHfConfig(), dtype=torch.bfloat16
    )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_not_finite_weights_are_refused_while_loading(tmp_path, caplog):
    model = tiny_model("llama", tied=True)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    model.save_pretrained(tmp_path)
    caplog.set_level(logging.WARNING, logger="transformers")  # its server leaves it higher
    transformers.utils.logging.enable_propagation()
    with pytest.raises(RuntimeError):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=GrinqhHfConfig())
    transformers.utils.logging.disable_propagation()
    assert "model.layers.1.mlp.up_proj: its weight has NaN" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 9}, "bits=9"),
        ({"levels": [0, 3]}, "levels"),
        ({"head_bits": 0}, "head_bits=0"),
        ({"group_size": 64}, "group_size"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        GrinqhHfConfig(**options)


def test_calibrating_a_loaded_model(tmp_path):
    words = " ".join(f"w{i % 300}" for i in range(400))
    tokenizer = tiny_tokenizer(words)
    tiny_model("llama", tied=True).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=GrinqhHfConfig())
    calibrate(model, token_batches(words, tokenizer, 256), bits=2.5)
    assert model.lm_head.weight.curve is not None


def test_torchao_config(tmp_path):
    tiny_model("llama", tied=False).save_pretrained(tmp_path)
    config = TorchAoConfig(GrinqhConfig(bits=3))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert len(layers_of(model)) == 14
    assert "lm_head" not in layers_of(model)  # TorchAoConfig leaves it out
    grinqh_ao.save(model, tmp_path / "saved")
    assert_alike(model, grinqh_ao.load(tmp_path / "saved"))


def test_torchao_config_by_name(tmp_path):
    tiny_model("llama", tied=False).save_pretrained(tmp_path)
    by_name = {
        "re:.*q_proj": GrinqhConfig(bits=2),
        "re:.*k_proj": None,
        "model.embed_tokens": None,
        "lm_head": GrinqhConfig(bits=6),
        "_default": GrinqhConfig(bits=3),
    }
    config = TorchAoConfig(FqnToConfig(by_name), include_input_output_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    bits = {name: weight.bits for name, _, weight in quantized_linears(model)}
    assert bits["model.layers.0.self_attn.q_proj"] == pytest.approx(2, abs=1e-3)
    assert bits["model.layers.0.mlp.up_proj"] == pytest.approx(3, abs=1e-3)
    assert bits["lm_head"] == pytest.approx(6, abs=1e-3)
    assert not any("k_proj" in name for name in bits)
