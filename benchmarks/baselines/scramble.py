"""The same model with its channels in another order.

SmolLM2's weights come rounded to a grid of 4 bits in blocks of 32 neighbouring input channels. A
quantizer whose groups are such blocks would find that grid again and look better than it is. A
Llama computes the same whatever the order of its hidden channels, of the channels of its MLPs, and
of the channels within its values, so these are put in a random order first: groups of neighbouring
channels are then groups of unrelated ones. GRINQH's groups run along outputs, in one channel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def scramble(model: Any, seed: int = 0) -> None:
    """Permutes channels of a Llama-like model of transformers, in place.

    Raises:
        ValueError: the model has biases, which nobody has needed yet, or does not compute the same.
    """
    if any(name.endswith(".bias") for name, _ in model.named_parameters()):
        raise ValueError("model has biases; only models without are scrambled")
    some_ids = torch.arange(32)[None]
    before = model(some_ids).logits
    generator = torch.Generator().manual_seed(seed)
    config, decoder = model.config, model.model

    def order(length: int) -> Tensor:
        return torch.randperm(length, generator=generator)

    hidden = order(config.hidden_size)
    head = decoder.layers[0].self_attn.head_dim
    queries_per_value = config.num_attention_heads // config.num_key_value_heads
    tied = model.lm_head.weight is decoder.embed_tokens.weight
    for embedding in (decoder.embed_tokens,) if tied else (decoder.embed_tokens, model.lm_head):
        embedding.weight.copy_(embedding.weight[:, hidden])
    decoder.norm.weight.copy_(decoder.norm.weight[hidden])
    for layer in decoder.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.copy_(norm.weight[hidden])
        attention, mlp = layer.self_attn, layer.mlp
        # Within every value head; all query heads that share it see the same order.
        within = [order(head) for _ in range(config.num_key_value_heads)]
        values = torch.cat([i * head + o for i, o in enumerate(within)])
        outputs = torch.cat(
            [i * head + within[i // queries_per_value] for i in range(config.num_attention_heads)]
        )
        inner = order(config.intermediate_size)
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight.copy_(projection.weight[:, hidden])
        attention.v_proj.weight.copy_(attention.v_proj.weight[values][:, hidden])
        attention.o_proj.weight.copy_(attention.o_proj.weight[hidden][:, outputs])
        for projection in (mlp.gate_proj, mlp.up_proj):
            projection.weight.copy_(projection.weight[inner][:, hidden])
        mlp.down_proj.weight.copy_(mlp.down_proj.weight[hidden][:, inner])
    after = model(some_ids).logits
    if (after - before).norm() > 1e-3 * before.norm():
        raise ValueError(f"model={type(model).__name__}: does not compute the same when scrambled")
