"""What was tried to get more quality out of a bit. docs/quality.md says what came of it.

    python benchmarks/frontier.py thresholds|codes|storage|compensation [--json FILE]

``thresholds``: how bits are shared out between tokens and layers. ``codes``: numbers of the
quantizer and of the ratios between thresholds. ``storage``: which channels keep low slices in
compact storage. ``compensation``: how much of what reading few bits costs could be made good by
other weights at all, as error feedback (GPTQ) tries: the share of the error of a layer's outputs
that is linear in its inputs, on unseen tokens.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torchao.quantization import quantize_

import texts
from grinqh_ao import (
    GrinqhConfig,
    all_but_head,
    calibrate,
    calibration,
    codec,
    compact,
    evaluate,
    grading,
    reference,
    running,
    set_bits,
    token_batches,
)
from grinqh_ao.linear import decode_each_row
from grinqh_ao.model import quantized_linears
from grinqh_ao.observing import Observer, observe
from grinqh_ao.tails import Histogram, common_curves
from grinqh_ao.torchao_tensor import GrinqhTensor

BITS = (3.0, 2.0)
# Of the decoder's layers, for compensation.
SAMPLED_LAYERS = (1, 10, 20, 28)
RIDGE = 1e-2


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--model", default=running.SMOLLM2, help="as for the demo")
    parser.add_argument("--text", default="cpython-docs")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--calibration", default="fortunes")
    parser.add_argument("--calibration-tokens", type=int, default=4096)
    parser.add_argument("--json", type=Path)
    argv = sys.argv[1:] if argv is None else argv
    arguments = parser.parse_args(argv)
    model, tokenizer = running.load(arguments.model)
    ids = running.token_rows(tokenizer, texts.load(arguments.text), arguments.tokens)
    text = texts.load(arguments.calibration)
    batches = token_batches(text, tokenizer, arguments.calibration_tokens)
    rows = EXPERIMENTS[arguments.experiment](model, ids, batches)
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".4f"))
    if arguments.json:
        report = {"machine": running.describe_machine(), "arguments": argv, "rows": rows}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


def thresholds(model: nn.Module, ids: Tensor, batches: list[Tensor]) -> list[dict]:
    full = reference(model, ids)
    quantize_(model, GrinqhConfig(), filter_fn=all_but_head)
    rows = []

    def together(data: list[Tensor] = batches, **options: Any) -> Callable[[], None]:
        return lambda: calibrate(model, data, **options)

    def each_layer(relative: float) -> Callable[[], None]:
        """Bits met in every layer by itself, not in all together."""

        def run() -> None:
            layers = list(quantized_linears(model))
            observers = {weight: Observer(weight, Histogram(relative)) for _, _, weight in layers}
            observe(model, batches, layers, observers, gradients=False)
            for weight, observer in observers.items():
                weight.calibrate(common_curves([observer.histogram], [1], [1.0])[0])

        return run

    variants: dict[str, Callable[[], None]] = {
        "no calibration": lambda: None,
        "each layer for itself, static": each_layer(0),
        "each layer for itself, relative": each_layer(1),
        "together": together(importance=False),
        "by importance": together(),
        "by importance, 512 tokens": together(batches[:1]),
        "by importance, a quarter relative": together(relative=0.25),
        "by importance, half relative": together(relative=0.5),
    }
    for name, prepare in variants.items():
        prepare()
        for bits in BITS:
            set_bits(model, bits)
            found = evaluate(model, full)
            kinds: dict[str, list[float]] = {}
            for layer, reading in found.read.layers.items():
                kinds.setdefault(layer.rpartition(".")[2], []).append(reading.bits)
            layers = [bits for every in kinds.values() for bits in every]
            rows.append(
                {
                    "thresholds": name,
                    "bits asked": bits,
                    "bits read": found.read.total.bits,
                    "fewest, of a layer": min(layers),
                    "most": max(layers),
                    "KL": found.kl,
                    "median": found.kl_median,
                }
                | {kind: sum(every) / len(every) for kind, every in kinds.items()}
            )
            print(*rows[-1].values(), flush=True)
    return rows


def codes(model: nn.Module, ids: Tensor, batches: list[Tensor]) -> list[dict]:
    full = reference(model, ids)
    ratios = grading.RELATIVE_ERROR
    variants: dict[str, list[tuple[Any, str, Any]]] = {
        "as built": [],
        "errors weigh 3, 8, 20, 100": [(codec, "_ERROR_WEIGHT", {2: 3, 4: 8, 6: 20, 8: 100})],
        "errors weigh 1, 16, 40, 200": [(codec, "_ERROR_WEIGHT", {2: 1, 4: 16, 6: 40, 8: 200})],
        "gain of level 2: .80": [(codec, "_GAINS", (0.80, 0.985, 1.0, 1.0))],
        "gain of level 2: .90": [(codec, "_GAINS", (0.90, 0.985, 1.0, 1.0))],
        "a scale 1.16 times the largest too": [(codec, "_SCALE_FACTORS", (1.0, 1.08, 1.16))],
        "thresholds for D(2) = .10": [(grading, "RELATIVE_ERROR", ratios | {2: 0.10})],
        "thresholds for D(2) = .20": [(grading, "RELATIVE_ERROR", ratios | {2: 0.20})],
        "thresholds for D(4) = .02": [(grading, "RELATIVE_ERROR", ratios | {4: 0.02})],
    }
    rows = []
    for name, changes in variants.items():
        with ExitStack() as changed:
            for module, attribute, value in changes:
                changed.enter_context(mock.patch.object(module, attribute, value))
            forget_tables()
            quantized = copy.deepcopy(model)
            quantize_(quantized, GrinqhConfig(calibration=batches), filter_fn=all_but_head)
            found = evaluate(quantized, full)
        row = {"variant": name, "bits read": found.read.total.bits, "KL": found.kl}
        rows.append(row | {"median": found.kl_median})
        print(*rows[-1].values(), flush=True)
    forget_tables()
    return rows


def forget_tables() -> None:
    """What follows from the numbers that ``codes`` changes."""
    codec._nearest_codes.cache_clear()
    grading._lowest_threshold.cache_clear()


class MostOften(compact.ChannelUse):
    """Of the channels, those that are most often read above 4 bits, but the loudest 1% first."""

    def __init__(self, channels: int, bits: float) -> None:
        super().__init__(channels, bits)
        self._energy = torch.zeros(channels, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        self._energy += x.double().square().sum(0)
        self._cost += (x.abs() > self._threshold * x.abs().mean(1, keepdim=True)).sum(0)

    def kept(self, stored_bits: float) -> Tensor:
        self._cost[self._energy.topk(-(-len(self._cost) // 100)).indices] = torch.inf
        return super().kept(stored_bits)


def storage(model: nn.Module, ids: Tensor, batches: list[Tensor]) -> list[dict]:
    full = reference(model, ids)
    rows = []
    for name, rule in {"cost": compact.ChannelUse, "most often": MostOften}.items():
        with mock.patch.object(calibration, "ChannelUse", rule):
            quantized = copy.deepcopy(model)
            config = GrinqhConfig(calibration=batches, stored_bits=4.4)
            quantize_(quantized, config, filter_fn=all_but_head)
        found, prompt = evaluate(quantized, full), evaluate(quantized, full, decode_rule=False)
        row = {"kept by": name, "bits read": found.read.total.bits, "KL": found.kl}
        rows.append(row | {"median": found.kl_median, "KL in the dense path": prompt.kl})
        print(*rows[-1].values(), flush=True)
    return rows


@torch.no_grad()
def compensation(model: nn.Module, ids: Tensor, batches: list[Tensor]) -> list[dict]:
    dense = {name: m.weight.clone() for name, m in model.named_modules() if all_but_head(m, name)}
    quantize_(model, GrinqhConfig(), filter_fn=all_but_head)
    names = [n for n in dense if any(f".layers.{i}." in n for i in SAMPLED_LAYERS)]
    seen, unseen = (inputs_of(model, names, rows) for rows in (batches, [row[None] for row in ids]))
    rows = []
    for bits in BITS:
        set_bits(model, bits)
        kinds: dict[str, list[tuple[float, float]]] = {}
        for name in names:
            nested = model.get_submodule(name).weight
            x, error = (t.double() for t in (seen[name], lost(nested, dense[name], seen[name])))
            # Ridge regression of the error on x, with a constant.
            x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
            gram = x.t() @ x
            gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
            solution = torch.linalg.solve(gram, x.t() @ error)
            x, error = (t.double() for t in (unseen[name], lost(nested, dense[name], unseen[name])))
            predicted = torch.cat([x, x.new_ones(len(x), 1)], dim=1) @ solution
            left = (error - predicted).square().sum() / error.square().sum()
            output = (x @ dense[name].double().t()).square().sum()
            relative = error.square().sum() / output
            kinds.setdefault(name.rpartition(".")[2], []).append((relative.item(), left.item()))
        for kind, found in kinds.items():
            relative, left = torch.tensor(found).mean(0).tolist()
            rows.append(
                {"bits": bits, "layers": kind, "error / output": relative, "left at best": left}
            )
    return rows


def inputs_of(model: nn.Module, names: list[str], batches: list[Tensor]) -> dict[str, Tensor]:
    """[tokens, K] of each layer, without the first 16 of each sequence."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, kept=kept: kept.append(args[0][:, 16:].flatten(0, 1))
        )
        for name, kept in found.items()
    ]
    for batch in batches:
        model(batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(kept) for name, kept in found.items()}


def lost(nested: GrinqhTensor, dense: Tensor, x: Tensor) -> Tensor:
    """[tokens, N]: the full-precision product minus what decoding reads of it."""
    return x @ dense.t() - decode_each_row(x, nested, None)


EXPERIMENTS = {
    "thresholds": thresholds,
    "codes": codes,
    "storage": storage,
    "compensation": compensation,
}

if __name__ == "__main__":
    main()
