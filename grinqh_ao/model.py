"""What a whole quantized model offers: its quantized weights, ``set_bits``, ``summary``."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from grinqh_ao.experts import ExpertLinears, expert_biases
from grinqh_ao.stepping import changing
from grinqh_ao.torchao_tensor import GrinqhTensor


def quantized_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, GrinqhTensor]]:
    """Yields (name, module, weight) of linear layers and experts with a quantized weight.

    Of a layer that accelerate has offloaded it is the weight with data, which is not the module's.
    """
    known: dict[int, GrinqhTensor] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if isinstance(module, nn.Linear | ExpertLinears) and isinstance(weight, GrinqhTensor):
            yield name, module, _with_data(module, weight, known)


def quantized_linears(model: nn.Module) -> Iterator[tuple[str, nn.Module, GrinqhTensor]]:
    """As :func:`quantized_modules`, but of a mixture every expert is a layer.

    Its weight is a part of its module's, on the same memory.
    """
    for name, module, weight in quantized_modules(model):
        if isinstance(module, ExpertLinears):
            for expert, one in enumerate(weight.unbind()):
                yield f"{name}.{expert}", module, one
        else:
            yield name, module, weight


def _with_data(
    module: nn.Module, weight: GrinqhTensor, known: dict[int, GrinqhTensor]
) -> GrinqhTensor:
    """A module's weight, or what accelerate keeps of it; the same tensor for tied modules."""
    hook: Any = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):
        offloaded = getattr(one, "weights_map", None)
        if weight.is_meta and offloaded is not None:
            found = offloaded["weight"]
            if isinstance(found, GrinqhTensor):
                return known.setdefault(found.slices.data_ptr(), found)
    return weight


def is_quantized(model: nn.Module) -> bool:
    """Whether a weight in ``model`` is quantized by GRINQH."""
    return next(quantized_modules(model), None) is not None


def require_quantized_linears(model: nn.Module) -> list[tuple[str, nn.Module, GrinqhTensor]]:
    """:func:`quantized_linears`; raises ValueError if there is none."""
    layers = list(quantized_linears(model))
    if not layers:
        raise ValueError(
            f"model={type(model).__name__}: no layer is quantized; "
            "call quantize_(model, GrinqhConfig(bits=...)) first"
        )
    return layers


def is_sharded(model: nn.Module) -> bool:
    """Whether this process has shards of weights, by transformers' tensor parallelism."""
    return getattr(model, "_mesh_manager", None) is not None


def set_bits(model: nn.Module, bits: float) -> None:
    """Sets the average number of weight bits read per token, in place.

    Takes effect from the next decode step on: nothing is requantized and nothing recompiles.
    An output head keeps its floor (``GrinqhConfig.head_bits``). Inputs that want gradients take
    the dense path whatever the bits: decode under ``torch.no_grad()``, as ``generate()`` does.
    A step that another thread runs meanwhile may read some layers as before and others as now,
    unless :func:`grinqh_ao.guard_steps` watches over ``model``; then this waits for it.

    Args:
        model: a model with weights quantized by ``quantize_(model, GrinqhConfig(...))``.
        bits: average over the weights of a layer; from above 0 to the highest level.

    Raises:
        ValueError: nothing in ``model`` is quantized, or ``bits`` is out of range for a layer;
            the model is unchanged.
    """
    layers = require_quantized_linears(model)
    for name, _, weight in layers:
        weight.check_bits(bits, name=f"bits of {name or 'the layer'}")
    with changing(model):
        for _, _, weight in layers:
            weight.set_bits(bits)


@dataclass(frozen=True)
class Summary:
    """How much of a model is quantized, and what is not. ``print`` it.

    Attributes:
        quantized: names of the modules with a quantized weight.
        heads: output heads among them, with the average bits they aim at.
        tied: groups of modules that share one quantized weight.
        dense: names of the weights with two or more dimensions that are not quantized, with the
            type of their module. Linear layers that were not selected are here too, the biases of
            experts are not.
        otherwise: the same for weights of another quantizer, with the type of their tensor.
        bits: average bits per weight that all layers but heads aim at; nan if there is none.
        weights: number of quantized weights.
        all_weights: number of weights with two or more dimensions.
        stored_bytes: of the whole model, as it is now.
        dense_bytes: of the whole model, had GRINQH quantized nothing.
    """

    quantized: list[str]
    heads: dict[str, float]
    tied: list[list[str]]
    dense: dict[str, str]
    otherwise: dict[str, str]
    bits: float
    weights: int
    all_weights: int
    stored_bytes: int
    dense_bytes: int

    def __str__(self) -> str:
        lines = [
            f"GRINQH: {self.weights / 1e6:.1f}M of {self.all_weights / 1e6:.1f}M weights "
            f"quantized, in {len(self.quantized)} modules",
            f"  stored: {self.stored_bytes / 1e6:.1f} MB, was {self.dense_bytes / 1e6:.1f} MB",
        ]
        if not math.isnan(self.bits):
            lines.append(f"  bits read per weight and token: {self.bits:.2f}")
        lines += [f"  output head {name}: {bits:.2f} bits" for name, bits in self.heads.items()]
        lines += [f"  tied, one quantized weight: {' = '.join(names)}" for names in self.tied]
        lines += [f"  left dense: {line}" for line in by_type(self.dense)]
        lines += [f"  quantized otherwise: {line}" for line in by_type(self.otherwise)]
        return "\n".join(lines)


def by_type(names: dict[str, str], but: Collection[str] = ()) -> list[str]:
    """A line for every type in a map from names to types, except the types in ``but``."""
    names_of: dict[str, list[str]] = {}
    for name, kind in names.items():
        if kind not in but:
            names_of.setdefault(kind, []).append(name)
    return [f"{len(names)} in {kind}: {first_few(names)}" for kind, names in names_of.items()]


def first_few(names: Sequence[str]) -> str:
    """The first four, with commas between, and whether there are more."""
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def summary(model: nn.Module) -> Summary:
    """Says how much of ``model`` is quantized and what is not. Waits for the device."""
    holders: dict[torch.Tensor, list[str]] = {}  # tensors hash by identity
    modules: dict[torch.Tensor, nn.Module] = {}
    known: dict[int, GrinqhTensor] = {}
    biases: set[torch.Tensor] = set()
    for module_name, module in model.named_modules():
        biases.update(expert_biases(module))
        for name, parameter in module.named_parameters(module_name, recurse=False):
            if nn.parameter.is_lazy(parameter):
                continue
            if isinstance(parameter, GrinqhTensor):
                parameter = _with_data(module, parameter, known)
            if hasattr(parameter, "to_local"):  # a DTensor: what this rank has of it
                parameter = parameter.to_local()
            holders.setdefault(parameter, []).append(re.sub(r"(^|\.)weight$", "", name))
            modules.setdefault(parameter, module)
    nested = {t: names for t, names in holders.items() if isinstance(t, GrinqhTensor)}
    others: list[torch.Tensor] = [t for t in holders if t not in nested]
    matrices = {t: holders[t][0] for t in others if t.dim() >= 2 and t not in biases}
    foreign = {t for t in matrices if type(t) not in (torch.Tensor, nn.Parameter)}
    body = [t for t in nested if not t.min_bits]
    others += {t for t in model.buffers() if not nn.parameter.is_lazy(t)}
    weights = sum(t.numel() for t in nested)
    body_weights = sum(t.numel() for t in body)
    return Summary(
        quantized=[name for names in nested.values() for name in names],
        heads={names[-1]: t.bits for t, names in nested.items() if t.min_bits},
        tied=[names for names in nested.values() if len(names) > 1],
        dense={n: type(modules[t]).__name__ for t, n in matrices.items() if t not in foreign},
        otherwise={n: type(t).__name__ for t, n in matrices.items() if t in foreign},
        bits=sum(t.bits * t.numel() for t in body) / body_weights if body else math.nan,
        weights=weights,
        all_weights=weights + sum(t.numel() for t in matrices),
        stored_bytes=sum(map(_stored_bytes, others)) + sum(map(_stored_bytes, nested)),
        dense_bytes=sum(map(_stored_bytes, others)) + sum(t.nbytes for t in nested),
    )


def _stored_bytes(tensor: torch.Tensor) -> int:
    """Of a tensor subclass what it holds, not what it stands for."""
    if not is_traceable_wrapper_subclass(tensor):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(_stored_bytes(getattr(tensor, name)) for name in names)
