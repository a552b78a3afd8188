"""Quality against bits: one stored model, read at many numbers of bits.

python docs/examples/pareto.py [--model MODEL] [--bits 2 2.5 3 3.5 4] [--out pareto.svg]
"""

import argparse

from tabulate import tabulate
from torchao.quantization import quantize_

import grinqh_ao
from grinqh_ao.running import english_prose, load, token_rows

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--model", default="smollm2", help="directory, .gguf file, hub id or smollm2")
parser.add_argument("--bits", type=float, nargs="+", default=[2, 2.5, 3, 3.5, 4, 5])
parser.add_argument("--tokens", type=int, default=1024, help="to evaluate on")
parser.add_argument("--out", help="also draw the curve, with Matplotlib")
arguments = parser.parse_args()
if arguments.out:
    import matplotlib.pyplot as plt

model, tokenizer = load(arguments.model)
ids = token_rows(tokenizer, english_prose(), arguments.tokens)
full = grinqh_ao.reference(model, ids.to(model.device))
quantize_(model, grinqh_ao.GrinqhConfig(bits=arguments.bits[0]))

rows = []
for bits in arguments.bits:
    grinqh_ao.set_bits(model, bits)  # nothing is quantized again
    found = grinqh_ao.evaluate(model, full)
    megabytes = found.read.total.bytes_per_token_with_scales / 1e6
    rows.append([bits, found.read.body.bits, megabytes, found.kl, found.perplexity])
headers = ["bits", "bits read", "MB per token", "mean KL", "perplexity"]
print(tabulate(rows, headers, "github", floatfmt=("g", ".2f", ".1f", ".4f", ".2f")))

if arguments.out:
    _, axes = plt.subplots(layout="constrained")
    axes.semilogy([row[2] for row in rows], [row[3] for row in rows], "o-")
    for row in rows:
        axes.annotate(f"{row[0]:g} bits", row[2:4], (6, 4), textcoords="offset points")
    axes.set(xlabel="MB read per token", ylabel="mean KL to full precision, nats per token")
    plt.savefig(arguments.out)
