"""Quantize a model and generate with it: nothing but `quantize_` is new.

python docs/examples/generate.py [--model MODEL] [--bits 3] [--prompt TEXT] [--new-tokens 64]
"""

import argparse

from torchao.quantization import quantize_

import grinqh_ao
from grinqh_ao.running import load, prompt_inputs

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--model", default="smollm2", help="directory, .gguf file, hub id or smollm2")
parser.add_argument("--bits", type=float, default=3.0)
parser.add_argument("--prompt", default="Explain in two sentences why the sky is blue.")
parser.add_argument("--new-tokens", type=int, default=64)
arguments = parser.parse_args()

# As AutoModelForCausalLM.from_pretrained and AutoTokenizer.from_pretrained do; .gguf files too.
model, tokenizer = load(arguments.model)
quantize_(model, grinqh_ao.GrinqhConfig(bits=arguments.bits))
print(grinqh_ao.summary(model))

inputs = prompt_inputs(tokenizer, arguments.prompt).to(model.device)
with grinqh_ao.measure(model) as measured:
    output = model.generate(
        **inputs, max_new_tokens=arguments.new_tokens, do_sample=False, pad_token_id=0
    )
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print(
    f"{measured.body.bits:.2f} bits read per weight, "
    f"{measured.total.bytes_per_token_with_scales / 1e6:.1f} MB per token"
)
