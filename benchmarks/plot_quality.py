"""Quality per bit, from what quality.py wrote; several files of one text make one picture.

    cd benchmarks/results
    python ../plot_quality.py quality-debian-handbook.json quality-debian-handbook-others.json

writes docs/pictures/NAME.svg and .png, by the name of the first file.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
# Okabe and Ito's colours, which the colour-blind can tell apart; and a marker for each.
STYLES = {
    "GRINQH": ("#0072B2", "o", "--"),
    "GRINQH, calibrated": ("#D55E00", "o", "-"),
    "GRINQH, 4.4 bits stored": ("#56B4E9", "o", "-"),
    "AWQ": ("#009E73", "^", ""),
    "GPTQ, act-order": ("#CC79A7", "D", ""),
    "GPTQ": ("#CC79A7", "s", ""),
    "HQQ": ("#E69F00", "v", ""),
    "llama.cpp": ("#000000", "P", ""),
    "RTN": ("#777777", "x", ""),
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
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
    for axis, quantity in zip(axes, ("with_scales", "stored"), strict=True):
        draw(axis, every_row, quantity)
    at_three = [
        (row["stored"], row["kl"])
        for row in every_row
        if re.fullmatch(r"GRINQH, (calibrated|[\d.]+ stored), 3", row["what"])
    ]
    axes[1].plot(
        *zip(*sorted(at_three), strict=True), color="#56B4E9", linewidth=1, marker=".", zorder=0
    )
    axes[1].annotate("GRINQH,\nread at 3 bits", (6.3, 0.082), fontsize=8, va="bottom", ha="center")
    axes[0].set_xlabel("bits read per weight and token, scales included")
    axes[1].set_xlabel("bits stored per weight, scales included")
    axes[0].set_ylabel("mean KL to full precision, nats per token")
    axes[0].legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 0.06))
    axes[1].annotate(
        "GRINQH: one stored model,\nread at 2 to 4.5 bits", (8.05, 0.5), ha="right", fontsize=8
    )
    for suffix in ("svg", "png"):
        figure.savefig(to / f"{files[0].stem}.{suffix}", dpi=130)
    plt.close(figure)


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
    axis.axhline(noise, color="#777777", linewidth=0.8, linestyle=":")
    axis.annotate("bfloat16", (axis.get_xlim()[0], noise), fontsize=8, va="bottom")
    axis.set_yscale("log")
    axis.grid(alpha=0.25, which="major")
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
