"""The last part of a decode kernel: sums of chunks -> outputs.

Every program adds up its own chunk of channels and writes that partial sum down; the program of a
tile that arrives last adds them all, always in the same order, so that equal inputs give equal
bits. No second launch, and no atomics on the outputs.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def combine(
    partial,  # float32 [splits, ROWS, padded], outputs of all weights, each padded to tiles
    arrivals,  # int32 [all tiles], zero before and after
    row_scale,  # float32 [n]
    bias,  # [n] or None
    out,  # [rows, n]
    tile,  # of all weights
    tile_of_weight,
    splits,
    rows,
    n,
    padded,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS_AT_ONCE: tl.constexpr,
):
    """To be called by all programs, after their partial sums are stored."""
    tl.debug_barrier()  # the sums of all threads of this program, before it counts as arrived
    arrived = tl.atomic_add(arrivals + tile, 1, sem="acq_rel", scope="gpu")
    if arrived == splits - 1:
        tl.store(arrivals + tile, 0)  # for the next launch
        # Not one-dimensional: the compiler gives all tensors of one shape the same layout, and the
        # lists of channels must keep one element per thread.
        column = tl.arange(0, TILE)[None, :]
        output = tile_of_weight * TILE + column
        inside = output < n
        scale = tl.load(row_scale + output, mask=inside, other=0)
        for r in range(rows):
            total = tl.zeros((1, TILE), tl.float32)
            for start in range(0, splits, SPLITS_AT_ONCE):
                split = (start + tl.arange(0, SPLITS_AT_ONCE))[:, None]
                # Past the first level cache: other programs wrote these.
                sums = tl.load(
                    partial + (split * ROWS + r) * padded + tile * TILE + column,
                    mask=split < splits,
                    other=0,
                    cache_modifier=".cg",
                )
                total += tl.sum(sums, 0, keep_dims=True)
            total *= scale
            if bias is not None:
                total += tl.load(bias + output, mask=inside, other=0).to(tl.float32)
            tl.store(out + r * n + output, total.to(out.dtype.element_ty), mask=inside)
