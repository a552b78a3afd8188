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
