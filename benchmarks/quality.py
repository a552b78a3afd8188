"""Quality per bit: GRINQH at many bits, with and without calibration, and other quantizers.

    python benchmarks/quality.py [--text debian-handbook] [--others] [--json FILE]

For texts by name see texts.py. All layers of the decoder are quantized; the output head stays in
full precision but in the rows that say otherwise, for GRINQH and the others alike.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tabulate import tabulate
from torch import nn
from torchao.quantization import quantize_

import texts
from baselines import methods
from baselines.scramble import scramble
from grinqh_ao import (
    GrinqhConfig,
    all_but_head,
    calibrate,
    evaluate,
    reference,
    running,
    set_bits,
    summary,
    token_batches,
)

BITS = (4.5, 4.0, 3.5, 3.0, 2.75, 2.5, 2.25, 2.0)
# Compact storage: the smallest size at all bits, the others at three.
STORED_BITS = (4.4, 5.0, 6.0)
PROMPT = 16
HEAD_BITS = (3.0, 4.0, 6.0, 8.0)


@dataclass
class Row:
    """One line: bits of the layers that were quantized, and what they cost."""

    what: str
    family: str
    bits: float | None = None
    with_scales: float | None = None
    stored: float | None = None
    kl: float | None = None
    kl_median: float | None = None
    kl_p90: float | None = None
    perplexity: float | None = None
    agreement: float | None = None
    seconds: float | None = None
    source: str = ""


class Table:
    """Rows so far, printed and written down one by one: a run takes a while."""

    def __init__(self, full, head: dict, file: Path | None) -> None:
        self.full, self.head, self.file = full, head, file
        self.rows: list[Row] = []

    def add(self, model: nn.Module, row: Row, **options) -> None:
        found = evaluate(model, self.full, **options)
        for name in ("kl", "kl_median", "kl_p90", "perplexity", "agreement"):
            setattr(row, name, getattr(found, name))
        if found.read:
            row.bits, row.with_scales = found.read.total.bits, found.read.total.bits_with_scales
            row.stored = found.read.total.stored_bits
        self.rows.append(row)
        if self.file:
            report = self.head | {"rows": [asdict(row) for row in self.rows]}
            self.file.write_text(json.dumps(report, indent=1) + "\n")
        cells = [row.what, row.bits, row.with_scales, row.kl, row.perplexity]
        print(*(f"{c:.4f}" if isinstance(c, float) else c for c in cells), flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=running.SMOLLM2, help="as for the demo")
    parser.add_argument("--text", default="cpython-docs")
    parser.add_argument("--skip-tokens", type=int, default=0, help="start that far into the text")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--calibration", default="fortunes")
    parser.add_argument("--calibration-tokens", type=int, default=4096)
    parser.add_argument("--bits", type=float, nargs="*", default=BITS)
    parser.add_argument("--others", action="store_true", help="other quantizers too")
    parser.add_argument("--only", nargs="+", help="of them, those whose names contain one of these")
    parser.add_argument("--cache", type=Path, help="keep the reference's predictions there")
    parser.add_argument("--json", type=Path)
    argv = sys.argv[1:] if argv is None else argv
    arguments = parser.parse_args(argv)

    model, tokenizer = running.load(arguments.model)
    scramble(model)
    text = texts.load(arguments.text)
    ids = running.token_rows(tokenizer, text, arguments.tokens, arguments.skip_tokens)
    batches = token_batches(
        texts.load(arguments.calibration), tokenizer, arguments.calibration_tokens
    )
    machine = running.describe_machine()
    head = {"machine": machine, "arguments": argv, "tokens": ids.numel()}
    table = Table(reference(model, ids, cache=arguments.cache), head, arguments.json)
    table.add(model, Row("full precision", "reference"), decode_rule=False)
    noise = copy.deepcopy(model).to(torch.bfloat16)
    table.add(noise, Row("bfloat16, the noise floor", "reference"), decode_rule=False)
    del noise

    grinqh(model, batches, arguments.bits, table)
    if arguments.others:
        others(model, batches, arguments.only, table)

    print()
    shown = [{k: v for k, v in asdict(row).items() if k != "source"} for row in table.rows]
    print(tabulate(shown, headers="keys", tablefmt="github", floatfmt=".4f"))
    print(f"\n{ids.numel()} tokens, the first 16 of each {ids.shape[1]} not scored\n{machine}")


def grinqh(model: nn.Module, batches: list, bits: list[float], table: Table) -> None:
    body, seconds = quantized(model)
    prefill("GRINQH", body, seconds, table)
    at_bits("GRINQH", body, bits, seconds, table)
    started = time.perf_counter()
    calibrate(body, batches)
    seconds += time.perf_counter() - started
    at_bits("GRINQH, calibrated", body, bits, seconds, table)
    set_bits(body, 3)
    prompt = table.full.input_ids.shape[1] // 2
    row = Row(f"GRINQH, calibrated, 3, after a dense prompt of {prompt}", "long prompt")
    table.add(body, row, dense_prefix=prompt)

    for stored in STORED_BITS:
        body, seconds = quantized(model)
        started = time.perf_counter()
        calibrate(body, batches, stored_bits=stored)
        seconds += time.perf_counter() - started
        family = f"GRINQH, {stored:g} stored"
        prefill(family, body, seconds, table)
        possible = [asked for asked in bits if asked < stored - 0.1]  # some channels more or less
        at_bits(family, body, possible if stored == STORED_BITS[0] else [3.0], seconds, table)
    del body

    head = copy.deepcopy(model)
    config = GrinqhConfig(head_bits=0.5)
    quantize_(head, config, filter_fn=lambda m, n: isinstance(m, nn.Linear) and "lm_head" in n)
    for asked in HEAD_BITS:
        set_bits(head, asked)
        table.add(head, Row(f"output head alone, {asked:g}", "head"))


def quantized(model: nn.Module) -> tuple[nn.Module, float]:
    body = copy.deepcopy(model)
    started = time.perf_counter()
    quantize_(body, GrinqhConfig(), filter_fn=all_but_head)
    return body, time.perf_counter() - started


def prefill(family: str, body: nn.Module, seconds: float, table: Table) -> None:
    weights = [m.weight for n, m in body.named_modules() if all_but_head(m, n)]
    stored = 8 * sum(weight.stored_bytes for weight in weights) / summary(body).weights
    row = Row(f"{family}, dense path (prefill)", "prefill", stored=stored, seconds=seconds)
    table.add(body, row, decode_rule=False)


def at_bits(
    family: str, body: nn.Module, bits: Sequence[float], seconds: float, table: Table
) -> None:
    for asked in bits:
        set_bits(body, asked)
        table.add(body, Row(f"{family}, {asked:g}", family, seconds=seconds))


def others(model: nn.Module, batches: list, only: list[str] | None, table: Table) -> None:
    for method in methods():
        if only and not any(part in method.name for part in only):
            continue
        changed = copy.deepcopy(model)
        started = time.perf_counter()
        method.run(changed, batches)
        row = Row(
            method.name,
            "others",
            method.bits,
            method.bits_with_scales,
            method.bits_with_scales,
            seconds=time.perf_counter() - started,
            source=method.source,
        )
        table.add(AfterDensePrompt(model, changed), row, decode_rule=False)


class AfterDensePrompt(nn.Module):
    """A model whose first 16 positions are those of another, as with GRINQH's dense prompts."""

    def __init__(self, dense: nn.Module, changed: nn.Module) -> None:
        super().__init__()
        self.dense, self.changed = dense, changed

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False):
        prompt = self.dense(input_ids[:, :PROMPT], use_cache=True)
        output = self.changed(input_ids[:, PROMPT:], past_key_values=prompt.past_key_values)
        output.logits = torch.cat([prompt.logits, output.logits], dim=1)
        return output


if __name__ == "__main__":
    main()
