"""Which modules share a parameter, inside a model and outside of it."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable

from torch import Tensor, nn

from grinqh_ao.selection import Layer

# For every parameter, the (name, module) of all modules that hold it. Tensors hash by identity.
Owners = dict[Tensor, list[tuple[str, nn.Module]]]

# References to a weight beside its owners', while we ask: the dictionary of owners, two variables
# and the argument of getrefcount.
_OUR_REFERENCES = 4


def owners_of_parameters(model: nn.Module) -> Owners:
    """The owners of every parameter inside ``model``."""
    owners: Owners = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(parameter, []).append((name, module))
    return owners


def held_elsewhere(layers: Iterable[Layer], owners: Owners) -> list[Layer]:
    """Layers whose weight is also a parameter of a module that ``owners`` does not know.

    Such a module exists when a part of a model is quantized, an output head, say. Only the
    garbage collector knows it; it is asked only about weights with more references than owners.
    """
    suspects: dict[Tensor, Layer] = {}
    for layer in layers:
        weight = layer.weight
        if weight is not None and sys.getrefcount(weight) > len(owners[weight]) + _OUR_REFERENCES:
            suspects[weight] = layer
        del weight
    if not suspects:
        return []
    known = {id(module._parameters) for holders in owners.values() for _, module in holders}
    strangers = [
        holder
        for holder in gc.get_referrers(*suspects)
        if isinstance(holder, dict) and id(holder) not in known and _belongs_to_a_module(holder)
    ]
    return [
        layer
        for weight, layer in suspects.items()
        if any(value is weight for holder in strangers for value in holder.values())
    ]


def _belongs_to_a_module(parameters: dict[str, object]) -> bool:
    for referrer in gc.get_referrers(parameters):
        state = vars(referrer) if isinstance(referrer, nn.Module) else referrer
        if isinstance(state, dict) and state.get("_parameters") is parameters:
            return True
    return False
