"""Tensor parallelism as transformers does it: ``from_pretrained(..., tp_plan="auto")``.

transformers would cut each tensor of a file as it cuts dense weights, but those that a quantized
weight is stored as are laid out otherwise. So quantized weights are left whole in its plan, noted
how they are to be cut, and cut while they are loaded, one by one. Each rank then has a weight that
``F.linear`` reads as any other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.distributed import tensor_parallel
from transformers.distributed.parallel_utils import (
    ALL_PARALLEL_STYLES,
    _get_parameter_plan,
    replace_layer_number_by_wildcard,
)

from grinqh_ao.parts import part, sharing_inputs
from grinqh_ao.torchao_tensor import GrinqhTensor

_PREFIX = "grinqh_"
_CUT = "_grinqh_cut"


class _Later(tensor_parallel.TensorParallelLayer):
    """Notes how a quantized weight is to be cut, for :func:`cut`; cuts others as they are."""

    def __init__(self, style: Any) -> None:
        self.style = style

    def shard_param(self, module: nn.Module, param: str, mesh: Any) -> None:
        if hasattr(module, _CUT):
            dim = 1 if isinstance(self.style, tensor_parallel.RowwiseParallel) else 0
            setattr(module, _CUT, (dim, mesh))
        else:
            self.style.shard_param(module, param, mesh)


def plan_cuts(model: nn.Module, plan: dict[str, str], names: Any) -> None:
    """Changes transformers' ``plan`` so that the weights of these names are cut by :func:`cut`."""
    dense = dict(plan)
    for name in names:
        style_name = _get_parameter_plan(name, dense)
        style = ALL_PARALLEL_STYLES[style_name] if style_name else None
        if type(style) not in (tensor_parallel.ColwiseParallel, tensor_parallel.RowwiseParallel):
            continue
        later = f"{_PREFIX}{style_name}"
        if later not in ALL_PARALLEL_STYLES:
            ALL_PARALLEL_STYLES.register(later, _Later(style))
        plan[replace_layer_number_by_wildcard(name)] = later
        module: Any = model.get_submodule(name.rpartition(".")[0])
        setattr(module, _CUT, None)
        module._hf_quantized_needs_local_tp = True  # no DTensors, not even with gradients


def cut(weight: GrinqhTensor, module: nn.Module, name: str) -> GrinqhTensor:
    """This rank's part of the weight of ``module``: all of it where it is not to be cut.

    Raises:
        ValueError: it cannot be cut into as many parts.
    """
    noted = module.__dict__.pop(_CUT, None)
    if noted is None:
        return weight
    dim, mesh = noted
    size, whole = mesh.size(), weight.shape[dim]
    step = -(-whole // size)
    start = step * mesh.get_local_rank()
    try:
        mine = part(weight, dim, start, min(start + step, whole))
    except ValueError as error:
        raise ValueError(
            f"{name}: cannot be cut in {size} for tensor parallelism: {error}"
        ) from None
    if dim == 1:
        mine = sharing_inputs(mine, mesh.get_group().group_name, whole)
    if mesh.device_type != "cpu":
        index = torch.accelerator.current_device_index()
        moved: GrinqhTensor = mine.to(torch.device(mesh.device_type, index))
        return moved
    return mine
