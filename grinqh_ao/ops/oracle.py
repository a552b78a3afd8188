"""What each op means, in plain PyTorch.

The kernels are checked against these, in float64. They also run wherever no kernel does; they
read only the channels and slices that the rule asks for, but make no attempt at speed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grinqh_ao.codec import SCALE_GROUP, decode_scales, level_values, lookup
from grinqh_ao.grading import grade
from grinqh_ao.slices import FIELDS_PER_WORD, HIGH_LEVEL, channels_of, tile_blocks, unpack


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
    """A few rows times a nested weight, each channel read at the level its activations ask for.

    Rows share what is read: the level of a channel is the highest that any row asks for.
    Accumulates in float32, or in float64 for a float64 ``x``.

    Args:
        x: [..., K], float32, float16, bfloat16 or float64; kernels take 1 to 8 rows in all.
        slices: int32 [tiles, lines, tile / 16], see :mod:`grinqh_ao.slices`.
        scales: uint8 [tiles, K, tile / 64], see :func:`grinqh_ao.codec.decode_scales`.
        row_scale: bfloat16 [N].
        sensitivity: bfloat16 [K], see :func:`grinqh_ao.grading.grade`.
        thresholds: float32 [2, len(levels) - 1].
        gains: float32 [4].
        bias: [N] or None.
        low: int32 [K] in compact storage, else None.
        levels: bits per weight of each level, ascending.

    Returns:
        [..., N] in the dtype of ``x``.
    """
    tiles, k, groups = scales.shape
    n = row_scale.shape[0]
    dtype = torch.promote_types(x.dtype, torch.float32)
    rows = x.reshape(-1, k)
    if len(rows) == 0:
        return x.new_empty(*x.shape[:-1], n)
    bits = grade(rows, sensitivity, thresholds, levels, low).amax(0)
    y = torch.zeros(len(rows), tiles, groups, SCALE_GROUP, dtype=dtype, device=x.device)
    for level in levels:
        channels = (bits == level).nonzero().squeeze(1)
        if level == 0 or channels.numel() == 0:
            continue
        table = level_values(gains, level).to(dtype)
        read = channels_of(slices, level, k, channels, low)
        scale = decode_scales(scales[:, channels]).to(dtype)
        active = rows[:, channels].to(dtype)
        for block in tile_blocks(tiles, len(channels) * groups * SCALE_GROUP):
            values = lookup(table, unpack([lines[block] for lines in read]))
            values = values.unflatten(2, (-1, SCALE_GROUP))  # [tiles, channels, groups, 64]
            y[:, block] += torch.einsum("rk,tkg,tkgn->rtgn", active, scale[block], values)
    out = y.flatten(1)[:, :n] * row_scale.to(dtype)
    if bias is not None:
        out = out + bias.to(dtype)
    return out.to(x.dtype).reshape(*x.shape[:-1], n)


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
    """:func:`decode_linear` of several weights with the same levels; each grades x by itself."""
    return [
        decode_linear(
            x,
            slices[i],
            scales[i],
            row_scales[i],
            sensitivities[i],
            thresholds[i],
            gains[i],
            biases[i],
            lows[i],
            levels,
        )
        for i in range(len(slices))
    ]


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
    """:func:`decode_linear` of single rows, each with an expert's weight out of a stack of them.

    Only what rows are routed to is read. Rows share nothing, even those of the same expert.

    Args:
        x: [S, K].
        experts: int64 [S], which weight each row is multiplied with.
        slices, scales, row_scale, sensitivity, thresholds, gains: as above, stacked: [E, ...].

    Returns:
        [S, N] in the dtype of ``x``.
    """
    y = x.new_empty(len(x), row_scale.shape[1])
    for row, expert in enumerate(experts.tolist()):
        y[row] = decode_linear(
            x[row],
            slices[expert],
            scales[expert],
            row_scale[expert],
            sensitivity[expert],
            thresholds[expert],
            gains[expert],
            None,
            None,
            levels,
        )
    return y


def dense_experts(
    x: Tensor,
    experts: Tensor,
    slices: Tensor,
    scales: Tensor,
    row_scale: Tensor,
    gains: Tensor,
    level: int,
) -> Tensor:
    """What :func:`decode_experts` computes if all is read at one level; arguments as above.

    Beside the result, it takes memory for one expert's dense weight.
    """
    y = x.new_empty(len(x), row_scale.shape[1])
    order = experts.argsort(stable=True)
    counts = experts.bincount(minlength=len(slices)).tolist()
    for expert, rows in enumerate(order.split(counts)):
        if len(rows):
            dense = torch.ops.grinqh.dequantize(
                slices[expert], scales[expert], row_scale[expert], gains[expert], None, level,
                x.dtype,
            )  # fmt: skip
            y[rows] = x[rows] @ dense.t()
    return y


def dense_linear(
    x: Tensor,
    slices: Tensor,
    scales: Tensor,
    row_scale: Tensor,
    gains: Tensor,
    bias: Tensor | None,
    low: Tensor | None,
    level: int,
) -> Tensor:
    """Any number of rows times the whole weight at one level; arguments as above.

    Returns:
        [..., N] in the dtype of ``x``, which is also what the weight is rounded to.
    """
    dense = torch.ops.grinqh.dequantize(slices, scales, row_scale, gains, low, level, x.dtype)
    return torch.nn.functional.linear(x, dense, bias)


def dequantize(
    slices: Tensor,
    scales: Tensor,
    row_scale: Tensor,
    gains: Tensor,
    low: Tensor | None,
    level: int,
    dtype: torch.dtype,
) -> Tensor:
    """The dense weight [N, K] as read at one level, in ``dtype``; arguments as above.

    Beside the result, it takes memory for a small block of it.
    """
    tiles, k, _ = scales.shape
    tile = slices.shape[2] * FIELDS_PER_WORD
    n = row_scale.shape[0]
    weight = torch.zeros(n, k, dtype=dtype, device=slices.device)
    if level == 0:
        return weight
    parts: list[tuple[Tensor | slice, int]] = [(slice(None), level)]
    if low is not None and level > HIGH_LEVEL:
        without, kept = (low < 0).nonzero().squeeze(1), (low >= 0).nonzero().squeeze(1)
        parts = [(without, HIGH_LEVEL), (kept, level)]
    dtype_of_values = torch.promote_types(dtype, torch.float32)
    for block in tile_blocks(tiles, k * tile):
        rows = slice(block.start * tile, min(block.stop * tile, n))
        for channels, at in parts:
            codes = unpack(channels_of(slices[block], at, k, channels, low)).transpose(1, 2)
            scale = decode_scales(scales[block][:, channels]).transpose(1, 2)
            dense = lookup(level_values(gains, at).to(dtype_of_values), codes)  # [tiles, tile, K']
            dense.unflatten(1, (-1, SCALE_GROUP)).mul_(scale[:, :, None])
            dense = dense.flatten(0, 1)[: rows.stop - rows.start].mul_(row_scale[rows, None])
            if dtype == torch.float16:  # rounding up must not turn its largest into infinity
                dense = dense.clamp_(torch.finfo(dtype).min, torch.finfo(dtype).max)
            weight[rows][:, channels] = dense.to(dtype)
    return weight
