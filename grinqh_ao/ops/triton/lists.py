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
from grinqh_ao.ops.triton.lines import high_lines, low_lines, place_of, prefetch, words_of
from grinqh_ao.ops.triton.ranks import rank
from grinqh_ao.ops.triton.shared import store_16_bytes, store_float

# A scale code c stands for 2 ** ((c - 255) / 16), and 0 for 0: see codec.decode_scales.
OCTAVE = tl.constexpr(1 / 16)
TOP_OCTAVE = tl.constexpr(-255 / 16)
# (a & ~mask) | (b & mask); the last number is the truth table of that.
SELECT = tl.constexpr("lop3.b32 $0, $1, $2, 0x33333333, 0xd8;")
# Of a chunk, whose second lines are asked for before there are lists.
EARLY_CHANNELS = tl.constexpr(64)
FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)
GAINS_AT = tl.constexpr(layout.GAINS_AT)
SENSITIVITY_AT = tl.constexpr(layout.SENSITIVITY_AT)


@triton.constexpr_function
def has_pairs(levels):
    return max(levels) >= 4


@triton.constexpr_function
def has_singles(levels):
    return 2 in levels or 6 in levels


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
def slices_of(magnitude, absolute, relative, mean, LEVELS: tl.constexpr):
    """Slices to read of every channel: ``grading.grade``, in slices."""
    STEPS: tl.constexpr = len(LEVELS) - 1
    slices = tl.zeros_like(magnitude).to(tl.int32) + LEVELS[STEPS] // 2
    for j in tl.static_range(STEPS - 1, -1, -1):
        threshold = absolute[j] + relative[j] * mean
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
def finite_magnitude(x):
    magnitude = tl.abs(x)
    return tl.where(magnitude <= FLOAT32_MAX, magnitude, 0.0)


@triton.jit
def exponent_for(largest, TOP: tl.constexpr):
    """Of the power of two that brings a magnitude to 2 ** TOP or up to twice it."""
    return TOP + 127 - (largest.to(tl.int32, bitcast=True) >> 23)  # TOP + 127 if subnormal or zero


@triton.jit
def exponent_of_row(exponents, row, ROWS: tl.constexpr):
    return exponents if ROWS == 1 else tl.sum(tl.where(tl.arange(0, ROWS) == row, exponents, 0), 0)


@triton.constexpr_function
def entry_bytes(rows):
    """Where its words are, x, all scale codes; several rows have their x behind that."""
    return 16 if rows == 1 else 16 + 4 * rows


@triton.constexpr_function
def entries_of_channel(levels):
    """At most, of both lists."""
    return max(level // 4 + level // 2 % 2 for level in levels)


@triton.jit
def x_of(entry, row, ROWS: tl.constexpr):
    """Where an entry has a row's x."""
    return entry + 4 if ROWS == 1 else entry + 16 + 4 * row


@triton.jit
def scale_codes_of(entry):
    """Where the first of an entry's scale codes is, a byte each."""
    return entry + 8


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
def store_nothing(entry, mask, ROWS: tl.constexpr, SHARED: tl.constexpr):
    """The first line, times zero."""
    zero = tl.zeros_like(mask.to(tl.int32))
    store_16_bytes(entry, zero, zero.to(tl.float32), zero.to(tl.int64), mask, SHARED)
    if ROWS > 1:
        for r in tl.static_range(ROWS):
            store_float(x_of(entry, r, ROWS), zero.to(tl.float32), mask, SHARED)


@triton.jit
def build_lists(
    x,  # [rows, k]
    words,  # int32 [lines, WORDS], of the tile
    scales,  # uint8 [k, WORDS / 4], of the tile
    vectors,  # float32 [L], see vectors.py
    low,  # int32 [k] in compact storage, else None
    known_mean,  # float32 [rows] where x is a part of a row, else None
    entries,  # address of [capacity] entries, see shared.py
    counts,  # address of 8 bytes for each 32 channels, if SHARED
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
    STEP: tl.constexpr,  # pairs of a step, or None
    PADDING: tl.constexpr,  # entries that multiply with zero behind the last one
    TOP: tl.constexpr,  # of each row, this chunk is scaled to less than 2 ** (TOP + 1)
    SHARED: tl.constexpr,
):
    """Returns the lengths of both lists and, for ``exponent_of_row``, the powers of two.

    With a STEP, singles begin behind the last step of pairs, which is filled up.

    An entry has ``entry_bytes(ROWS)``: where its line is (its upper line, the lower one lies
    behind), as int32; what the codes are multiplied with but for the scale, as float32; the scale
    codes of its channel, a byte each. Several rows have a float32 each behind that.
    """
    ENTRY: tl.constexpr = entry_bytes(ROWS)
    STEPS: tl.constexpr = len(LEVELS) - 1
    sensitivity = vectors + SENSITIVITY_AT
    channel = first + tl.arange(0, BLOCK)
    inside = channel < last

    # What does not depend on anything, first: memory takes its time.
    weighs = tl.load(sensitivity + channel, mask=inside, other=0)
    codes = load_scale_codes(scales, channel, inside, WORDS)
    low_line = channel
    if low is not None:
        low_line = tl.load(low + channel, mask=inside, other=0)
    gain_2 = tl.load(vectors + GAINS_AT)
    gain_4 = tl.load(vectors + (GAINS_AT + 1))
    gain_6 = tl.load(vectors + (GAINS_AT + 2))
    gain_8 = tl.load(vectors + (GAINS_AT + 3))
    absolute = ()
    relative = ()
    all_relative = 0.0
    for j in tl.static_range(STEPS):
        absolute = absolute + (tl.load(vectors + j),)
        relative = relative + (tl.load(vectors + STEPS + j),)
        all_relative += relative[j]

    # Several rows share what is read: a channel's level is the highest that any of them asks for.
    slices = tl.zeros((BLOCK,), tl.int32)
    value = tl.zeros((BLOCK,), tl.float32)
    for r in range(ROWS):
        mask = inside & (r < rows)
        value = tl.load(x + r * k + channel, mask=mask, other=0).to(tl.float32)
        mean = 0.0
        if (all_relative > 0) & (r < rows):  # static thresholds need no mean
            if known_mean is None:
                mean = mean_magnitude(x + r * k, sensitivity, k, MEAN_BLOCK)
            else:
                mean = tl.load(known_mean + r)
        wanted = slices_of(tl.abs(value) * weighs, absolute, relative, mean, LEVELS)
        slices = tl.maximum(slices, tl.where(mask, wanted, 0))
    if low is not None:
        slices = tl.where(low_line < 0, tl.minimum(slices, high_lines(LEVELS)), slices)

    pairs = slices >> 1
    single = slices & 1
    place = place_of(channel * high_lines(LEVELS), WORDS)
    if SHARED and ROWS == 1 and has_pairs(LEVELS):  # on their way while lists are written
        soon = tl.arange(0, BLOCK) < EARLY_CHANNELS
        second = words_of(words + WORDS, place, WORDS)
        prefetch(second.to(tl.int64), soon & (slices > 1))

    # Several rows have each a largest magnitude of their own, below.
    magnitude = finite_magnitude(value) if ROWS == 1 else tl.zeros((BLOCK,), tl.float32)
    before, total, largest = rank(slices, magnitude, counts, SHARED)
    num_pairs = total & 0xFFFF
    num_singles = total >> 16
    if STEP is not None:
        to_singles = (num_pairs + (STEP - 1)) // STEP * STEP
    first_pair = entries + (before & 0xFFFF) * ENTRY
    only_single = entries + (to_singles + (before >> 16)) * ENTRY

    low_place = place_of(k * high_lines(LEVELS) + low_line * low_lines(LEVELS), WORDS)
    place_of_single = tl.where(pairs > 0, low_place, place)
    gain = tl.where(slices >= 4, gain_8, tl.where(slices == 3, gain_6, gain_4))
    gain = tl.where(slices == 1, gain_2, gain)
    of_single = tl.where(pairs > 0, 0.5 / 16, 0.5)
    if ROWS == 1:
        exponents = exponent_for(largest, TOP)
        value = scaled(value, exponents) * gain
        store_16_bytes(first_pair, place, value * 0.125, codes, pairs > 0, SHARED)
        store_16_bytes(
            first_pair + ENTRY, low_place, value * (0.125 / 16), codes, pairs > 1, SHARED
        )
        store_16_bytes(only_single, place_of_single, value * of_single, codes, single > 0, SHARED)
    else:
        nothing = tl.zeros((BLOCK,), tl.float32)
        store_16_bytes(first_pair, place, nothing, codes, pairs > 0, SHARED)
        store_16_bytes(first_pair + ENTRY, low_place, nothing, codes, pairs > 1, SHARED)
        store_16_bytes(only_single, place_of_single, nothing, codes, single > 0, SHARED)
        exponents = tl.zeros((ROWS,), tl.int32)
        for r in range(ROWS):
            mask = inside & (r < rows)
            value = tl.load(x + r * k + channel, mask=mask, other=0).to(tl.float32)
            exponent = exponent_for(tl.max(finite_magnitude(value), 0), TOP)
            exponents = tl.where(tl.arange(0, ROWS) == r, exponent, exponents)
            value = scaled(value, exponent) * gain
            store_float(x_of(first_pair, r, ROWS), value * 0.125, pairs > 0, SHARED)
            store_float(x_of(first_pair + ENTRY, r, ROWS), value * (0.125 / 16), pairs > 1, SHARED)
            store_float(x_of(only_single, r, ROWS), value * of_single, single > 0, SHARED)

    padding = tl.arange(0, PADDING)
    behind = entries + (to_singles + num_singles + padding) * ENTRY
    store_nothing(behind, padding >= 0, ROWS, SHARED)
    if STEP is None:
        store_nothing(entries + (num_pairs + padding) * ENTRY, padding >= 0, ROWS, SHARED)
    else:
        pair = num_pairs + tl.arange(0, STEP)
        store_nothing(entries + pair * ENTRY, pair < to_singles, ROWS, SHARED)
    return num_pairs, num_singles, exponents


@triton.jit
def saturate(value, INTERPRET: tl.constexpr):
    """Not negative -> at most 1, with no instruction of the integer pipe."""
    if INTERPRET:
        return tl.minimum(value, 1.0)
    else:
        return tl.inline_asm_elementwise(
            "add.sat.f32 $0, $1, 0f00000000;", "=f,f", [value], dtype=tl.float32, is_pure=True,
            pack=1,
        )  # fmt: skip


@triton.jit
def decode_scale(code, INTERPRET: tl.constexpr):
    value = code.to(tl.float32)
    return tl.exp2(tl.fma(value, OCTAVE, TOP_OCTAVE)) * saturate(value, INTERPRET)


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
