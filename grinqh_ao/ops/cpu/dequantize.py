"""``grinqh::dequantize`` on CPUs, and ``dense_linear``, a block of outputs at a time.

Arguments as in :mod:`grinqh_ao.ops.oracle`, which takes what the kernel does not.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from grinqh_ao.ops import oracle
from grinqh_ao.ops.cpu.build import kernels
from grinqh_ao.ops.dense_products import dense_product, product_dtype
from grinqh_ao.slices import FIELDS_PER_WORD, num_slices_of
from grinqh_ao.vectors import outputs_of

BLOCK_WEIGHTS = 1 << 21


def dequantize(
    slices: Tensor,
    scales: Tensor,
    vectors: Tensor,
    low: Tensor | None,
    level: int,
    dtype: torch.dtype,
) -> Tensor:
    weight = (slices, scales, vectors, low)
    if not supports(slices, level, dtype):
        return oracle.dequantize(*weight, level, dtype)
    k = scales.shape[1]
    dense = torch.empty(outputs_of(vectors, k), k, dtype=dtype)
    stored_bits = 2 * num_slices_of(slices, k, low)
    torch.ops.grinqh.dequantize_into(*weight, level, stored_bits, 0, False, dense)
    return dense


def dense_linear(
    x: Tensor,
    slices: Tensor,
    scales: Tensor,
    vectors: Tensor,
    bias: Tensor | None,
    low: Tensor | None,
    level: int,
) -> Tensor:
    weight = (slices, scales, vectors)
    if not supports(slices, level, x.dtype):
        return oracle.dense_linear(x, *weight, bias, low, level)
    y = x.new_empty(*x.shape[:-1], outputs_of(vectors, x.shape[-1]))
    flat, into = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    for rows, transposed in _blocks(*weight, low, level, product_dtype(x)):
        some = None if bias is None else bias[rows].to(x.dtype)
        into[:, rows] = dense_product(flat, transposed.t(), some)
    return y


def supports(slices: Tensor, level: int, dtype: torch.dtype) -> bool:
    """Whether there is a kernel for these arguments, and it could be compiled."""
    supported = dtype in (torch.float32, torch.float16, torch.bfloat16)
    return supported and level > 0 and slices.numel() > 0 and kernels() is not None


def _blocks(
    slices: Tensor,
    scales: Tensor,
    vectors: Tensor,
    low: Tensor | None,
    level: int,
    dtype: torch.dtype,
) -> Iterator[tuple[slice, Tensor]]:
    """Runs of outputs, and their weights [K, outputs]; the next run overwrites them."""
    tiles, k = scales.shape[:2]
    tile, n = slices.shape[2] * FIELDS_PER_WORD, outputs_of(vectors, k)
    stored_bits = 2 * num_slices_of(slices, k, low)
    run = max(1, BLOCK_WEIGHTS // (k * tile))
    buffer = torch.empty(k * min(run, tiles) * tile, dtype=dtype)
    for first in range(0, tiles, run):
        stop = min(first + run, tiles)
        rows = slice(first * tile, min(stop * tile, n))
        dense = buffer[: k * (stop - first) * tile].view(k, -1)
        torch.ops.grinqh.dequantize_into(
            slices, scales, vectors, low, level, stored_bits, first, True, dense
        )
        yield rows, dense[:, : rows.stop - rows.start]
