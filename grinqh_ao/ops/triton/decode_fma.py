"""``grinqh::decode_linear`` in float32: for float32 activations, and for tiles of any width.

One instruction unpacks a weight: a word of a slice, masked with 3 << 2 f, is q * 2**(2 f - 149) if
read as a float32, a subnormal one, exact and with no offset. One multiply-add does the rest.
Subnormal numbers cost nothing extra on a GPU; this file's kernels must not flush them to zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

from grinqh_ao.ops.triton.combine import combine
from grinqh_ao.ops.triton.lines import words_of
from grinqh_ao.ops.triton.lists import (
    build_lists,
    decode_scale,
    entry_bytes,
    exponent_of_row,
    has_pairs,
    has_singles,
    merge,
    scale_codes_of,
    scaled,
    x_of,
)
from grinqh_ao.ops.triton.members import pick, work_of_program
from grinqh_ao.ops.triton.shared import load_byte, load_float, load_int

# x is scaled to less than 2 ** (TOP + 1), so that products with subnormal codes are normal numbers.
TOP = tl.constexpr(100)


@triton.constexpr_function
def channels_per_step(words, rows):
    """Channels per step: 128 threads with four words each, or fewer where rows need registers."""
    return 128 * max(1, 4 // rows) // words


@triton.constexpr_function
def entries_at_once(words):
    return 2048 // words


@triton.constexpr_function
def field_bit(field):
    """Lowest bit of a 2-bit field; of fields above bit 23, once they are shifted there."""
    return 2 * field if field < 12 else 2 * (field - 12)


@triton.constexpr_function
def nibble_bit(field):
    """The same of a nibble; even and odd fields are in words of their own."""
    return 4 * (field // 2) if field < 12 else 4 * (field // 2 - 6)


@triton.constexpr_function
def unit(bit):
    """One factor of 2 ** (149 - bit), which is no float32 itself; the other is 2 ** 49."""
    return 2.0 ** (100 - bit)


@triton.jit
def scale_entries(
    entries, multiplier, count, capacity, total, MEAN: tl.constexpr, WORDS: tl.constexpr,
    ROWS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Writes x * scale of every entry and group, adds their sums times the mean code to total."""
    GROUPS: tl.constexpr = WORDS // 4
    AT_ONCE: tl.constexpr = entries_at_once(WORDS)
    group = tl.arange(0, GROUPS)[None, :]
    entry = tl.arange(0, AT_ONCE)[:, None]
    for start in range(0, count, AT_ONCE):
        position = start + entry
        this = entries + position * entry_bytes(ROWS)
        scale = decode_scale(load_byte(scale_codes_of(this) + group, False), INTERPRET)
        new = ()
        for r in tl.static_range(ROWS):
            product = load_float(x_of(this, r, ROWS), False) * scale
            tl.store(multiplier + (r * capacity + position) * GROUPS + group, product)
            new = new + (total[r] + product * MEAN,)
        total = new
    return total


@triton.jit
def accumulate(
    acc, even, odd, multiplier, capacity, NIBBLES: tl.constexpr, WORDS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """acc[f] += code of field f * multiplier of its group, over the channels of a step."""
    GROUPS: tl.constexpr = WORDS // 4
    even = even.to(tl.uint32, bitcast=True)
    odd = odd.to(tl.uint32, bitcast=True)
    high = (even >> 24, odd >> 24)
    new = ()
    for f in tl.static_range(16):
        if NIBBLES:
            word = (even if f < 12 else high[0]) if f % 2 == 0 else (odd if f < 12 else high[1])
            code = word & (15 << nibble_bit(f))
        else:
            word = even if f < 12 else high[0]
            code = word & (3 << field_bit(f))
        code = code.to(tl.float32, bitcast=True)
        for r in tl.static_range(ROWS):
            m = tl.load(multiplier + r * capacity * GROUPS + f * WORDS // 64)
            new = new + (tl.fma(code, m, acc[f * ROWS + r]),)
    return new


@triton.jit
def pairs_to_singles(acc, ROWS: tl.constexpr):
    new = ()
    for f in tl.static_range(16):
        for r in tl.static_range(ROWS):
            new = new + (acc[f * ROWS + r] * 2.0 ** (field_bit(f) - nibble_bit(f)),)
    return new


@triton.jit
def sum_channels(acc, r: tl.constexpr, ROWS: tl.constexpr):
    """Sums over channels of all fields, [WORDS, 2, 2, 2, 2]: the last four are bits of a field."""
    by_3 = ()
    for f in tl.static_range(8):
        low = acc[f * ROWS + r] * unit(field_bit(f))
        by_3 = by_3 + (tl.join(low, acc[(f + 8) * ROWS + r] * unit(field_bit(f + 8))),)
    by_2 = ()
    for f in tl.static_range(4):
        by_2 = by_2 + (tl.join(by_3[f], by_3[f + 4]),)
    by_1 = (tl.join(by_2[0], by_2[2]), tl.join(by_2[1], by_2[3]))
    return tl.sum(tl.join(by_1[0], by_1[1]), 0) * 2.0**49


@triton.jit(do_not_specialize=["chunk"])
def decode_fma_kernel(
    x,  # [rows, k]
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
    entries,  # int8 [programs, capacity, entry_bytes(ROWS)], see lists.py
    multipliers,  # float32 [programs, ROWS, capacity + 1, WORDS / 4]
    partial,  # float32 [splits, ROWS, all tiles * TILE]
    arrivals,  # int32 [all tiles]
    rows,
    k,
    chunk,
    capacity,
    LEVELS: tl.constexpr,
    ROWS: tl.constexpr,  # 1, 2, 4 or 8
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    MEAN_BLOCK: tl.constexpr,
    SPLITS_AT_ONCE: tl.constexpr,
    EARLY: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    if EARLY:  # launched while the kernel in front of this one ends; nothing is read before
        tl.extra.cuda.gdc_wait()
    tile = tl.program_id(0)
    split = tl.program_id(1)
    all_tiles = tl.num_programs(0)
    splits = tl.num_programs(1)
    member, tile_of_weight, program, x, slices, scales, this = work_of_program(
        x, slices, scales, vectors, experts, n, tiles, lines, k, WORDS
    )
    TILE: tl.constexpr = 16 * WORDS
    GROUPS: tl.constexpr = WORDS // 4
    ENTRY: tl.constexpr = entry_bytes(ROWS)
    STEP: tl.constexpr = channels_per_step(WORDS, ROWS)
    PADDING: tl.constexpr = entries_at_once(WORDS)

    first = split * chunk
    last = tl.minimum(first + chunk, k)
    entries += program * capacity * ENTRY
    multipliers += program * (capacity + 1) * (ROWS * GROUPS)
    to_single = 2 * chunk + PADDING
    single_entries = entries + to_single * ENTRY
    num_pairs, num_singles, exponents = build_lists(
        x, slices, scales, this, None if low is None else pick(member, low), mean, entries, None,
        to_single, first, last, rows, k, LEVELS, WORDS, ROWS, BLOCK, MEAN_BLOCK, None, PADDING,
        TOP, False,
    )  # fmt: skip
    tl.debug_barrier()

    totals = ()
    for _ in tl.static_range(ROWS):
        totals = totals + (tl.zeros((PADDING, GROUPS), tl.float32),)
    if has_pairs(LEVELS):
        totals = scale_entries(
            entries, multipliers, num_pairs, capacity, totals, 7.5, WORDS, ROWS, INTERPRET,
        )  # fmt: skip
    if has_singles(LEVELS):
        totals = scale_entries(
            single_entries, multipliers + to_single * GROUPS, num_singles, capacity, totals,
            1.5, WORDS, ROWS, INTERPRET,
        )  # fmt: skip
    # The row behind the last entry: what all outputs of a group have to be corrected by.
    correction = multipliers + ROWS * capacity * GROUPS
    for r in tl.static_range(ROWS):
        tl.store(correction + r * GROUPS + tl.arange(0, GROUPS), tl.sum(totals[r], 0))
    tl.debug_barrier()

    lane = tl.arange(0, STEP)[:, None]
    word = tl.arange(0, WORDS)[None, :]
    lower_slices = slices + WORDS  # a pair's lines lie side by side
    acc = ()
    for _ in tl.static_range(16 * ROWS):
        acc = acc + (tl.zeros((STEP, WORDS), tl.float32),)
    if has_pairs(LEVELS):
        for start in range(0, num_pairs, STEP):
            at = load_int(entries + (start + lane) * ENTRY, False)
            even, odd = merge(
                tl.load(words_of(slices, at, WORDS) + word),
                tl.load(words_of(lower_slices, at, WORDS) + word),
                INTERPRET,
            )
            multiplier = multipliers + (start + lane) * GROUPS
            acc = accumulate(acc, even, odd, multiplier, capacity, True, WORDS, ROWS)
        acc = pairs_to_singles(acc, ROWS)
    if has_singles(LEVELS):
        for start in range(0, num_singles, 2 * STEP):  # as many words in flight as with pairs
            entry = start + lane
            at0 = load_int(single_entries + entry * ENTRY, False)
            at1 = load_int(single_entries + (entry + STEP) * ENTRY, False)
            words0 = tl.load(words_of(slices, at0, WORDS) + word)
            words1 = tl.load(words_of(slices, at1, WORDS) + word)
            multiplier = multipliers + (to_single + entry) * GROUPS
            acc = accumulate(acc, words0, words0, multiplier, capacity, False, WORDS, ROWS)
            multiplier += STEP * GROUPS
            acc = accumulate(acc, words1, words1, multiplier, capacity, False, WORDS, ROWS)

    word = tl.arange(0, WORDS)[:, None, None, None, None]
    field = 8 * tl.arange(0, 2)[None, :, None, None, None]
    field += 4 * tl.arange(0, 2)[None, None, :, None, None]
    field += 2 * tl.arange(0, 2)[None, None, None, :, None]
    field += tl.arange(0, 2)[None, None, None, None, :]
    if experts is not None:
        partial += tl.program_id(2).to(tl.int64) * splits * ROWS * all_tiles * TILE
        arrivals += tl.program_id(2) * all_tiles
    sums = partial + ((split * ROWS).to(tl.int64) * all_tiles + tile) * TILE
    for r in tl.static_range(ROWS):
        total = sum_channels(acc, r, ROWS)
        total -= tl.load(correction + r * GROUPS + field * WORDS // 64 + 0 * word)
        at = r * all_tiles * TILE + field * WORDS + word
        exponent = exponent_of_row(exponents, r, ROWS)
        tl.store(sums + at, scaled(total, -exponent))
    combine(
        partial, arrivals, vectors, bias, experts, out, n, member, tile, tile_of_weight, splits,
        rows, k, all_tiles * TILE, TILE, ROWS, SPLITS_AT_ONCE,
    )  # fmt: skip
