"""GrinqhLinear: a linear layer that takes the host hardly longer to call than a dense one.

A tensor with inner tensors takes Python to call: in eager mode to find out what ``F.linear`` means
for it; in compiled models to check it and to take it apart, for every weight at every step. On a
large GPU that can be more than the products take (docs/architecture.md). So this layer hands over
the inner tensors itself. ``F.linear`` with the weight computes the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from grinqh_ao.decode_rule import decoded_together
from grinqh_ao.linear import Inner, linear
from grinqh_ao.torchao_tensor import GrinqhTensor


class GrinqhLinear(nn.Linear):
    """An ``nn.Linear`` whose weight is a GrinqhTensor, or anything else: ``quantize_`` and
    transformers' loading make one of every plain ``nn.Linear`` they quantize.

    Put another weight in its place by assignment, ``load_state_dict``, ``to()`` or the like. One
    put into ``_parameters`` directly is seen by the next call outside of a compiled model only.
    """

    # What the weight holds, by names: its own __dict__, so that it is never behind. Compiled models
    # look here and not at the weight, whose mere sight would make them check it.
    _inner: dict[str, Any] | None = None

    def forward(self, input: Tensor) -> Tensor:
        inner = self.inner()
        if inner is None or not decoded_together():
            return super().forward(input)
        return linear(input, inner, self.bias)

    def inner(self) -> Inner | None:
        """What is in the weight, if this layer can compute with that."""
        found = self._inner if torch.compiler.is_compiling() else self._look_at_weight()
        return None if found is None else Inner(*(found[name] for name in Inner._fields))

    def extra_repr(self) -> str:
        weight: Tensor | None = self._parameters.get("weight")
        if not isinstance(weight, GrinqhTensor):
            return super().extra_repr()
        return f"{super().extra_repr()}, grinqh: {weight._quantization_type()}"

    def _look_at_weight(self) -> dict[str, Any] | None:
        """What is in the weight, which may have been replaced.

        None of a weight that is not quantized, or a part of one; and where accelerate is at work:
        it puts weights into ``_parameters`` for the length of a call, and to hold on to their inner
        tensors would keep them in memory.
        """
        weight = self._parameters.get("weight")
        inner = None
        if isinstance(weight, GrinqhTensor) and "forward" not in self.__dict__:
            inner = weight.__dict__
            if inner["sharing"] is not None:
                inner = None
        if inner is not self._inner:
            self.__dict__["_inner"] = inner
        return inner

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "weight":
            self._look_at_weight()

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        if name == "weight":
            self._look_at_weight()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GrinqhLinear:
        super()._apply(fn, recurse)
        self._look_at_weight()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._look_at_weight()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_inner"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._look_at_weight()


def adopt(module: nn.Module) -> None:
    """Makes a GrinqhLinear of a plain ``nn.Linear``; other modules stay what they are."""
    if type(module) is nn.Linear:
        module.__class__ = GrinqhLinear
    if isinstance(module, GrinqhLinear):
        module._look_at_weight()
