"""Several weights in one launch: those that multiply the same activations, as q, k and v do.

What differs between weights comes to a kernel as tuples; a program finds the weight of its tile
first, and takes that weight's part of each.

Experts are something else: one weight in the tuples, a stack of them in memory, and a third axis of
programs for slots. A slot is a row of activations with the number of its expert, which only the
device knows; ``experts`` has them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from grinqh_ao.ops.triton.lists import row_scale_at


@triton.jit
def find(tile, tiles):
    """Of a tile, counted over all weights: its weight, and its place in there."""
    member = 0
    start = 0
    first = 0
    for i in tl.static_range(len(tiles) - 1):
        start += tiles[i]
        member += (tile >= start).to(tl.int32)
        first = tl.where(tile >= start, start, first)
    return member, tile - first


@triton.jit
def pick(member, values):
    chosen = values[0]
    for i in tl.static_range(1, len(values)):
        chosen = tl.where(member == i, values[i], chosen)
    return chosen


@triton.jit
def work_of_program(x, slices, scales, vectors, experts, n, tiles, lines, k, WORDS: tl.constexpr):
    """What a program of a decode kernel works on, of the kernel's arguments with these names.

    Returns its weight, its tile's place in that and its own number; and where are the activations,
    the tile's slices and scales, and the weight's vectors.
    """
    tile = tl.program_id(0)
    all_tiles = tl.num_programs(0)
    member, tile_of_weight = find(tile, tiles)
    slices = pick(member, slices) + tile_of_weight.to(tl.int64) * pick(member, lines) * WORDS
    scales = pick(member, scales) + tile_of_weight.to(tl.int64) * k * (WORDS // 4)
    vectors = pick(member, vectors)
    program = (tl.program_id(1) * all_tiles + tile).to(tl.int64)
    if experts is not None:
        slot = tl.program_id(2)
        program += slot.to(tl.int64) * tl.num_programs(1) * all_tiles
        expert = tl.load(experts + slot)
        slices += expert * all_tiles * lines[0] * WORDS
        scales += expert * all_tiles * k * (WORDS // 4)
        vectors += expert * (row_scale_at(k) + n[0])
        x += slot * k
    return member, tile_of_weight, program, x, slices, scales, vectors
