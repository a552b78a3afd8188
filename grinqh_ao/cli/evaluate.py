"""``grinqh evaluate``"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from grinqh_ao.cli.options import (
    BitsList,
    Json,
    Model,
    check_bits_option,
    numbers,
    open_full_precision,
    say,
)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    weights: str
    bits_asked: float | None
    bits_read: float | None
    head_bits_read: float | None
    kl: float
    kl_p90: float
    agreement: float
    perplexity: float


COLUMNS = {
    "weights": ("weights", ""),
    "bits_asked": ("bits asked", "g"),
    "bits_read": ("bits read", ".2f"),
    "head_bits_read": ("head", ".2f"),
    "kl": ("KL", ".4f"),
    "kl_p90": ("KL p90", ".4f"),
    "agreement": ("agreement", ".3f"),
    "perplexity": ("perplexity", ".2f"),
}


def evaluate(
    model: Model,
    bits: BitsList = "2,3,4",
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The full-precision model, to compare with."),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="A text file; default: prose of CPython's documentation.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=64, help="How much of the text to use.")] = 2048,
    json_file: Json = None,
) -> None:
    """Measures quality at several bits: KL divergence (nats per token), agreement, perplexity.

    KL and agreement are against the full-precision model: the one given with --against, or MODEL
    itself if it is not quantized yet. Else they are against MODEL's own prompts, read at its
    highest level. The decode rule holds for every token but the first 16 of a sequence.
    """
    from tabulate import tabulate
    from torchao.quantization import quantize_

    from grinqh_ao import GrinqhConfig, set_bits
    from grinqh_ao import evaluate as measure_quality
    from grinqh_ao import reference as predictions
    from grinqh_ao.evaluation import Quality
    from grinqh_ao.model import is_quantized
    from grinqh_ao.running import describe_machine, english_prose, load, token_rows

    wanted = numbers(bits, "--bits")
    for one in wanted:
        check_bits_option(one)
    prose = english_prose() if text is None else text.read_text()
    dtype = "auto" if Path(model).is_dir() else None
    found, tokenizer = load(model, dtype=dtype)
    ids = token_rows(tokenizer, prose, tokens).to(found.device)
    rows: list[Row] = []

    def add(weights: str, quality: Quality, asked: float | None = None) -> None:
        read = quality.read
        rows.append(
            Row(
                weights,
                asked,
                read.body.bits if read and read.body else None,
                read.head.bits if read and read.head else None,
                quality.kl,
                quality.kl_p90,
                quality.agreement,
                quality.perplexity,
            )
        )

    quantized = is_quantized(found)
    if against is not None:
        original = open_full_precision(against, dtype)
        full = predictions(original, ids)
        add("full precision", measure_quality(original, full, decode_rule=False))
        del original
        versus = against
    else:
        full = predictions(found, ids)
        versus = f"{model}, prompts" if quantized else model
        if not quantized:
            add("full precision", measure_quality(found, full, decode_rule=False))
    if not quantized:
        say(f"{model} is not quantized; quantizing it in memory")
        quantize_(found, GrinqhConfig(bits=wanted[0]))
    prompts = measure_quality(found, full, decode_rule=False)
    add("prompts", prompts)
    for one in wanted:
        set_bits(found, one)
        add("decoding", measure_quality(found, full), one)

    cells = [[getattr(row, name) for name in COLUMNS] for row in rows]
    headers = [header for header, _ in COLUMNS.values()]
    print(tabulate(cells, headers, "github", floatfmt=[form for _, form in COLUMNS.values()]))
    positions = prompts.positions
    say(f"\nKL and agreement against {versus}; {positions} tokens\n{describe_machine()}")
    if json_file is not None:
        report = {
            "model": model,
            "against": versus,
            "tokens": positions,
            "machine": describe_machine(),
            "rows": [asdict(row) for row in rows],
        }
        json_file.write_text(json.dumps(report, indent=1) + "\n")
