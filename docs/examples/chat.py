"""A chat in the terminal whose bits you change while you talk: /bits 2.5, /quit.

python docs/examples/chat.py [--model MODEL] [--bits 3] [--new-tokens 200]
"""

import argparse

from transformers import TextStreamer

import grinqh_ao
from grinqh_ao.cli.options import open_model

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--model", default="smollm2", help="directory, .gguf file, hub id or smollm2")
parser.add_argument("--bits", type=float, default=3.0)
parser.add_argument("--new-tokens", type=int, default=200)
arguments = parser.parse_args()

# As it was saved, or quantized now; if dense, it has to fit in memory as such.
model, tokenizer = open_model(arguments.model, arguments.bits)
streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
conversation: list[dict[str, str]] = []


def answer() -> str:
    """Generates the next turn, prints it as it comes, and says what was read."""
    inputs = tokenizer.apply_chat_template(
        conversation, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    ).to(model.device)
    with grinqh_ao.measure(model) as measured:
        output = model.generate(
            **inputs, max_new_tokens=arguments.new_tokens, streamer=streamer, pad_token_id=0
        )
    if measured.body:
        print(f"[{measured.body.bits:.2f} bits read per weight]")
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


while True:
    try:
        said = input("> ").strip()
    except EOFError:
        break
    if said == "/quit":
        break
    command, _, argument = said.partition(" ")
    if command == "/bits":
        try:
            grinqh_ao.set_bits(model, float(argument))
        except ValueError as error:
            print(f"{said}: expected a number of bits above 0 and up to 8 ({error})")
    elif said.startswith("/"):
        print(f"{command}: expected /bits NUMBER or /quit")
    elif said:
        conversation.append({"role": "user", "content": said})
        conversation.append({"role": "assistant", "content": answer()})
