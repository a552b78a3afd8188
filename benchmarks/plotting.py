"""How every picture of the docs is drawn: one SVG file, readable on light and on dark pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Okabe and Ito's colours, which the colour-blind can tell apart.
BLUE, ORANGE, GREEN, PINK, SKY, AMBER = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00",
)  # fmt: skip
COLOURS = [BLUE, ORANGE, GREEN, PINK, SKY, AMBER]
INK, FAINT = "#24292f", "#8c959f"
# What browsers show instead where the page is dark.
ON_DARK = {INK: "#e6edf3", FAINT: "#7d8590", BLUE: "#2f81c7"}

plt.rcParams.update(
    {
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": FAINT,
        "xtick.color": INK,
        "ytick.color": INK,
        "grid.color": FAINT,
        "grid.alpha": 0.3,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "font.size": 10,
        "svg.hashsalt": "grinqh_ao",  # equal figures give equal files
    }
)


def save(figure: Any, path: Path) -> None:
    """Writes an .svg file without a background, whose dark colours turn light on dark pages."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, transparent=True, metadata={"Date": None})
    plt.close(figure)
    rules = "".join(
        f'[style*="{what}: {colour}"]{{{what}:{other}!important}}'
        for colour, other in ON_DARK.items()
        for what in ("fill", "stroke")
    )
    style = f"<style>@media (prefers-color-scheme: dark){{{rules}}}</style>"
    text = path.read_text()
    assert "<defs>" in text, "Matplotlib writes another SVG: where does a style go?"
    assert f": {INK}" in text, "Matplotlib writes colours in another way"
    text = text.replace("<defs>", style + "<defs>", 1)
    path.write_text("\n".join(line.rstrip() for line in text.split("\n")))
