"""What calibration is worth: KL to the full model without it, with it, and stored compactly.

python docs/examples/calibrate_and_evaluate.py [--model MODEL] [--bits 3] [--stored-bits 4.4]

Calibrated on one half of the prose in CPython's documentation, evaluated on the other.
"""

import argparse

from tabulate import tabulate
from torchao.quantization import quantize_

import grinqh_ao
from grinqh_ao.running import english_prose, load, token_rows

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--model", default="smollm2", help="directory, .gguf file, hub id or smollm2")
parser.add_argument("--bits", type=float, default=3.0)
parser.add_argument("--stored-bits", type=float, default=4.4)
parser.add_argument("--tokens", type=int, default=1024, help="to evaluate on")
parser.add_argument("--calibration-tokens", type=int, default=4096)
arguments = parser.parse_args()

model, tokenizer = load(arguments.model)
paragraphs = english_prose().split("\n\n")
for_calibration = paragraphs[: len(paragraphs) // 2]
ids = token_rows(tokenizer, "\n\n".join(paragraphs[len(paragraphs) // 2 :]), arguments.tokens)
full = grinqh_ao.reference(model, ids.to(model.device))  # before it is quantized

rows = []


def evaluate(name: str) -> None:
    found = grinqh_ao.evaluate(model, full)
    stored = grinqh_ao.summary(model).stored_bytes / 1e6
    rows.append([name, found.read.total.bits, stored, found.kl, found.perplexity])


quantize_(model, grinqh_ao.GrinqhConfig(bits=arguments.bits))
evaluate("by the formula")
batches = grinqh_ao.token_batches(for_calibration, tokenizer, arguments.calibration_tokens)
grinqh_ao.calibrate(model, batches)
evaluate("calibrated")
grinqh_ao.calibrate(model, batches, stored_bits=arguments.stored_bits)
evaluate(f"calibrated, {arguments.stored_bits:g} bits stored")
headers = ["thresholds", "bits read, with the head", "stored MB", "mean KL", "perplexity"]
print(tabulate(rows, headers, "github", floatfmt=("", ".2f", ".1f", ".4f", ".2f")))
