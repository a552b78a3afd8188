"""``grinqh generate``"""

from __future__ import annotations

from typing import Annotated

import typer

from grinqh_ao.cli.options import Model, check_bits_option, open_model, say


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option("-p", "--prompt", help="What to answer, or go on from.")],
    bits: Annotated[
        float | None, typer.Option(help="Average weight bits to read per token; else as saved.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="How much to generate at most.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")
    ] = 0.0,
    raw: Annotated[bool, typer.Option(help="Go on from the prompt; no chat template.")] = False,
    compile: Annotated[
        bool, typer.Option(help="Compile the model first, which takes a while.")
    ] = False,
) -> None:
    """Streams an answer, then says how fast it came and what was read for it."""
    import torch
    from transformers import CompileConfig, TextStreamer

    from grinqh_ao import decode_every_row, measure
    from grinqh_ao.running import Clock, prompt_inputs

    if not prompt:
        raise typer.BadParameter("is empty", param_hint="--prompt")
    if any("\ud800" <= character <= "\udfff" for character in prompt):  # bytes that were no text
        raise typer.BadParameter("is no text in this encoding", param_hint="--prompt")
    if bits is not None:
        check_bits_option(bits)
    found, tokenizer = open_model(model, bits)
    inputs = prompt_inputs(tokenizer, prompt, raw=raw).to(found.device)

    class Streamer(TextStreamer):
        clock = Clock()

        def put(self, value: torch.Tensor) -> None:
            self.clock.put(value)
            super().put(value)

    options: dict[str, object] = {"do_sample": temperature > 0}
    if temperature > 0:
        options["temperature"] = temperature
    if compile:
        config = CompileConfig() if found.device.type == "cuda" else CompileConfig(mode="default")
        config._compile_all_devices = True  # else generate() compiles on GPUs only
        options |= {"cache_implementation": "static", "compile_config": config}
    streamer = Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    output = found.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        streamer=streamer,
        pad_token_id=tokenizer.pad_token_id or 0,
        **options,
    )
    given = inputs["input_ids"].shape[1]
    new = output.shape[1] - given
    speed = streamer.clock.tokens_per_second()
    if new < 2:
        say(f"\n{new} token")
        return
    # What decoding read, token by token, in one pass over what it wrote.
    with torch.no_grad(), decode_every_row(given), measure(found) as measured:
        found(output[:, :-1])
    read = measured.total
    compiling = " (compiling included)" if compile else ""
    parts = [f"{new} tokens, {speed:.2f} tokens/s{compiling}"]
    if measured.body:
        parts.append(f"{measured.body.bits:.2f} bits read per weight")
    if measured.head:
        parts.append(f"{measured.head.bits:.2f} of the head")
    parts.append(f"{read.bytes_per_token_with_scales / 1e6:.1f} MB per token")
    say("\n" + ", ".join(parts))
