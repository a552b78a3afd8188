"""Weight <-> nested codes and scales.

    weight[n, k] ~ row_scale[n] * scale[n // 64, k] * values_b[code[n, k] >> (8 - b)]

for b = 2, 4, 6 or 8 bits: the top bits of a code are the code of a lower level. Codes are uniform,

    values_b[c] = gain_b * ((2 c + 1) / 2**b - 1)

so that kernels need one multiplication per weight and no table. The gains are data.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SCALE_GROUP = 64
"""Neighbouring outputs that share one scale per input channel."""

CODE_BITS = 8
SCALE_STEPS_PER_OCTAVE = 16
TOP_SCALE_CODE = 255

# What an error at a level costs while codes and scales are chosen. Level 8 carries the outlier
# channels and is never traded for a lower one.
_ERROR_WEIGHT = {2: 1.0, 4: 8.0, 6: 20.0, 8: 100.0}
# A scale is the group's largest magnitude times one of these. All are at least 1: no clipping.
_SCALE_FACTORS = (1.0, 1.08)
# Weights in units of their scale are rounded to this grid to look their best code up.
_GRID = 1000
# Gains of levels 2, 4, 6 and 8; below 1 because magnitudes bunch near zero.
_GAINS = (0.85, 0.985, 1.0, 1.0)
# Between these magnitudes every scale is a normal number.
_TINY = 2.0**-100
MAX_MAGNITUDE = 2.0**100
_BLOCK_WEIGHTS = {"cpu": 1 << 18}
_BLOCK_WEIGHTS_DEFAULT = 1 << 24


class Quantized(NamedTuple):
    """One weight [N, K] as nested codes.

    codes: uint8 [N, K], 8 bits.
    scale_codes: uint8 [ceil(N / 64), K], see :func:`decode_scales`.
    row_scale: bfloat16 [N].
    """

    codes: Tensor
    scale_codes: Tensor
    row_scale: Tensor


def default_gains(device: torch.device | str = "cpu") -> Tensor:
    """float32 [4]: the gains of levels 2, 4, 6, 8."""
    return torch.tensor(_GAINS, dtype=torch.float32, device=device)


def level_values(gains: Tensor, level: int) -> Tensor:
    """float32 [2**level]: the values of one level's codes."""
    codes = torch.arange(2**level, dtype=torch.float32, device=gains.device)
    values: Tensor = gains[level // 2 - 1] * ((2 * codes + 1) / 2**level - 1)
    return values


def decode_scales(scale_codes: Tensor) -> Tensor:
    """float32 scales of uint8 codes: 2 ** ((code - 255) / 16), and exactly 0 for code 0."""
    codes = torch.arange(TOP_SCALE_CODE + 1, device=scale_codes.device, dtype=torch.float32)
    table = torch.exp2((codes - TOP_SCALE_CODE) / SCALE_STEPS_PER_OCTAVE)
    table[0] = 0
    return lookup(table, scale_codes)


def lookup(table: Tensor, codes: Tensor) -> Tensor:
    """``table[codes]`` for integer codes of any shape."""
    # index_select over a flat index is twice as fast as advanced indexing on a CPU.
    return table.index_select(0, codes.flatten().int()).view(codes.shape)


# Tables are kept as NumPy arrays: a tensor in a cache would carry the default device, or the fake
# tensor mode, of whoever came first.
@functools.cache
def _nearest_codes(max_level: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """For every weight on the grid over [-1, 1]: its best code and what that code's errors cost."""
    grid = np.linspace(-1, 1, 2 * _GRID + 1)
    codes = np.arange(2**CODE_BITS)
    cost = np.zeros((len(grid), len(codes)))
    for level, weight in _ERROR_WEIGHT.items():
        if level <= max_level:
            values = _GAINS[level // 2 - 1] * ((2 * np.arange(2**level) + 1) / 2**level - 1)
            cost += weight * (grid[:, None] - values[codes >> (CODE_BITS - level)]) ** 2
    best = cost.argmin(axis=1)
    best[:_GRID] = 2**CODE_BITS - 1 - best[:_GRID:-1]  # ties must not lean to one side
    return best.astype(np.uint8), cost.min(axis=1).astype(np.float32)


def check_values(weight: Tensor) -> None:
    """Raises ValueError for values that no code expresses. Waits for the device."""
    if weight.is_meta:
        raise ValueError("its weight is on the meta device; load its values first")
    if weight.numel() == 0:
        return
    smallest, largest = (bound.item() for bound in torch.aminmax(weight))  # NaN reaches both
    if not (math.isfinite(smallest) and math.isfinite(largest)):
        raise ValueError("its weight has NaN or infinite values")
    if max(-smallest, largest) > MAX_MAGNITUDE:
        raise ValueError(f"its weight has values beyond {MAX_MAGNITUDE:.1e}, the largest supported")


def quantize(weight: Tensor, max_level: int = CODE_BITS) -> Quantized:
    """Quantizes a weight to nested codes, as docs/method.md describes.

    Works through the weight in blocks of rows, so the peak extra memory is a small part of one
    layer. Levels above ``max_level`` have no say in the choice of codes. A weight with nothing
    above 2**-100 becomes all zero, and so does a row that is about 2**-70 below the largest.

    Args:
        weight: [N, K], float32, float16 or bfloat16, that :func:`check_values` accepts.
        max_level: the highest level the codes will be read at: 2, 4, 6 or 8.
    """
    n, k = weight.shape
    groups = -(-n // SCALE_GROUP)
    device = weight.device
    codes = torch.zeros((n, k), dtype=torch.uint8, device=device)
    scale_codes = torch.zeros((groups, k), dtype=torch.uint8, device=device)
    if n == 0 or k == 0:
        return Quantized(codes, scale_codes, torch.zeros(n, dtype=torch.bfloat16, device=device))

    block = _BLOCK_WEIGHTS.get(device.type, _BLOCK_WEIGHTS_DEFAULT)
    rows = max(1, block // (k * SCALE_GROUP)) * SCALE_GROUP
    row_scale = _row_scales(weight, rows)
    inverse = _reciprocal(row_scale)
    # What errors in a row weigh; near 1, so that squares neither overflow nor vanish.
    energy = torch.ldexp(row_scale, -torch.frexp(row_scale.amax()).exponent).square()
    best_code, cost = (torch.from_numpy(t).to(device) for t in _nearest_codes(max_level))

    for start in range(0, n, rows):
        stop = min(start + rows, n)
        padding = -(stop - start) % SCALE_GROUP
        block_weight = weight[start:stop].float() * inverse[start:stop, None]
        u = torch.nn.functional.pad(block_weight, (0, 0, 0, padding)).view(-1, SCALE_GROUP, k)
        block_energy = torch.nn.functional.pad(energy[start:stop], (0, padding))
        chosen = _choose_scales(u, block_energy.view(-1, SCALE_GROUP), cost)
        scale_codes[start // SCALE_GROUP : -(-stop // SCALE_GROUP)] = chosen
        index = _grid_index(u, decode_scales(chosen))
        codes[start:stop] = lookup(best_code, index).view(-1, k)[: stop - start]
    return Quantized(codes, scale_codes, row_scale.bfloat16())


def sensitivity(scale_codes: Tensor, row_scale: Tensor) -> Tensor:
    """bfloat16 [K]: what a rounding error in each input channel weighs; its rms over channels is 1.

    Rounding errors are in proportion to scales; so it is the root mean square of row_scale * scale.

    Args:
        scale_codes: uint8 [tiles, K, tile / 64], see :func:`decode_scales`.
        row_scale: float32 or bfloat16 [N].
    """
    tiles, _, groups = scale_codes.shape
    # In units of the largest, so that squares neither overflow nor vanish.
    rows = row_scale.double()
    rows = rows * _reciprocal(rows.amax())
    rows = torch.nn.functional.pad(rows, (0, tiles * groups * SCALE_GROUP - len(rows)))
    energy_of_groups = rows.view(tiles, groups, SCALE_GROUP).square().sum(2)
    scales = decode_scales(scale_codes).double()
    energy = torch.einsum("tkg,tg->k", scales.square(), energy_of_groups)
    return (energy * _reciprocal(energy.mean())).sqrt().bfloat16()


def _row_scales(weight: Tensor, rows: int) -> Tensor:
    """float32 [N] holding bfloat16 values: row rms over its mean, times a power of two that puts
    every group's largest magnitude, times the largest scale factor, at or below 1."""
    blocks = weight.split(rows)
    largest = torch.stack([block.abs().amax() for block in blocks]).amax().float()
    # In units of the largest weight squares neither overflow nor vanish; tiny layers become zero.
    unit = torch.where(largest >= _TINY, largest, torch.inf)
    # Written in place: small results between large temporaries would leave the heap full of holes.
    row_rms, peak = torch.empty((2, len(weight)), dtype=torch.float32, device=weight.device)
    for start, block in zip(range(0, len(weight), rows), blocks, strict=True):
        relative = block.float() / unit
        row_rms[start : start + rows] = relative.square().mean(dim=1).sqrt()
        peak[start : start + rows] = relative.abs().amax(dim=1)
    row_scale = row_rms / row_rms.mean().clamp_min(torch.finfo(torch.float32).tiny)
    row_scale = row_scale.bfloat16().float()
    top = (peak * _reciprocal(row_scale)).amax() * _SCALE_FACTORS[-1]
    exponent = top.log2() + torch.where(largest >= _TINY, largest, 1).log2()
    power = torch.exp2(torch.nan_to_num(exponent, neginf=0.0).ceil().clamp(-120, 120))
    rounded: Tensor = (row_scale * power).bfloat16().float()
    return rounded


def _reciprocal(x: Tensor) -> Tensor:
    """1 / x, and 0 where x is 0."""
    return torch.where(x > 0, 1 / x, 0)


def _choose_scales(u: Tensor, energy: Tensor, cost: Tensor) -> Tensor:
    """uint8 [groups, K]: per group and channel the scale whose errors cost least.

    u: float32 [groups, 64, K], weights over row scales; energy: float32 [groups, 64].
    """
    largest = u.abs().amax(dim=1)
    candidates, costs = [], []
    for factor in _SCALE_FACTORS:
        # Rounded up: scales do not clip. The 1e-5 octaves, far below a step of the codes, keep
        # float32 rounding from moving a group that is on the grid up by a whole step.
        octaves = (largest * factor).log2() - 1e-5
        code = (octaves * SCALE_STEPS_PER_OCTAVE).ceil() + TOP_SCALE_CODE
        code = torch.where(largest > 0, code.clamp(1, TOP_SCALE_CODE), 0).to(torch.uint8)
        scale = decode_scales(code)
        group_cost = torch.einsum("gnk,gn->gk", lookup(cost, _grid_index(u, scale)), energy)
        candidates.append(code)
        costs.append(group_cost * scale.square())
    best = torch.stack(costs).argmin(dim=0, keepdim=True)
    return torch.stack(candidates).gather(0, best)[0]


def _grid_index(u: Tensor, scale: Tensor) -> Tensor:
    """int32 [groups, 64, K]: position of u / scale on the grid over [-1, 1]."""
    inverse = _GRID * _reciprocal(scale)
    return (u * inverse[:, None]).add_(_GRID + 0.5).clamp_(0, 2 * _GRID).to(torch.int32)


def narrowed(dense: Tensor, dtype: torch.dtype) -> Tensor:
    """Values of a weight, in float32 or more, in ``dtype``; changes ``dense``."""
    if dtype == torch.float16:  # rounding up must not turn its largest into infinity
        dense.clamp_(torch.finfo(dtype).min, torch.finfo(dtype).max)
    return dense.to(dtype)
