"""What each op means, in plain PyTorch.

The kernels are checked against these, in float64. They also run wherever no kernel does; they
read only the channels and slices that the rule asks for, but make no attempt at speed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grinqh_ao.codec import SCALE_GROUP, decode_scales, level_values, lookup
from grinqh_ao.grading import level_index
from grinqh_ao.slices import FIELDS_PER_WORD, tile_blocks, unpack


def decode_linear(
    x: Tensor,
    slices: Tensor,
    scales: Tensor,
    row_scale: Tensor,
    thresholds: Tensor,
    gains: Tensor,
    bias: Tensor | None,
    levels: Sequence[int],
) -> Tensor:
    """A few rows times a nested weight, each channel read at the level its activations ask for.

    Rows share what is read: the level of a channel is the highest that any row asks for.
    Accumulates in float32, or in float64 for a float64 ``x``.

    Args:
        x: [..., K], float32, float16, bfloat16 or float64; kernels take 1 to 8 rows in all.
        slices: int32 [S, tiles, K, tile / 16].
        scales: uint8 [tiles, K, tile / 64], see :func:`grinqh_ao.codec.decode_scales`.
        row_scale: bfloat16 [N].
        thresholds: float32 [2, len(levels) - 1].
        gains: float32 [4].
        bias: [N] or None.
        levels: bits per weight of each level, ascending.

    Returns:
        [..., N] in the dtype of ``x``.
    """
    _, tiles, k, _ = slices.shape
    n = row_scale.shape[0]
    dtype = torch.promote_types(x.dtype, torch.float32)
    rows = x.reshape(-1, k)
    if len(rows) == 0:
        return x.new_empty(*x.shape[:-1], n)
    index = level_index(rows, thresholds).amax(0)
    groups = scales.shape[2]
    y = torch.zeros(len(rows), tiles, groups, SCALE_GROUP, dtype=dtype, device=x.device)
    for i, level in enumerate(levels):
        channels = (index == i).nonzero().squeeze(1)
        if level == 0 or channels.numel() == 0:
            continue
        table = level_values(gains, level).to(dtype)
        read = slices[: level // 2, :, channels]
        scale = decode_scales(scales[:, channels]).to(dtype)
        active = rows[:, channels].to(dtype)
        for block in tile_blocks(read):
            values = lookup(table, unpack(read[:, block]))  # [tiles, channels, tile]
            values = values.unflatten(2, (-1, SCALE_GROUP))
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
    thresholds: Sequence[Tensor],
    gains: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    levels: Sequence[int],
) -> list[Tensor]:
    """:func:`decode_linear` of several weights with the same levels; each grades x by itself."""
    weights = zip(slices, scales, row_scales, thresholds, gains, biases, strict=True)
    return [
        decode_linear(x, codes, scale, row_scale, threshold, gain, bias, levels)
        for codes, scale, row_scale, threshold, gain, bias in weights
    ]


def dequantize(
    slices: Tensor,
    scales: Tensor,
    row_scale: Tensor,
    gains: Tensor,
    level: int,
    dtype: torch.dtype,
) -> Tensor:
    """The dense weight [N, K] as read at one level, in ``dtype``; arguments as above.

    Beside the result, it takes memory for a small block of it.
    """
    _, _, k, words = slices.shape
    tile = words * FIELDS_PER_WORD
    n = row_scale.shape[0]
    weight = torch.zeros(n, k, dtype=dtype, device=slices.device)
    if level == 0:
        return weight
    table = level_values(gains, level).to(torch.promote_types(dtype, torch.float32))
    for block in tile_blocks(slices):
        codes = unpack(slices[: level // 2, block]).transpose(1, 2)  # [tiles, tile, K]
        dense = lookup(table, codes).view(-1, SCALE_GROUP, k)
        dense *= decode_scales(scales[block]).transpose(1, 2).reshape(-1, 1, k)
        rows = slice(block.start * tile, min(block.stop * tile, n))
        dense = dense.view(-1, k)[: rows.stop - rows.start].mul_(row_scale[rows, None])
        if dtype == torch.float16:  # rounding up must not turn its largest values into infinity
            dense = dense.clamp_(torch.finfo(dtype).min, torch.finfo(dtype).max)
        weight[rows] = dense
    return weight
