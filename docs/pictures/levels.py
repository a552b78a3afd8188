"""Draws levels.svg: the same weights, read at the levels that two successive tokens ask for.

    python docs/pictures/levels.py

The activations are random (Laplace, seed 5, one outlier channel); levels and bits are what the
package computes. Bars are on a square-root scale.
"""

from pathlib import Path

import torch

from grinqh_ao.grading import ALL_LEVELS, grade, thresholds_for

CHANNELS, CELL, BAR, SLICE = 24, 22, 120, 20
LEFT, TOP, GAP = 190, 56, 50
OUTLIER = 4  # real models have a few channels that are large at every token
BITS = 3.5
INK, FAINT, NOT_READ = "#24292f", "#8c959f", "#eaeef2"
SHADES = ["#0b3c6f", "#2a6fb0", "#6aa5d8", "#abd0ee"]  # top bits darkest


def panel(x: torch.Tensor, left: float, title: str) -> list[str]:
    thresholds = thresholds_for(BITS, ALL_LEVELS)
    levels = grade(x, torch.ones(1), thresholds, ALL_LEVELS).tolist()
    limits = (thresholds[1] * x.abs().mean()).sqrt().tolist()
    x = x.abs().sqrt()
    tallest = float(x.max())
    base = TOP + BAR
    width = CHANNELS * CELL
    out = [f'<text x="{left}" y="{TOP - 26}" font-weight="600">{title}</text>']
    for limit, level in zip(limits, ALL_LEVELS[1:], strict=True):
        if limit <= tallest:
            y = base - BAR * limit / tallest
            out.append(
                f'<line x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}" '
                f'stroke="{FAINT}" stroke-dasharray="3 3"/>'
                f'<text x="{left + width + 4}" y="{y + (10 if level == 2 else 3):.1f}" '
                f'fill="{FAINT}">{level} bits</text>'
            )
    for k, (value, level) in enumerate(zip(x.tolist(), levels, strict=True)):
        column = left + k * CELL
        height = BAR * value / tallest
        out.append(
            f'<rect x="{column + 5}" y="{base - height:.1f}" width="{CELL - 10}" '
            f'height="{height:.1f}" fill="{INK}"/>'
        )
        for s in range(4):
            fill = SHADES[s] if level > 2 * s else NOT_READ
            out.append(
                f'<rect x="{column + 1}" y="{base + 16 + s * SLICE}" width="{CELL - 2}" '
                f'height="{SLICE - 2}" rx="2" fill="{fill}"/>'
            )
        out.append(
            f'<text x="{column + CELL / 2}" y="{base + 16 + 4 * SLICE + 14}" '
            f'text-anchor="middle">{level}</text>'
        )
    average = sum(levels) / len(levels)
    out.append(
        f'<text x="{left + width / 2}" y="{base + 16 + 4 * SLICE + 36}" text-anchor="middle" '
        f'font-weight="600">{average:.2f} bits per weight read</text>'
    )
    return out


def main() -> None:
    torch.manual_seed(5)
    tokens = torch.distributions.Laplace(0.0, 1.0).sample((2, CHANNELS))
    tokens[:, OUTLIER] = 22
    panels = []
    for i, x in enumerate(tokens):
        left = LEFT + i * (CHANNELS * CELL + GAP)
        panels += panel(x, left, f"Token {i + 1}")
    base = TOP + BAR
    labels = [(TOP + BAR / 2, "activation |x| by channel")]
    labels += [(base + 16 + s * SLICE + 14, f"slice {s + 1} of the codes") for s in range(4)]
    labels.append((base + 16 + 4 * SLICE + 14, "bits read"))
    side = [f'<text x="{LEFT - 12}" y="{y}" text-anchor="end">{text}</text>' for y, text in labels]
    width = LEFT + 2 * (CHANNELS * CELL + GAP)
    height = base + 16 + 4 * SLICE + 56
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="Helvetica, Arial, sans-serif" font-size="13" fill="{INK}">'
        f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>'
        + "\n".join(side + panels)
        + "</svg>\n"
    )
    Path(__file__).with_suffix(".svg").write_text(svg)


if __name__ == "__main__":
    main()
