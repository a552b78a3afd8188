"""Draws how the method works: docs/pictures/levels.svg, slices.svg and thresholds.svg.

    python benchmarks/draw_method.py [--out docs/pictures]

Activations are random (Laplace, seed 5, one outlier channel); levels, bits, values and thresholds
are what the package computes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Rectangle
from torch import Tensor

from grinqh_ao.codec import default_gains, level_values
from grinqh_ao.grading import (
    ALL_LEVELS,
    RELATIVE_ERROR,
    grade,
    threshold_ratios,
    thresholds_for,
)
from plotting import COLOURS, FAINT, INK, ORANGE, save

CHANNELS, OUTLIER, BITS = 24, 4, 3.5
SHADES = ["#0b4f86", "#2a7fc0", "#6aa9dc", "#a9cdec"]  # the top slice darkest


def two_tokens() -> Tensor:
    torch.manual_seed(5)
    tokens = torch.distributions.Laplace(0.0, 1.0).sample((2, CHANNELS))
    tokens[:, OUTLIER] = 22  # real models have a few channels that are large at every token
    return tokens


def draw_levels(out: Path) -> None:
    """The same weights, read at the levels that two successive tokens ask for."""
    figure, axes = plt.subplots(
        2, 2, figsize=(11, 4), sharex=True, sharey="row", layout="constrained",
        height_ratios=[1.3, 1],
    )  # fmt: skip
    thresholds = thresholds_for(BITS, ALL_LEVELS)
    channel = torch.arange(CHANNELS)
    for i, x in enumerate(two_tokens()):
        levels = grade(x, torch.ones(1), thresholds, ALL_LEVELS)
        top, bottom = axes[:, i]
        top.bar(channel, x.abs(), 0.55, color=INK)
        top.set_yscale("function", functions=(_root, _square))
        limits = (thresholds[1] * x.abs().mean()).tolist()
        for limit, level in zip(limits, ALL_LEVELS[1:], strict=True):
            top.axhline(limit, color=ORANGE, linewidth=1, linestyle="--")
            top.annotate(
                f"{level} bits", (CHANNELS, limit), color=ORANGE, fontsize=8, va="center",
                annotation_clip=False,
            )  # fmt: skip
        top.set(title=f"Token {i + 1}", yticks=[0, 1, 5, 20], xticks=[])
        for s in range(4):
            for k, level in enumerate(levels.tolist()):
                read = level > 2 * s
                box = Rectangle(
                    (k - 0.45, 3 - s), 0.9, 0.88, linewidth=0.8, edgecolor=FAINT,
                    facecolor=SHADES[s] if read else "none",
                )  # fmt: skip
                bottom.add_patch(box)
        for k, level in enumerate(levels.tolist()):
            bottom.annotate(f"{level}", (k, -0.55), ha="center", fontsize=8)
        mean = float(levels.float().mean())
        bottom.set(ylim=(-1.1, 4), xlim=(-0.8, CHANNELS - 0.2), xticks=[])
        bottom.set_xlabel(f"input channels: {mean:.2f} bits per weight read")
        bottom.set_yticks(
            [-0.4, 0.45, 1.45, 2.45, 3.45], ["bits read", *(f"slice {s}" for s in (3, 2, 1, 0))]
        )
        bottom.tick_params(length=0)
        bottom.spines[:].set_visible(False)
        for axis in (top, bottom):
            axis.grid(False)
    axes[0, 0].set_ylabel("activation |x|")
    save(figure, out / "levels.svg")


def _root(value: Any) -> Any:
    return abs(value) ** 0.5


def _square(value: Any) -> Any:
    return value**2


def draw_slices(out: Path) -> None:
    """One weight: its code, cut into slices, and what is known of it after each of them."""
    code, gains = 0b10110110, default_gains()
    slices = [f"{code >> shift & 3:02b}" for shift in (6, 4, 2, 0)]
    figure, axis = plt.subplots(figsize=(9, 3), layout="constrained")
    for row, level in enumerate(ALL_LEVELS[1:]):
        values = level_values(gains, level)
        value = float(values[code >> (8 - level)])
        marker = "|" if level < 8 else ","
        axis.plot(values, [-row] * len(values), marker, color=FAINT, markersize=9)
        axis.plot(value, -row, "o", color=SHADES[row], markersize=9, markeredgecolor=INK)
        for i, digits in enumerate(slices):
            box = Rectangle(
                (-2.05 + 0.2 * i, -row - 0.3), 0.18, 0.6, linewidth=0.8, edgecolor=FAINT,
                facecolor=SHADES[i] if i <= row else "none",
            )  # fmt: skip
            axis.add_patch(box)
            if i <= row:
                colour = "#ffffff" if i < 2 else "#000000"
                axis.annotate(
                    digits, (-1.96 + 0.2 * i, -row), ha="center", va="center", color=colour,
                    family="monospace",
                )  # fmt: skip
        axis.annotate(f"{level} bits read:  {value:+.3f}", (1.08, -row), va="center")
    axis.annotate("slices of the code", (-1.66, 0.5), ha="center", va="bottom")
    axis.annotate("values of the level, times the scale", (0, 0.5), ha="center", va="bottom")
    axis.set(xlim=(-2.15, 1.75), ylim=(-3.5, 0.9))
    axis.axis("off")
    save(figure, out / "slices.svg")


def draw_thresholds(out: Path) -> None:
    """Reverse water-filling: the level that a magnitude is read at, and what error that leaves."""
    figure, axis = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    ratios = threshold_ratios(ALL_LEVELS)
    magnitude = torch.logspace(-0.7, 2.2, 600)
    errors = torch.stack([magnitude.square() * RELATIVE_ERROR[level] for level in ALL_LEVELS])
    chosen = torch.bucketize(magnitude, torch.tensor(ratios) / ratios[0])
    axis.loglog(magnitude, errors[0], color=FAINT, linestyle=":", linewidth=1.2)
    axis.annotate("if not read,\nall of it is error", (11, 12), fontsize=9)
    for i, level in enumerate(ALL_LEVELS):
        here = chosen == i
        axis.loglog(
            magnitude[here], errors[i][here], color=COLOURS[i], linewidth=3,
            label=f"{level} bits" if level else "not read",
        )  # fmt: skip
    for ratio in ratios:
        at = ratio / ratios[0]
        axis.axvline(at, color=FAINT, linewidth=0.8, linestyle="--")
        axis.annotate(f" {at:.3g}", (at, 2e-3), fontsize=9)
    axis.set(
        xlabel="|x|, in units of the lowest threshold", ylabel="squared error that is left",
        ylim=(1.5e-3, 300),
    )  # fmt: skip
    axis.grid(False)
    axis.legend(loc="upper left")
    save(figure, out / "thresholds.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = Path(__file__).resolve().parents[1] / "docs" / "pictures"
    parser.add_argument("--out", type=Path, default=default)
    out = parser.parse_args().out
    for draw in (draw_levels, draw_slices, draw_thresholds):
        draw(out)


if __name__ == "__main__":
    main()
