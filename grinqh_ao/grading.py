"""Activations -> levels, and the thresholds that make the levels read ``bits`` bits on average.

What an error in channel k costs is in proportion to the square of its *magnitude*

    m_k = sensitivity[k] * |x_k|

and a layer's thresholds are a float32 tensor [2, J] for J + 1 levels: those of a token are

    thresholds[0] + thresholds[1] * mean(m)

the first row absolute, the second relative to the token's own mean. Channel k is read at the level
with index #{j : m_k > threshold_j}, but at 4 bits at most where compact storage has kept no more
of it.
"""

from __future__ import annotations

import functools
import itertools
import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from grinqh_ao.slices import HIGH_LEVEL
from grinqh_ao.tails import Tail, laplace, tails_of

ALL_LEVELS = (0, 2, 4, 6, 8)

# Squared error of a weight read at each level over its square, for random normal weights. Only
# the ratios of thresholds follow from it, and they are forgiving.
RELATIVE_ERROR = {0: 1.0, 2: 0.142, 4: 0.0098, 6: 0.00067, 8: 0.000057}

_FLOAT32_MAX = torch.finfo(torch.float32).max


def threshold_ratios(levels: tuple[int, ...]) -> list[float]:
    """Ratios between a layer's thresholds, the lowest being 1.

    Minimising sum_k x_k^2 D(b_k) at a fixed average of b is reverse water-filling: raising a
    channel from level a to level b pays where x_k^2 > lambda (b - a) / (D(a) - D(b)).
    """
    steps = [
        math.sqrt((b - a) / (RELATIVE_ERROR[a] - RELATIVE_ERROR[b]))
        for a, b in itertools.pairwise(levels)
    ]
    return [step / steps[0] for step in steps]


def expected_bits(
    lowest_threshold: float,
    levels: tuple[int, ...],
    tail: Tail = laplace,
    low_tail: Tail | None = None,
) -> float:
    """Average bits per weight with thresholds of the given ratios, the lowest being given.

    Args:
        lowest_threshold: in the units of ``tail``.
        levels: ascending.
        tail: share of the channels above a threshold. The default takes activations as Laplace
            and thresholds in units of the token's mean |x|; docs/method.md shows how well that is
            met on a real model.
        low_tail: in compact storage, share of the channels that are above a threshold and have low
            slices to be read.
    """
    bits = float(levels[0])
    for (a, b), ratio in zip(itertools.pairwise(levels), threshold_ratios(levels), strict=True):
        share = low_tail if low_tail and b > HIGH_LEVEL else tail
        bits += (b - a) * share(lowest_threshold * ratio)
    return bits


def most_bits(levels: tuple[int, ...], curve: Tensor | None = None) -> float:
    """The average that is read if every non-zero activation asks for the highest level."""
    return expected_bits(0.0, levels, *_weights_and_tails(curve)[2:])


def level_shares(bits: float, levels: tuple[int, ...] = ALL_LEVELS) -> dict[int, float]:
    """The share of channels expected at each level, of activations that are Laplace distributed."""
    above = [math.exp(-t) for t in thresholds_for(bits, levels)[1].tolist()]
    return {
        level: more - less
        for level, more, less in zip(levels, [1.0, *above], [*above, 0.0], strict=True)
    }


def thresholds_for(bits: float, levels: tuple[int, ...], curve: Tensor | None = None) -> Tensor:
    """float32 [2, len(levels) - 1], on the CPU: thresholds that read ``bits`` bits on average.

    Args:
        bits: the average asked for.
        levels: ascending.
        curve: what calibration measured (see :mod:`.tails`). None takes activations as Laplace.

    Raises:
        ValueError: ``bits`` is not a number the levels can average to.
    """
    most = most_bits(levels, curve)
    check_bits(bits, levels, most=most)
    absolute, relative, tail, low_tail = _weights_and_tails(curve)
    ratios = torch.tensor(threshold_ratios(levels), dtype=torch.float64, device="cpu")
    if bits == levels[0]:
        lowest = math.inf
    elif bits == most:  # exactly: every non-zero activation at the highest level
        lowest = 0.0
    else:
        lowest = _lowest_threshold(bits, levels, tail, low_tail)
    rows = [lowest * weight * ratios if weight else 0 * ratios for weight in (absolute, relative)]
    return torch.stack(rows).clamp(max=_FLOAT32_MAX).float()


def bits_of(thresholds: Tensor, levels: tuple[int, ...], curve: Tensor | None = None) -> float:
    """The average that :func:`thresholds_for` was asked for. Waits for the device."""
    if len(levels) == 1:
        return float(levels[0])
    absolute, relative, tail, low_tail = _weights_and_tails(curve)
    row, weight = (0, absolute) if absolute else (1, relative)
    lowest: float = thresholds[row, 0].item()
    return expected_bits(lowest / weight, levels, tail, low_tail)


def _weights_and_tails(curve: Tensor | None) -> tuple[float, float, Tail, Tail | None]:
    """How much the average and the token's mean count in a threshold, and the tails of the rest."""
    if curve is None:
        return 0.0, 1.0, laplace, None
    absolute, relative = curve[:2].tolist()
    return absolute, relative, *tails_of(curve)


@functools.lru_cache(maxsize=256)  # all layers of a model ask for the same
def _lowest_threshold(
    bits: float, levels: tuple[int, ...], tail: Tail, low_tail: Tail | None
) -> float:
    """Bisection over log2: expected_bits falls as its threshold grows."""
    low, high = -64.0, 32.0
    for _ in range(60):
        middle = (low + high) / 2
        more = expected_bits(math.exp2(middle), levels, tail, low_tail) > bits
        low, high = (middle, high) if more else (low, middle)
    return math.exp2(high)


def grade(
    x: Tensor,
    sensitivity: Tensor,
    thresholds: Tensor,
    levels: Sequence[int],
    low: Tensor | None = None,
    mean: Tensor | None = None,
) -> Tensor:
    """The level of every channel; graded in float32, whatever the dtype of ``x``.

    A zero is never above a threshold, so it is read at the lowest level, where it loses nothing.
    NaN and infinity are above every threshold: they reach the output as in a dense layer.

    Args:
        x: [..., K]; each row of K is graded against its own thresholds.
        sensitivity: float32 or bfloat16 [K].
        thresholds: float32 [2, J].
        levels: J + 1, ascending.
        low: int32 [K] in compact storage: channels where it is negative have no low slices.
        mean: float32 [...], mean magnitudes, where ``x`` has but some of a layer's channels.

    Returns:
        uint8 [..., K], bits.
    """
    magnitude = x.abs().float() * sensitivity.float()
    absolute, relative = thresholds
    if mean is None:
        mean = magnitude.mean(dim=-1)
    row = absolute + relative * mean[..., None]  # [..., J]
    row = row.clamp(max=_FLOAT32_MAX)
    bits = torch.full_like(magnitude, levels[0], dtype=torch.uint8)
    for j, (a, b) in enumerate(itertools.pairwise(levels)):
        bits += (b - a) * ~(magnitude <= row[..., j : j + 1])
    return bits if low is None else torch.where(low < 0, bits.clamp(max=HIGH_LEVEL), bits)


def check_levels(levels: object) -> tuple[int, ...]:
    """A list or tuple of levels as a tuple.

    Raises:
        ValueError: ``levels`` are not ascending, not from 0, 2, 4, 6, 8, or read nothing.
    """
    if (
        isinstance(levels, list | tuple)
        and all(type(level) is int and level in ALL_LEVELS for level in levels)
        and list(levels) == sorted(set(levels))
        and any(levels)
    ):
        return tuple(levels)
    raise ValueError(
        f"levels={levels!r}: expected ascending bit widths from {ALL_LEVELS}, "
        "at least one of them above 0"
    )


def check_bits(
    bits: float, levels: tuple[int, ...], name: str = "bits", most: float | None = None
) -> None:
    """Raises ValueError unless ``bits`` is an average that ``levels`` can reach.

    Args:
        most: where less than the highest level can be reached: by layers that calibration took
            together with some in compact storage.
    """
    most = levels[-1] if most is None else most
    # Of NumPy's numbers too.
    number = isinstance(bits, numbers.Real) and not isinstance(bits, bool) and math.isfinite(bits)
    if not number or not levels[0] <= bits <= most or bits <= 0:
        least = "above 0" if levels[0] == 0 else f"at least {levels[0]}"
        stored = "" if most == levels[-1] else ", with layers stored compactly,"
        raise ValueError(
            f"{name}={bits!r}: expected a number {least} and at most {most:g}, "
            f"the average that levels {levels}{stored} can reach"
        )
