"""Errors of the quantizer by level and kind of layer: D(b) = |W - W_b|^2 / |W|^2.

python benchmarks/errors.py [--model ...] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tabulate import tabulate
from torch import nn

from grinqh_ao import GrinqhTensor, running

LEVELS = (2, 4, 6, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=running.SMOLLM2, help="as for the demo")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model, _ = running.load(arguments.model)
    layers: dict[str, list[nn.Linear]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            layers.setdefault(name.rpartition(".")[2], []).append(module)
    rows = []
    for kind, modules in layers.items():
        errors, total = dict.fromkeys(LEVELS, 0.0), 0.0
        for module in modules:
            dense = module.weight.detach().float()
            nested = GrinqhTensor.from_hp(dense)
            total += dense.square().sum().item()
            for level in LEVELS:
                read = nested.dequantize(dense.dtype, level)
                errors[level] += (read - dense).square().sum().item()
        rows.append(
            {"layers": kind, "number": len(modules)}
            | {f"D({level})": errors[level] / total for level in LEVELS}
        )
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".2e"))
    if arguments.json:
        report = {"machine": running.describe_machine(), "rows": rows}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
