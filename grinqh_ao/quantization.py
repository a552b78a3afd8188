"""Quantizing a model: which layers, checked before any is changed; then one layer at a time.

TorchAO hands a config's handler one module at a time, without its name and without the model.
Neither a useful error, nor "checked before any is changed", nor tied weights can be done with
that, so the handler looks up the ``quantize_`` call it was called from, and does the whole of its
work when the first module arrives. For the modules that follow nothing is left to do.
"""

from __future__ import annotations

import functools
import inspect
import logging
import re
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchao.quantization import FqnToConfig, quantize_
from tqdm import tqdm

from grinqh_ao.config import HEAD_NAMES, GrinqhConfig
from grinqh_ao.model import summary
from grinqh_ao.tensor import SUPPORTED_DTYPES, GrinqhTensor

logger = logging.getLogger("grinqh_ao")

# Why a layer was left dense, so that it is said once.
_reported: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


# For every parameter, the (name, module) of all modules that hold it. Tensors hash by identity.
Owners = dict[Tensor, list[tuple[str, nn.Module]]]


@dataclass(frozen=True)
class _Layer:
    """A module that ``quantize_`` selected."""

    name: str
    module: nn.Module
    config: GrinqhConfig

    @property
    def weight(self) -> Tensor | None:
        return self.module._parameters.get("weight")

    def __str__(self) -> str:
        return self.name or f"{type(self.module).__name__}({self.module.extra_repr()})"


def handle(module: nn.Module, config: GrinqhConfig, parameter_name: str) -> None:
    """Called by ``quantize_`` for every module it selects.

    Raises:
        TypeError: the filter selected something that is no linear layer.
        ValueError: a weight is not finite or has no data; nothing has been changed.
    """
    if isinstance(module._parameters.get("weight"), GrinqhTensor) or parameter_name != "weight":
        return
    call = _enclosing_quantize_call()
    if call is None:
        _quantize_layers(module, [_Layer("", module, config)])
        return
    if isinstance(call["config"], FqnToConfig) and not isinstance(module, nn.Linear):
        return  # a pattern as wide as "re:.*" matches norms and embeddings too
    layers = list(_selected(call))
    if all(layer.module is not module for layer in layers):  # a filter that changes its mind
        layers.append(_Layer("", module, config))
    _quantize_layers(call["model"], layers, call["device"])


def _enclosing_quantize_call() -> dict[str, Any] | None:
    """The arguments of the ``quantize_`` call we are in: model, config, filter_fn, device."""
    code = inspect.unwrap(quantize_).__code__
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return None if frame is None else frame.f_locals


def _selected(call: dict[str, Any]) -> Iterator[_Layer]:
    """The modules that a ``quantize_`` call gives to a GrinqhConfig, with their names."""
    model, config, filter_fn = call["model"], call["config"], call["filter_fn"]
    if isinstance(config, FqnToConfig):
        for name, module in model.named_modules():
            layer_config = _config_for(config, name)
            if isinstance(module, nn.Linear) and isinstance(layer_config, GrinqhConfig):
                yield _Layer(name, module, layer_config)
        return

    def walk(module: nn.Module, name: str) -> Iterator[_Layer]:
        if filter_fn(module, name):
            yield _Layer(name, module, config)
        else:  # as TorchAO, which does not look inside what it selects
            for child_name, child in module.named_children():
                yield from walk(child, f"{name}.{child_name}" if name else child_name)

    yield from {layer.module: layer for layer in walk(model, "")}.values()


def _config_for(config: FqnToConfig, name: str) -> Any:
    """What FqnToConfig asks for the weight of a linear layer, in its documented precedence."""
    table = config.fqn_to_config
    names = (f"{name}.weight" if name else "weight", name)
    for exact in names:
        if exact in table:
            return table[exact]
    for candidate in names:
        for pattern, value in table.items():
            if pattern.startswith("re:") and re.fullmatch(pattern[3:], candidate):
                return value
    return table.get("_default")


def _quantize_layers(
    model: nn.Module, layers: list[_Layer], device: torch.device | str | None = None
) -> None:
    owners = _owners_of_weights(model)
    todo = [layer for layer in layers if _is_to_be_quantized(model, layer, owners)]
    for layer in todo:
        _check_values(layer)
    heads = {layer.module for layer in todo if _is_head(model, layer, owners)}

    with tqdm(todo, desc="quantizing", unit="layer", disable=None) as progress:
        for layer in progress:
            weight, config = layer.weight, layer.config
            if weight is None or isinstance(weight, GrinqhTensor):  # tied to one done before
                continue
            holders = owners.pop(weight)  # pop: lets go of the dense weight
            min_bits = 0.0
            if layer.module in heads and config.head_bits is not None:
                min_bits = float(min(config.head_bits, config.levels[-1]))
            dense = weight.to(device or weight.device)
            nested = GrinqhTensor.from_hp(dense, config.bits, config.levels, min_bits)
            parameter = nn.Parameter(nested, requires_grad=False)
            for _, holder in holders:  # tied modules stay tied
                holder.weight = parameter
                if isinstance(holder, nn.Linear):
                    holder.extra_repr = functools.partial(_extra_repr, holder)  # type: ignore[method-assign]
    if todo:
        logger.info("%s", summary(model))


def _extra_repr(module: nn.Linear) -> str:
    weight = module.weight
    added = f", grinqh: {weight._quantization_type()}" if isinstance(weight, GrinqhTensor) else ""
    return f"{type(module).extra_repr(module)}{added}"


def _owners_of_weights(model: nn.Module) -> Owners:
    owners: Owners = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(parameter, []).append((name, module))
    return owners


def _is_to_be_quantized(model: nn.Module, layer: _Layer, owners: Owners) -> bool:
    """Says once in the log why a layer is left dense."""
    if not isinstance(layer.module, nn.Linear):
        raise TypeError(
            f"{layer.name or 'the model'}: filter_fn selected a {type(layer.module).__name__}; "
            "GrinqhConfig quantizes nn.Linear layers"
        )
    if isinstance(layer.weight, GrinqhTensor):
        return False
    reason, level = _why_not(layer.module, owners), logging.WARNING
    if not reason and layer.config.head_bits is None and _is_head(model, layer, owners):
        reason, level = "it is the output head and head_bits is None", logging.INFO
    if reason and _reported.get(layer.module) != reason:
        _reported[layer.module] = reason
        logger.log(level, "%s is left dense: %s", layer, reason)
    return not reason


def _why_not(module: nn.Module, owners: Owners) -> str:
    """Why a linear layer cannot be quantized; empty if it can."""
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is not a plain parameter"
    if type(weight) not in (Tensor, nn.Parameter):
        return f"its weight is a {type(weight).__name__} already"
    if weight.dtype not in SUPPORTED_DTYPES:
        return f"its weight has dtype {weight.dtype}"
    if weight.numel() == 0:
        return f"its weight is empty, of shape {tuple(weight.shape)}"
    for name, owner in owners[weight]:
        plain_embedding = isinstance(owner, nn.Embedding) and owner.max_norm is None
        if not isinstance(owner, nn.Linear) and not plain_embedding:
            return f"it shares its weight with {name}, a {type(owner).__name__}"
    return ""


def _is_head(model: nn.Module, layer: _Layer, owners: Owners) -> bool:
    """Whether a layer turns hidden states into logits."""
    if layer.name.rpartition(".")[2] in HEAD_NAMES:
        return True
    find = cast(Any, getattr(model, "get_output_embeddings", None))  # transformers
    if find and find() is layer.module:
        return True
    holders = owners[layer.weight] if layer.weight is not None else []
    return any(isinstance(owner, nn.Embedding) for _, owner in holders)


def _check_values(layer: _Layer) -> None:
    weight = layer.weight
    if weight is None:
        return
    if weight.is_meta:
        raise ValueError(f"{layer}: its weight is on the meta device; load its values first")
    smallest, largest = torch.aminmax(weight.detach())  # NaN reaches both
    if not (torch.isfinite(smallest) and torch.isfinite(largest)):
        raise ValueError(f"{layer}: its weight has NaN or infinite values; nothing was quantized")
