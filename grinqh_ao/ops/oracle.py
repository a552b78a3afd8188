"""What each op means, in plain PyTorch.

The kernels are checked against these, in float64. They also run wherever no kernel does; they
read only the channels and slices that the rule asks for, but make no attempt at speed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grinqh_ao.codec import SCALE_GROUP, decode_scales, level_values, lookup, narrowed
from grinqh_ao.grading import grade
from grinqh_ao.ops.dense_products import dense_product, product_dtype
from grinqh_ao.slices import FIELDS_PER_WORD, HIGH_LEVEL, channels_of, tile_blocks, unpack
from grinqh_ao.vectors import gains_of, outputs_of, row_scale_of, sensitivity_of, thresholds_of


def decode_linear(
    x: Tensor,
    slices: Tensor,
    scales: Tensor,
    vectors: Tensor,
    bias: Tensor | None,
    low: Tensor | None,
    levels: Sequence[int],
    mean: Tensor | None = None,
) -> Tensor:
    """A few rows times a nested weight, each channel read at the level its activations ask for.

    Rows share what is read: the level of a channel is the highest that any row asks for.
    Accumulates in float32, or in float64 for a float64 ``x``.

    Args:
        x: [..., K], float32, float16, bfloat16 or float64; kernels take 1 to 8 rows in all.
        slices: int32 [tiles, lines, tile / 16], see :mod:`grinqh_ao.slices`.
        scales: uint8 [tiles, K, tile / 64], see :func:`grinqh_ao.codec.decode_scales`.
        vectors: float32 [L], see :mod:`grinqh_ao.vectors`.
        bias: [N] or None.
        low: int32 [K] in compact storage, else None.
        levels: bits per weight of each level, ascending.
        mean: float32 [rows], the mean magnitudes that relative thresholds refer to, where ``x`` is
            but a part of what they are taken over; else None.

    Returns:
        [..., N] in the dtype of ``x``.
    """
    tiles, k, groups = scales.shape
    n = outputs_of(vectors, k)
    dtype = torch.promote_types(x.dtype, torch.float32)
    rows = x.reshape(-1, k)
    if len(rows) == 0:
        return x.new_empty(*x.shape[:-1], n)
    thresholds = thresholds_of(vectors, len(levels))
    mean = None if mean is None else mean.flatten()
    bits = grade(rows, sensitivity_of(vectors, k), thresholds, levels, low, mean).amax(0)
    y = torch.zeros(len(rows), tiles, groups, SCALE_GROUP, dtype=dtype, device=x.device)
    for level in levels:
        channels = (bits == level).nonzero().squeeze(1)
        if level == 0 or channels.numel() == 0:
            continue
        table = level_values(gains_of(vectors), level).to(dtype)
        read = channels_of(slices, level, k, channels, low)
        scale = decode_scales(scales[:, channels]).to(dtype)
        active = rows[:, channels].to(dtype)
        for block in tile_blocks(tiles, len(channels) * groups * SCALE_GROUP):
            values = lookup(table, unpack([lines[block] for lines in read]))
            values = values.unflatten(2, (-1, SCALE_GROUP))  # [tiles, channels, groups, 64]
            with torch.autocast(x.device.type, enabled=False):
                y[:, block] += torch.einsum("rk,tkg,tkgn->rtgn", active, scale[block], values)
    out = y.flatten(1)[:, :n] * row_scale_of(vectors, k).to(dtype)
    if bias is not None:
        out = out + bias.to(dtype)
    return out.to(x.dtype).reshape(*x.shape[:-1], n)


def decode_linears(
    x: Tensor,
    slices: Sequence[Tensor],
    scales: Sequence[Tensor],
    vectors: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lows: Sequence[Tensor | None],
    levels: Sequence[int],
) -> list[Tensor]:
    """:func:`decode_linear` of several weights with the same levels; each grades x by itself."""
    weights = zip(slices, scales, vectors, biases, lows, strict=True)
    return [decode_linear(x, *weight, levels) for weight in weights]


def decode_experts(
    x: Tensor,
    experts: Tensor,
    slices: Tensor,
    scales: Tensor,
    vectors: Tensor,
    levels: Sequence[int],
) -> Tensor:
    """:func:`decode_linear` of single rows, each with an expert's weight out of a stack of them.

    Only what rows are routed to is read. Rows share nothing, even those of the same expert.

    Args:
        x: [S, K].
        experts: int64 [S], which weight each row is multiplied with.
        slices, scales, vectors: as above, stacked: [E, ...].

    Returns:
        [S, N] in the dtype of ``x``.
    """
    y = x.new_empty(len(x), outputs_of(vectors, x.shape[1]))
    for row, expert in enumerate(experts.tolist()):
        weight = slices[expert], scales[expert], vectors[expert]
        y[row] = decode_linear(x[row], *weight, None, None, levels)
    return y


def dense_experts(
    x: Tensor,
    experts: Tensor,
    slices: Tensor,
    scales: Tensor,
    vectors: Tensor,
    level: int,
) -> Tensor:
    """What :func:`decode_experts` computes if all is read at one level; arguments as above.

    Beside the result, it takes memory for one expert's dense weight at most.
    """
    y = x.new_empty(len(x), outputs_of(vectors, x.shape[1]))
    order = experts.argsort(stable=True)
    counts = experts.bincount(minlength=len(slices)).tolist()
    for expert, rows in enumerate(order.split(counts)):
        if len(rows):
            weight = slices[expert], scales[expert], vectors[expert]
            y[rows] = torch.ops.grinqh.dense_linear(x[rows], *weight, None, None, level)
    return y


def dense_linear(
    x: Tensor,
    slices: Tensor,
    scales: Tensor,
    vectors: Tensor,
    bias: Tensor | None,
    low: Tensor | None,
    level: int,
) -> Tensor:
    """Any number of rows times the whole weight at one level; arguments as above.

    Returns:
        [..., N] in the dtype of ``x``; the weight is rounded to that of the product.
    """
    dense = torch.ops.grinqh.dequantize(slices, scales, vectors, low, level, product_dtype(x))
    return dense_product(x, dense, bias)


def dequantize(
    slices: Tensor,
    scales: Tensor,
    vectors: Tensor,
    low: Tensor | None,
    level: int,
    dtype: torch.dtype,
) -> Tensor:
    """The dense weight [N, K] as read at one level, in ``dtype``; arguments as above.

    Beside the result, it takes memory for a small block of it.
    """
    tiles, k, _ = scales.shape
    tile = slices.shape[2] * FIELDS_PER_WORD
    n, row_scale = outputs_of(vectors, k), row_scale_of(vectors, k)
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
            table = level_values(gains_of(vectors), at).to(dtype_of_values)
            dense = lookup(table, codes)  # [tiles, tile, K']
            dense.unflatten(1, (-1, SCALE_GROUP)).mul_(scale[:, :, None])
            dense = dense.flatten(0, 1)[: rows.stop - rows.start].mul_(row_scale[rows, None])
            weight[rows][:, channels] = narrowed(dense, dtype)
    return weight
