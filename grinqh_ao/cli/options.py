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


def _writable(file: Path | None) -> Path | None:
    """Raises typer.BadParameter before anything long is begun."""
    if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise typer.BadParameter(f"{file}: expected a file in a directory that is there")
    return file


Json = Annotated[
    Path | None,
    typer.Option("--json", help="Also write the results to this file.", callback=_writable),
]


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


def check_bits_option(bits: float) -> None:
    """Raises typer.BadParameter unless some model can be read at so many bits."""
    from grinqh_ao.grading import ALL_LEVELS, check_bits

    try:
        check_bits(bits, ALL_LEVELS)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--bits") from None


def open_full_precision(model: str, dtype: Any = None) -> Any:
    """The model that another is compared with; raises typer.BadParameter of a quantized one."""
    from grinqh_ao.model import is_quantized
    from grinqh_ao.running import load

    found, _ = load(model, dtype=dtype)
    if is_quantized(found):
        raise typer.BadParameter(
            f"{model} is quantized; expected a full-precision model", param_hint="--against"
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
