"""Reads the lines that a decode step needs, and does no arithmetic: what the memory allows."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from grinqh_ao import GrinqhTensor
from grinqh_ao.ops.cpu.build import find_compiler
from grinqh_ao.slices import HIGH_SLICES

AHEAD = 32  # runs that are prefetched


@functools.cache
def _library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as directory:
        library = Path(directory) / "selected_lines.so"
        source = Path(__file__).with_suffix(".cpp")
        command = [find_compiler(), "-O3", "-march=native", "-fPIC", "-shared", "-fopenmp"]
        subprocess.run([*command, str(source), "-o", str(library)], check=True)
        loaded = ctypes.CDLL(str(library))
    loaded.read_runs.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 2 + [ctypes.c_int]
    loaded.read_runs.restype = ctypes.c_uint64
    return loaded


def reader(weight: GrinqhTensor, x: Tensor) -> Callable[[], object]:
    """A function that reads the slices that one row x [1, K] asks of the weight, tile by tile.

    Neighbouring lines are one run. Only for lines of 64 bytes and more, and levels up to 8 bits.
    """
    tiles, lines, words = weight.slices.shape
    k = weight.shape[1]
    slices = weight.grade(x)[0].long() // 2
    channel = torch.arange(k)
    starts = torch.cat([HIGH_SLICES * channel, HIGH_SLICES * k + HIGH_SLICES * channel])
    sizes = torch.cat([slices.clamp(max=HIGH_SLICES), (slices - HIGH_SLICES).clamp(min=0)])
    starts, sizes = starts[sizes > 0], sizes[sizes > 0]
    line = 4 * words
    starts = (torch.arange(tiles)[:, None] * lines * line + starts * line).flatten().contiguous()
    sizes = (sizes * line).repeat(tiles).contiguous()

    def read() -> int:
        return _library().read_runs(
            weight.slices.data_ptr(), starts.data_ptr(), sizes.data_ptr(), len(starts), AHEAD,
            torch.get_num_threads(),
        )  # fmt: skip

    return read
