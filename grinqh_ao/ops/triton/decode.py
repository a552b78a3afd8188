"""``grinqh::decode_linear`` on CUDA: chooses a form of the kernel and launches it, once.

    mma   tensor cores; float16 and bfloat16, tiles of 256 and 512 outputs
    fma   float32 arithmetic; everything else

Nothing here waits for the device or looks at data: a launch can be captured into a CUDA graph and
replayed with other activations and thresholds.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from grinqh_ao.ops.triton.arrivals import MOST_TILES, arrivals
from grinqh_ao.ops.triton.configurations import REGISTERS_OF_ONE_ROW, WARPS, chunk_length
from grinqh_ao.ops.triton.decode_fma import decode_fma_kernel, entries_at_once
from grinqh_ao.ops.triton.decode_mma import decode_mma_kernel

LARGEST_MEAN_BLOCK = 8192
SUMS_AT_ONCE = 8192
LEAST_CAPABILITY = 80


@functools.cache
def device_of(index: int) -> tuple[int, int]:
    """Compute capability, as 10 * major + minor, and number of multiprocessors."""
    properties = torch.cuda.get_device_properties(index)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def supports(x: Tensor, slices: Tensor) -> bool:
    """Whether there is a kernel for these arguments."""
    return (
        x.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and device_of(x.device.index)[0] >= LEAST_CAPABILITY
        and 0 < slices.numel() < 2**31  # offsets are 32-bit
        and slices.shape[1] <= MOST_TILES
    )


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
    """See :func:`grinqh_ao.ops.oracle.decode_linear`."""
    capability, multiprocessors = device_of(x.device.index)
    tiles, k = slices.shape[1:3]
    chunk = chunk_length(capability, multiprocessors, tiles, k)
    counters = arrivals(tiles, x.device)
    return launch(
        x, slices, scales, row_scale, thresholds, gains, bias, levels, chunk, counters, False
    )


def launch(
    x: Tensor,
    slices: Tensor,
    scales: Tensor,
    row_scale: Tensor,
    thresholds: Tensor,
    gains: Tensor,
    bias: Tensor | None,
    levels: Sequence[int],
    chunk: int,
    counters: Tensor,
    interpret: bool,
) -> Tensor:
    """Runs the kernel with chunks of a given length, on a device or in the interpreter."""
    _, tiles, k, words = slices.shape
    n = row_scale.shape[0]
    tensors = [t.contiguous() for t in (x, slices, scales, row_scale, thresholds, gains)]
    rows = x.numel() // k
    mma = words >= 16 and x.dtype != torch.float32
    # Kernels are compiled for 1, 2, 4 and 8 rows; mma's columns take four at least.
    compiled_rows = triton.next_power_of_2(rows)
    if mma and compiled_rows == 2:
        compiled_rows = 4
    splits = -(-k // chunk)
    programs = tiles * splits
    tile = 16 * words
    # Both lists of a program, each with padding, and what is loaded ahead of the last step.
    capacity = 3 * chunk + (48 * WARPS if mma else 2 * entries_at_once(words))

    out = x.new_empty(*x.shape[:-1], n)
    at = torch.empty(programs * capacity, dtype=torch.int64, device=x.device)
    floats = functools.partial(torch.empty, dtype=torch.float32, device=x.device)
    entries = [at, floats(programs * compiled_rows * capacity)]
    if not mma:
        entries.append(floats(programs * compiled_rows * (capacity + 1) * (words // 4)))
    kernel = decode_mma_kernel if mma else decode_fma_kernel
    kernel[(tiles, splits)](
        *tensors,
        None if bias is None else bias.contiguous(),
        out,
        *entries,
        floats(splits * compiled_rows * tiles * tile),
        counters,
        rows,
        n,
        k,
        chunk,
        capacity,
        tensors[1].stride(0),
        LEVELS=tuple(levels),
        ROWS=compiled_rows,
        WORDS=words,
        BLOCK=triton.next_power_of_2(chunk),
        MEAN_BLOCK=min(triton.next_power_of_2(k), LARGEST_MEAN_BLOCK),
        SPLITS_AT_ONCE=min(triton.next_power_of_2(splits), SUMS_AT_ONCE // tile),
        INTERPRET=interpret,
        num_warps=WARPS,
        maxnreg=REGISTERS_OF_ONE_ROW if rows == 1 else None,
    )
    return out
