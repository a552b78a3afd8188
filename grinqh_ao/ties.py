"""Which modules share a parameter, inside a model and outside of it."""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Iterable

from torch import Tensor, nn

from grinqh_ao.config import GrinqhConfig
from grinqh_ao.selection import Layer

_SHARED = (
    "it shares its weight with a module outside of what is being quantized; give quantize_ the "
    "whole model"
)
_MAYBE_SHARED = (
    "after gc.freeze() it cannot be known whether other modules share its weight, to which more "
    "refers than the model; call quantize_ before"
)

# For every parameter, the (name, module) of all modules that hold it. Tensors hash by identity.
Owners = dict[Tensor, list[tuple[str, nn.Module]]]


def owners_of_parameters(model: nn.Module) -> Owners:
    """The owners of every parameter inside ``model``."""
    owners: Owners = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(parameter, []).append((name, module))
    return owners


def held_elsewhere(layers: Iterable[Layer], owners: Owners) -> dict[Layer, str]:
    """Layers whose weight is also a parameter of a module that ``owners`` does not know, and why.

    Such a module exists when a part of a model is quantized, an output head, say. Only the
    garbage collector knows it; it is asked only about weights with more references than owners.
    """
    suspects = [
        layer
        for layer in layers
        if layer.weight is not None
        and _references(layer) > _references_of_one_owner() + len(owners.get(layer.weight, ()))
    ]
    if gc.get_freeze_count():  # it does not know what is frozen
        return dict.fromkeys(suspects, _MAYBE_SHARED)
    if not suspects:
        return {}
    weights = [layer.weight for layer in suspects]
    known = {id(module._parameters) for holders in owners.values() for _, module in holders}
    strangers = [
        holder
        for holder in gc.get_referrers(*weights)
        if isinstance(holder, dict) and id(holder) not in known and _belongs_to_a_module(holder)
    ]
    return {
        layer: _SHARED
        for layer in suspects
        if any(value is layer.weight for holder in strangers for value in holder.values())
    }


def _references(layer: Layer) -> int:
    return sys.getrefcount(layer.weight)


@functools.cache
def _references_of_one_owner() -> int:
    """What :func:`_references` counts for one owner: how many are ours depends on the Python.

    That owner stands for the reference that the dictionary of owners itself holds.
    """
    return _references(Layer("", nn.Linear(1, 1), GrinqhConfig()))


def _belongs_to_a_module(parameters: dict[str, object]) -> bool:
    for referrer in gc.get_referrers(parameters):
        state = vars(referrer) if isinstance(referrer, nn.Module) else referrer
        if isinstance(state, dict) and state.get("_parameters") is parameters:
            return True
    return False
