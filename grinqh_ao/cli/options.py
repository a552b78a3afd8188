"""What several commands take, and models opened as they say."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Directory, .gguf file, hub id, or 'smollm2'.")
]
Bits = Annotated[float, typer.Option(help="Average weight bits to read per token.")]
BitsList = Annotated[
    str, typer.Option("--bits", help="Averages of weight bits to read, with commas between.")
]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the results to this file.")]


def say(message: str) -> None:
    """To standard error: results alone go to standard output."""
    print(message, file=sys.stderr)


def numbers(text: str, name: str) -> list[float]:
    """Numbers with commas between; raises typer.BadParameter."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [math.nan]
    if not all(map(math.isfinite, found)):
        raise typer.BadParameter(
            f"{text!r}: expected numbers with commas between, as 2,3,4", param_hint=name
        )
    return found


def open_model(model: str, bits: float | None = None) -> tuple[Any, Any]:
    """(model, tokenizer), quantized: as it was saved, or else now, in memory.

    Args:
        bits: None keeps what a saved model reads, and is 3 for others.
    """
    from torchao.quantization import quantize_

    from grinqh_ao import GrinqhConfig, set_bits
    from grinqh_ao.model import is_quantized
    from grinqh_ao.running import load

    found, tokenizer = load(model, dtype="auto" if Path(model).is_dir() else None)
    if not is_quantized(found):
        config = GrinqhConfig(bits=3.0 if bits is None else bits)
        say(f"{model} is not quantized; quantizing it in memory")
        quantize_(found, config)
    elif bits is not None:
        set_bits(found, bits)
    return found, tokenizer
