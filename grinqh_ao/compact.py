"""Compact storage: which channels keep their low slices, those of levels 6 and 8.

Few channels are ever read above 4 bits. The others lose little if they cannot be, and the stored
size falls from 8 bits to little over 4.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from grinqh_ao.grading import ALL_LEVELS, thresholds_for
from grinqh_ao.slices import HIGH_LEVEL

FULL_LEVEL = ALL_LEVELS[-1]
# Of the channels, those with the largest mean square over all positions, the first ones included:
# massive activations are few, but a prompt breaks without their low slices.
_LOUDEST = 0.01


def check_stored_bits(stored_bits: object) -> None:
    """Raises ValueError unless ``stored_bits`` is a size that compact storage can have."""
    number = isinstance(stored_bits, int | float) and HIGH_LEVEL < stored_bits < FULL_LEVEL
    if not number:
        raise ValueError(
            f"stored_bits={stored_bits!r}: expected a number above {HIGH_LEVEL} and below "
            f"{FULL_LEVEL}, or None"
        )


class ChannelUse:
    """How the channels of one layer are used.

    Args:
        bits: the average that is to be read.
    """

    def __init__(self, channels: int, bits: float) -> None:
        above = [level > HIGH_LEVEL for level in ALL_LEVELS[1:]].index(True)
        # By the formula, in units of the token's mean |x|: near enough to put channels in order.
        self._threshold = thresholds_for(bits, ALL_LEVELS)[1, above].item()
        self._energy = torch.zeros(channels, dtype=torch.float64)
        self._asked = torch.zeros(channels, dtype=torch.float64)

    def add(self, everything: Tensor, counted: Tensor) -> None:
        """Activations [tokens, K]: of all positions, and of those that decoding is like."""
        self._energy += everything.float().square().sum(0).double().cpu()
        magnitude = counted.float().abs()
        above = magnitude > self._threshold * magnitude.mean(1, keepdim=True)
        self._asked += above.sum(0).cpu()

    def kept(self, stored_bits: float) -> Tensor:
        """bool [K], on the CPU: the channels to keep at 8 bits where ``stored_bits`` are stored.

        Those with the largest mean square, then those that are most often read above 4 bits.
        """
        k = len(self._energy)
        share = (stored_bits - HIGH_LEVEL) / (FULL_LEVEL - HIGH_LEVEL)
        number = max(1, round(share * k))
        loudest = self._energy.topk(min(number, math.ceil(k * _LOUDEST))).indices
        rank = self._asked.clone()
        rank[loudest] = torch.inf
        kept = torch.zeros(k, dtype=torch.bool)
        kept[rank.topk(number).indices] = True
        return kept
