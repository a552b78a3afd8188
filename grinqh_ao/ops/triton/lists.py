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
def place_of(channel, line, WORDS: tl.constexpr):
    """Where a channel's scales are << 32 | where a line is, both in bytes."""
    return (channel.to(tl.int64) * (WORDS // 4) << 32) | (line.to(tl.int64) * (4 * WORDS))


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
def scales_of(scales, entry):
    return scales + (entry >> 32)


@triton.jit
def build_lists(
    x,  # [rows, k]
    vectors,  # float32 [L], see vectors.py
    low,  # int32 [k] in compact storage, else None
    known_mean,  # float32 [rows] where x is a part of a row, else None
    pair_entries,  # int64 [2 * chunk + PADDING, 1 + ROWS]
    single_entries,  # int64 [chunk + PADDING, 1 + ROWS]
    first,  # channels first .. last - 1
    last,
    rows,
    k,
    LEVELS: tl.constexpr,
    WORDS: tl.constexpr,  # of a line
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # at least last - first
    MEAN_BLOCK: tl.constexpr,
    PADDING: tl.constexpr,  # entries that multiply with zero behind the last one
    TOP: tl.constexpr,  # x is scaled by a power of two that puts the largest at 2 ** TOP
):
    """Returns the lengths of both lists and the exponent of the power of two.

    An entry is one row of int64: where its words are | where its scales are << 32, both in bytes
    from the beginning of a tile; then for every row of x what the codes are multiplied with, but
    for the scale, as float32 bits.
    """
    ENTRY: tl.constexpr = 1 + ROWS
    STEPS: tl.constexpr = len(LEVELS) - 1
    thresholds = vectors
    gains = vectors + GAINS_AT
    sensitivity = vectors + SENSITIVITY_AT
    channel = first + tl.arange(0, BLOCK)
    inside = channel < last

    relative = 0.0
    for j in tl.static_range(STEPS):
        relative += tl.load(thresholds + STEPS + j)

    # Several rows share what is read: a channel's level is the highest that any of them asks for.
    slices = tl.zeros((BLOCK,), tl.int32)
    weighs = tl.load(sensitivity + channel, mask=inside, other=0)
    largest = 0.0
    for r in range(ROWS):
        mask = inside & (r < rows)
        magnitude = tl.abs(tl.load(x + r * k + channel, mask=mask, other=0).to(tl.float32))
        finite = tl.where(magnitude <= FLOAT32_MAX, magnitude, 0.0)
        largest = tl.maximum(largest, tl.max(finite, 0))
        mean = 0.0
        if (relative > 0) & (r < rows):  # calibrated thresholds are absolute and need no mean
            if known_mean is None:
                mean = mean_magnitude(x + r * k, sensitivity, k, MEAN_BLOCK)
            else:
                mean = tl.load(known_mean + r)
        wanted = slices_of(magnitude * weighs, thresholds, mean, LEVELS)
        slices = tl.maximum(slices, tl.where(mask, wanted, 0))
    low_place = channel
    if low is not None:
        low_place = tl.load(low + channel, mask=inside, other=0)
        slices = tl.where(low_place < 0, tl.minimum(slices, high_lines(LEVELS)), slices)

    # Zero has exponent -127 here; within these bounds no product overflows.
    exponent = TOP - ((largest.to(tl.int32, bitcast=True) >> 23) - 127)
    exponent = tl.minimum(tl.maximum(exponent, -126), 126)
    gain = tl.load(gains + slices - 1, mask=slices > 0, other=0) * power_of_two(exponent)

    pairs = slices >> 1
    single = slices & 1
    ones = pairs | (single << 16)
    before = tl.cumsum(ones, 0) - ones
    total = tl.sum(ones, 0)
    num_pairs = total & 0xFFFF
    num_singles = total >> 16

    at = place_of(channel, channel * high_lines(LEVELS), WORDS)
    low_line = k * high_lines(LEVELS) + low_place * low_lines(LEVELS)
    low_at = place_of(channel, low_line, WORDS)
    first_pair = pair_entries + (before & 0xFFFF) * ENTRY
    only_single = single_entries + (before >> 16) * ENTRY
    tl.store(first_pair, at, mask=pairs > 0)
    tl.store(first_pair + ENTRY, low_at, mask=pairs > 1)
    tl.store(only_single, tl.where(pairs > 0, low_at, at), mask=single > 0)
    for r in range(ROWS):
        mask = inside & (r < rows)
        value = tl.load(x + r * k + channel, mask=mask, other=0).to(tl.float32) * gain
        tl.store(first_pair + 1 + r, bits_of(value * 0.125), mask=pairs > 0)
        tl.store(first_pair + ENTRY + 1 + r, bits_of(value * (0.125 / 16)), mask=pairs > 1)
        value = value * tl.where(pairs > 0, 0.5 / 16, 0.5)
        tl.store(only_single + 1 + r, bits_of(value), mask=single > 0)

    padding = tl.arange(0, PADDING) * ENTRY
    nowhere = place_of(0 * padding + first, 0 * padding, WORDS)
    zero = tl.zeros((PADDING,), tl.int64)
    tl.store(pair_entries + num_pairs * ENTRY + padding, nowhere)
    tl.store(single_entries + num_singles * ENTRY + padding, nowhere)
    for r in range(ROWS):
        tl.store(pair_entries + num_pairs * ENTRY + padding + 1 + r, zero)
        tl.store(single_entries + num_singles * ENTRY + padding + 1 + r, zero)
    return num_pairs, num_singles, exponent


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
