"""Parts of a weight, as tensor parallelism cuts it: some of its outputs, or some of its inputs.

A part has the codes, scales and thresholds of the whole. Relative thresholds refer to the mean over
all inputs of the whole, which a part with some of them does not see: :func:`sharing_inputs` says
who has the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grinqh_ao import vectors
from grinqh_ao.codec import SCALE_GROUP
from grinqh_ao.slices import HIGH_SLICES, TILE_WIDTHS, pack, unpack
from grinqh_ao.torchao_tensor import GrinqhTensor


def shard(weight: GrinqhTensor, dim: int, start: int, stop: int) -> GrinqhTensor:
    """Outputs (``dim=0``) or inputs (``dim=1``) from ``start`` to before ``stop`` of [N, K].

    Raises:
        ValueError: outputs are cut within a group of 64 that share a scale, or the range is empty
            or not within the weight.
        TypeError: ``weight`` is a stack of experts.
    """
    if weight.dim() != 2:
        raise TypeError(f"weight of shape {tuple(weight.shape)}: expected [out, in], no experts")
    size = weight.shape[dim]
    if not 0 <= start < stop <= size:
        raise ValueError(f"part {start}:{stop} of dimension {dim}: expected some of 0:{size}")
    return (_inputs if dim else _outputs)(weight, start, stop)


def _outputs(weight: GrinqhTensor, start: int, stop: int) -> GrinqhTensor:
    n, k = weight.shape
    ends = [place for place in (start, stop) if place != n]
    if any(place % SCALE_GROUP for place in ends):
        raise ValueError(
            f"outputs {start}:{stop} of {n}: expected a cut between groups of {SCALE_GROUP}, which "
            "share a scale"
        )
    tile = weight.tile
    tiles = slice(start // tile, -(-stop // tile))
    slices, scales = weight.slices[tiles], weight.scales[tiles]
    narrow = next(
        width for width in TILE_WIDTHS if width <= tile and not any(p % width for p in ends)
    )
    if narrow != tile:
        first = (start - tiles.start * tile) // narrow
        some = slice(first, first + -(-(stop - start) // narrow))
        slices = _retiled(slices, narrow)[some]
        groups = scales.transpose(1, 2).reshape(-1, narrow // SCALE_GROUP, k)
        scales = groups.transpose(1, 2).contiguous()[some]
    row_scale = weight.row_scale[start:stop]
    return like(weight, slices, scales, weight.sensitivity, row_scale, weight.low)


def _retiled(slices: Tensor, tile: int) -> Tensor:
    """The same lines in narrower tiles."""
    lines = slices.shape[1]
    fields = unpack([slices]).transpose(1, 2).reshape(-1, lines)  # [outputs, lines]
    return pack(fields, 1, tile)


def _inputs(weight: GrinqhTensor, start: int, stop: int) -> GrinqhTensor:
    k = weight.shape[1]
    stored = weight.levels[-1] // 2
    high = min(stored, HIGH_SLICES)
    upper = weight.slices[:, high * start : high * stop]
    low = None
    if weight.low is None:
        lower = weight.slices[:, high * k :][:, (stored - high) * start : (stored - high) * stop]
    else:
        low = weight.low[start:stop]
        kept = low >= 0
        tiles, _, words = weight.slices.shape
        of_all = weight.slices[:, high * k :].reshape(tiles, -1, stored - high, words)
        lower = of_all[:, low[kept]].flatten(1, 2)
        low = torch.where(kept, kept.cumsum(0) - 1, -1).int()
    slices = torch.cat([upper, lower], dim=1)
    scales = weight.scales[:, start:stop].contiguous()
    return like(weight, slices, scales, weight.sensitivity[start:stop], weight.row_scale, low)


def like(
    weight: GrinqhTensor,
    slices: Tensor,
    scales: Tensor,
    sensitivity: Tensor,
    row_scale: Tensor,
    low: Tensor | None,
) -> GrinqhTensor:
    """A weight of these, with everything else as ``weight`` has it."""
    return GrinqhTensor(
        slices,
        scales,
        vectors.join(weight.thresholds, weight.gains, sensitivity, row_scale),
        weight.levels,
        weight.min_bits,
        weight.dtype,
        weight.curve,
        low,
        weight.sharing,
    )


def sharing_inputs(weight: GrinqhTensor, group: str, k: int) -> GrinqhTensor:
    """The same part, knowing that the ranks of a process group have the other inputs.

    Args:
        group: the name of the process group.
        k: inputs of the whole weight.
    """
    return weight.with_data(lambda data: data, sharing=(group, k))
