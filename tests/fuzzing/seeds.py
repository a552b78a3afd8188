"""Checkpoints that are what they claim, for the fuzzer to begin with."""

import json
import tempfile
from pathlib import Path

import torch
from loading import SIZES, joined
from torchao.quantization import quantize_
from transformers import LlamaConfig, LlamaForCausalLM

import grinqh_ao


def seeds() -> dict[str, bytes]:
    kinds = {
        "plain": {},
        "levels": {"levels": [0, 4, 8]},
        "two-bits": {"levels": [2], "bits": 2, "head_bits": None},
        "compact": {"stored_bits": 5},
    }
    return {name: checkpoint(**options) for name, options in kinds.items()}


def checkpoint(stored_bits: float | None = None, **options: object) -> bytes:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    quantize_(model, grinqh_ao.GrinqhConfig(**options))
    if stored_bits:
        grinqh_ao.calibrate(model, [torch.arange(48)[None] % 16], stored_bits=stored_bits)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        config = json.loads((Path(directory) / "config.json").read_text())
        file = (Path(directory) / "model.safetensors").read_bytes()
    return joined(json.dumps(config["quantization_config"]).encode(), file)
