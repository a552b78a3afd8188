"""``grinqh::decode_linear`` on tensor cores: for float16 and bfloat16, tiles of 256 and 512.

Lists, then a loop over pairs of slices and one over single ones, then sums; ``fragments.py`` has
what tensor cores make of a step.
"""

from __future__ import annotations

import triton
import triton.language as tl

from grinqh_ao.ops.triton import configurations
from grinqh_ao.ops.triton.combine import combine
from grinqh_ao.ops.triton.fragments import (
    accumulate,
    four_of,
    pairs_to_singles,
    single_unit,
)
from grinqh_ao.ops.triton.lines import THREADS, prefetch, prefetch_speculative, words_of
from grinqh_ao.ops.triton.lists import (
    SENSITIVITY_AT,
    build_lists,
    decode_scale,
    entries_of_channel,
    entry_bytes,
    exponent_of_row,
    has_pairs,
    has_singles,
    merge,
    row_scale_at,
    scale_codes_of,
    scaled,
    x_of,
)
from grinqh_ao.ops.triton.members import pick, work_of_program
from grinqh_ao.ops.triton.shared import (
    allocate,
    load_byte,
    load_float,
    load_int,
    load_vectors,
    store_vectors,
)

# x is scaled to less than 2 ** (TOP + 1): products with scales and gains, at most 1, stay finite.
TOP = tl.constexpr(14)
# Lines that a lane reads in a step: a pair takes two, a single one.
LINES = tl.constexpr(4)
WARPS = tl.constexpr(configurations.WARPS)
# Entries of a step of a program.
PAIRS = tl.constexpr(2 * LINES.value * WARPS.value)
SINGLES = tl.constexpr(2 * PAIRS.value)
# Behind the singles, to a whole step, and one more that is loaded in vain.
PADDING = tl.constexpr(2 * SINGLES.value)


@triton.constexpr_function
def memory_bytes(levels, block, rows, words):
    """Of a program on chip: its lists, later its warps' sums, of four rows at a time."""
    entries = entries_of_channel(levels) * block + PAIRS.value + PADDING.value
    sums = WARPS.value * (1 if rows == 1 else 4) * 16 * words
    return max(entries * entry_bytes(rows), 4 * sums)


@triton.jit
def entry_of_line(entry, i: tl.constexpr, pairs, ROWS: tl.constexpr):
    """Of a lane's line i, of LINES. Its entries are 4 apart; pairs have one for two lines, i and
    i + LINES / 2."""
    HALF: tl.constexpr = LINES // 2
    if i < HALF:
        return entry + 4 * entry_bytes(ROWS) * i
    else:
        return (
            entry
            + tl.where(pairs, 0, 4 * entry_bytes(ROWS) * HALF)
            + (4 * entry_bytes(ROWS) * (i - HALF))
        )


@triton.jit
def load_places(entry, pairs, WORDS: tl.constexpr, ROWS: tl.constexpr, SHARED: tl.constexpr):
    """Where a lane's lines are; of pairs, the lower line lies behind the upper one."""
    places = ()
    for i in tl.static_range(LINES):
        place = load_int(entry_of_line(entry, i, pairs, ROWS), SHARED)
        places = places + (place + tl.where(pairs, i // (LINES // 2) * (4 * WORDS), 0),)
    return places


@triton.jit
def load_words(words, places, WORDS: tl.constexpr, FEW: tl.constexpr):
    v = tl.arange(0, WORDS // 8)[None, :]
    # Large layers fill the L2 cache with what is read once.
    POLICY: tl.constexpr = "" if FEW else "evict_first"
    new = ()
    for i in tl.static_range(len(places)):
        new = new + (tl.load(words_of(words, places[i], WORDS) + v, eviction_policy=POLICY),)
    return new


@triton.jit
def prefetch_step(
    words, pair, single, step, pairs_left, steps_left, g, mask, WORDS: tl.constexpr,
    ROWS: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Asks for a warp's lines of a step, one for each lane; steps are counted from the entries."""
    i = g % 4
    of_pair = pair + (PAIRS * step + i % 2 * 4) * entry_bytes(ROWS)
    of_single = single + (SINGLES * (step - pairs_left) + i * 4) * entry_bytes(ROWS)
    mask = mask & (step < steps_left)
    entry = tl.where(mask, tl.where(step < pairs_left, of_pair, of_single), pair)
    place = load_int(entry, SHARED) + tl.where(step < pairs_left, i // 2 * (4 * WORDS), 0)
    prefetch(words_of(words, place, WORDS).to(tl.int64), mask)


@triton.jit
def multiplier(x, scale_code, shift, INTERPRET: tl.constexpr):
    """x * scale as float16 bits in the half that the column asks for."""
    bits = (x * decode_scale(scale_code, INTERPRET)).to(tl.float16).to(tl.int16, bitcast=True)
    return (bits.to(tl.int32) & 0xFFFF) << shift


@triton.jit
def multipliers(
    entry, row, group, shift, WORDS: tl.constexpr, ROWS: tl.constexpr, SHARED: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """B registers of a lane's channel: one, or one for every j and block of four rows.

    With one row, of the lane's column's group, else of four groups.
    """
    bs = ()
    for j in tl.static_range(1 if ROWS == 1 else 4):
        code = load_byte(scale_codes_of(entry) + group + 2 * j * WORDS // 64, SHARED)
        for block in tl.static_range((ROWS + 3) // 4):
            x = load_float(x_of(entry, 4 * block + row, ROWS), SHARED)
            bs = bs + (multiplier(x, code, shift, INTERPRET),)
    return bs


@triton.jit
def turned(word, t, WORDS: tl.constexpr):
    """Where lanes t put a word of a line, so that they do not get in each other's way."""
    V: tl.constexpr = WORDS // 8
    return (word + 2 * t * V) % WORDS


@triton.jit
def store_sums(
    to,  # address of float32 [warps, 1 or 4 rows, TILE]
    acc,
    sums,
    block: tl.constexpr,  # of four rows
    WORDS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    SHARED: tl.constexpr,
):
    """Writes down what each warp has summed up, lines ``turned``."""
    V: tl.constexpr = WORDS // 8
    thread = tl.arange(0, acc[0].shape[0])[:, None]
    t = thread % 4
    word = turned(thread // 4 % 8 * V + tl.arange(0, V)[None, :], t, WORDS)
    to += (thread // 32) * ((1 if ROWS == 1 else 4) * 64 * WORDS) + 4 * word
    if ROWS == 1:
        # Column 2 t + c belongs to mma 2 (t % 2) + c, of lower fields if t < 2, else of upper.
        even = t % 2 == 0
        for i in tl.static_range(4):
            value = tl.where(even, acc[4 * (i % 2) + i], acc[4 * (i % 2) + 8 + i])
            here = single_unit(2 * (i % 2) + i // 2)
            there = single_unit(2 * (i % 2) + i // 2 + 4)
            value = value * tl.where(even, here, there) - sums[i % 2]
            field = 4 * (t % 2) + 2 * (i % 2) + i // 2 + 8 * (t // 2)
            store_vectors(to + field * (4 * WORDS), value, SHARED)
    else:
        for j in tl.static_range(4):
            c = four_of(acc, j * BLOCKS + block)
            for i in tl.static_range(4):
                value = c[i] * single_unit(2 * j + i // 2)
                value = value - sums[2 * (j * BLOCKS + block) + i % 2]
                row = 2 * (t % 2) + i % 2
                field = 2 * j + i // 2 + 8 * (t // 2)
                store_vectors(to + (row * 16 + field) * (4 * WORDS), value, SHARED)


@triton.jit
def sum_of_warps(sums, row, WORDS: tl.constexpr, ROWS: tl.constexpr, SHARED: tl.constexpr):
    """float32 [threads, V] of a row, of four, out of what ``store_sums`` has written: thread
    8 field + i has words i V ... of that field."""
    V: tl.constexpr = WORDS // 8
    thread = tl.arange(0, 32 * WARPS)[:, None]
    field = thread // 8
    half = field // 4 % 2 if ROWS == 1 else row // 2
    first = turned(thread % 8 * V, half + 2 * (field // 8), WORDS)
    address = sums + 4 * ((row * 16 + field) * WORDS + first + tl.arange(0, V)[None, :])
    total = tl.zeros((32 * WARPS, V), tl.float32)
    for w in tl.static_range(WARPS):
        total += load_vectors(address + w * ((1 if ROWS == 1 else 4) * 64 * WORDS), V, SHARED)
    return total


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
    memory,  # int8 [programs, memory_bytes()] in the interpreter, else None: it is shared memory
    partial,  # float32 [splits, ROWS, all tiles * TILE]
    arrivals,  # int32 [all tiles]
    rows,
    k,
    chunk,
    LEVELS: tl.constexpr,
    ROWS: tl.constexpr,  # 1, 4 or 8
    WORDS: tl.constexpr,  # 32 or 16
    BLOCK: tl.constexpr,
    MEAN_BLOCK: tl.constexpr,
    SPLITS_AT_ONCE: tl.constexpr,
    FEW: tl.constexpr,  # see configurations.py
    SPECULATIVE: tl.constexpr,
    EARLY: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    # EARLY, a program may begin while the kernel in front ends. Before that it may only prefetch,
    # which is right whoever writes to what it asks for.
    if EARLY and experts is not None:  # the kernel in front may have to find out which
        tl.extra.cuda.gdc_wait()
    tile = tl.program_id(0)
    split = tl.program_id(1)
    all_tiles = tl.num_programs(0)
    splits = tl.num_programs(1)
    member, tile_of_weight, program, x, slices, scales, this = work_of_program(
        x, slices, scales, vectors, experts, n, tiles, lines, k, WORDS
    )
    ENTRY: tl.constexpr = entry_bytes(ROWS)
    AHEAD: tl.constexpr = ROWS < 8
    BLOCKS: tl.constexpr = (ROWS + 3) // 4
    V: tl.constexpr = WORDS // 8
    TILE: tl.constexpr = 16 * WORDS
    SHARED: tl.constexpr = memory is None
    SIZE: tl.constexpr = memory_bytes(LEVELS, BLOCK, ROWS, WORDS)
    if SHARED:
        memory = allocate(SIZE + BLOCK // 4)  # and the counts that places in lists come from
    else:
        memory += program * SIZE
    first = split * chunk
    last = tl.minimum(first + chunk, k)
    low = None if low is None else pick(member, low)
    if not INTERPRET:
        row_scale = this + row_scale_at(k) + tile_of_weight * TILE
        prefetch_speculative(
            slices, scales, this + SENSITIVITY_AT, low, row_scale,
            pick(member, n) - tile_of_weight * TILE, first, last, LEVELS, WORDS, SPECULATIVE,
        )  # fmt: skip
    if EARLY and experts is None:
        tl.extra.cuda.gdc_wait()
    num_pairs, num_singles, exponents = build_lists(
        x, slices, scales, this, low, mean, memory, memory + SIZE, None, first, last, rows, k,
        LEVELS, WORDS, ROWS, BLOCK, MEAN_BLOCK, PAIRS, PADDING, TOP, SHARED,
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
    # ahead. Eight rows leave no registers for that.
    pair_steps = (num_pairs + (PAIRS - 1)) // PAIRS
    pair = memory + (warp * (2 * LINES) + t) * ENTRY
    single = memory + (pair_steps * PAIRS + warp * (4 * LINES) + t) * ENTRY
    more = num_pairs > 0
    places = load_places(tl.where(more, pair, single), more, WORDS, ROWS, SHARED)
    words = load_words(lane_words, places, WORDS, FEW)
    steps_left = pair_steps + (num_singles + (SINGLES - 1)) // SINGLES
    if not INTERPRET:  # the second step and the third
        prefetch_step(
            lane_words, pair, single, 1 + g // 4, pair_steps, steps_left, g, True,
            WORDS, ROWS, SHARED,
        )  # fmt: skip
    if has_pairs(LEVELS):
        for start in range(0, num_pairs, PAIRS):
            if not AHEAD:
                words = load_words(lane_words, places, WORDS, FEW)
            b = ()
            nibbles = ()
            for i in tl.static_range(LINES // 2):
                entry = entry_of_line(pair, i, True, ROWS)
                b = b + (multipliers(entry, row, group, shift, WORDS, ROWS, SHARED, INTERPRET),)
                nibbles = nibbles + (merge(words[i], words[i + LINES // 2], INTERPRET),)
            pair += PAIRS * ENTRY
            more = start + PAIRS < num_pairs
            places = load_places(tl.where(more, pair, single), more, WORDS, ROWS, SHARED)
            steps_left -= 1
            pair_steps -= 1
            if FEW and not INTERPRET:
                prefetch_step(
                    lane_words, pair, single, 2, pair_steps, steps_left, g, g < 4,
                    WORDS, ROWS, SHARED,
                )  # fmt: skip
            if AHEAD:
                words = load_words(lane_words, places, WORDS, FEW)
            acc, sums = accumulate(
                acc, sums, nibbles[0], nibbles[1], b[0], b[1], True, BLOCKS, ROWS, INTERPRET
            )
        acc = pairs_to_singles(acc, BLOCKS)
    if has_singles(LEVELS):
        for _ in range(0, num_singles, SINGLES):
            if not AHEAD:
                words = load_words(lane_words, places, WORDS, FEW)
            b = ()
            for i in tl.static_range(LINES):
                entry = entry_of_line(single, i, False, ROWS)
                b = b + (multipliers(entry, row, group, shift, WORDS, ROWS, SHARED, INTERPRET),)
            single += SINGLES * ENTRY
            places = load_places(single, False, WORDS, ROWS, SHARED)
            steps_left -= 1
            if FEW and not INTERPRET:
                prefetch_step(
                    lane_words, pair, single, 2, 0, steps_left, g, g < 4, WORDS, ROWS, SHARED
                )  # fmt: skip
            for i in tl.static_range(0, LINES, 2):
                words0 = (words[i], words[i])
                words1 = (words[i + 1], words[i + 1])
                acc, sums = accumulate(
                    acc, sums, words0, words1, b[i], b[i + 1], False, BLOCKS, ROWS, INTERPRET
                )
            if AHEAD:
                words = load_words(lane_words, places, WORDS, FEW)

    # Warps have summed up channels of their own; the lists make room for their sums.
    if experts is not None:
        partial += tl.program_id(2).to(tl.int64) * splits * ROWS * all_tiles * TILE
        arrivals += tl.program_id(2) * all_tiles
    partial_tile = partial + ((split * ROWS).to(tl.int64) * all_tiles + tile) * TILE
    output = thread * V + tl.arange(0, V)[None, :]
    for block in tl.static_range(BLOCKS):
        tl.debug_barrier()
        store_sums(memory, acc, sums, block, WORDS, ROWS, BLOCKS, SHARED)
        tl.debug_barrier()
        for r in range(1 if ROWS == 1 else 4):
            total = sum_of_warps(memory, r, WORDS, ROWS, SHARED)
            exponent = exponent_of_row(exponents, 4 * block + r, ROWS)
            to = partial_tile + (4 * block + r) * all_tiles * TILE + output
            tl.store(to, scaled(total, -exponent))
    combine(
        partial, arrivals, vectors, bias, experts, out, n, member, tile, tile_of_weight, splits,
        rows, k, all_tiles * TILE, TILE, ROWS, SPLITS_AT_ONCE,
    )  # fmt: skip
