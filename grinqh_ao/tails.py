"""The share of activations above a threshold: by formula, or as calibration measured it.

A calibrated layer keeps a *curve*, float32 [2 + POINTS]: two weights (a, r), then the share of

    u_k = m_k / (a + r * mean m)

above 2**(LOWEST + i / PER_OCTAVE), for i from 0 to POINTS - 1, in all layers taken together, with
the magnitudes m of :mod:`.grading`. With r zero, thresholds on u are thresholds on m itself; with
a zero they are relative to each token's mean. From the curve follow the thresholds for any
``bits`` and any level set. In compact storage a second list of POINTS shares counts only what is
in channels with low slices: what is read of levels above 4.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LOWEST = -24
PER_OCTAVE = 8
POINTS = 48 * PER_OCTAVE + 1
CURVE_LENGTH = 2 + POINTS
COMPACT_CURVE_LENGTH = 2 + 2 * POINTS

# Elements of a temporary; keeps them small beside the model.
_BLOCK = 1 << 20

Tail = Callable[[float], float]


def laplace(threshold: float) -> float:
    """Share of |x| / mean|x| above a threshold if x is Laplace distributed: no data needed."""
    return math.exp(-threshold)


def tails_of(curve: Tensor) -> tuple[Tail, Tail | None]:
    """A curve's tails: of all channels, and of those with low slices if storage is compact.

    The same functions for equal shares: the layers of a model have theirs in common.
    """
    return _tails_of(tuple(curve[2:].tolist()))


@functools.lru_cache(maxsize=32)
def _tails_of(shares: tuple[float, ...]) -> tuple[Tail, Tail | None]:
    every, low = shares[:POINTS], shares[POINTS:]
    return measured(every), measured(low, low[0]) if low else None


def measured(shares: Sequence[float], everything: float = 1.0) -> Tail:
    """The tail that a curve's shares describe, straight lines over log2 of the threshold.

    Args:
        shares: POINTS of them.
        everything: the share above a threshold of zero.
    """

    def tail(threshold: float) -> float:
        if threshold <= 0:
            return everything
        place = (math.log2(threshold) - LOWEST) * PER_OCTAVE
        if place <= 0:
            return shares[0]
        if place >= POINTS - 1:
            return shares[-1]
        i = int(place)
        return shares[i] + (place - i) * (shares[i + 1] - shares[i])

    return tail


def formula_curve() -> Tensor:
    """float32 [2 + POINTS]: the curve that says of a layer what :func:`laplace` does."""
    points = [laplace(2.0 ** (LOWEST + i / PER_OCTAVE)) for i in range(POINTS)]
    return torch.tensor([0.0, 1.0, *points], dtype=torch.float32, device="cpu")


def as_compact(curve: Tensor) -> Tensor:
    """A curve [2 + POINTS] as [2 + 2 * POINTS]: all channels have low slices."""
    return torch.cat([curve, curve[2:]])


class Histogram:
    """Counts of u in one layer, in the bins between a curve's points.

    Args:
        relative: how much the token's own mean counts in u, 0 to 1; the rest is the layer's
            average, of what it sees first.
        kept: bool [K], on the CPU: in compact storage, the channels with low slices; else None.
    """

    def __init__(self, relative: float, kept: Tensor | None = None) -> None:
        self.relative = relative
        self.kept = kept
        self.average: float | None = None
        # Of all channels; in compact storage also of those with low slices.
        rows = 1 if kept is None else 2
        self.counts = torch.zeros(rows, POINTS + 1, dtype=torch.int64, device="cpu")

    def add(self, x: Tensor) -> None:
        """Counts magnitudes [tokens, K], but not of tokens that are not finite or all zero."""
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
            self.counts[0] += torch.bincount(bins.flatten(), minlength=POINTS + 1).cpu()
            if self.kept is not None:
                bins = bins[:, self.kept.to(bins.device)]
                self.counts[1] += torch.bincount(bins.flatten(), minlength=POINTS + 1).cpu()

    @property
    def empty(self) -> bool:
        return self.average is None

    @property
    def magnitudes(self) -> int:
        """How many were counted."""
        return int(self.counts[0].sum())

    def weights(self, steps: int) -> Tensor:
        """float64 [2]: of the layer's average and of the token's mean in u / 2**(steps / 8)."""
        assert self.average is not None
        weights = [(1 - self.relative) * self.average, self.relative]
        return 2 ** (steps / PER_OCTAVE) * torch.tensor(weights, dtype=torch.float64, device="cpu")

    def shares(self, steps: int) -> Tensor:
        """float64 [2, POINTS]: shares of u / 2**(steps / 8) above the points of a curve.

        Of all channels, and of those with low slices: all of them unless storage is compact.
        """
        bins = (torch.arange(POINTS + 1, device="cpu") - steps).clamp(0, POINTS)
        counts = torch.zeros_like(self.counts, dtype=torch.float64)
        counts.index_add_(1, bins, self.counts.double())
        shares = counts.flip(1).cumsum(1).flip(1)[:, 1:] / counts[0].sum()
        return shares.expand(2, -1)


def common_curves(
    histograms: Sequence[Histogram], sizes: Sequence[float], units: Sequence[float]
) -> list[Tensor]:
    """float32 [2 + POINTS], or [2 + 2 * POINTS], for each layer, on the CPU.

    Args:
        histograms: what each layer saw; none of them empty.
        sizes: by which the layers' shares count.
        units: what thresholds are to be in proportion to, layer by layer, beside each layer's own
            activations. Rounded to points of the curve.
    """
    steps = [round(PER_OCTAVE * math.log2(unit)) for unit in units]
    layers = list(zip(histograms, sizes, steps, strict=True))
    shares_of_all = torch.stack([size * h.shares(step) for h, size, step in layers])
    common = shares_of_all.sum(0) / sum(sizes)
    compact = any(h.kept is not None for h in histograms)
    shares = common.flatten() if compact else common[0]
    return [torch.cat([h.weights(step), shares]).float() for h, _, step in layers]


def _rows(x: Tensor) -> int:
    return max(1, _BLOCK // x.shape[1])


def _blocks(x: Tensor) -> tuple[Tensor, ...]:
    blocks: tuple[Tensor, ...] = x.split(_rows(x))
    return blocks


def _mean_magnitude(x: Tensor) -> Tensor:
    return x.abs().float().mean(dim=1)


def check_curve(curve: Tensor, compact: bool = False) -> None:
    """Raises ValueError unless ``curve`` is what :func:`common_curves` could give.

    Args:
        compact: it is for a weight in compact storage.
    """
    lengths = [COMPACT_CURVE_LENGTH] if compact else [CURVE_LENGTH, COMPACT_CURVE_LENGTH]
    if curve.dtype != torch.float32 or curve.dim() != 1 or len(curve) not in lengths:
        raise ValueError(
            f"curve of dtype {curve.dtype} and shape {tuple(curve.shape)}: expected float32 "
            f"{' or '.join(f'[{length}]' for length in lengths)}"
        )
    absolute, relative = curve[:2].tolist()
    if not (
        0 <= absolute < math.inf and 0 <= relative < math.inf and (absolute > 0 or relative > 0)
    ):
        raise ValueError(
            f"curve with weights {absolute} and {relative}: expected finite numbers from 0, "
            "at least one of them above 0"
        )
    for shares in curve[2:].view(-1, POINTS).tolist():
        falls = all(a >= b for a, b in itertools.pairwise(shares))
        if not (falls and shares[-1] >= 0 and shares[0] <= 1):
            raise ValueError("curve whose shares do not fall from at most 1 to at least 0")
