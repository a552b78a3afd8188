"""FSDP2: each rank keeps some outputs of a weight, and gathers the others when it needs them.

``fully_shard`` cuts a weight by its outputs, asks each rank's part what to gather, and hands back
what came of it. Cuts are even, so all parts have the same tiles, and tiles in a row are a weight.
https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grinqh_ao import vectors
from grinqh_ao.shards import like
from grinqh_ao.torchao_tensor import GrinqhTensor


def pre_all_gather(
    mine: GrinqhTensor, mesh: Any, outer_size: Any, outer_stride: Any, module: Any, mp_policy: Any
) -> tuple[tuple[Tensor, ...], None]:
    """The tensors to gather: those of which every rank has another part."""
    return (mine.slices, mine.scales, mine.vectors), None


def post_all_gather(
    mine: GrinqhTensor,
    gathered: tuple[Tensor, ...],
    metadata: None,
    param_dtype: torch.dtype,
    *,
    out: GrinqhTensor | None = None,
) -> tuple[GrinqhTensor, tuple[Tensor, ...]] | None:
    """The whole weight, and of what it is made the tensors that FSDP2 does not own.

    With ``out``, the weight of before, whose memory holds what was gathered now, but for those.
    """
    slices, scales, of_parts = gathered
    of_parts = of_parts.view(-1, mine.vectors.shape[0])
    row_scale = vectors.row_scale_of(of_parts, mine.shape[1]).flatten()
    whole = like(mine, slices, scales, mine.sensitivity, row_scale, mine.low)
    if out is not None:
        out.vectors.copy_(whole.vectors)
        return None
    return whole, (whole.vectors,)


GrinqhTensor.fsdp_pre_all_gather = pre_all_gather
GrinqhTensor.fsdp_post_all_gather = post_all_gather
