"""A mixture's experts in one launch: right, graph-safe, and how fast."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tabulate import tabulate
from torch import Tensor

from gpu_suite import timing
from gpu_suite.checks import TOLERANCE, laplace
from gpu_suite.kernels import needed_bytes
from grinqh_ao import GrinqhTensor, ops
from grinqh_ao.ops import oracle

# Experts, outputs, inputs of Qwen3-30B-A3B's gate and up, and down; each token goes to 8.
SHAPES = [(128, 1536, 2048), (128, 2048, 768)]
ROUTED = 8


def stack_of(experts: int, n: int, k: int, bits: float) -> GrinqhTensor:
    return GrinqhTensor.stack(
        [
            GrinqhTensor.from_hp(torch.randn(n, k, device=timing.DEVICE).bfloat16(), bits)
            for _ in range(experts)
        ]
    )


def arguments(stack: GrinqhTensor) -> tuple[object, ...]:
    return stack.slices, stack.scales, stack.vectors, stack.levels


@torch.no_grad()
def correctness() -> dict[str, object]:
    """Against float64, twice; and captured, with other experts and thresholds at each replay."""
    torch.manual_seed(0)
    worst = {}
    for n, k in ((1536, 2048), (700, 333), (40, 70)):
        stack = stack_of(6, n, k, 3)
        experts = torch.tensor([5, 0, 3, 3, 1], device=timing.DEVICE)
        for dtype, limit in TOLERANCE.items():
            x = laplace(5, k).to(dtype)
            found = ops.decode_experts(x, experts, *arguments(stack))
            assert torch.equal(found, ops.decode_experts(x, experts, *arguments(stack)))
            truth = oracle.decode_experts(x.double(), experts, *arguments(stack))
            error = ((found.double() - truth).abs().max() / truth.abs().max()).item()
            worst[f"{n}x{k}, {dtype}"] = error
            assert error <= limit, worst
    print("largest errors:", worst)
    return {"largest_errors": worst}


@torch.no_grad()
def cuda_graphs() -> dict[str, object]:
    torch.manual_seed(0)
    stack = stack_of(6, 1536, 2048, 3)
    experts = torch.zeros(ROUTED, dtype=torch.int64, device=timing.DEVICE)
    x = laplace(ROUTED, 2048).half()
    ops.decode_experts(x, experts, *arguments(stack))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.decode_experts(x, experts, *arguments(stack))
    for bits in (2, 8, 3):
        stack.unbind()[1].set_bits(bits)
        experts.random_(6)
        x.copy_(laplace(ROUTED, 2048))
        graph.replay()
        assert torch.equal(out, ops.decode_experts(x, experts, *arguments(stack)))
    return {"replayed": "as in eager mode, with other experts and thresholds"}


@torch.no_grad()
def speed() -> list[dict[str, object]]:
    """One token's experts at 2, 3 and 4 bits, and in bfloat16 multiplied in several ways."""
    torch.manual_seed(0)
    results = [{"shape": "x".join(map(str, shape)), **_times(*shape)} for shape in SHAPES]
    print(tabulate(results, "keys", floatfmt=".1f"))
    return results


def _times(experts: int, n: int, k: int) -> dict[str, float]:
    dense = torch.randn(experts, n, k, device=timing.DEVICE).bfloat16()
    x = laplace(ROUTED, k).bfloat16()
    # Other experts at each call, of as many stacks as it takes that none is in a cache.
    order = torch.randperm(experts)[: experts // ROUTED * ROUTED]
    on_host = [route.sort().values for route in order.split(ROUTED)]
    routes = [route.to(timing.DEVICE) for route in on_host]

    def decode(stack: GrinqhTensor, bits: float) -> list[Callable[[], object]]:
        copies = timing.copies_for(len(order) * needed_bytes(n, k, bits))
        stacks = [stack, *(stack.with_data(torch.clone) for _ in range(copies - 1))]
        return [
            lambda r=r, one=one: ops.decode_experts(x, r, *arguments(one))
            for one in stacks
            for r in routes
        ]

    candidates = _in_bfloat16(dense, x, on_host, routes)
    for bits in (2, 3, 4):
        candidates[f"grinqh {bits}"] = decode(stack_of(experts, n, k, bits), bits)
    return timing.compare(candidates)


def _in_bfloat16(
    dense: Tensor, x: Tensor, on_host: list[Tensor], routes: list[Tensor]
) -> dict[str, list[Callable[[], object]]]:
    """Ways to multiply each row of x [S, K] with its expert, out of dense [E, N, K].

    Gathered as transformers' "batched_mm"; one by one without that copy, where the host knows the
    routes, which it does not while decoding; grouped as transformers does by default.
    """

    def one_by_one(route: Tensor) -> Tensor:
        rows = zip(route.tolist(), x, strict=True)
        return torch.stack([torch.mv(dense[expert], row) for expert, row in rows])

    ends = [
        torch.bincount(route, minlength=len(dense)).cumsum(0).int().to(x.device)
        for route in on_host
    ]
    candidates: dict[str, list[Callable[[], object]]] = {
        "bf16, gathered": [lambda r=r: torch.bmm(dense[r], x[:, :, None]) for r in routes],
        "bf16, one by one": [lambda r=r: one_by_one(r) for r in on_host],
        "bf16, grouped": [lambda e=e: torch._grouped_mm(x, dense.mT, offs=e) for e in ends],
    }
    expected = candidates["bf16, gathered"][0]()[:, :, 0].float()
    for name, calls in list(candidates.items()):
        try:
            found = calls[0]().reshape(expected.shape).float()
        except RuntimeError as error:  # not for this GPU
            print(f"{name}: {error}")
            del candidates[name]
        else:
            assert (found - expected).abs().max() <= 0.02 * expected.abs().max(), name
    return candidates
