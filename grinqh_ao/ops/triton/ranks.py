"""Where in the lists a channel's entries go: sums over all channels in front of it.

Triton's scan and its reductions would each go through shared memory, one after the other. Here the
lanes of a warp vote, and what warps have counted is exchanged at once. A lane has one channel of
32 neighbours, a segment; ``tests/kernels/test_compiled.py`` holds that layout.
"""

from __future__ import annotations

import triton
import triton.language as tl

from grinqh_ao.ops.triton.shared import bits_of, store_8_bytes

# slices -> pairs and singles of the lanes below, and of all lanes; singles count 1 << 16.
VOTE = tl.constexpr(
    "{.reg .pred pair, two, single; .reg .b32 below, pairs, twos, singles, i, j; "
    "setp.ge.s32 pair, $2, 2; setp.ge.s32 two, $2, 4; "
    "and.b32 i, $2, 1; setp.ne.s32 single, i, 0; "
    "vote.sync.ballot.b32 pairs, pair, 0xffffffff; vote.sync.ballot.b32 twos, two, 0xffffffff; "
    "vote.sync.ballot.b32 singles, single, 0xffffffff; "
    "popc.b32 i, pairs; popc.b32 j, twos; add.s32 i, i, j; popc.b32 j, singles; "
    "mad.lo.s32 $1, j, 65536, i; "
    "mov.u32 below, %lanemask_lt; "
    "and.b32 pairs, pairs, below; and.b32 twos, twos, below; and.b32 singles, singles, below; "
    "popc.b32 i, pairs; popc.b32 j, twos; add.s32 i, i, j; popc.b32 j, singles; "
    "mad.lo.s32 $0, j, 65536, i;}"
)
MAX = tl.constexpr("redux.sync.max.u32 $0, $1, 0xffffffff;")
# Address of all segments' counts, number of segments -> sum of the counts of those.
SUM = tl.constexpr(
    "{.reg .pred p; .reg .b32 lane, there, count; mov.u32 lane, %laneid; "
    "setp.lt.s32 p, lane, $2; mad.lo.s32 there, lane, 8, $1; mov.b32 count, 0; "
    "@p ld.shared.b32 count, [there]; redux.sync.add.s32 $0, count, 0xffffffff;}"
)
# The same, and of the magnitudes behind the counts the largest.
SUM_AND_MAX = tl.constexpr(
    "{.reg .pred p; .reg .b32 lane, there, count, magnitude; mov.u32 lane, %laneid; "
    "setp.lt.s32 p, lane, $3; mad.lo.s32 there, lane, 8, $2; mov.b32 count, 0; "
    "mov.b32 magnitude, 0; @p ld.shared.v2.b32 {count, magnitude}, [there]; "
    "redux.sync.add.s32 $0, count, 0xffffffff; redux.sync.max.u32 $1, magnitude, 0xffffffff;}"
)


@triton.jit
def rank(slices, magnitude, memory, SHARED: tl.constexpr):
    """Pairs and singles in front of every channel and in all, singles in the upper 16 bits.

    Args:
        slices: int32 [BLOCK], 0 to 4 of every channel.
        magnitude: float32 [BLOCK], not negative; the largest is returned too, for all.
        memory: address of 8 bytes for each 32 channels.
    """
    if SHARED:
        BLOCK: tl.constexpr = slices.shape[0]
        tl.static_assert((BLOCK >= 32) & (BLOCK <= 1024), "a lane for each segment, of 32 channels")
        before, count = tl.inline_asm_elementwise(
            VOTE, "=&r,=&r,r", [slices], dtype=(tl.int32, tl.int32), is_pure=False, pack=1
        )
        largest = tl.inline_asm_elementwise(
            MAX, "=r,r", [bits_of(magnitude)], dtype=tl.int32, is_pure=False, pack=1
        )
        index = tl.arange(0, BLOCK)
        segment = index // 32
        store_8_bytes(memory + 8 * segment, count, largest, index % 32 == 0)
        tl.debug_barrier()
        before += tl.inline_asm_elementwise(
            SUM, "=r,r,r", [memory, segment], dtype=tl.int32, is_pure=False, pack=1
        )
        total, largest = tl.inline_asm_elementwise(
            SUM_AND_MAX, "=&r,=&r,r,r", [memory, BLOCK // 32], dtype=(tl.int32, tl.int32),
            is_pure=False, pack=1,
        )  # fmt: skip
        return before, total, largest.to(tl.float32, bitcast=True)
    else:
        counts = (slices >> 1) | ((slices & 1) << 16)
        before = tl.cumsum(counts, 0) - counts
        return before, tl.sum(counts, 0), tl.max(magnitude, 0)
