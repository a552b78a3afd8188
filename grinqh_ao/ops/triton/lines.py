"""Lines of slices, the units that are read: where they are, and asking for them ahead of time."""

from __future__ import annotations

import triton
import triton.language as tl

from grinqh_ao.ops.triton import configurations
from grinqh_ao.slices import HIGH_SLICES

PREFETCH_LINE = tl.constexpr(
    "{.reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0;}"
)
CACHE_LINE = tl.constexpr(128)  # in bytes
THREADS = tl.constexpr(32 * configurations.WARPS)


@triton.constexpr_function
def high_lines(levels):
    """Lines of a channel among the high ones: see slices.py."""
    return min(max(levels) // 2, HIGH_SLICES)


@triton.constexpr_function
def low_lines(levels):
    return max(max(levels) // 2 - HIGH_SLICES, 0)


@triton.jit
def place_of(line, WORDS: tl.constexpr):
    """Where a line is, in bytes from the beginning of a tile; unsigned, though in an int32."""
    return (line.to(tl.uint32) * (4 * WORDS)).to(tl.int32, bitcast=True)


@triton.jit
def words_of(words, place, WORDS: tl.constexpr):
    """Pointers to the words of lines; unsigned bytes are added with the fewest instructions."""
    offset = place.to(tl.uint32, bitcast=True).to(tl.int64)
    offset = tl.multiple_of(offset, [4 * WORDS] * len(place.shape))
    return (words.to(tl.pointer_type(tl.int8)) + offset).to(tl.pointer_type(tl.int32))


@triton.jit
def prefetch(address, mask):
    """Asks for the 128 bytes at an int64 address to be brought into the L2 cache."""
    tl.inline_asm_elementwise(
        PREFETCH_LINE, "=r,l,r", [address, mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def prefetch_range(start, size):
    """Asks for so many bytes from a pointer on, 16 KiB at most."""
    start = start.to(tl.int64)
    offset = CACHE_LINE * tl.arange(0, THREADS)
    prefetch((start & -CACHE_LINE) + offset, offset < size + (start & (CACHE_LINE - 1)))


@triton.jit
def prefetch_speculative(
    words,  # int32 [lines, WORDS], of the tile
    scales,  # uint8 [k, WORDS / 4], of the tile
    sensitivity,  # float32 [k]; thresholds and gains lie in front of it
    low,  # int32 [k] in compact storage, else None
    row_scale,  # float32 [outputs], from the tile's first output on
    outputs,
    first,  # channels first .. last - 1
    last,
    LEVELS: tl.constexpr,
    WORDS: tl.constexpr,
    SPECULATIVE: tl.constexpr,
):
    """Asks for what a program will read, as far as that is known before the activations are.

    First what lists are made of, because they are waited for; thresholds and gains come with the
    first sensitivities, on the same cache line but in stacks of experts. Then, as the memory has
    nothing else to do, the top slices of the first SPECULATIVE channels: many will be read.
    """
    channels = last - first
    prefetch_range(sensitivity + first, 4 * channels)
    prefetch_range(scales + first * (WORDS // 4), channels * (WORDS // 4))
    if low is not None:
        prefetch_range(low + first, 4 * channels)
    tl.static_assert(SPECULATIVE <= THREADS)
    index = tl.arange(0, THREADS)
    place = place_of((first + index) * high_lines(LEVELS), WORDS)
    wanted = index < tl.minimum(channels, SPECULATIVE)
    prefetch(words_of(words, place, WORDS).to(tl.int64), wanted)
    prefetch_range(row_scale, 4 * tl.minimum(outputs, 16 * WORDS))  # for the very end
