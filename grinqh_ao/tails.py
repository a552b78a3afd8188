"""The share of activations above a threshold: by formula, or as calibration measured it.

A calibrated layer keeps a *curve*, float32 [2 + POINTS]: two weights (a, r), then the share of

    u_k = |x_k| / (a + r * mean|x|)

above 2**(LOWEST + i / PER_OCTAVE), for i from 0 to POINTS - 1. (a, r) is (1, 0) for thresholds on
|x| itself, (0, 1) for thresholds relative to the token's own mean. From one curve follow the
thresholds for any ``bits`` and any level set.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LOWEST = -24
PER_OCTAVE = 8
POINTS = 48 * PER_OCTAVE + 1
CURVE_LENGTH = 2 + POINTS

# Elements of a temporary; keeps them small beside the model.
_BLOCK = 1 << 20

Tail = Callable[[float], float]


def laplace(threshold: float) -> float:
    """Share of |x| / mean|x| above a threshold if x is Laplace distributed: no data needed."""
    return math.exp(-threshold)


def measured(shares: Sequence[float]) -> Tail:
    """The tail that a curve's shares describe, straight lines over log2 of the threshold."""

    def tail(threshold: float) -> float:
        if threshold <= 0:
            return 1.0
        place = (math.log2(threshold) - LOWEST) * PER_OCTAVE
        if place <= 0:
            return shares[0]
        if place >= POINTS - 1:
            return shares[-1]
        i = int(place)
        return shares[i] + (place - i) * (shares[i + 1] - shares[i])

    return tail


class Histogram:
    """Counts of u in the bins between a curve's points.

    Args:
        relative: whether u is relative to each token's mean |x|; else it is |x| itself.
        device: of the counts.
    """

    def __init__(self, relative: bool, device: torch.device | str = "cpu") -> None:
        self.relative = relative
        self.counts = torch.zeros(POINTS + 1, dtype=torch.int64, device=device)

    def add(self, x: Tensor) -> None:
        """Counts activations [tokens, K], but not of tokens that are not finite or all zero."""
        for block in x.split(max(1, _BLOCK // x.shape[1])):
            magnitude = block.abs().float()
            mean = magnitude.mean(dim=1, keepdim=True)
            usable = (mean.isfinite() & (mean > 0)).squeeze(1)
            u = (magnitude / mean if self.relative else magnitude)[usable]
            # Bin i holds what is above point i - 1 and not above point i.
            bins = ((u.log2() - LOWEST) * PER_OCTAVE).ceil().clamp(0, POINTS).long()
            self.counts += torch.bincount(bins.flatten(), minlength=POINTS + 1)

    def merge(self, other: Histogram) -> None:
        self.counts += other.counts.to(self.counts.device)

    @property
    def empty(self) -> bool:
        return not self.counts.any()

    def curve(self) -> Tensor:
        """float32 [CURVE_LENGTH] on the CPU."""
        counts = self.counts.cpu().double()
        above = counts.flip(0).cumsum(0).flip(0)[1:] / counts.sum()
        weights = torch.tensor([0.0, 1.0] if self.relative else [1.0, 0.0])
        return torch.cat([weights, above.float()])


def check_curve(curve: Tensor) -> None:
    """Raises ValueError unless ``curve`` is what :meth:`Histogram.curve` could give."""
    if curve.dtype != torch.float32 or curve.shape != (CURVE_LENGTH,):
        raise ValueError(
            f"curve of dtype {curve.dtype} and shape {tuple(curve.shape)}: expected float32 "
            f"[{CURVE_LENGTH}]"
        )
    weights, shares = curve[:2].tolist(), curve[2:].tolist()
    if weights not in ([0.0, 1.0], [1.0, 0.0]):
        raise ValueError(f"curve with weights {weights}: expected [0, 1] or [1, 0]")
    falls = all(a >= b for a, b in itertools.pairwise(shares))
    if not (falls and shares[-1] >= 0 and shares[0] <= 1):
        raise ValueError("curve whose shares do not fall from at most 1 to at least 0")
