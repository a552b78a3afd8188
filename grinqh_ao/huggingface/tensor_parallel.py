"""Tensor parallelism as transformers does it: ``from_pretrained(..., tp_plan="auto")``.

transformers would cut each tensor of a file as it cuts dense weights, but those that a quantized
weight is stored as are laid out otherwise. So quantized weights are left whole in its plan, noted
how they are to be cut, and cut while they are loaded, one by one. Each rank then has a weight that
``F.linear`` reads as any other.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers.distributed import tensor_parallel
from transformers.distributed.parallel_utils import (
    ALL_PARALLEL_STYLES,
    _get_parameter_plan,
    replace_layer_number_by_wildcard,
)

from grinqh_ao.codec import SCALE_GROUP
from grinqh_ao.shards import shard, sharing_inputs
from grinqh_ao.torchao_tensor import GrinqhTensor

_PREFIX = "grinqh_"
CUT = "_grinqh_cut"


class _Later(tensor_parallel.TensorParallelLayer):
    """Notes how a quantized weight is to be cut, for :func:`cut`; cuts others as they are."""

    def __init__(self, style: Any) -> None:
        self.style = style

    def shard_param(self, module: nn.Module, param: str, mesh: Any) -> None:
        """Raises ValueError if the weight cannot be cut into as many parts."""
        name = getattr(module, CUT, None)
        if name is None:
            self.style.shard_param(module, param, mesh)
            return
        dim = 1 if isinstance(self.style, tensor_parallel.RowwiseParallel) else 0
        size = getattr(module, param).shape[dim]
        for rank in range(mesh.size()):
            start, stop = _range_of(rank, size, mesh)
            if start >= stop or (dim == 0 and stop != size and stop % SCALE_GROUP):
                raise ValueError(
                    f"{name}: {size} {('outputs', 'inputs')[dim]} cannot be cut in {mesh.size()} "
                    f"for tensor parallelism: expected parts of {SCALE_GROUP} outputs, which share "
                    "a scale, or multiples of it, or any number of inputs"
                )
        setattr(module, CUT, (dim, mesh))


class _Refuse(tensor_parallel.TensorParallelLayer):
    """For what transformers would cut in ways that quantized weights cannot be."""

    def shard_param(self, module: nn.Module, param: str, mesh: Any) -> None:
        raise ValueError(
            f"{param} of {type(module).__name__}, quantized: cannot be cut in {mesh.size()} as "
            "transformers' plan says; only linear layers can be cut, by outputs or inputs"
        )


ALL_PARALLEL_STYLES.register(f"{_PREFIX}refuse", _Refuse())


def _range_of(rank: int, size: int, mesh: Any) -> tuple[int, int]:
    step = -(-size // mesh.size())
    return rank * step, min((rank + 1) * step, size)


def plan_cuts(model: Any, plan: dict[str, str], names: Iterable[str]) -> None:
    """Changes transformers' ``plan`` so that the weights of these names are cut by :func:`cut`.

    A head that is tied to the embedding stays whole on every rank, and so does the embedding.
    """
    dense = dict(plan)
    ties = model.all_tied_weights_keys
    for name in names:
        tied = {one for pair in ties.items() if name in pair for one in pair}
        for one in tied:
            for entry in (one, one.rpartition(".")[0]):
                plan.pop(replace_layer_number_by_wildcard(entry), None)
        if tied:
            continue
        style_name = _get_parameter_plan(name, dense)
        if style_name is None:
            continue
        style = ALL_PARALLEL_STYLES[style_name]
        if type(style) not in (tensor_parallel.ColwiseParallel, tensor_parallel.RowwiseParallel):
            plan[replace_layer_number_by_wildcard(name)] = f"{_PREFIX}refuse"
            continue
        later = f"{_PREFIX}{style_name}"
        if later not in ALL_PARALLEL_STYLES:
            ALL_PARALLEL_STYLES.register(later, _Later(style))
        plan[replace_layer_number_by_wildcard(name)] = later
        module: Any = model.get_submodule(name.rpartition(".")[0])
        setattr(module, CUT, name)
        module._hf_quantized_needs_local_tp = True  # no DTensors, not even with gradients


def cut(weight: GrinqhTensor, module: nn.Module) -> GrinqhTensor:
    """This rank's part of the weight of ``module``: all of it where it is not to be cut."""
    noted = module.__dict__.pop(CUT, None)
    if not isinstance(noted, tuple):
        return weight
    dim, mesh = noted
    whole = weight.shape[dim]
    mine = shard(weight, dim, *_range_of(mesh.get_local_rank(), whole, mesh))
    if dim == 1:
        mine = sharing_inputs(mine, mesh.get_group().group_name, whole)
    if mesh.device_type != "cpu":
        index = torch.accelerator.current_device_index()
        moved: GrinqhTensor = mine.to(torch.device(mesh.device_type, index))
        return moved
    return mine
