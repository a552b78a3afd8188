"""What the C++ functions are handed: a row of 64-bit integers, see ``source/weight.h``."""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence

import torch

MOST_LEVELS = 5
CALL_FIELDS = 8 + MOST_LEVELS
WEIGHT_FIELDS = 13
_PADDING = [(0,) * (MOST_LEVELS - n) for n in range(MOST_LEVELS + 1)]


@functools.cache
def _format(weights: int) -> struct.Struct:
    return struct.Struct(f"={CALL_FIELDS + weights * WEIGHT_FIELDS}q")


def pack(fields: Sequence[int], weights: int) -> bytes:
    """Those of a call and of its weights, one after the other."""
    return _format(weights).pack(*fields)


def call_fields(
    weights: int, rows: int, k: int, dtype: torch.dtype, levels: Sequence[int], level: int = 0
) -> tuple[int, ...]:
    """``Call``; ``level`` is that of dequantizing."""
    return (
        weights,
        rows,
        k,
        dtype == torch.bfloat16,
        torch.get_num_threads(),
        levels[-1],
        level,
        len(levels),
        *levels,
        *_PADDING[len(levels)],
    )
