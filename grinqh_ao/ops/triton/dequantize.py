"""``grinqh::dequantize`` on CUDA: slices to a dense weight, one pass, nothing in between.

A program turns ``BLOCK_K`` channels of one tile into dense weights. It holds the words of those
channels, all slices of them, in registers; each of the 16 fields of a word is one of ``words``
neighbouring outputs, and one or more whole fields share a scale.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from grinqh_ao.codec import SCALE_GROUP
from grinqh_ao.ops.triton.lists import GAINS_AT, row_scale_at
from grinqh_ao.slices import FIELDS_PER_WORD, HIGH_SLICES, num_slices_of
from grinqh_ao.vectors import outputs_of

# Words of one slice per program: 64 channels of the widest tile, more of narrower ones.
BLOCK_WORDS = 2048
NUM_WARPS = 4

FIELDS = tl.constexpr(FIELDS_PER_WORD)
GROUP = tl.constexpr(SCALE_GROUP)
HIGH_LINES = tl.constexpr(HIGH_SLICES)


@triton.jit
def dequantize_kernel(
    slices,  # int32 [tiles, lines, words]
    scales,  # uint8 [tiles, K, words / 4]
    vectors,  # float32 [L], see vectors.py
    low,  # int32 [K] in compact storage, else None
    out,  # [N, K]
    n,
    k,
    lines,  # of a tile
    STORED: tl.constexpr,  # slices of a code
    SLICES: tl.constexpr,  # of them, to be read
    WORDS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    word = tl.arange(0, WORDS)
    inside = channel < k
    row = tile * k + channel  # of scales
    gains = vectors + GAINS_AT
    row_scale = vectors + row_scale_at(k)
    HIGH: tl.constexpr = min(STORED, HIGH_LINES)
    low_place = channel
    if low is not None:
        low_place = tl.load(low + channel, mask=inside, other=0)
    has_low = low_place >= 0

    words = ()
    for s in tl.static_range(SLICES):
        if s < HIGH:
            line = channel * HIGH + s
            mask = inside
        else:
            line = k * HIGH + low_place * (STORED - HIGH) + (s - HIGH)
            mask = inside & has_low
        pointer = slices + (tile * lines + line)[:, None] * WORDS + word[None, :]
        words = words + (tl.load(pointer, mask=mask[:, None], other=0),)

    gain = tl.load(gains + SLICES - 1)
    # What stands for the codes of slices that a channel does not have: their middle.
    middle = 0.0
    if low is not None and SLICES > HIGH:
        gain = tl.where(has_low, gain, tl.load(gains + HIGH - 1))[:, None]
        middle = tl.where(has_low, 0.0, (4 ** (SLICES - HIGH) - 1) / 2)[:, None]
    STEP: tl.constexpr = 2.0 / 4**SLICES
    LOWEST: tl.constexpr = 1.0 / 4**SLICES - 1.0
    GROUPS: tl.constexpr = FIELDS * WORDS // GROUP
    for group in tl.static_range(GROUPS):  # whole fields: a scale serves all words of a field
        exponent = tl.load(scales + row * GROUPS + group, mask=inside, other=0).to(tl.float32)
        scale = tl.where(exponent > 0, tl.exp2((exponent - 255.0) * 0.0625), 0.0)
        for j in tl.static_range(FIELDS // GROUPS):
            field = group * (FIELDS // GROUPS) + j
            code = (words[0] >> (2 * field)) & 3
            for s in tl.static_range(1, SLICES):
                code = (code << 2) | ((words[s] >> (2 * field)) & 3)
            output = tile * (FIELDS * WORDS) + field * WORDS + word
            by_output = tl.load(row_scale + output, mask=output < n, other=0)
            value = gain * ((code.to(tl.float32) + middle) * STEP + LOWEST)
            dense = value * scale[:, None] * by_output[None, :]
            if out.dtype.element_ty == tl.float16:  # rounding up must not give infinity
                dense = tl.minimum(tl.maximum(dense, -65504.0), 65504.0)
            # Slices have a channel's outputs together, the result an output's channels.
            dense = tl.trans(dense.to(out.dtype.element_ty))
            pointer = out + output[:, None] * k + channel[None, :]
            tl.store(pointer, dense, mask=(output < n)[:, None] & inside[None, :])


def dequantize(
    slices: Tensor,
    scales: Tensor,
    vectors: Tensor,
    low: Tensor | None,
    level: int,
    dtype: torch.dtype,
) -> Tensor:
    """See :func:`grinqh_ao.ops.oracle.dequantize`; float32, float16 and bfloat16 results."""
    tiles, k, _ = scales.shape
    lines, words = slices.shape[1:]
    n = outputs_of(vectors, k)
    if level == 0:
        return torch.zeros(n, k, dtype=dtype, device=slices.device)
    out = torch.empty(n, k, dtype=dtype, device=slices.device)
    block_k = BLOCK_WORDS // words
    dequantize_kernel[(tiles, triton.cdiv(k, block_k))](
        slices.contiguous(),
        scales.contiguous(),
        vectors.contiguous(),
        low,
        out,
        n,
        k,
        lines,
        STORED=num_slices_of(slices, k, low),
        SLICES=level // 2,
        WORDS=words,
        BLOCK_K=block_k,
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,  # Triton 3.10 will not by itself
    )
    return out
