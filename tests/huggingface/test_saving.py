"""Saving a quantized model and loading it again."""

import json

import pytest
import torch
import transformers
from torch import nn
from torchao.quantization import FqnToConfig, quantize_
from transformers import AutoModelForCausalLM

import grinqh_ao
from grinqh_ao import (
    GrinqhConfig,
    GrinqhHfConfig,
    GrinqhTensor,
    calibrate,
    set_bits,
)
from grinqh_ao.huggingface.quantizer import GrinqhHfQuantizer
from grinqh_ao.model import quantized_linears
from models import SMALL, tiny_model, tiny_tokenizer
from saved import IDS, MODELS, assert_alike, logits, quantized


@pytest.mark.parametrize(("family", "tied"), MODELS)
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "50KB"}], ids=["one file", "shards"])
def test_saved_and_loaded_is_the_same(family, tied, options, tmp_path):
    model = quantized(family, tied)
    set_bits(model, 3.5)
    model.save_pretrained(tmp_path, **options)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or options
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_alike(model, loaded)
    assert "grinqh: levels" in repr(loaded)
    assert not any(weight.requires_grad for _, _, weight in quantized_linears(loaded))
    for one in (model, loaded):
        set_bits(one, 2.0)
    assert_alike(model, loaded)


def test_saved_again(tmp_path):
    quantized().save_pretrained(tmp_path / "first")
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    set_bits(first, 4.0)
    first.save_pretrained(tmp_path / "second")
    assert_alike(first, AutoModelForCausalLM.from_pretrained(tmp_path / "second"))
    config = json.loads((tmp_path / "second" / "config.json").read_text())
    assert config["quantization_config"]["bits"] == pytest.approx(4.0)


@pytest.mark.parametrize("stored_bits", [None, 5.0])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_calibrated_models_keep_their_curves(family, stored_bits, tmp_path):
    model = quantized(family, tied=False)
    calibrate(model, torch.randint(0, 320, (2, 64)), stored_bits=stored_bits)
    model.save_pretrained(tmp_path)
    loaded = grinqh_ao.load(tmp_path)
    assert_alike(model, loaded)
    some = next(weight for _, _, weight in quantized_linears(loaded) if not weight.min_bits)
    assert some.curve is not None
    assert (some.low is None) == (stored_bits is None)


def test_levels_and_dense_layers_survive(tmp_path):
    """Each layer's own settings, not the last config's."""
    model = tiny_model("llama", tied=False)
    configs = {
        "re:.*q_proj": GrinqhConfig(bits=2, levels=[0, 2, 4]),
        "re:.*mlp.*": GrinqhConfig(bits=5, levels=[4, 8]),
        "lm_head": GrinqhConfig(bits=3, head_bits=7),
    }
    quantize_(model, FqnToConfig(configs), filter_fn=None)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_alike(model, loaded)
    assert type(loaded.model.layers[0].self_attn.k_proj.weight) is torch.nn.Parameter


def test_dense_tied_head_stays_tied(tmp_path):
    model = quantized(head_bits=None)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_alike(model, loaded)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype(dtype, tmp_path):
    quantized().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert logits(loaded).dtype == dtype
    # What is stored does not depend on it.
    assert loaded.lm_head.weight.vectors.dtype == torch.float32
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert again.dtype == dtype
    assert_alike(loaded, again)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_map(device_map, tmp_path):
    model = quantized()
    model.save_pretrained(tmp_path)
    assert_alike(model, AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map))


def test_disk_offload_is_refused(tmp_path):
    quantized().save_pretrained(tmp_path)
    for device_map in ({"": "disk"}, "meta"):
        with pytest.raises(ValueError, match="disk or meta"):
            AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)


@pytest.mark.parametrize("tied", [True, False])
def test_offloaded_models_are_saved_whole(tied, tmp_path):
    import accelerate

    model = quantized(tied=tied)
    expected = logits(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.lm_head.weight.is_meta
    grinqh_ao.save(model, tmp_path)
    loaded = grinqh_ao.load(tmp_path)
    assert torch.equal(logits(loaded), expected)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


def test_a_head_that_was_untied_stays_so(tmp_path):
    model = tiny_model("llama", tied=True)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    quantize_(model, GrinqhConfig(bits=3))
    model.save_pretrained(tmp_path)
    assert_alike(model, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_saving_over_the_files_that_are_in_use(tmp_path):
    quantized().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    set_bits(model, 2.0)
    model.save_pretrained(tmp_path)
    assert_alike(model, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_names_that_a_conversion_would_change(tmp_path):
    """In Laguna's files it is mlp.shared_expert, a pattern that fits its shared_experts too."""
    config = transformers.LagunaConfig(
        **SMALL, head_dim=16, moe_intermediate_size=80, num_experts=4, num_experts_per_tok=2,
        shared_expert_intermediate_size=80,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LagunaForCausalLM(config).eval()
    quantize_(model, GrinqhConfig(bits=3))
    model.save_pretrained(tmp_path)
    assert_alike(model, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_a_vision_language_model(tmp_path):
    text = SMALL | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
    config = transformers.Qwen2VLConfig(
        text_config=text,
        vision_config={"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 64},
        image_token_id=300, video_token_id=301, vision_start_token_id=302, vision_end_token_id=303,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen2VLForConditionalGeneration(config).eval()
    quantize_(model, GrinqhConfig(bits=3))
    grinqh_ao.save(model, tmp_path)
    assert_alike(model, grinqh_ao.load(tmp_path))
    assert '"AutoModelForImageTextToText"' in (tmp_path / "config.json").read_text()
    base = transformers.AutoModel.from_pretrained(tmp_path)
    for name, parameter in model.model.named_parameters():
        assert torch.equal(base.get_parameter(name), parameter), name


@pytest.mark.parametrize("loaded", [False, True])
def test_parts_that_are_models_are_saved_alone(loaded, tmp_path):
    model = quantized(tied=False)
    if loaded:
        model.save_pretrained(tmp_path / "whole")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    model.model.save_pretrained(tmp_path)
    base = transformers.AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(base(IDS)[0], model.model(IDS)[0])
    model.save_pretrained(tmp_path / "again")
    assert_alike(model, AutoModelForCausalLM.from_pretrained(tmp_path / "again"))


def test_a_config_that_models_share_is_changed_by_saving_only():
    model = quantized()
    assert not hasattr(model.config, "quantization_config")


def test_classifiers(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, num_labels=3, pad_token_id=0)
    model = transformers.LlamaForSequenceClassification(config).eval()
    quantize_(model, GrinqhConfig(bits=3))
    grinqh_ao.save(model, tmp_path)
    assert "AutoModelForSequenceClassification" in (tmp_path / "config.json").read_text()
    loaded = grinqh_ao.load(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_save_does_not_upload_half(tmp_path):
    with pytest.raises(ValueError, match="upload_folder"):
        grinqh_ao.save(quantized(), tmp_path / "new", push_to_hub=True)
    assert not (tmp_path / "new").exists()


def test_very_few_bits(tmp_path):
    model = quantized()
    set_bits(model, 1e-7)
    model.save_pretrained(tmp_path)
    assert_alike(model, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_base_model_of_a_saved_one(tmp_path):
    model = quantized("qwen3", tied=False)
    model.save_pretrained(tmp_path)
    base = transformers.AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(base(IDS)[0], model.model(IDS)[0])


def test_replaces_another_quantizer(tmp_path):
    """As a model's that came from GGUF and was made dense."""
    model = tiny_model("llama", tied=True)
    model.hf_quantizer = object()
    model.config.quantization_config = transformers.GgufConfig(dequantize=True)
    quantize_(model, GrinqhConfig(bits=3))
    model.save_pretrained(tmp_path)
    assert_alike(model, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_a_part_that_was_quantized_by_itself(tmp_path):
    model = tiny_model("llama", tied=False)
    quantize_(model.model.layers[0], GrinqhConfig(bits=3))
    grinqh_ao.save(model, tmp_path)
    assert_alike(model, grinqh_ao.load(tmp_path))


def test_a_part_that_was_quantized_before_the_whole(tmp_path):
    model = tiny_model("llama", tied=False)
    quantize_(model.model, GrinqhConfig(bits=3))
    quantize_(model, GrinqhConfig(bits=3, head_bits=None))  # nothing is left to be done
    model.save_pretrained(tmp_path)
    assert_alike(model, grinqh_ao.load(tmp_path))


def test_push_to_hub_uploads_the_same_files(tmp_path, monkeypatch):
    model = quantized()
    uploaded = []

    class Repository:
        repo_id = "me/tiny"

    from transformers.utils import hub

    api = type(
        "Api", (), {"create_repo": lambda *args, **options: Repository(),
                    "create_commit": lambda self, **options: uploaded.extend(
                        o.path_in_repo for o in options["operations"])}
    )  # fmt: skip
    if hasattr(hub, "hf_api"):
        monkeypatch.setattr(hub, "hf_api", api)
        monkeypatch.setattr(transformers.modeling_utils, "hf_api", api, raising=False)
    else:
        monkeypatch.setattr(hub, "create_repo", api().create_repo)
        monkeypatch.setattr(hub, "create_commit", api().create_commit)
        monkeypatch.setattr(transformers.modeling_utils, "create_repo", api().create_repo)
    monkeypatch.setattr(
        transformers.modeling_utils,
        "create_and_tag_model_card",
        lambda *a, **k: __import__("huggingface_hub").ModelCard("---\ntags: [grinqh]\n---\n"),
        raising=False,
    )
    model.push_to_hub("me/tiny")
    assert "model.safetensors" in uploaded
    assert "config.json" in uploaded


def test_save_writes_a_card_and_load_reads(tmp_path):
    model = quantized()
    tokenizer = tiny_tokenizer(" ".join(f"w{i}" for i in range(300)))
    grinqh_ao.save(model, tmp_path / "tiny-q", tokenizer)
    card = (tmp_path / "tiny-q" / "README.md").read_text()
    assert 'grinqh_ao.load("tiny-q")' in card
    assert "trust-remote-code" in card
    assert "bits read per weight and token: 3.00" in card
    loaded = grinqh_ao.load(tmp_path / "tiny-q")
    assert_alike(model, loaded)
    assert not hasattr(model.config, "auto_map")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "tiny-q")
    # A card that somebody has written stays.
    (tmp_path / "tiny-q" / "README.md").write_text("mine")
    grinqh_ao.save(loaded, tmp_path / "tiny-q")
    assert (tmp_path / "tiny-q" / "README.md").read_text() == "mine"


def test_save_refuses_what_it_cannot_save(tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig

    with pytest.raises(ValueError, match="no layer is quantized"):
        grinqh_ao.save(tiny_model("llama", tied=True), tmp_path / "new")
    model = tiny_model("llama", tied=False)
    quantize_(model.model.layers[0], Int8WeightOnlyConfig())
    quantize_(model, GrinqhConfig(bits=3))
    with pytest.raises(ValueError, match="quantized otherwise"):
        grinqh_ao.save(model, tmp_path / "new")
    with pytest.raises(ValueError, match="Sequential: expected a model of transformers"):
        grinqh_ao.save(nn.Sequential(nn.Linear(4, 4)), tmp_path / "new")
    with pytest.raises(ValueError, match="directory='': expected the name"):
        grinqh_ao.save(quantized(), "")
    assert not (tmp_path / "new").exists()


def test_load_refuses_what_is_not_ours(tmp_path):
    tiny_model("llama", tied=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected a model quantized by GRINQH"):
        grinqh_ao.load(tmp_path)


def test_quantizer_says_what_transformers_asks():
    quantizer = GrinqhHfQuantizer(GrinqhHfConfig(), pre_quantized=False)
    assert quantizer.is_serializable()
    assert quantizer.is_trainable
    assert quantizer.is_compileable


def test_a_quantized_model_copies_and_generates(tmp_path):
    import copy
    import pickle

    model = quantized()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_alike(loaded, copy.deepcopy(loaded))
    assert_alike(loaded, pickle.loads(pickle.dumps(loaded)))
    assert isinstance(loaded.lm_head.weight, GrinqhTensor)


def test_a_compiled_model_is_saved_as_what_it_is(tmp_path):
    model = quantized("llama")
    grinqh_ao.save(model, tmp_path / "a")
    grinqh_ao.save(torch.compile(model), tmp_path / "b")
    names = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert sorted(file.name for file in (tmp_path / "b").iterdir()) == names
    assert "modeling_grinqh.py" in names
    assert "auto_map" in (tmp_path / "b" / "config.json").read_text()


@pytest.mark.parametrize("around", [torch.compile, nn.Sequential], ids=["compiled", "wrapped"])
def test_a_model_within_what_was_quantized(around, tmp_path):
    model = tiny_model("llama", tied=True)
    quantize_(around(model), GrinqhConfig(bits=3))
    model.save_pretrained(tmp_path)
    assert_alike(model, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_in_inference_mode(tmp_path):
    model = quantized("llama")
    with torch.inference_mode():
        grinqh_ao.save(model, tmp_path / "a")
        model.save_pretrained(tmp_path / "b")
    for name in ("a", "b"):
        assert_alike(model, AutoModelForCausalLM.from_pretrained(tmp_path / name))
