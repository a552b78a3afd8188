"""Model families of transformers: every linear layer and expert is quantized, and kept."""

import pytest
import torch
import transformers
from torchao.quantization import quantize_
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from grinqh_ao import GrinqhConfig, summary
from models import SMALL

EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
DEEPSEEK = EXPERTS | {
    "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "q_lora_rank": 32, "kv_lora_rank": 16,
    "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}  # fmt: skip
HEAD = {"head_dim": 16}
# What the config of a family wants beside SMALL.
FAMILIES = {
    "apertus": {},
    "arcee": {},
    "bloom": {"n_layer": 2, "n_head": 4},
    "cohere": {},
    "cohere2": {},
    "deepseek_v3": DEEPSEEK,
    "ernie4_5": {},
    "exaone4": {},
    "falcon": {},
    "gemma": HEAD,
    "gemma2": HEAD,
    "gemma3_text": HEAD,
    "glm": HEAD,
    "glm4": HEAD,
    "glm4_moe": EXPERTS
    | HEAD
    | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "gpt_neox": {},
    "gpt_oss": HEAD | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "granite": {},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "helium": HEAD,
    "hunyuan_v1_dense": HEAD,
    "jamba": {
        "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1, "mamba_d_state": 8, "use_mamba_kernels": False,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "llama": {},
    "mamba": {"state_size": 8},
    "mamba2": {"state_size": 8, "num_heads": 4, "head_dim": 32, "n_groups": 1},
    "mistral": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "nemotron": {},
    "olmo2": {},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "phi": {},
    "phi3": {},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {},
    "qwen2_moe": EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 32},
    "qwen3": {},
    "qwen3_moe": EXPERTS | HEAD | {"num_experts": 4},
    "qwen3_next": EXPERTS
    | HEAD
    | {
        "num_experts": 4, "shared_expert_intermediate_size": 32,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 4, "linear_num_key_heads": 2,
        "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    },
    "seed_oss": HEAD,
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
}  # fmt: skip
# Of other classes, which hold weights too: what is left dense.
DENSE = ("Embedding", "Conv1d", "Router", "Mixer")


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_family(family, tmp_path):
    if family not in CONFIG_MAPPING:
        pytest.skip("this version of transformers does not have it yet")
    torch.manual_seed(0)
    options = SMALL | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | FAMILIES[family]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options)).eval()
    ids = torch.randint(3, 320, (1, 12))
    expected = model(ids).logits
    quantize_(model, GrinqhConfig(bits=8))
    dense = set(summary(model).dense.values())
    assert not [kind for kind in dense if not any(part in kind for part in DENSE)]
    found = model(ids).logits
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert errors.median() < 0.05  # a router may choose another expert for some token

    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, found)
    decode = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    assert torch.equal(loaded.generate(ids, **decode), model.generate(ids, **decode))


SEQ2SEQ = {
    "vocab_size": 320, "d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128,
    "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
IMAGE = 310  # a token; an image is four of them


def others():
    """Models that are no decoders of text alone: name of a class, config, inputs."""
    ids = torch.randint(3, 300, (1, 12))
    yield (
        "T5ForConditionalGeneration",
        transformers.T5Config(
            vocab_size=320, d_model=64, d_ff=128, d_kv=16, num_layers=2, num_heads=4,
            feed_forward_proj="gated-gelu", decoder_start_token_id=0,
        ),
        {"input_ids": ids},
    )  # fmt: skip
    yield "BartForConditionalGeneration", transformers.BartConfig(**SEQ2SEQ), {"input_ids": ids}
    whisper = transformers.WhisperConfig(
        **SEQ2SEQ, max_source_positions=50, num_mel_bins=16, suppress_tokens=[],
        begin_suppress_tokens=[],
    )  # fmt: skip
    features = {"input_features": torch.randn(1, 16, 100)}
    yield "WhisperForConditionalGeneration", whisper, features
    llava = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**SMALL),
        image_token_index=IMAGE,
        image_token_id=IMAGE,
    )
    with_image = torch.cat([ids, torch.full((1, 4), IMAGE), ids], dim=1)
    images = {"input_ids": with_image, "pixel_values": torch.randn(1, 3, 16, 16)}
    yield "LlavaForConditionalGeneration", llava, images


@pytest.mark.parametrize("number", range(4), ids=["t5", "bart", "whisper", "llava"])
@torch.no_grad()
def test_encoders_speech_and_images(number, tmp_path):
    torch.manual_seed(0)
    name, config, inputs = list(others())[number]
    model = getattr(transformers, name)(config).eval()
    decode = {"max_new_tokens": 6, "do_sample": False}
    decode |= {"output_scores": True, "return_dict_in_generate": True}
    expected = model.generate(**inputs, **decode)
    quantize_(model, GrinqhConfig(bits=8, head_bits=8))
    assert "Linear" not in summary(model).dense.values()
    found = model.generate(**inputs, **decode)
    first, exact = found.scores[0], expected.scores[0]
    assert (first - exact).norm() < 0.05 * exact.norm()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).generate(**inputs, **decode)
    assert torch.equal(loaded.sequences, found.sequences)
    assert torch.equal(torch.stack(loaded.scores), torch.stack(found.scores))
