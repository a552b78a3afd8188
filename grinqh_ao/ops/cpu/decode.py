"""``grinqh::decode_linear``, ``decode_linears`` and ``decode_experts`` on CPUs.

Arguments as in :mod:`grinqh_ao.ops.oracle`, which takes what the kernels do not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grinqh_ao.ops import oracle
from grinqh_ao.ops.cpu.binding import address, call_fields, pack
from grinqh_ao.ops.cpu.build import kernels

MOST_ROWS = 8


def supports(x: Tensor, rows: int, slices: Tensor) -> bool:
    """Whether there is a kernel for these arguments, and it could be compiled."""
    return (
        x.dtype != torch.float64
        and 1 <= rows <= MOST_ROWS
        and slices.numel() > 0
        and kernels() is not None
    )


def decode_linear(
    x: Tensor,
    slices: Tensor,
    scales: Tensor,
    row_scale: Tensor,
    sensitivity: Tensor,
    thresholds: Tensor,
    gains: Tensor,
    bias: Tensor | None,
    low: Tensor | None,
    levels: Sequence[int],
) -> Tensor:
    weight = (slices, scales, row_scale, sensitivity, thresholds, gains)
    k = x.shape[-1]
    rows = x.numel() // k if k else 0
    if not supports(x, rows, slices):
        return oracle.decode_linear(x, *weight, bias, low, levels)
    return _decode(x, rows, [(*weight, bias, low)], levels)[0]


def decode_linears(
    x: Tensor,
    slices: Sequence[Tensor],
    scales: Sequence[Tensor],
    row_scales: Sequence[Tensor],
    sensitivities: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    gains: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lows: Sequence[Tensor | None],
    levels: Sequence[int],
) -> list[Tensor]:
    lists = (slices, scales, row_scales, sensitivities, thresholds, gains, biases, lows)
    k = x.shape[-1]
    rows = x.numel() // k if k else 0
    if not all(supports(x, rows, s) for s in slices):
        return oracle.decode_linears(x, *lists, levels)
    return _decode(x, rows, list(zip(*lists, strict=True)), levels)


def decode_experts(
    x: Tensor,
    experts: Tensor,
    slices: Tensor,
    scales: Tensor,
    row_scale: Tensor,
    sensitivity: Tensor,
    thresholds: Tensor,
    gains: Tensor,
    levels: Sequence[int],
) -> Tensor:
    stack = (slices, scales, row_scale, sensitivity, thresholds, gains)
    if not supports(x, min(len(x), 1), slices):
        return oracle.decode_experts(x, experts, *stack, levels)
    weights = [(*(data[e] for data in stack), None, None) for e in experts.tolist()]
    return torch.cat(_decode(x, 1, weights, levels, x.shape[-1]))


def _decode(
    x: Tensor,
    rows: int,
    weights: Sequence[tuple[Tensor | None, ...]],
    levels: Sequence[int],
    stride: int = 0,
) -> list[Tensor]:
    """Runs the kernel once for all weights; ``stride`` leads from one's x to the next one's."""
    dtype = x.dtype
    x = x.float() if dtype == torch.float16 else x
    x = x.contiguous()
    shape = x.shape[:-1] if stride == 0 else (1,)
    begin, step = x.data_ptr(), stride * x.itemsize
    outs: list[Tensor] = []
    kept = []  # what the addresses belong to
    fields = list(call_fields(len(weights), rows, x.shape[-1], x.dtype, levels))
    for i, (slices, scales, row_scale, sensitivity, thresholds, gains, bias, low) in enumerate(
        weights
    ):
        assert slices is not None
        assert row_scale is not None
        n = row_scale.shape[0]
        out = x.new_empty(*shape, n)
        outs.append(out)
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        data = [
            t if t is None or t.is_contiguous() else t.contiguous()
            for t in (slices, scales, row_scale, sensitivity, thresholds, gains, bias, low)
        ]
        kept.append(data)
        fields += (
            begin + i * step, *map(address, data), out.data_ptr(), n, slices.shape[1],
            slices.shape[2],
        )  # fmt: skip
    loaded = kernels()
    assert loaded is not None
    loaded.grinqh_decode(pack(fields, len(weights)))
    return [out.half() for out in outs] if dtype == torch.float16 else outs
