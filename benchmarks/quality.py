"""Quality without calibration data, on a text of your choice; and what the output head may read.

    python benchmarks/quality.py [--text FILE | --text debian-handbook] [--json FILE]

``debian-handbook`` is Debian's package of that name: ordinary English prose
(``apt-get install debian-handbook``). The default is the prose of CPython's documentation.
"""

from __future__ import annotations

import argparse
import copy
import html
import json
import re
import sys
from pathlib import Path

from tabulate import tabulate
from torch import nn
from torchao.quantization import quantize_

from grinqh_ao import GrinqhConfig, all_but_head, demo, measure, set_bits
from grinqh_ao.evaluation import quality, reference

HANDBOOK = Path("/usr/share/doc/debian-handbook/html/en-US")
BODY_BITS = (4.0, 3.5, 3.0, 2.5, 2.0)
HEAD_BITS = (2.0, 3.0, 4.0, 5.0, 6.0, 8.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="as for the demo")
    parser.add_argument("--text", help="a text file, or debian-handbook")
    parser.add_argument("--skip-tokens", type=int, default=0, help="start that far into the text")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--handbook", type=Path, default=HANDBOOK, help="where its pages are")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    model, tokenizer = demo.load(arguments.model)
    ids = demo.token_rows(tokenizer, text_of(arguments), arguments.tokens, arguments.skip_tokens)
    full = reference(model, ids)
    rows: list[dict] = []

    def add(name: str, quantized: nn.Module, **options: bool) -> None:
        with measure(quantized) as measured:
            found = quality(quantized, full, **options)
        read = measured.total if measured.layers else None
        row = {
            "what": name,
            "bits": read and read.bits,
            "with scales": read and read.bits_with_scales,
            "KL": found.kl,
            "perplexity": found.perplexity,
            "same first token": found.agreement,
        }
        rows.append(row)
        print(tabulate([row], tablefmt="plain", floatfmt=".4f"), flush=True)

    full_perplexity = quality(model, full, decode_rule=False).perplexity
    full_perplexity = quality(model, full, decode_rule=False).perplexity
    print(f"full precision: perplexity {full_perplexity:.3f}")

    body = copy.deepcopy(model)
    quantize_(body, GrinqhConfig(), filter_fn=all_but_head)
    add("body, dense path (prefill)", body, decode_rule=False)
    for bits in BODY_BITS:
        set_bits(body, bits)
        add(f"body {bits:g}", body)

    head = copy.deepcopy(model)
    quantize_(
        head,
        GrinqhConfig(head_bits=0.5),
        filter_fn=lambda module, name: (
            isinstance(module, nn.Linear) and not all_but_head(module, name)
        ),
    )
    for bits in HEAD_BITS:
        set_bits(head, bits)
        add(f"head {bits:g}", head)

    quantize_(model, GrinqhConfig(bits=3))
    add("all, bits=3, dense path (prefill)", model, decode_rule=False)
    add("all, bits=3", model)

    print()
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=("", ".2f", ".2f", ".4f")))
    machine = demo.describe_machine()
    print(f"\n{ids.numel()} tokens, decode rule after the first 16 of each 512\n{machine}")
    if arguments.json:
        report = {
            "machine": machine,
            "arguments": sys.argv[1:],
            "tokens": ids.numel(),
            "full_precision_perplexity": full_perplexity,
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


def text_of(arguments: argparse.Namespace) -> str:
    if arguments.text is None:
        return demo.english_prose()
    if arguments.text != "debian-handbook":
        return Path(arguments.text).read_text()
    paragraphs = []
    for page in sorted(arguments.handbook.glob("*.html")):
        for found in re.findall(r'<div class="para">(.*?)</div>', page.read_text(), re.DOTALL):
            paragraph = " ".join(html.unescape(re.sub("<[^>]+>", "", found)).split())
            if len(paragraph) > 200:
                paragraphs.append(paragraph)
    if not paragraphs:
        raise SystemExit(f"no page in {arguments.handbook}: apt-get install debian-handbook")
    return "\n\n".join(paragraphs)


if __name__ == "__main__":
    main()
