"""``grinqh bench``"""

from __future__ import annotations

import json
import statistics
from typing import Annotated, Any

import typer

from grinqh_ao.cli.options import (
    BitsList,
    Json,
    Model,
    check_bits_option,
    numbers,
    open_full_precision,
    open_model,
    say,
)


def bench(
    model: Model,
    bits: BitsList = "2,3,4",
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A full-precision model to time as well.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate each time.")] = 16,
    repeat: Annotated[int, typer.Option(min=1, help="Rounds; medians are shown.")] = 3,
    prompt: Annotated[str, typer.Option(help="What to go on from.")] = "The capital of France is",
    json_file: Json = None,
) -> None:
    """Times decoding with unchanged generate(), at several bits in turn, round by round.

    The time of a prompt's own pass is not in it. On a shared machine trust ratios only.
    """
    from tabulate import tabulate

    from grinqh_ao import set_bits
    from grinqh_ao.running import Clock, describe_machine, prompt_inputs

    wanted = numbers(bits, "--bits")
    for one in wanted:
        check_bits_option(one)
    found, tokenizer = open_model(model, wanted[0])
    for one in wanted:
        set_bits(found, one)  # refuses it before anything is timed
    inputs = prompt_inputs(tokenizer, prompt, raw=True).to(found.device)
    original: Any = None
    if against is not None:
        original = open_full_precision(against, found.dtype)

    def milliseconds(timed: Any) -> float:
        clock = Clock()
        timed.generate(
            **inputs, max_new_tokens=new_tokens, eos_token_id=None, do_sample=False,
            streamer=clock, pad_token_id=tokenizer.pad_token_id or 0,
        )  # fmt: skip
        return 1e3 / clock.tokens_per_second()

    times: dict[str, list[float]] = {}
    for turn in range(repeat + 1):  # the first warms up
        say(f"round {turn} of {repeat}")
        for one in wanted:
            set_bits(found, one)
            times.setdefault(f"{one:g} bits", []).append(milliseconds(found))
        if original is not None:
            times.setdefault("full precision", []).append(milliseconds(original))
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    base = "full precision" if original is not None else next(iter(medians))
    rows = [[name, ms, 1e3 / ms, medians[base] / ms] for name, ms in medians.items()]
    headers = ["weights", "ms/token", "tokens/s", f"times {base}"]
    print(tabulate(rows, headers, "github", floatfmt=".2f"))
    say(describe_machine())
    if json_file is not None:
        report = {"model": model, "machine": describe_machine(), "milliseconds": times}
        json_file.write_text(json.dumps(report, indent=1) + "\n")
