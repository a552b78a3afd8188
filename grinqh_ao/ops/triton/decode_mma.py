"""``grinqh::decode_linear`` on tensor cores: for float16 and bfloat16, tiles of 256 and 512.

Lists, then a loop over pairs of slices and one over single ones, then sums; ``fragments.py`` has
what tensor cores make of a step.
"""

from __future__ import annotations

import triton
import triton.language as tl

from grinqh_ao.ops.triton.combine import combine
from grinqh_ao.ops.triton.fragments import (
    accumulate,
    four_of,
    pairs_to_singles,
    single_unit,
)
from grinqh_ao.ops.triton.lists import (
    build_lists,
    decode_scale,
    entry_words,
    exponent_of_row,
    has_pairs,
    has_singles,
    load_x,
    merge,
    prefetch,
    row_scale_at,
    scaled,
    scales_of,
    words_of,
)
from grinqh_ao.ops.triton.members import pick, work_of_program

# x is scaled to less than 2 ** (TOP + 1): products with scales and gains, at most 1, stay finite.
TOP = tl.constexpr(14)
# That a lane reads in a step; a pair has two.
LINES = tl.constexpr(4)
# Of what a program reads first, brought into the L2 cache while it writes its lists.
PREFETCHED_STEPS = tl.constexpr(2)


@triton.jit
def load_entries(entry, row, group, WORDS: tl.constexpr, ROWS: tl.constexpr):
    """Of a lane's lines, 4 entries apart: places, the lane's row of x, and scale codes.

    x comes as tuples of blocks of four rows. Scale codes are one, of the lane's column's group,
    with one row, else those of four groups.
    """
    ats = ()
    xs = ()
    scales = ()
    for i in tl.static_range(LINES):
        this = entry + 4 * i * entry_words(ROWS)
        at = tl.load(this)
        x = ()
        for block in tl.static_range((ROWS + 3) // 4):
            x = x + (load_x(this, at, 4 * block + row, ROWS),)
        codes = ()
        for j in tl.static_range(1 if ROWS == 1 else 4):
            codes = codes + (tl.load(scales_of(this) + group + 2 * j * WORDS // 64),)
        ats = ats + (at,)
        xs = xs + (x,)
        scales = scales + (codes,)
    return ats, xs, scales


@triton.jit
def load_words(words, ats, WORDS: tl.constexpr):
    v = tl.arange(0, WORDS // 8)[None, :]
    new = ()
    for i in tl.static_range(len(ats)):
        new = new + (tl.load(words_of(words, ats[i], WORDS) + v),)
    return new


@triton.jit
def multiplier(x, scale_code, shift):
    """x * scale as float16 bits in the half that the column asks for."""
    bits = (x * decode_scale(scale_code)).to(tl.float16).to(tl.int16, bitcast=True)
    return (bits.to(tl.int32) & 0xFFFF) << shift


@triton.jit
def multipliers(xs, codes, shift, BLOCKS: tl.constexpr, ROWS: tl.constexpr):
    """B registers of one channel per lane: one, or one for every j and block of rows."""
    bs = ()
    for j in tl.static_range(1 if ROWS == 1 else 4):
        for block in tl.static_range(BLOCKS):
            bs = bs + (multiplier(xs[block], codes[j], shift),)
    return bs


@triton.jit
def store_sums(
    to,  # float32 [warps, ROWS, TILE]
    acc,
    sums,
    WORDS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Writes down what each warp has summed up, outputs in their order."""
    V: tl.constexpr = WORDS // 8
    thread = tl.arange(0, acc[0].shape[0])[:, None]
    t = thread % 4
    to += (thread // 32) * (ROWS * 16 * WORDS)
    word = (thread // 4 % 8) * V + tl.arange(0, V)[None, :]
    if ROWS == 1:
        # Column 2 t + c belongs to mma 2 (t % 2) + c, of lower fields if t < 2, else of upper.
        even = t % 2 == 0
        for i in tl.static_range(4):
            here = acc[4 * (i % 2) + i] * single_unit(2 * (i % 2) + i // 2)
            there = acc[4 * (i % 2) + 8 + i] * single_unit(2 * (i % 2) + i // 2 + 4)
            value = tl.where(even, here, there) - sums[i % 2]
            field = 4 * (t % 2) + 2 * (i % 2) + i // 2 + 8 * (t // 2)
            tl.store(to + field * WORDS + word, value)
    else:
        for j in tl.static_range(4):
            for block in tl.static_range(BLOCKS):
                c = four_of(acc, j * BLOCKS + block)
                for i in tl.static_range(4):
                    value = c[i] * single_unit(2 * j + i // 2)
                    value = value - sums[2 * (j * BLOCKS + block) + i % 2]
                    row = 4 * block + 2 * (t % 2) + i % 2
                    field = 2 * j + i // 2 + 8 * (t // 2)
                    tl.store(to + row * (16 * WORDS) + field * WORDS + word, value)


@triton.jit(do_not_specialize=["chunk"])
def decode_mma_kernel(
    x,  # float16 or bfloat16 [rows, k]
    # Of each weight, in tuples:
    slices,  # int32 [tiles, lines, WORDS]
    scales,  # uint8 [tiles, k, WORDS / 4]
    vectors,  # float32 [L], see vectors.py
    bias,  # [n]; or None, for all
    low,  # int32 [k]; or None, for all
    experts,  # int64 [slots]; or None, see members.py
    mean,  # float32 [rows] where x is a part of a row, else None
    out,  # [rows, n]
    n,
    tiles,
    lines,  # of a tile
    # Of all:
    entries,  # int64 [programs, capacity, entry_words(ROWS)], see lists.py
    warp_sums,  # float32 [programs, NUM_WARPS, ROWS, TILE]
    partial,  # float32 [splits, ROWS, all tiles * TILE]
    arrivals,  # int32 [all tiles]
    rows,
    k,
    chunk,
    capacity,
    LEVELS: tl.constexpr,
    ROWS: tl.constexpr,  # 1, 4 or 8
    WORDS: tl.constexpr,  # 32 or 16
    BLOCK: tl.constexpr,
    MEAN_BLOCK: tl.constexpr,
    SPLITS_AT_ONCE: tl.constexpr,
    NUM_WARPS: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    tile = tl.program_id(0)
    split = tl.program_id(1)
    all_tiles = tl.num_programs(0)
    splits = tl.num_programs(1)
    member, tile_of_weight, program, x, slices, scales, this = work_of_program(
        x, slices, scales, vectors, experts, n, tiles, lines, k, WORDS
    )
    STEP: tl.constexpr = 4 * LINES * NUM_WARPS  # entries
    PADDING: tl.constexpr = 2 * STEP  # to whole steps, and one that is loaded in vain
    ENTRY: tl.constexpr = entry_words(ROWS)
    THREADS: tl.constexpr = 32 * NUM_WARPS
    AHEAD: tl.constexpr = ROWS < 8
    BLOCKS: tl.constexpr = (ROWS + 3) // 4
    V: tl.constexpr = WORDS // 8
    TILE: tl.constexpr = 16 * WORDS

    if not INTERPRET:  # they are read at the very end
        line = tl.arange(0, TILE // 32)
        address = (this + row_scale_at(k) + tile_of_weight * TILE).to(tl.int64)
        prefetch(address + 128 * line, tile_of_weight * TILE + 32 * line < pick(member, n))
    first = split * chunk
    last = tl.minimum(first + chunk, k)
    entries += program * capacity * ENTRY
    num_pairs, num_singles, exponents = build_lists(
        x, slices, scales, this, None if low is None else pick(member, low), mean, entries, None,
        first, last, rows, k, LEVELS, WORDS, ROWS, BLOCK, MEAN_BLOCK, STEP, PADDING,
        TOP, PREFETCHED_STEPS * STEP, INTERPRET,
    )  # fmt: skip
    tl.debug_barrier()

    # Tensors are [threads, V] or [threads, 1], so that the compiler has no choice of layouts but
    # the one that mma needs: thread 32 warp + 4 g + t has element 32 warp + 4 g + t.
    thread = tl.arange(0, THREADS)[:, None]
    warp = thread // 32
    g = thread // 4 % 8  # also the column of a B register
    t = thread % 4
    shift = 16 * (g // 4)
    if ROWS == 1:
        group = g * WORDS // 32
        row = 0 * g
    else:
        group = 8 * (g // 4) * WORDS // 64
        row = g % 4
    lane_words = slices + g * V

    acc = ()
    for _ in tl.static_range(16 * BLOCKS):
        acc = acc + (tl.zeros((THREADS, V), tl.float32),)
    sums = ()
    for _ in tl.static_range(2 if ROWS == 1 else 8 * BLOCKS):
        sums = sums + (tl.zeros((THREADS, 1), tl.float32),)

    # A step reads four lines per lane: pairs first, then singles. They are loaded one step
    # ahead, and the entries that say where they are another one. Eight rows leave no registers for
    # that.
    entry = entries + (warp * (4 * LINES) + t) * ENTRY
    at, x, scale = load_entries(entry, row, group, WORDS, ROWS)
    words = load_words(lane_words, at, WORDS)
    entry += STEP * ENTRY
    next_at, next_x, next_scale = load_entries(entry, row, group, WORDS, ROWS)
    if has_pairs(LEVELS):
        for _ in range(0, num_pairs, STEP // 2):
            if not AHEAD:
                words = load_words(lane_words, at, WORDS)
            b = ()
            nibbles = ()
            for i in tl.static_range(0, LINES, 2):
                b = b + (multipliers(x[i], scale[i], shift, BLOCKS, ROWS),)
                nibbles = nibbles + (merge(words[i], words[i + 1], INTERPRET),)
            at = next_at
            x = next_x
            scale = next_scale
            entry += STEP * ENTRY
            next_at, next_x, next_scale = load_entries(entry, row, group, WORDS, ROWS)
            if AHEAD:
                words = load_words(lane_words, at, WORDS)
            acc, sums = accumulate(
                acc, sums, nibbles[0], nibbles[1], b[0], b[1], True, BLOCKS, ROWS, INTERPRET
            )
        acc = pairs_to_singles(acc, BLOCKS)
    if has_singles(LEVELS):
        for _ in range(0, num_singles, STEP):
            if not AHEAD:
                words = load_words(lane_words, at, WORDS)
            b = ()
            for i in tl.static_range(LINES):
                b = b + (multipliers(x[i], scale[i], shift, BLOCKS, ROWS),)
            at = next_at
            x = next_x
            scale = next_scale
            entry += STEP * ENTRY
            next_at, next_x, next_scale = load_entries(entry, row, group, WORDS, ROWS)
            for i in tl.static_range(0, LINES, 2):
                words0 = (words[i], words[i])
                words1 = (words[i + 1], words[i + 1])
                acc, sums = accumulate(
                    acc, sums, words0, words1, b[i], b[i + 1], False, BLOCKS, ROWS, INTERPRET
                )
            if AHEAD:
                words = load_words(lane_words, at, WORDS)

    # Warps have summed up channels of their own. A reduction would go through shared memory too,
    # but element by element.
    warp_sums += program * (NUM_WARPS * ROWS * TILE)
    store_sums(warp_sums, acc, sums, WORDS, ROWS, BLOCKS)
    tl.debug_barrier()
    output = tl.arange(0, TILE)[None, :]
    if experts is not None:
        partial += tl.program_id(2).to(tl.int64) * splits * ROWS * all_tiles * TILE
        arrivals += tl.program_id(2) * all_tiles
    partial_tile = partial + ((split * ROWS).to(tl.int64) * all_tiles + tile) * TILE
    for r in range(ROWS):
        total = tl.zeros((1, TILE), tl.float32)
        for w in tl.static_range(NUM_WARPS):
            total += tl.load(warp_sums + (w * ROWS + r) * TILE + output)
        exponent = exponent_of_row(exponents, r, ROWS)
        tl.store(partial_tile + r * all_tiles * TILE + output, scaled(total, -exponent))
    combine(
        partial, arrivals, vectors, bias, experts, out, n, member, tile, tile_of_weight, splits,
        rows, k, all_tiles * TILE, TILE, ROWS, SPLITS_AT_ONCE,
    )  # fmt: skip
