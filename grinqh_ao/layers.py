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
from grinqh_ao.tracing import being_traced


class GrinqhLinear(nn.Linear):
    """An ``nn.Linear`` whose weight is a GrinqhTensor, or anything else: ``quantize_`` and
    transformers' loading make one of every plain ``nn.Linear`` they quantize.

    Put another weight in its place by assignment, ``load_state_dict``, ``to()`` or the like. What
    is put into ``_parameters`` behind the layer's back, as ``torch.func.functional_call`` does, is
    for calls outside of compiled functions only; after such a call those look at the weight itself.
    """

    # What torch._dynamo.mark_static sets, and is said of nn.Linear itself: with dynamic=True shapes
    # of weights are no symbols, which took compilation several times as long.
    _dynamo_marked_static = True
    # What the weight holds, by names: its own __dict__, so that it is never behind. Compiled models
    # look here and not at the weight, whose mere sight would make them check it.
    _inner: dict[str, Any] | None = None
    # With a module that may move the weight without this one noticing.
    _shares_weight = False

    def forward(self, input: Tensor) -> Tensor:
        inner = self.inner()
        if inner is None or not decoded_together() or isinstance(input, torch.fx.Proxy):
            return super().forward(input)
        return linear(input, inner, self.bias)

    def inner(self) -> Inner | None:
        """What is in the weight, if this layer can compute with that."""
        if being_traced():
            # Not is_exporting(), which is True in all that Dynamo traces.
            found = None if torch.compiler._is_exporting_flag else self._inner
        else:
            found = self._in_weight()
            if self._inner is not None and found is not self._inner:
                self._inner = None  # someone works behind this layer's back
        return None if found is None else Inner(*(found[name] for name in Inner._fields))

    def extra_repr(self) -> str:
        weight: Tensor | None = self._parameters.get("weight")
        if not isinstance(weight, GrinqhTensor):
            return super().extra_repr()
        return f"{super().extra_repr()}, grinqh: {weight._quantization_type()}"

    def _in_weight(self) -> dict[str, Any] | None:
        """None of a weight that is not quantized, or a part of one."""
        weight = self._parameters.get("weight")
        whole = isinstance(weight, GrinqhTensor) and weight.__dict__["sharing"] is None
        return weight.__dict__ if whole else None

    def _remember(self) -> None:
        """Another weight may be here. Not where something else has replaced forward(): accelerate
        does, to put weights in place for the length of a call, and they are not to be kept."""
        keep = not self._shares_weight and "forward" not in self.__dict__
        inner = self._in_weight() if keep else None
        if inner is not None:
            _into_parameters(inner)
        self._inner = inner

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in ("weight", "forward"):
            self._remember()

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        if name in ("weight", "forward"):
            self._remember()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GrinqhLinear:
        super()._apply(fn, recurse)
        self._remember()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._remember()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_inner"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._remember()


def _into_parameters(inner: dict[str, Any]) -> None:
    """The tensors in a weight: compiled models check others even where they are asked to check no
    weights (``torch.compiler.set_stance(skip_guard_eval_unsafe=True)``)."""
    for name in Inner._fields:
        if type(inner[name]) is Tensor:
            inner[name] = nn.Parameter(inner[name], requires_grad=False)


def adopt(module: nn.Module, shared: bool = False) -> None:
    """Makes a GrinqhLinear of a plain ``nn.Linear``; other modules stay what they are.

    Args:
        shared: another module has the same weight.
    """
    if type(module) is nn.Linear:
        module.__class__ = GrinqhLinear
    if isinstance(module, GrinqhLinear):
        if shared:
            module._shares_weight = True
        module._remember()
