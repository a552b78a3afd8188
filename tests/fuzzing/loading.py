"""What the fuzzer feeds: a checkpoint's bytes, through all we do between files and weights.

An input is four bytes, the length of what follows them: ``quantization_config`` of config.json as
JSON; then a safetensors file.
"""

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from grinqh_ao import CheckpointError, GrinqhTensor
from grinqh_ao.checkpoint import SUFFIXES, from_tensors
from grinqh_ao.huggingface import GrinqhHfConfig
from grinqh_ao.huggingface.files import check_files, open_tensors
from grinqh_ao.huggingface.loading import prepare_places
from grinqh_ao.linear import embedding

MAX_BYTES = 1 << 16
SIZES = {
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "tie_word_embeddings": False,
    "architectures": ["LlamaForCausalLM"],
}
DIRECTORY = tempfile.TemporaryDirectory()


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, list | tuple) else [result]:
            if isinstance(one, Tensor):
                self.bytes = max(self.bytes, one.nbytes)
        return result


@cache
def model() -> LlamaForCausalLM:
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**SIZES))


def joined(config: bytes, file: bytes) -> bytes:
    return len(config).to_bytes(4, "little") + config + file


def parted(data: bytes) -> tuple[bytes, bytes]:
    end = 4 + int.from_bytes(data[:4], "little")
    return data[4:end], data[end:]


def load(data: bytes, say: bool = False) -> bool:
    """True if the checkpoint was accepted, and all its weights used; False if it was refused.

    Whatever else is raised, or made larger than MAX_BYTES, is a defect.

    Args:
        say: raise the CheckpointError of a refusal instead.
    """
    config, content = parted(data)
    try:
        settings = json.loads(config)
    except (ValueError, RecursionError):
        return False  # transformers reads it, and says so
    if not isinstance(settings, dict):
        return False
    file = Path(DIRECTORY.name) / "model.safetensors"
    file.write_bytes(content)
    with LargestTensor() as largest:
        try:
            accepted = weights(settings, str(file))
        except CheckpointError:
            if say:
                raise
            accepted = []
        for weight in accepted:
            use(weight)
    assert largest.bytes <= MAX_BYTES, f"a tensor of {largest.bytes} bytes"
    return bool(accepted)


def weights(settings: dict[str, Any], file: str) -> list[GrinqhTensor]:
    """All of a model, as ``from_pretrained`` loads them; refused with CheckpointError."""
    quantization_config = GrinqhHfConfig.from_dict(settings)
    attributes = quantization_config.attributes()
    save_id = quantization_config.save_id
    places = prepare_places(model(), attributes)
    shapes = {name: model().get_parameter(own).shape for name, own in places.items()}
    check_files([file], model(), attributes, shapes, save_id)
    found = []
    with open_tensors([file], save_id) as tensors:
        for name, shape in shapes.items():
            inner = [s for s in SUFFIXES.values() if name + s in tensors]
            parts = {suffix: tensors[name + suffix][...] for suffix in inner}
            found.append(from_tensors(parts, shape, attributes[name], torch.float32, name))
    return found


def use(weight: GrinqhTensor) -> None:
    x = torch.linspace(-3, 3, 9 * weight.shape[1]).view(9, -1)
    for rows in (1, 3, 9):
        assert F.linear(x[:rows], weight).shape == (rows, weight.shape[0])
    for level in weight.levels:
        weight.dequantize(level=level)
    embedding(torch.tensor([0, weight.shape[0] - 1]), weight)
    weight.set_bits(max(weight.levels[0], weight.levels[-1] / 2))
    assert 0 <= weight.bits <= 8
