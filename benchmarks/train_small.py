"""Trains a small Llama from scratch on the standard library's source: weights never quantized.

    python benchmarks/train_small.py DIRECTORY [--minutes 8]

A few minutes on two CPU cores. SmolLM2, the real model of the other benchmarks, was quantized once
before it came to us; this one says whether a ranking of quantizers depends on that.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import tokenizers
import torch
import transformers

import texts
from grinqh_ao.ops.dense_products import product_dtype

VOCABULARY = 4096
LENGTH = 256
BATCH = 8
LEARNING_RATE = 3e-3
WARM_UP = 0.05  # share of the time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--minutes", type=float, default=8)
    arguments = parser.parse_args()
    torch.manual_seed(0)

    text = texts.load("stdlib")
    tokenizer = train_tokenizer(text)
    ids = torch.tensor(tokenizer(text)["input_ids"])
    print(f"{len(text) / 1e6:.1f} MB, {len(ids) / 1e6:.2f} M tokens")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=768, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    train(model, ids, 60 * arguments.minutes)
    model.save_pretrained(arguments.directory)
    tokenizer.save_pretrained(arguments.directory)


def train_tokenizer(text: str) -> transformers.PreTrainedTokenizerFast:
    backend = tokenizers.ByteLevelBPETokenizer()
    backend.train_from_iterator(text.splitlines(keepends=True), VOCABULARY, show_progress=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend._tokenizer)


def train(model: torch.nn.Module, ids: torch.Tensor, seconds: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1)
    # Where it is slow (without AVX-512), float32.
    in_bfloat16 = product_dtype(torch.empty(0, dtype=torch.bfloat16)) == torch.bfloat16
    started, step, running = time.perf_counter(), 0, math.nan
    while (share := (time.perf_counter() - started) / seconds) < 1:
        rate = min(share / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * share))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * rate
        starts = torch.randint(0, len(ids) - LENGTH, (BATCH,))
        batch = torch.stack([ids[start : start + LENGTH] for start in starts.tolist()])
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bfloat16):
            loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running = loss.item() if math.isnan(running) else 0.95 * running + 0.05 * loss.item()
        step += 1
        if step % 50 == 0:
            print(f"step {step}, {share:.0%} of the time, loss {running:.3f}", flush=True)


if __name__ == "__main__":
    main()
