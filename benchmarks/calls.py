"""What the host does in a step before kernels run: in compiled models, and in eager mode by layer.

    python benchmarks/calls.py [--json FILE]

A model with as many layers as Llama-3-8B has, small ones, on this CPU. "tensor" has plain nn.Linear
layers with a GrinqhTensor each, "layer" what quantize_ makes of them, "fused" is that after
fuse_projections. "Skipped" is what is left of checks where torch.compiler.set_stance skips what it
may, as docs/transformers.md recommends.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tabulate import tabulate
from torch import nn
from torch._inductor.compile_fx import compile_fx
from torch._inductor.output_code import CompiledFxGraph
from torchao.quantization import quantize_

from grinqh_ao import GrinqhConfig, fuse_projections, running
from grinqh_ao.layers import GrinqhLinear

KINDS = ("bf16", "tensor", "layer", "fused")
CONFIG: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 32,
    "num_attention_heads": 8, "num_key_value_heads": 8,
}  # fmt: skip
PROMPT, WARM_UP, STEPS, ROUNDS = 4, 10, 100, 3
EAGER_CALLS = 2000


class Stopwatch:
    """When a compiled step begins, comes to its graph, and comes to the graph's first kernel."""

    def __init__(self) -> None:
        self.graph = self.kernels = 0.0

    def backend(self, graph: torch.fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        compiled = compile_fx(graph, examples)

        def call(*inputs: Any) -> Any:
            self.graph = time.perf_counter()
            return compiled(*inputs)

        return call

    def watch_kernels(self) -> None:
        call = CompiledFxGraph.__call__

        def watched(graph: CompiledFxGraph, inputs: Any) -> Any:
            self.kernels = time.perf_counter()
            return call(graph, inputs)

        CompiledFxGraph.__call__ = watched  # type: ignore[method-assign]


def build(kind: str) -> Any:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).bfloat16().eval()
    if kind != "bf16":
        quantize_(model, GrinqhConfig(bits=3))
    if kind == "tensor":
        for module in model.modules():
            if isinstance(module, GrinqhLinear):
                module.__class__ = nn.Linear
    if kind == "fused":
        fuse_projections(model)
    return model


def compiled_steps(model: Any, watch: Stopwatch) -> dict[str, float]:
    """Median microseconds of a step's checks, and from there to the first kernel; checks once more
    where they are skipped."""
    torch._dynamo.reset()
    forward = torch.compile(model.forward, fullgraph=True, backend=watch.backend)
    cache = transformers.StaticCache(config=model.config, max_cache_len=PROMPT + WARM_UP + STEPS)
    ids = torch.zeros(1, PROMPT, dtype=torch.int64)
    model(ids, past_key_values=cache, use_cache=True)
    checks: dict[bool, list[float]] = {False: [], True: []}
    unwrapping = []
    for place in range(PROMPT, PROMPT + WARM_UP + STEPS):
        token, position = ids[:, :1].clone(), torch.tensor([[place]])
        skip = place >= PROMPT + WARM_UP and place % 2 == 1  # in turn, when all is compiled
        with torch.compiler.set_stance(skip_guard_eval_unsafe=skip):
            begin = time.perf_counter()
            forward(token, past_key_values=cache, position_ids=position, use_cache=True)
        checks[skip].append(1e6 * (watch.graph - begin))
        unwrapping.append(1e6 * (watch.kernels - watch.graph))
    return {
        "checks": statistics.median(checks[False][WARM_UP:]),
        "skipped": statistics.median(checks[True]),
        "unwrapping": statistics.median(unwrapping[WARM_UP:]),
    }


def eager_calls(models: dict[str, Any]) -> dict[str, float]:
    """Median microseconds of a call of one layer, in turn."""
    x = torch.randn(1, CONFIG["hidden_size"]).bfloat16()
    taken: dict[str, list[float]] = {kind: [] for kind in models}
    for _ in range(EAGER_CALLS):
        for kind, model in models.items():
            layer = model.model.layers[0].self_attn.o_proj
            begin = time.perf_counter()
            layer(x)
            taken[kind].append(1e6 * (time.perf_counter() - begin))
    return {kind: statistics.median(times) for kind, times in taken.items()}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    models = {kind: build(kind) for kind in KINDS}
    watch = Stopwatch()
    watch.watch_kernels()
    steps: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for _ in range(ROUNDS):
        for kind, model in models.items():  # one at a time: compiled code is looked for in turn
            steps[kind].append(compiled_steps(model, watch))
    eager = eager_calls({kind: model for kind, model in models.items() if kind != "fused"})
    rows = [
        {"kind": kind}
        | {name: statistics.median(one[name] for one in steps[kind]) for name in steps[kind][0]}
        | {"eager, one layer": eager.get(kind)}
        for kind in KINDS
    ]
    print(tabulate(rows, "keys", floatfmt=".0f"))
    if arguments.json:
        report = {"machine": running.describe_machine(), "us": rows}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
