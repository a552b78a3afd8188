"""Compact storage: which channels keep their low slices, those of levels 6 and 8.

Few channels are ever read above 4 bits. The others lose little if they cannot be, and the stored
size falls from 8 bits to little over 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grinqh_ao.grading import ALL_LEVELS, thresholds_for
from grinqh_ao.slices import HIGH_LEVEL

FULL_LEVEL = ALL_LEVELS[-1]


def levels_fit(levels: Sequence[int]) -> bool:
    """Whether weights with these levels can be stored compactly."""
    return HIGH_LEVEL in levels and FULL_LEVEL in levels


def check_stored_bits(stored_bits: object) -> None:
    """Raises ValueError unless ``stored_bits`` is a size that compact storage can have."""
    if not (isinstance(stored_bits, int | float) and HIGH_LEVEL < stored_bits < FULL_LEVEL):
        raise ValueError(
            f"stored_bits={stored_bits!r}: expected a number above {HIGH_LEVEL} and below "
            f"{FULL_LEVEL}, or None"
        )


class ChannelUse:
    """What it would cost not to have the low slices of each channel of a layer.

    Args:
        bits: the average that is to be read.
    """

    def __init__(self, channels: int, bits: float) -> None:
        above = ALL_LEVELS.index(HIGH_LEVEL)  # of the thresholds: that of the next level
        # By the formula, in units of the token's mean |x|: near enough to put channels in order.
        self._threshold = thresholds_for(bits, ALL_LEVELS)[1, above].item()
        self._cost = torch.zeros(channels, dtype=torch.float64, device="cpu")

    def add(self, x: Tensor) -> None:
        """Activations times sensitivity [tokens, K], of first positions too.

        Massive activations draw errors to them: a prompt breaks without their low slices.
        """
        magnitude = x.abs().float()
        asks = magnitude > self._threshold * magnitude.mean(1, keepdim=True)
        cost = torch.where(asks, magnitude, 0).square().double().sum(0)
        self._cost += cost.nan_to_num(0.0, 0.0, 0.0).cpu()

    def kept(self, stored_bits: float) -> Tensor:
        """bool [K], on the CPU: the channels to keep at 8 bits where ``stored_bits`` are stored.

        Errors at level 4 cost in proportion to a magnitude's square; so those with the largest sum
        of that over the tokens that would read more than 4 bits of them.
        """
        share = (stored_bits - HIGH_LEVEL) / (FULL_LEVEL - HIGH_LEVEL)
        kept = torch.zeros_like(self._cost, dtype=torch.bool)
        kept[self._cost.topk(max(1, round(share * len(kept)))).indices] = True
        return kept
