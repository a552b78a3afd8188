"""Tiny random models, and what tests ask of models."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from grinqh_ao.model import quantized_linears

SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


# Layers that can be cut in two: each part has some heads, and at least 64 outputs.
CUTTABLE = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "vocab_size": 384,
    "num_key_value_heads": 4,
}

# By family: transformers' config and model class, and what its config wants beside SMALL.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 16}),
    "phi": ("PhiConfig", "PhiForCausalLM", {"num_key_value_heads": 4}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 16}),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            "head_dim": 16,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {
            "head_dim": 16,
            "moe_intermediate_size": 80,
            "num_experts": 6,
            "num_experts_per_tok": 2,
        },
    ),
    "gpt_oss": (  # experts with biases, stored transposed
        "GptOssConfig",
        "GptOssForCausalLM",
        {
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
}


def tiny_model(family: str, *, tied: bool, dtype: torch.dtype = torch.float32, **sizes: int) -> Any:
    """A random model with large enough weights that greedy tokens vary."""
    import transformers

    torch.manual_seed(0)
    config_name, model_name, more = FAMILIES[family]
    options = SMALL | more | {"tie_word_embeddings": tied, "initializer_range": 0.2} | sizes
    config = getattr(transformers, config_name)(**options)
    model = getattr(transformers, model_name)(config)
    for name, parameter in model.named_parameters():
        if name.endswith("_proj_bias"):
            nn.init.normal_(parameter)
    return model.to(dtype).eval()


def tiny_tokenizer(text: str) -> Any:
    """Words of a text as tokens, at most as many as a tiny model knows."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    split = pre_tokenizers.Whitespace()
    words = dict.fromkeys(word for word, _ in split.pre_tokenize_str(text))
    known = [*list(words)[: SMALL["vocab_size"] - 2], "[UNK]", "[END]"]
    vocabulary = {word: i for i, word in enumerate(known)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = split
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", eos_token="[END]", pad_token="[END]"
    )


def layers_of(model: nn.Module) -> set[str]:
    return {name for name, _, _ in quantized_linears(model)}


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters(remove_duplicate=False))


def assert_unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = snapshot(model)
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)


@contextmanager
def interrupted(owner: object, name: str, call: int) -> Iterator[None]:
    """Ctrl-C at a call of owner.name, the first being 1."""
    original, calls = getattr(owner, name), itertools.count(1)

    def stops(*arguments):
        if next(calls) == call:
            raise KeyboardInterrupt
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, stops)
        yield


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(40, 96), nn.Linear(96, 30))
