"""The decoder of a transformers model, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def decoder(model: Any) -> nn.ModuleList:
    return model.model.layers


def linears(module: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear)}


def is_linear(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear)


@torch.no_grad()
def set_weight(layer: nn.Linear, weight: Tensor) -> None:
    dense = weight.detach().to(torch.float32).contiguous().clone()
    layer.weight = nn.Parameter(dense, requires_grad=False)


@torch.no_grad()
def replace_weights(model: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    for layer in linears(decoder(model)).values():
        set_weight(layer, change(layer.weight.detach()))


class Passes:
    """Runs a decoder one layer at a time, so that each sees the quantized ones before it."""

    @torch.no_grad()
    def __init__(self, model: nn.Module, batches: list[Tensor]) -> None:
        self.hidden: list[Tensor] = []
        self.arguments: list[list[dict[str, Any]]] = []  # of every batch, of every layer
        handles = [
            layer.register_forward_pre_hook(self._record(i), with_kwargs=True)
            for i, layer in enumerate(decoder(model))
        ]
        for batch in batches:
            model(batch, use_cache=False)
        for handle in handles:
            handle.remove()

    def _record(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            kwargs = dict(kwargs)
            hidden = args[0] if args else kwargs.pop("hidden_states")
            if index == 0:
                self.hidden.append(hidden.clone())
                self.arguments.append([])
            self.arguments[-1].append(kwargs)

        return hook

    @torch.no_grad()
    def run(self, index: int, layer: nn.Module) -> list[Tensor]:
        """What ``layer``, number ``index``, makes of what comes to it."""
        found = []
        for hidden, arguments in zip(self.hidden, self.arguments, strict=True):
            output = layer(hidden, **arguments[index])
            found.append(output[0] if isinstance(output, tuple) else output)
        return found
