"""The small tensors of a weight [N, K], kept as one float32 vector:

    thresholds [2, J] | gains [4] | sensitivity [K] | row_scale [N]

where thresholds have room for J = 4, and K for a multiple of 4, so that each part begins at 16
bytes. One, because compiled models check and unwrap every inner tensor of every weight at every
step. All functions take stacks [E, ...] of vectors too; slices of a vector are views of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_STEPS = 4
NUM_GAINS = 4
GAINS_AT = 2 * MAX_STEPS
SENSITIVITY_AT = GAINS_AT + NUM_GAINS


def row_scale_at(k: int) -> int:
    return SENSITIVITY_AT + -(-k // 4) * 4


def join(thresholds: Tensor, gains: Tensor, sensitivity: Tensor, row_scale: Tensor) -> Tensor:
    """The vector of its parts, each [..., its shape] and of any floating dtype."""
    parts = [
        (thresholds.flatten(-2), GAINS_AT),
        (gains, NUM_GAINS),
        (sensitivity, row_scale_at(sensitivity.shape[-1]) - SENSITIVITY_AT),
        (row_scale, row_scale.shape[-1]),
    ]
    return torch.cat([F.pad(p.float(), (0, size - p.shape[-1])) for p, size in parts], dim=-1)


def thresholds_of(vectors: Tensor, levels: int) -> Tensor:
    """[2, levels - 1], see :mod:`.grading`."""
    thresholds: Tensor = vectors[..., : 2 * (levels - 1)].unflatten(-1, (2, levels - 1))
    return thresholds


def gains_of(vectors: Tensor) -> Tensor:
    """[4], of levels 2, 4, 6 and 8, see :mod:`.codec`."""
    return vectors[..., GAINS_AT:SENSITIVITY_AT]


def sensitivity_of(vectors: Tensor, k: int) -> Tensor:
    """[K], see :func:`grinqh_ao.grading.grade`."""
    return vectors[..., SENSITIVITY_AT : SENSITIVITY_AT + k]


def row_scale_of(vectors: Tensor, k: int) -> Tensor:
    """[N], see :mod:`.codec`."""
    return vectors[..., row_scale_at(k) :]


def outputs_of(vectors: Tensor, k: int) -> int:
    """N."""
    return vectors.shape[-1] - row_scale_at(k)
