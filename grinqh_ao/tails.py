"""The share of activations above a threshold: by formula, or as calibration measured it.

A calibrated layer keeps a *curve*, float32 [2 + POINTS]: two weights (a, r), then the share of

    u_k = |x_k| / (a + r * mean|x|)

above 2**(LOWEST + i / PER_OCTAVE), for i from 0 to POINTS - 1, in all layers taken together. With
r zero and a the layer's own average of |x|, thresholds on u are thresholds on |x| itself; with
(0, 1) they are relative to each token's mean. From the curve follow the thresholds for any ``bits``
and any level set.
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
    """Counts of u in one layer, in the bins between a curve's points.

    Args:
        relative: how much the token's own mean |x| counts in u, 0 to 1; the rest is the layer's
            average, of what it sees first.
    """

    def __init__(self, relative: float) -> None:
        self.relative = relative
        self.average: float | None = None
        self.counts = torch.zeros(POINTS + 1, dtype=torch.int64)

    def add(self, x: Tensor) -> None:
        """Counts activations [tokens, K], but not of tokens that are not finite or all zero."""
        mean = torch.cat([_mean_magnitude(block) for block in _blocks(x)])
        usable = mean.isfinite() & (mean > 0)
        x, mean = x[usable], mean[usable]
        if len(x) == 0:
            return
        if self.average is None:
            self.average = mean.double().mean().item()
        unit = (1 - self.relative) * self.average + self.relative * mean
        for block, block_unit in zip(_blocks(x), unit.split(_rows(x)), strict=True):
            u = block.abs().float() / block_unit[:, None]
            # Bin i holds what is above point i - 1 and not above point i.
            bins = ((u.log2() - LOWEST) * PER_OCTAVE).ceil().clamp(0, POINTS).long()
            self.counts += torch.bincount(bins.flatten(), minlength=POINTS + 1).cpu()

    @property
    def empty(self) -> bool:
        return self.average is None

    @property
    def weights(self) -> tuple[float, float]:
        """Of the layer's average and of the token's mean in u."""
        assert self.average is not None
        return (1 - self.relative) * self.average, self.relative

    def shares(self) -> Tensor:
        """float64 [POINTS], on the CPU: shares of u above the points of a curve."""
        counts = self.counts.double()
        return counts.flip(0).cumsum(0).flip(0)[1:] / counts.sum()


def common_curves(histograms: Sequence[Histogram], sizes: Sequence[int]) -> list[Tensor]:
    """float32 [CURVE_LENGTH] for each layer, on the CPU, from what each of them saw.

    Args:
        histograms: none of them empty.
        sizes: number of weights of the layers, by which their shares count.
    """
    shares = [size * h.shares() for size, h in zip(sizes, histograms, strict=True)]
    common = torch.stack(shares).sum(0) / sum(sizes)
    return [torch.cat([torch.tensor(h.weights), common]).float() for h in histograms]


def _rows(x: Tensor) -> int:
    return max(1, _BLOCK // x.shape[1])


def _blocks(x: Tensor) -> tuple[Tensor, ...]:
    blocks: tuple[Tensor, ...] = x.split(_rows(x))
    return blocks


def _mean_magnitude(x: Tensor) -> Tensor:
    return x.abs().float().mean(dim=1)


def check_curve(curve: Tensor) -> None:
    """Raises ValueError unless ``curve`` is what :func:`common_curves` could give."""
    if curve.dtype != torch.float32 or curve.shape != (CURVE_LENGTH,):
        raise ValueError(
            f"curve of dtype {curve.dtype} and shape {tuple(curve.shape)}: expected float32 "
            f"[{CURVE_LENGTH}]"
        )
    (absolute, relative), shares = curve[:2].tolist(), curve[2:].tolist()
    if not (
        0 <= absolute < math.inf and 0 <= relative < math.inf and (absolute > 0 or relative > 0)
    ):
        raise ValueError(
            f"curve with weights {absolute} and {relative}: expected finite numbers from 0, "
            "at least one of them above 0"
        )
    falls = all(a >= b for a, b in itertools.pairwise(shares))
    if not (falls and shares[-1] >= 0 and shares[0] <= 1):
        raise ValueError("curve whose shares do not fall from at most 1 to at least 0")
