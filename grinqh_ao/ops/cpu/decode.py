"""``grinqh::decode_linear``, ``decode_linears`` and ``decode_experts`` on CPUs.

Arguments as in :mod:`grinqh_ao.ops.oracle`, which takes what the kernels do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from grinqh_ao.ops import oracle
from grinqh_ao.ops.cpu.binding import call_fields, pack
from grinqh_ao.ops.cpu.build import kernels

MOST_ROWS = 8
# Those of decode_linear's arguments that belong to the weight, in order.
Weight = tuple[Any, Any, Any, Any, Any, Any, Any, Any]


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
    weights = [
        (slices[e], scales[e], row_scale[e], sensitivity[e], thresholds[e], gains[e], None, None)
        for e in experts.tolist()
    ]
    return torch.cat(_decode(x, 1, weights, levels, x.shape[-1]))


def _decode(
    x: Tensor,
    rows: int,
    weights: Sequence[Weight],
    levels: Sequence[int],
    stride: int = 0,
) -> list[Tensor]:
    """Runs the kernel once for all weights; ``stride`` leads from one's x to the next one's.

    It runs for every layer of every token: what it costs is counted in microseconds.
    """
    dtype = x.dtype
    if dtype == torch.float16:
        x = x.float()
    x = x.contiguous()
    shape = x.shape[:-1] if stride == 0 else (1,)
    at = x.data_ptr()
    fields = call_fields(len(weights), rows, x.shape[-1], x.dtype, levels)
    outs: list[Tensor] = []
    kept = []  # what the addresses belong to
    for weight in weights:
        if not _is_plain(*weight, x.dtype):
            *stored, bias, low = weight
            bias = None if bias is None else bias.to(x.dtype)
            weight = cast(
                Weight, tuple(t if t is None else t.contiguous() for t in (*stored, bias, low))
            )
            kept.append(weight)
        slices, scales, row_scale, sensitivity, thresholds, gains, bias, low = weight
        n = len(row_scale)
        out = x.new_empty((*shape, n))
        outs.append(out)
        fields += (
            at,
            slices.data_ptr(),
            scales.data_ptr(),
            row_scale.data_ptr(),
            sensitivity.data_ptr(),
            thresholds.data_ptr(),
            gains.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0 if low is None else low.data_ptr(),
            out.data_ptr(),
            n,
            *slices.shape[1:],
        )
        at += stride * x.itemsize
    loaded = kernels()
    assert loaded is not None
    if loaded.grinqh_decode(pack(fields, len(weights))):  # some activation is not finite
        inputs = [x[i : i + 1] if stride else x for i in range(len(weights))]
        outs = [oracle.decode_linear(a, *w, levels) for a, w in zip(inputs, weights, strict=True)]
    return [out.half() for out in outs] if dtype == torch.float16 else outs


def _is_plain(
    slices: Tensor,
    scales: Tensor,
    row_scale: Tensor,
    sensitivity: Tensor,
    thresholds: Tensor,
    gains: Tensor,
    bias: Tensor | None,
    low: Tensor | None,
    dtype: torch.dtype,
) -> bool:
    return (
        slices.is_contiguous()
        and scales.is_contiguous()
        and row_scale.is_contiguous()
        and sensitivity.is_contiguous()
        and thresholds.is_contiguous()
        and gains.is_contiguous()
        and (bias is None or (bias.is_contiguous() and bias.dtype == dtype))
        and (low is None or low.is_contiguous())
    )
