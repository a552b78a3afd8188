"""Quality per bit, from what quality.py wrote; several files of one text make one picture.

    cd benchmarks/results
    python ../plot_quality.py quality-debian-handbook.json quality-debian-handbook-others.json

writes docs/pictures/NAME.svg, by the name of the first file, and NAME-read.svg, its left
half, for the README.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import matplotlib.pyplot as plt

from plotting import AMBER, BLUE, FAINT, GREEN, INK, ORANGE, PINK, SKY, save

PICTURES = Path(__file__).resolve().parents[1] / "docs" / "pictures"
STYLES = {
    "GRINQH": (BLUE, "o", "--"),
    "GRINQH, calibrated": (ORANGE, "o", "-"),
    "GRINQH, 4.4 bits stored": (SKY, "o", "-"),
    "AWQ": (GREEN, "^", ""),
    "GPTQ, act-order": (PINK, "D", ""),
    "GPTQ": (PINK, "s", ""),
    "HQQ": (AMBER, "v", ""),
    "llama.cpp": (INK, "P", ""),
    "RTN": (FAINT, "x", ""),
}


def family(row: dict) -> str | None:
    if row["family"] != "others":
        name = row["family"].replace("stored", "bits stored")
        return name if name in STYLES else None
    name = row["what"]
    if re.match(r"Q\d_", name):
        return "llama.cpp"
    if "act-order" in name:
        return "GPTQ, act-order"
    return next((kind for kind in STYLES if name.startswith(kind)), None)


def main(argv: list[str] | None = None, to: Path = PICTURES) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", type=Path, nargs="+")
    files = parser.parse_args(argv).files
    every_row = [row for file in files for row in json.loads(file.read_text())["rows"]]
    figure, axis = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    draw_read(axis, every_row)
    save(figure, to / f"{files[0].stem}-read.svg")
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
    draw_read(axes[0], every_row)
    draw_stored(axes[1], every_row)
    save(figure, to / f"{files[0].stem}.svg")


def draw_read(axis, every_row: list[dict]) -> None:
    draw(axis, every_row, "with_scales")
    axis.set_xlabel("bits read per weight and token, scales included")
    axis.set_ylabel("mean KL to full precision, nats per token")
    axis.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 0.06))


def draw_stored(axis, every_row: list[dict]) -> None:
    draw(axis, every_row, "stored")
    at_three = [
        (row["stored"], row["kl"])
        for row in every_row
        if re.fullmatch(r"GRINQH, (calibrated|[\d.]+ stored), 3", row["what"])
    ]
    axis.plot(*zip(*sorted(at_three), strict=True), color=SKY, linewidth=1, marker=".", zorder=0)
    axis.annotate("GRINQH,\nread at 3 bits", (6.3, 0.082), fontsize=8, va="bottom", ha="center")
    axis.set_xlabel("bits stored per weight, scales included")
    axis.annotate(
        "GRINQH: one stored model,\nread at 2 to 4.5 bits", (8.05, 0.5), ha="right", fontsize=8
    )


def draw(axis, every_row: list[dict], quantity: str) -> None:
    for name, (colour, marker, line) in STYLES.items():
        rows = [row for row in every_row if family(row) == name and row[quantity]]
        points = sorted((row[quantity], row["kl"]) for row in rows if row["kl"] < 3)
        if points:
            axis.plot(
                *zip(*points, strict=True), color=colour, marker=marker, label=name, markersize=6,
                linestyle=line if quantity == "with_scales" else "",
            )  # fmt: skip
    noise = next(row["kl"] for row in every_row if row["what"].startswith("bfloat16"))
    axis.axhline(noise, color=FAINT, linewidth=0.8, linestyle=":")
    axis.text(
        0.01, noise, "bfloat16", transform=axis.get_yaxis_transform(), fontsize=8, va="bottom"
    )
    axis.set_yscale("log")


if __name__ == "__main__":
    main()
