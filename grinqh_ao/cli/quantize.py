"""``grinqh quantize``"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

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
        str, typer.Option(help="Of what is not quantized: bfloat16, float16, float32 or auto.")
    ] = "auto",
    calibrate: Annotated[
        Path | None,
        typer.Option(help="A text file: bits go where its activations show that they help."),
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(help="How much of that text to use.")] = 4096,
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
    from grinqh_ao import GrinqhHfConfig, save, summary
    from grinqh_ao import calibrate as calibrate_model
    from grinqh_ao.running import is_gguf, load

    if output.exists() and not overwrite and (not output.is_dir() or any(output.iterdir())):
        raise typer.BadParameter(f"{output} is there already; --overwrite?", param_hint="--output")
    if stored_bits is not None and calibrate is None:
        raise typer.BadParameter("needs --calibrate", param_hint="--stored-bits")
    config = GrinqhHfConfig(
        bits=bits,
        levels=[int(level) for level in numbers(levels, "--levels")],
        head_bits=None if head_bits == "none" else numbers(head_bits, "--head-bits")[0],
        modules_to_not_convert=skip,
    )
    text = None if calibrate is None else calibrate.read_text()
    if is_gguf(model) and dtype == "auto":
        dtype = "bfloat16"
    started = time.perf_counter()
    quantized, tokenizer = load(model, dtype=dtype, quantize=config)
    if text is not None:
        calibrate_model(
            quantized, text, tokenizer=tokenizer, tokens=calibration_tokens, stored_bits=stored_bits
        )
    seconds = time.perf_counter() - started
    save(quantized, output, tokenizer, max_shard_size=max_shard_size)
    print(summary(quantized))
    say(f"loaded and quantized in {seconds:.1f} s, saved in {output}; next:")
    say(f'  grinqh generate {output} -p "..."')
