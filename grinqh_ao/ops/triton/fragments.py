"""Tensor cores: codes as they are stored, multiplied with activations.

Codes are unpacked with one instruction for two weights. A word of a slice has two halves of 8
fields; masked with 3 << 2 f in both halves it is a pair of float16 numbers q * 2**(2 f - 24):
subnormal ones, exact, with no offset to cancel. A word of nibbles (a pair of slices) likewise.

    mma.m16n8k16      D[16 outputs, 8] += A[16 outputs, 16] B[16, 8]

A takes such words as they are. Lane 4 g + t has word g of the channels t and t + 4 of eight
channels; the two halves of a word are two of the 16 indices that A and B are multiplied over, but
different outputs. Hence a column of B has x in the lower half and zero in the upper one, or the
other way round, and yields the outputs of lower or of upper fields. One row of activations needs
two of the eight columns for each pair of scale groups, so the columns are the groups: column c has
x times the scale of group c, and mma number j, of fields 2 j and 2 j + 1, is right in columns j
and j + 4, the only ones that are kept. More rows take a column each, once per group.
"""

from __future__ import annotations

import triton
import triton.language as tl

MMA = tl.constexpr(
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
    "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
)
MMA_REGISTERS = tl.constexpr("=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f")
# 7.5 and 1.5, twice: what the mean of all nibbles and of all 2-bit codes is.
HALVES_7_5 = tl.constexpr(0x47804780)
HALVES_1_5 = tl.constexpr(0x3E003E00)


@triton.jit
def mma(acc, a0, a1, a2, a3, b0, b1, INTERPRET: tl.constexpr):
    """acc: a tuple of four, for rows g, g, g + 8, g + 8 and columns 2 t, 2 t + 1 twice."""
    if INTERPRET:
        # A is [warps, row g, t, V], B [warps, column, t, 1]; both become [warps, g, column, t, V].
        V: tl.constexpr = a0.shape[1]
        THREADS: tl.constexpr = a0.shape[0]
        WARPS: tl.constexpr = THREADS // 32
        top = tl.zeros((1, 1, 1, 1), tl.float32)
        bottom = top
        for upper in tl.static_range(2):
            for a_top, a_bottom, b in ((a0, a1, b0), (a2, a3, b1)):
                b = tl.reshape((b >> 16 * upper).to(tl.int16), (WARPS, 1, 8, 4, 1))
                b = b.to(tl.float16, bitcast=True).to(tl.float32)
                a = tl.reshape((a_top >> 16 * upper).to(tl.int16), (WARPS, 8, 1, 4, V))
                top += tl.sum(a.to(tl.float16, bitcast=True).to(tl.float32) * b, 3)
                a = tl.reshape((a_bottom >> 16 * upper).to(tl.int16), (WARPS, 8, 1, 4, V))
                bottom += tl.sum(a.to(tl.float16, bitcast=True).to(tl.float32) * b, 3)
        # [warps, g, 8, V] -> [threads, column 2 t or 2 t + 1, V]
        top = tl.reshape(top, (THREADS, 2, V))
        bottom = tl.reshape(bottom, (THREADS, 2, V))
        odd = tl.arange(0, 2)[None, :, None] == 1
        return (
            acc[0] + tl.sum(tl.where(odd, 0.0, top), 1),
            acc[1] + tl.sum(tl.where(odd, top, 0.0), 1),
            acc[2] + tl.sum(tl.where(odd, 0.0, bottom), 1),
            acc[3] + tl.sum(tl.where(odd, bottom, 0.0), 1),
        )
    else:
        d0, d1, d2, d3 = tl.inline_asm_elementwise(
            MMA,
            MMA_REGISTERS,
            [a0, a1, a2, a3, b0, b1, acc[0], acc[1], acc[2], acc[3]],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
        return d0, d1, d2, d3


@triton.constexpr_function
def field_bit(field):
    """Lowest bit of a 2-bit field within its half, once shifted if it must be."""
    return 2 * field if field < 5 else 2 * (field - 5)


@triton.constexpr_function
def both_halves(mask):
    return mask | mask << 16


@triton.jit
def operands(lower, upper, low, high, j: tl.constexpr, NIBBLES: tl.constexpr):
    """A registers of mma j: fields 2 j and 2 j + 1, of the channels t and t + 4.

    lower and upper are the words of these channels, low and high the same shifted, each for even
    fields and for odd ones.
    """
    if NIBBLES:
        mask: tl.constexpr = both_halves(15 << (4 * (j % 2)))
        if j < 2:
            return lower[0] & mask, lower[1] & mask, upper[0] & mask, upper[1] & mask
        else:
            return low[0] & mask, low[1] & mask, high[0] & mask, high[1] & mask
    else:
        even: tl.constexpr = both_halves(3 << field_bit(2 * j))
        odd: tl.constexpr = both_halves(3 << field_bit(2 * j + 1))
        if j < 2:
            return lower[0] & even, lower[1] & odd, upper[0] & even, upper[1] & odd
        elif j == 2:  # field 4 fits, 5 does not
            return lower[0] & even, low[1] & odd, upper[0] & even, high[1] & odd
        else:
            return low[0] & even, low[1] & odd, high[0] & even, high[1] & odd


@triton.jit
def four_of(acc, i: tl.constexpr):
    return acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]


@triton.jit
def accumulate(
    acc, sums, lower, upper, b0, b1, NIBBLES: tl.constexpr, BLOCKS: tl.constexpr,
    ROWS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """acc += codes * multipliers, sums += mean code * multipliers, over eight channels a warp."""
    ones = tl.zeros_like(b0[0]) + (HALVES_7_5 if NIBBLES else HALVES_1_5)
    new_sums = ()
    for i in tl.static_range(len(b0)):
        s = (sums[2 * i], sums[2 * i + 1], sums[2 * i], sums[2 * i + 1])
        s = mma(s, ones, ones, ones, ones, b0[i], b1[i], INTERPRET)
        new_sums = new_sums + (s[0], s[1])
    # Fields beyond the lowest 10 bits of a half are shifted there.
    SHIFT: tl.constexpr = 8 if NIBBLES else 10
    low = (lower[0] >> SHIFT, lower[1] >> SHIFT)
    high = (upper[0] >> SHIFT, upper[1] >> SHIFT)
    new = ()
    for j in tl.static_range(4):
        a = operands(lower, upper, low, high, j, NIBBLES)
        for block in tl.static_range(BLOCKS):
            c = four_of(acc, j * BLOCKS + block)
            # One row: a B register serves all of the fields. More: one for each group and block.
            b = (b0[0], b1[0]) if ROWS == 1 else (b0[j * BLOCKS + block], b1[j * BLOCKS + block])
            new = new + mma(c, a[0], a[1], a[2], a[3], b[0], b[1], INTERPRET)
    return new, new_sums


@triton.constexpr_function
def single_unit(field):
    """What an accumulator of 2-bit codes has to be multiplied with."""
    return 2.0 ** (24 - field_bit(field))


@triton.constexpr_function
def pair_to_single(field):
    """From the unit of an accumulator of nibbles to that of 2-bit codes."""
    return 2.0 ** (field_bit(field) - 4 * ((field // 2) % 2))


@triton.jit
def pairs_to_singles(acc, BLOCKS: tl.constexpr):
    new = ()
    for j in tl.static_range(4):
        for block in tl.static_range(BLOCKS):
            c = four_of(acc, j * BLOCKS + block)
            new = new + (c[0] * pair_to_single(2 * j), c[1] * pair_to_single(2 * j))
            new = new + (c[2] * pair_to_single(2 * j + 1), c[3] * pair_to_single(2 * j + 1))
    return new
