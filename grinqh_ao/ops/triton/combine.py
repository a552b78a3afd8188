"""The last part of a decode kernel: sums of chunks -> outputs.

Every program adds up its own chunk of channels and writes that partial sum down; the program of a
tile that arrives last adds them all, always in the same order, so that equal inputs give equal
bits. No second launch, and no atomics on the outputs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from grinqh_ao.ops.triton.lists import row_scale_at
from grinqh_ao.ops.triton.members import pick


@triton.jit
def combine(
    partial,  # float32 [splits, ROWS, padded], outputs of all weights, each padded to tiles
    arrivals,  # int32 [all tiles], zero before and after
    # As the kernels have them:
    vectors,
    bias,
    experts,
    out,
    n,
    member,  # the weight of the tile
    tile,  # of all weights
    tile_of_weight,
    splits,
    rows,
    k,
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
        outputs = pick(member, n)
        inside = output < outputs
        row_scale = pick(member, vectors) + row_scale_at(k)
        to = pick(member, out) + output
        if experts is not None:
            slot = tl.program_id(2)
            row_scale += tl.load(experts + slot) * (row_scale_at(k) + outputs)
            to += slot * outputs
        scale = tl.load(row_scale + output, mask=inside, other=0)
        offset = tl.zeros((1, TILE), tl.float32)
        if bias is not None:
            offset = tl.load(pick(member, bias) + output, mask=inside, other=0).to(tl.float32)
        sums = partial + tile * TILE
        for r in range(rows):
            total = tl.zeros((1, TILE), tl.float32)
            for start in range(0, splits, SPLITS_AT_ONCE):
                for i in tl.static_range(SPLITS_AT_ONCE):
                    # Past the first level cache: other programs wrote these. A mask that differs
                    # between columns would take the loads apart.
                    total += tl.load(
                        sums + ((start + i) * ROWS + r) * padded + column,
                        mask=(start + i < splits) & (column >= 0),
                        other=0,
                        cache_modifier=".cg",
                    )
            total = total * scale + offset
            tl.store(to + r * outputs, total.to(to.dtype.element_ty), mask=inside)
