"""Draws what ``benchmarks/gpu.py`` wrote: speed-up over bf16 against bits, one line per layer.

python benchmarks/plot_gpu.py benchmarks/results/gpu.json --out docs/pictures/gpu.svg
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from plotting import COLOURS, FAINT, save

LAYERS = [(4096, 4096), (14336, 4096), (28672, 4096), (4096, 14336)]
PEERS = {"torchao int4": "s", "GemLite 4-bit": "^", "GemLite 2-bit": "v"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("--out", type=Path, default=Path("gpu.svg"))
    arguments = parser.parse_args()
    draw(json.loads(arguments.report.read_text()), arguments.out)


def draw(report: dict[str, Any], out: Path) -> None:
    figure, axes = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    rows = {tuple(row["shape"]): row["us"] for row in report["kernels"]["rows"]}
    bits: list[float] = []
    for colour, layer in zip(COLOURS, LAYERS, strict=False):
        if layer not in rows:
            continue
        times = rows[layer]
        ours = {
            float(n.split()[1]): us for n, us in times.items() if re.fullmatch("grinqh [0-9.]+", n)
        }
        bits = sorted(ours)
        label = "x".join(map(str, layer))
        speedup = [times["bf16"] / ours[b] for b in bits]
        axes.plot(bits, speedup, "o-", color=colour, label=f"{label}, out x in")
        for peer, marker in PEERS.items():
            if peer in times:
                position = 2 if "2-bit" in peer else 4
                axes.plot(position, times["bf16"] / times[peer], marker, color=colour, mfc="none")
                axes.annotate(
                    peer, (position, times["bf16"] / times[peer]), fontsize=7,
                    xytext=(6, -3), textcoords="offset points", color=colour,
                )  # fmt: skip
    if bits:
        ideal = [16 / (b + 0.1) for b in bits]
        axes.plot(bits, ideal, "--", color=FAINT, label="as the bytes, 16 / (bits + scales)")
    axes.set(xlabel="bits read per weight", ylabel="speed-up over bf16 (cuBLAS)", ylim=0)
    axes.set_title(report["machine"].split(";")[0].split(", ")[-1], fontsize=10)
    axes.legend(fontsize=8)
    save(figure, out)


if __name__ == "__main__":
    main()
