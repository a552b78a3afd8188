"""``grinqh quantize``"""

from __future__ import annotations

import os
import re
import shlex
import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from grinqh_ao.batches import FIRST_POSITIONS
from grinqh_ao.cli.options import Bits, Model, numbers, say


def quantize(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory to write.")],
    bits: Bits = 3.0,
    levels: Annotated[
        str, typer.Option(help="Bit widths a channel may be read at; the highest is stored.")
    ] = "0,2,4,6,8",
    head_bits: Annotated[
        str, typer.Option(help="Least bits read of the output head; 'none' leaves it dense.")
    ] = "6",
    skip: Annotated[
        list[str] | None, typer.Option(help="Leave modules of this name dense. May be repeated.")
    ] = None,
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        typer.Option(help="Of what is not quantized."),
    ] = "auto",
    calibrate: Annotated[
        Path | None,
        typer.Option(help="A text file: bits go where its activations show that they help."),
    ] = None,
    calibration_tokens: Annotated[
        int, typer.Option(min=FIRST_POSITIONS + 1, help="How much of that text to use.")
    ] = 4096,
    stored_bits: Annotated[
        float | None,
        typer.Option(help="Store about this many bits per weight, above 4, not 8. Calibrates."),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Of a file, as 5GB.")] = "50GB",
    overwrite: Annotated[bool, typer.Option(help="Write into a directory that is there.")] = False,
) -> None:
    """Quantizes MODEL and saves it, layer by layer: never more than one in full precision.

    (All of it for .gguf files.) Without --calibrate no data is needed.
    """
    from transformers.quantizers.quantizers_utils import should_convert_module

    from grinqh_ao import GrinqhHfConfig, save, summary
    from grinqh_ao import calibrate as calibrate_model
    from grinqh_ao.compact import check_stored_bits
    from grinqh_ao.running import is_gguf, load

    if output.exists() and not output.is_dir():
        raise typer.BadParameter(f"{output} is no directory", param_hint="--output")
    if output.exists() and not overwrite and any(output.iterdir()):
        raise typer.BadParameter(f"{output} is there already; --overwrite?", param_hint="--output")
    there = next(p for p in (output, *output.absolute().parents) if p.exists())
    if not os.access(there, os.W_OK):
        raise typer.BadParameter(f"{there} cannot be written to", param_hint="--output")
    if stored_bits is not None:
        if calibrate is None:
            raise typer.BadParameter("needs --calibrate", param_hint="--stored-bits")
        try:
            check_stored_bits(stored_bits)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--stored-bits") from None
        if bits >= stored_bits:
            raise typer.BadParameter("expected more than --bits", param_hint="--stored-bits")
    if not re.fullmatch(r"\d+(\.\d+)?\s*[KMGT]?i?B", max_shard_size, re.IGNORECASE):
        raise typer.BadParameter(
            f"{max_shard_size!r}: expected a size, as 5GB", param_hint="--max-shard-size"
        )
    head = None if head_bits == "none" else numbers(head_bits, "--head-bits")
    if head is not None and len(head) != 1:
        raise typer.BadParameter(
            f"{head_bits!r}: expected one number, or none", param_hint="--head-bits"
        )
    wanted = numbers(levels, "--levels")
    try:
        config = GrinqhHfConfig(
            bits=bits,
            levels=[int(level) if level.is_integer() else level for level in wanted],  # type: ignore[misc]
            head_bits=head[0] if head else None,
            modules_to_not_convert=skip,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    text = None if calibrate is None else _read(calibrate)
    if is_gguf(model) and dtype == "auto":
        dtype = "bfloat16"
    started = time.perf_counter()
    quantized, tokenizer = load(model, dtype=dtype, quantize=config)
    if text is not None:
        calibrate_model(
            quantized, text, tokenizer=tokenizer, tokens=calibration_tokens, stored_bits=stored_bits
        )
    seconds = time.perf_counter() - started
    for pattern in skip or ():
        if all(should_convert_module(name, [pattern]) for name, _ in quantized.named_modules()):
            say(f"warning: --skip {pattern}: no module has such a name")
    save(quantized, output, tokenizer, max_shard_size=max_shard_size)
    print(summary(quantized))
    say(f"loaded and quantized in {seconds:.1f} s, saved in {output}; next:")
    say(f'  grinqh generate {shlex.quote(str(output))} -p "..."')


def _read(file: Path) -> str:
    try:
        text = file.read_text()
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"{file}: {error}", param_hint="--calibrate") from None
    if not text.strip():
        raise typer.BadParameter(f"{file}: is empty", param_hint="--calibrate")
    return text
