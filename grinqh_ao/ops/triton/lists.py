"""The first part of a decode kernel: which channels to read, and how far.

A program grades its chunk of channels and writes down what is to be read, densely packed, so that
the loops that follow touch nothing else and need no masks. There are two lists:

    pairs    two slices of a channel, read together: 4 bits more of it
    singles  one slice: 2 bits more

so that level 2 is a single, level 4 a pair, level 6 a pair and a single, level 8 two pairs. An
entry is where the slices are, and what their codes are to be multiplied with: with q the code of
a slice and s its place (0 is the top one), a channel contributes to an output

    x * scale * gain * sum_s 0.5 * 4**-s * (q_s - 1.5)

whose pairs are 0.5 * 4**-(s + 1) * ((4 q_s + q_(s+1)) - 7.5).
"""

from __future__ import annotations

import triton
import triton.language as tl

from grinqh_ao import vectors as layout
from grinqh_ao.slices import HIGH_SLICES

# A scale code c stands for 2 ** ((c - 255) / 16), and 0 for 0: see codec.decode_scales.
OCTAVE = tl.constexpr(1 / 16)
TOP_OCTAVE = tl.constexpr(-255 / 16)
# (a & ~mask) | (b & mask); the last number is the truth table of that.
SELECT = tl.constexpr("lop3.b32 $0, $1, $2, 0x33333333, 0xd8;")
PREFETCH_LINE = tl.constexpr(
    "{.reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0;}"
)
FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)
GAINS_AT = tl.constexpr(layout.GAINS_AT)
SENSITIVITY_AT = tl.constexpr(layout.SENSITIVITY_AT)


@triton.constexpr_function
def has_pairs(levels):
    return max(levels) >= 4


@triton.constexpr_function
def has_singles(levels):
    return 2 in levels or 6 in levels


@triton.constexpr_function
def high_lines(levels):
    """Lines of a channel among the high ones: see slices.py."""
    return min(max(levels) // 2, HIGH_SLICES)


@triton.constexpr_function
def low_lines(levels):
    return max(max(levels) // 2 - HIGH_SLICES, 0)


@triton.jit
def row_scale_at(k):
    """See vectors.py."""
    return SENSITIVITY_AT + (k + 3) // 4 * 4


@triton.jit
def mean_magnitude(x, sensitivity, k, BLOCK: tl.constexpr):
    """Mean of |x| * sensitivity of one row [k], in the same order in every program."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, k, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        weighs = tl.load(sensitivity + channel, mask=channel < k, other=0)
        total += weighs * tl.abs(tl.load(x + channel, mask=channel < k, other=0).to(tl.float32))
    return tl.sum(total, 0) / k


@triton.jit
def slices_of(magnitude, thresholds, mean, LEVELS: tl.constexpr):
    """Slices to read of every channel: ``grading.grade``, in slices."""
    STEPS: tl.constexpr = len(LEVELS) - 1
    slices = tl.zeros_like(magnitude).to(tl.int32) + LEVELS[STEPS] // 2
    for j in tl.static_range(STEPS - 1, -1, -1):
        threshold = tl.load(thresholds + j) + tl.load(thresholds + STEPS + j) * mean
        threshold = tl.where(threshold > FLOAT32_MAX, FLOAT32_MAX, threshold)
        # False for NaN, which is to be read at the highest level.
        slices = tl.where(magnitude <= threshold, LEVELS[j] // 2, slices)
    return slices


@triton.jit
def power_of_two(exponent):
    """2 ** exponent for int32 exponents of normal float32 numbers."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def scaled(value, exponent):
    """value * 2 ** exponent, in two steps: the power itself need be no float32 number."""
    half = exponent >> 1
    return value * power_of_two(half) * power_of_two(exponent - half)


@triton.jit
def exponent_for(x, TOP: tl.constexpr):
    """Of the power of two that brings the largest finite element to 2 ** TOP or up to twice it."""
    magnitude = tl.abs(x)
    largest = tl.max(tl.where(magnitude <= FLOAT32_MAX, magnitude, 0.0), 0)
    return TOP + 127 - (largest.to(tl.int32, bitcast=True) >> 23)  # TOP + 127 if subnormal or zero


@triton.jit
def exponent_of_row(exponents, row, ROWS: tl.constexpr):
    return exponents if ROWS == 1 else tl.sum(tl.where(tl.arange(0, ROWS) == row, exponents, 0), 0)


@triton.constexpr_function
def entry_words(rows):
    """int64 of an entry: where its words are, its scales, and x of every row, one of which fits
    beside the first."""
    return 2 if rows == 1 else 2 + rows


@triton.jit
def place_of(line, WORDS: tl.constexpr):
    """Where a line is, in bytes."""
    return line.to(tl.int64) * (4 * WORDS)


@triton.jit
def bits_of(value):
    return value.to(tl.int32, bitcast=True).to(tl.int64)


@triton.jit
def value_of(bits):
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def words_of(words, entry, WORDS: tl.constexpr):
    """Pointers to the words of entries; unsigned bytes are added with the fewest instructions."""
    offset = tl.multiple_of(entry & 0xFFFFFFFF, [4 * WORDS] * len(entry.shape))
    return (words.to(tl.pointer_type(tl.int8)) + offset).to(tl.pointer_type(tl.int32))


@triton.jit
def scales_of(entry):
    """Pointers to the first scale code of entries."""
    return (entry + 1).to(tl.pointer_type(tl.uint8))


@triton.jit
def store_entry(entry, at, x, scale_codes, mask):
    """With one row: all of an entry at once."""
    both = tl.join(at | (bits_of(x) << 32), scale_codes)
    tl.store(entry[:, None] + tl.arange(0, 2)[None, :], both, mask=mask[:, None])


@triton.jit
def load_x(entry, at, row, ROWS: tl.constexpr):
    """What codes are multiplied with in a row, of entries whose first word is ``at``."""
    return value_of(at >> 32) if ROWS == 1 else value_of(tl.load(entry + 2 + row))


@triton.jit
def load_scale_codes(scales, channel, mask, WORDS: tl.constexpr):
    """All scale codes of channels, a byte each, as int64."""
    if WORDS == 32:
        codes = tl.load(scales.to(tl.pointer_type(tl.int64)) + channel, mask=mask, other=0)
    elif WORDS == 16:
        codes = tl.load(scales.to(tl.pointer_type(tl.uint32)) + channel, mask=mask, other=0)
    elif WORDS == 8:
        codes = tl.load(scales.to(tl.pointer_type(tl.uint16)) + channel, mask=mask, other=0)
    else:
        codes = tl.load(scales + channel, mask=mask, other=0)
    return codes.to(tl.int64)


@triton.jit
def prefetch(address, mask):
    """Asks for the 128 bytes at an int64 address to be brought into the L2 cache."""
    tl.inline_asm_elementwise(
        PREFETCH_LINE, "=r,l,r", [address, mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.constexpr_function
def lines_of_channel(levels):
    """At most, where each line of a pair has an entry."""
    return max(levels) // 2


@triton.jit
def slot_of(pair, STEP: tl.constexpr):
    """Where the entry of a pair is among entries, that of its upper line if both have one."""
    return pair if STEP is None else 2 * pair - pair % 4


@triton.jit
def build_lists(
    x,  # [rows, k]
    words,  # int32 [lines, WORDS], of the tile
    scales,  # uint8 [k, WORDS / 4]
    vectors,  # float32 [L], see vectors.py
    low,  # int32 [k] in compact storage, else None
    known_mean,  # float32 [rows] where x is a part of a row, else None
    entries,  # int64 [capacity, entry_words(ROWS)]
    to_singles,  # entries before the list of singles, if STEP is None
    first,  # channels first .. last - 1
    last,
    rows,
    k,
    LEVELS: tl.constexpr,
    WORDS: tl.constexpr,  # of a line
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # at least last - first
    MEAN_BLOCK: tl.constexpr,
    STEP: tl.constexpr,  # entries of the loops' steps, or None
    PADDING: tl.constexpr,  # entries that multiply with zero behind the last one
    TOP: tl.constexpr,  # of each row, this chunk is scaled to less than 2 ** (TOP + 1)
    PREFETCHED: tl.constexpr,  # the first entries of either list whose lines are prefetched
    INTERPRET: tl.constexpr,
):
    """Returns the lengths of both lists and, for ``exponent_of_row``, the powers of two.

    With a STEP there is an entry per line, and singles begin at the first step that has no pairs:
    a loop over steps goes through both lists. Of eight entries of pairs, four are upper lines and
    four the lower ones; these have no scales and no x.

    An entry is int64 [entry_words(ROWS)]: where its words are, in bytes from the beginning of a
    tile, unsigned; the scale codes of its channel, a byte each; then for every row of x what the
    codes are multiplied with, but for the scale, as float32 bits. One row has no word of its own,
    it is in the upper half of the first one.
    """
    ENTRY: tl.constexpr = entry_words(ROWS)
    STEPS: tl.constexpr = len(LEVELS) - 1
    thresholds = vectors
    sensitivity = vectors + SENSITIVITY_AT
    channel = first + tl.arange(0, BLOCK)
    inside = channel < last

    # What does not depend on anything, first: memory takes its time.
    weighs = tl.load(sensitivity + channel, mask=inside, other=0)
    codes = load_scale_codes(scales, channel, inside, WORDS)
    low_place = channel
    if low is not None:
        low_place = tl.load(low + channel, mask=inside, other=0)
    gain_2 = tl.load(vectors + GAINS_AT)
    gain_4 = tl.load(vectors + (GAINS_AT + 1))
    gain_6 = tl.load(vectors + (GAINS_AT + 2))
    gain_8 = tl.load(vectors + (GAINS_AT + 3))
    relative = 0.0
    for j in tl.static_range(STEPS):
        relative += tl.load(thresholds + STEPS + j)

    # Several rows share what is read: a channel's level is the highest that any of them asks for.
    slices = tl.zeros((BLOCK,), tl.int32)
    for r in range(ROWS):
        mask = inside & (r < rows)
        magnitude = tl.abs(tl.load(x + r * k + channel, mask=mask, other=0).to(tl.float32))
        mean = 0.0
        if (relative > 0) & (r < rows):  # calibrated thresholds are absolute and need no mean
            if known_mean is None:
                mean = mean_magnitude(x + r * k, sensitivity, k, MEAN_BLOCK)
            else:
                mean = tl.load(known_mean + r)
        wanted = slices_of(magnitude * weighs, thresholds, mean, LEVELS)
        slices = tl.maximum(slices, tl.where(mask, wanted, 0))
    if low is not None:
        slices = tl.where(low_place < 0, tl.minimum(slices, high_lines(LEVELS)), slices)

    pairs = slices >> 1
    single = slices & 1
    ones = pairs | (single << 16)
    before = tl.cumsum(ones, 0) - ones
    before_pairs = before & 0xFFFF
    before_singles = before >> 16
    at = place_of(channel * high_lines(LEVELS), WORDS)
    low_at = place_of(k * high_lines(LEVELS) + low_place * low_lines(LEVELS), WORDS)
    single_at = tl.where(pairs > 0, low_at, at)
    if PREFETCHED > 0 and not INTERPRET:  # on their way while lists are written
        base = words.to(tl.int64)
        soon = before_pairs < PREFETCHED // 2
        for line in tl.static_range(2):
            prefetch(base + at + line * 4 * WORDS, soon & (pairs > 0))
            prefetch(base + low_at + line * 4 * WORDS, soon & (pairs > 1))
        prefetch(base + single_at, (single > 0) & (before_singles < PREFETCHED))

    total = tl.sum(ones, 0)
    num_pairs = total & 0xFFFF
    num_singles = total >> 16
    if STEP is not None:
        to_singles = (num_pairs + (STEP // 2 - 1)) // (STEP // 2) * STEP
    single_entries = entries + to_singles * ENTRY
    gain = tl.where(slices >= 4, gain_8, tl.where(slices == 3, gain_6, gain_4))
    gain = tl.where(slices == 1, gain_2, gain)

    first_pair = entries + slot_of(before_pairs, STEP) * ENTRY
    second_pair = entries + slot_of(before_pairs + 1, STEP) * ENTRY
    only_single = single_entries + before_singles * ENTRY
    if STEP is not None:
        tl.store(first_pair + 4 * ENTRY, at + 4 * WORDS, mask=pairs > 0)
        tl.store(second_pair + 4 * ENTRY, low_at + 4 * WORDS, mask=pairs > 1)
    of_single = tl.where(pairs > 0, 0.5 / 16, 0.5)
    if ROWS == 1:
        value = tl.load(x + channel, mask=inside, other=0).to(tl.float32)
        exponents = exponent_for(value, TOP)
        value = scaled(value, exponents) * gain
        store_entry(first_pair, at, value * 0.125, codes, pairs > 0)
        store_entry(second_pair, low_at, value * (0.125 / 16), codes, pairs > 1)
        store_entry(only_single, single_at, value * of_single, codes, single > 0)
    else:
        tl.store(first_pair, at, mask=pairs > 0)
        tl.store(second_pair, low_at, mask=pairs > 1)
        tl.store(only_single, single_at, mask=single > 0)
        tl.store(first_pair + 1, codes, mask=pairs > 0)
        tl.store(second_pair + 1, codes, mask=pairs > 1)
        tl.store(only_single + 1, codes, mask=single > 0)
        exponents = tl.zeros((ROWS,), tl.int32)
        for r in range(ROWS):
            mask = inside & (r < rows)
            value = tl.load(x + r * k + channel, mask=mask, other=0).to(tl.float32)
            exponent = exponent_for(value, TOP)
            exponents = tl.where(tl.arange(0, ROWS) == r, exponent, exponents)
            value = scaled(value, exponent) * gain
            tl.store(first_pair + 2 + r, bits_of(value * 0.125), mask=pairs > 0)
            tl.store(second_pair + 2 + r, bits_of(value * (0.125 / 16)), mask=pairs > 1)
            tl.store(only_single + 2 + r, bits_of(value * of_single), mask=single > 0)

    # The first line, times zero.
    padding = tl.arange(0, PADDING)
    zero = tl.zeros((PADDING,), tl.int64)
    for i in tl.static_range(ENTRY):
        tl.store(single_entries + (num_singles + padding) * ENTRY + i, zero)
    if STEP is None:
        for i in tl.static_range(ENTRY):
            tl.store(entries + (num_pairs + padding) * ENTRY + i, zero)
    else:
        padding = tl.arange(0, STEP // 2)
        zero = tl.zeros((STEP // 2,), tl.int64)
        pair = entries + slot_of(num_pairs + padding, STEP) * ENTRY
        mask = num_pairs + padding < to_singles // 2
        for i in tl.static_range(ENTRY):
            tl.store(pair + i, zero, mask=mask)
        tl.store(pair + 4 * ENTRY, zero, mask=mask)
    return num_pairs, num_singles, exponents


@triton.jit
def decode_scale(code):
    return tl.where(code > 0, tl.exp2(tl.fma(code.to(tl.float32), OCTAVE, TOP_OCTAVE)), 0.0)


@triton.jit
def select(a, b, INTERPRET: tl.constexpr):
    """The bits 0xCC... of a and 0x33... of b, in one instruction."""
    if INTERPRET:
        return (a & -0x33333334) | (b & 0x33333333)
    else:
        return tl.inline_asm_elementwise(
            SELECT,
            "=r,r,r",
            [a, b],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def merge(upper, lower, INTERPRET: tl.constexpr):
    """Two slices' words -> words of nibbles 4 * upper + lower: of even fields, and of odd ones."""
    return select(upper << 2, lower, INTERPRET), select(upper, lower >> 2, INTERPRET)
