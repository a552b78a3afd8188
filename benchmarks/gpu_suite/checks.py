"""Is it right? Every form of the kernels against float64; graphs; compiled generation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torchao.quantization import quantize_

from gpu_suite import timing
from grinqh_ao import GrinqhConfig, GrinqhTensor, fuse_projections, ops, set_bits
from grinqh_ao.ops import oracle
from grinqh_ao.slices import drop_low

# Of the largest output.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 1e-2}
# Tiles of 512, 256, 128 and 64; odd sizes; one channel; chunks that do not divide.
SHAPES = [(4096, 4096), (14336, 512), (1000, 777), (768, 4099), (384, 100), (70, 9), (5, 1)]
# With rows, as long chunks have them, and many programs on each multiprocessor.
LARGE = [(28672, 4096, 1), (28672, 4096, 4), (14336, 4096, 1), (14336, 4096, 8)]
FUSED = [((4096, 1024, 1024), 1), ((1500, 700), 3)]  # rows behind the sizes


def laplace(*shape: int) -> torch.Tensor:
    return torch.distributions.Laplace(0.0, 1.0).sample(shape).to(timing.DEVICE)


def expected(x: torch.Tensor, weight: GrinqhTensor, bias: torch.Tensor | None) -> torch.Tensor:
    return oracle.decode_linear(
        x.double(), weight.slices, weight.scales, weight.vectors,
        None if bias is None else bias.double(), weight.low, weight.levels,
    )  # fmt: skip


def store_compactly(weight: GrinqhTensor) -> None:
    kept = torch.rand(weight.shape[1], device=timing.DEVICE) < 0.2
    weight.slices, weight.low = drop_low(weight.slices, kept)


# A check and what it takes.
Job = tuple[Callable[[Any], "list[Outcome]"], tuple[Any, ...]]


class Outcome(NamedTuple):
    case: str
    dtype: str
    error: float  # of the largest output of its row
    wrong: bool


def judged(case: str, found: torch.Tensor, again: torch.Tensor, truth: torch.Tensor) -> Outcome:
    """Of rows that were decoded twice."""
    same = torch.equal(found, again)
    errors = (found.double() - truth).abs().amax(-1) / truth.abs().amax(-1)
    error = errors.max().item()
    wrong = not error <= TOLERANCE[found.dtype] or not same
    return Outcome(f"{case}, same twice: {same}", str(found.dtype), error, wrong)


@torch.no_grad()
def check_decode(job: tuple[int, int, int, torch.dtype]) -> list[Outcome]:
    """One shape and number of rows at several bits, each twice."""
    n, k, rows, dtype = job
    torch.manual_seed(0)
    outcomes = []
    for bits in (1.5, 3, 8):
        levels = (0, 2, 4, 6, 8) if rows != 2 else (0, 2, 4, 8)
        weight = GrinqhTensor.from_hp(torch.randn(n, k, device=timing.DEVICE), bits, levels)
        if rows == 5:  # static
            weight.thresholds[0] = weight.thresholds[1]
            weight.thresholds[1] = 0
        if rows in (1, 8) and bits == 3:
            store_compactly(weight)
        smaller = 2.0 if dtype == torch.float16 else 2.0**9  # than the row before
        x = laplace(rows, k) / smaller ** torch.arange(rows, device=timing.DEVICE)[:, None]
        x = x.to(dtype)
        bias = torch.randn(n, device=timing.DEVICE, dtype=dtype) if rows in (1, 5) else None
        found = F.linear(x, weight, bias)
        again = F.linear(x, weight, bias)
        case = f"{n}x{k}, {rows} rows, {bits} bits"
        outcomes.append(judged(case, found, again, expected(x, weight, bias)))
    return outcomes


@torch.no_grad()
def check_fused(job: tuple[tuple[int, ...], int, torch.dtype]) -> list[Outcome]:
    """Several weights in one launch, twice."""
    sizes, rows, dtype = job
    torch.manual_seed(0)
    weights = [GrinqhTensor.from_hp(torch.randn(n, 4096, device=timing.DEVICE)) for n in sizes]
    x = laplace(rows, 4096).to(dtype)
    biases = [torch.randn(n, device=timing.DEVICE, dtype=dtype) for n in sizes]

    def decode() -> torch.Tensor:
        outs = ops.decode_linears(
            x, [w.slices for w in weights], [w.scales for w in weights],
            [w.vectors for w in weights], biases, [None] * len(sizes), weights[0].levels,
        )  # fmt: skip
        return torch.cat(outs, -1)

    found, again = decode(), decode()
    truth = torch.cat([expected(x, *each) for each in zip(weights, biases, strict=True)], -1)
    return [judged(f"{sizes} fused, {rows} rows", found, again, truth)]


@torch.no_grad()
def check_dequantize(job: tuple[torch.dtype, int, bool]) -> list[Outcome]:
    dtype, level, compact = job
    torch.manual_seed(0)
    weight = GrinqhTensor.from_hp(torch.randn(1000, 777, device=timing.DEVICE))
    if compact:
        store_compactly(weight)
    found = weight.dequantize(dtype, level)
    truth = oracle.dequantize(
        weight.slices, weight.scales, weight.vectors, weight.low, level, dtype
    )
    error = ((found.double() - truth.double()).abs().max() / truth.abs().max()).item()
    wrong = not torch.allclose(found, truth, rtol=2 * torch.finfo(dtype).eps, atol=0)
    return [Outcome(f"dequantize, level {level}, compact: {compact}", str(dtype), error, wrong)]


@torch.no_grad()
def check_extremes(job: tuple[int, torch.dtype]) -> list[Outcome]:
    """From the largest numbers to subnormal ones and zeros, side by side; NaN and infinity."""
    n, dtype = job
    torch.manual_seed(0)
    info = torch.finfo(dtype)
    weight = GrinqhTensor.from_hp(torch.randn(n, 300, device=timing.DEVICE) / 64, bits=8)
    magnitudes = [info.max / 2**12, 1, info.tiny * 2**7, info.tiny / 16, 0]
    x = laplace(5, 300) * torch.tensor(magnitudes, device=timing.DEVICE)[:, None]
    x = x.to(dtype)
    found, truth = F.linear(x, weight), expected(x, weight, None)
    allowed = TOLERANCE[dtype] * truth.abs().amax(-1, keepdim=True) + 16 * info.tiny * info.eps
    difference = (found.double() - truth).abs()
    x[1, 7], x[2, 9] = torch.nan, torch.inf
    not_finite = (~F.linear(x, weight).isfinite().all(-1)).tolist()
    accurate = bool((difference <= allowed).all())
    wrong = not accurate or not_finite != [False, True, True, False, False]
    case = f"{n}x300, extremes, not finite: {not_finite}"
    error = (difference[1].max() / truth[1].abs().max()).item()
    return [Outcome(case, str(dtype), error, wrong)]


def check(job: Job) -> list[Outcome]:
    how, arguments = job
    return how(arguments)


def jobs() -> list[Job]:
    """Every form of the kernels at several shapes; not every combination, each is compiled."""
    dtypes = list(TOLERANCE)
    found: list[Job] = [(check_decode, (*shape, 1, torch.bfloat16)) for shape in SHAPES]
    for i, shape in enumerate(SHAPES):
        found.append((check_decode, (*shape, 1, (torch.float16, torch.float32)[i % 2])))
        found += [(check_decode, (*shape, r, dtypes[(i + r) % 3])) for r in (2, 3, 5, 8)]
    found += [(check_decode, (*each, torch.bfloat16)) for each in LARGE]
    found += [(check_fused, (*each, dtype)) for each in FUSED for dtype in dtypes]
    for i, dtype in enumerate(dtypes):
        found.append((check_dequantize, (dtype, 2 + 2 * i, False)))
        found.append((check_dequantize, (dtype, 8 - 2 * i, True)))
        found += [(check_extremes, (n, dtype)) for n in (128, 512)]  # without, with tensor cores
    return found


def correctness() -> dict[str, object]:
    outcomes = [outcome for of_job in timing.spread(check, jobs()) for outcome in of_job]
    wrong = [outcome for outcome in outcomes if outcome.wrong]
    largest = {
        str(dtype): max(outcome.error for outcome in outcomes if outcome.dtype == str(dtype))
        for dtype in TOLERANCE
    }
    print(f"{len(outcomes)} cases, {len(wrong)} wrong; largest errors {largest}")
    for outcome in wrong[:20]:
        print("  wrong:", outcome)
    if wrong:
        raise AssertionError(f"{len(wrong)} of {len(outcomes)} cases are wrong: {wrong[:20]}")
    return {"cases": len(outcomes), "largest_errors": largest}


@torch.no_grad()
def cuda_graphs() -> dict[str, object]:
    """Capture once; replay with other activations and other thresholds."""
    torch.manual_seed(0)
    weight = GrinqhTensor.from_hp(torch.randn(4096, 4096, device=timing.DEVICE), 3)
    x = laplace(1, 4096).half()
    F.linear(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = F.linear(x, weight)
    errors = {}
    for bits in (2, 3, 8, 2):
        weight.set_bits(bits)
        x.copy_(laplace(1, 4096))
        graph.replay()
        truth = expected(x, weight, None)
        errors[bits] = ((out.double() - truth).abs().max() / truth.abs().max()).item()
        assert errors[bits] < TOLERANCE[torch.float16], (bits, errors)
        assert torch.equal(out, F.linear(x, weight)), "graph and eager differ"
    print("replayed with changed thresholds:", errors)
    return {"errors": errors}


@torch.no_grad()
def compiled_generation() -> dict[str, object]:
    """``mode="reduce-overhead"`` over a decode loop: no recompilation when bits change."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=2048, hidden_size=512, intermediate_size=1536, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=4,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(timing.DEVICE).half().eval()
    quantize_(model, GrinqhConfig(bits=3))
    ids = torch.randint(0, 2048, (1, 24), device=timing.DEVICE)
    every_bits = (3, 3, 3, 2, 8, 2.5, 3, 4)

    def decode(forward: Callable[..., Any]) -> tuple[torch.Tensor, list[int]]:
        cache = transformers.StaticCache(config=config, max_cache_len=64)
        model(ids[:, :16], past_key_values=cache, use_cache=True)
        logits, graphs = [], []
        for position, bits in enumerate(every_bits, start=16):
            set_bits(model, bits)
            torch.compiler.cudagraph_mark_step_begin()
            output = forward(
                ids[:, position : position + 1].clone(),
                past_key_values=cache,
                position_ids=torch.tensor([[position]], device=timing.DEVICE),
                use_cache=True,
            )
            logits.append(output.logits.float().clone())
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return torch.cat(logits), graphs

    results: dict[str, object] = {}
    for fused in (False, True):
        if fused:
            fuse_projections(model)
        eager, _ = decode(model)
        torch._dynamo.reset()
        compiled, graphs = decode(
            torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
        )
        # Other rounding before a layer can put a channel on the other side of a threshold.
        difference = ((compiled - eager).norm() / eager.norm()).item()
        results["fused" if fused else "separate"] = {
            "graphs after each step": graphs,
            "difference to eager": difference,
        }
        assert graphs[-1] == graphs[2], f"changing bits recompiled: {graphs}"
        assert difference < 0.1, results
    print(results)
    return results
