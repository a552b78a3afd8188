"""llama.cpp's k-quants, by the library that llama-cpp-python builds (``pip install`` it).

Super-blocks have 256 weights. Where that does not divide a layer's channels (SmolLM2's 576)
llama.cpp would take a format of more bits; here super-blocks run over the ends of rows instead.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor, nn

from baselines.layers import replace_weights

NAMES = ("Q4_0", "Q4_K", "Q3_K", "Q2_K")


def _library_file() -> Path | None:
    spec = importlib.util.find_spec("llama_cpp")
    folders = spec.submodule_search_locations if spec else None
    files = sorted(Path(folders[0]).glob("lib/libggml-base.*")) if folders else []
    return files[0] if files else None


def available() -> bool:
    return _library_file() is not None


def bits(name: str) -> float:
    """Bits per weight, scales included."""
    weights, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    return 8 * size / weights


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_library_file()))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64,
        ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    return library


def quantizer(name: str):
    kind = GGMLQuantizationType[name]
    block, size = GGML_QUANT_SIZES[kind]

    def dense(weight: Tensor) -> Tensor:
        values = np.ascontiguousarray(weight.float().numpy()).reshape(-1)
        if values.size % 256:
            raise ValueError(f"{values.size} weights are no whole number of super-blocks")
        codes = np.empty(values.size // block * size, dtype=np.uint8)
        written = _library().ggml_quantize_chunk(
            int(kind), values.ctypes.data, codes.ctypes.data, 0, values.size // 256, 256, None
        )
        if written != codes.size:
            raise RuntimeError(f"ggml wrote {written} bytes, {codes.size} were expected")
        return torch.from_numpy(dequantize(codes, kind).reshape(weight.shape))

    def run(model: nn.Module, batches: list[Tensor]) -> None:
        replace_weights(model, dense)

    return run
