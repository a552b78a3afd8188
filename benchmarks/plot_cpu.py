"""Draws what ``benchmarks/cpu.py`` wrote: speed-up over bfloat16 against bits, a line per layer.

python benchmarks/plot_cpu.py benchmarks/results/cpu.json --out docs/pictures/cpu.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from plotting import COLOURS, FAINT, save

PEERS = {"int8 (torchao, compiled)": (8, "s"), "int4 (PyTorch)": (4, "^")}
MIN_WEIGHTS = 1 << 22


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("--out", type=Path, default=Path("cpu.svg"))
    arguments = parser.parse_args()
    draw(json.loads(arguments.report.read_text()), arguments.out)


def draw(report: dict[str, Any], out: Path) -> None:
    figure, axes = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    most = max(row["threads"] for row in report["layers"])
    rows = [row for row in report["layers"] if row["threads"] == most]
    rows = [row for row in rows if row["shape"][0] * row["shape"][1] > MIN_WEIGHTS]
    for colour, row in zip(COLOURS, rows, strict=False):
        us, name = row["us"], "x".join(map(str, row["shape"]))
        bits = sorted(float(key.split()[0]) for key in row["needed_bytes"])
        speedup = [us["bfloat16"] / us[f"{b:g} bits"] for b in bits]
        axes.plot(bits, speedup, "o-", color=colour, label=f"{name}, out x in")
        for peer, (position, marker) in PEERS.items():
            if peer in us:
                axes.plot(position, us["bfloat16"] / us[peer], marker, color=colour, mfc="none")
    for peer, (_, marker) in PEERS.items():
        axes.plot([], [], marker, color=FAINT, mfc="none", label=peer)
    axes.set(xlabel="bits read per weight", ylabel="speed-up over bfloat16 (PyTorch)", ylim=0)
    axes.set_title(f"{report['machine'].split(';')[0]}", fontsize=10)
    axes.legend(fontsize=8)
    save(figure, out)


if __name__ == "__main__":
    main()
