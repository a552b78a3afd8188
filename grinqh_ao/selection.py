"""Which layers a ``quantize_`` call gives to a GrinqhConfig, with their names.

TorchAO tells a handler neither; the ``quantize_`` call on the stack does, by its arguments.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import FqnToConfig, quantize_

from grinqh_ao.config import GrinqhConfig
from grinqh_ao.experts import ExpertLinears, projections_of_experts, untransposed


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear layer that ``quantize_`` selected, or those of all experts of a mixture.

    Attributes:
        name: of the module; of experts, of the parameter that holds them.
        parameter: of the module. Not "weight", for experts.
    """

    name: str
    module: nn.Module
    config: GrinqhConfig
    parameter: str = "weight"

    @property
    def weight(self) -> Tensor | None:
        held = self.module._parameters
        if self.parameter in held:
            return held[self.parameter]
        if isinstance(experts := self.module._modules.get(self.parameter), ExpertLinears):
            return experts.weight
        # PEFT, when it merges adapters, leaves a plain tensor to be quantized again. Pruning and
        # hooks that normalize leave one too, which they compute from weight_orig or its like.
        computed = any(name.startswith(f"{self.parameter}_") for name in held)
        plain = vars(self.module).get(self.parameter)
        return plain if isinstance(plain, Tensor) and not computed else None

    @property
    def linear(self) -> nn.Module:
        """The module that computes with the weight, once that is quantized."""
        held = getattr(self.module, self.parameter)
        return held if isinstance(held, ExpertLinears) else self.module

    @property
    def holds_experts(self) -> bool:
        return self.parameter != "weight"

    def __str__(self) -> str:
        if self.name or not isinstance(self.module, nn.Linear):
            return self.name or "the model"
        return f"Linear({type(self.module).extra_repr(self.module)})"


@dataclass
class QuantizeCall:
    """A ``quantize_`` call, by its arguments.

    Attributes:
        done: whether all that it selects has been dealt with.
    """

    model: nn.Module
    config: AOBaseConfig
    filter_fn: Callable[[nn.Module, str], bool] | None
    device: torch.device | str | None = None
    done: bool = False

    @functools.cached_property
    def layers(self) -> list[Layer]:
        """What it selects for GrinqhConfigs. Asks ``filter_fn`` once more than TorchAO does."""
        if isinstance(self.config, FqnToConfig):
            return list(_by_name(self.model, self.config))
        if isinstance(self.config, GrinqhConfig) and self.filter_fn:
            return list(_by_filter(self.model, self.config, self.filter_fn))
        return []

    @functools.cached_property
    def modules(self) -> set[nn.Module]:
        """Those of the layers."""
        return {layer.module for layer in self.layers}

    def add(self, module: nn.Module, config: GrinqhConfig) -> None:
        """Also selects ``module``, of which no name is known."""
        self.layers.append(Layer("", module, config))
        self.modules.add(module)

    @property
    def by_name(self) -> bool:
        """Whether it selects by name, not by a filter."""
        return isinstance(self.config, FqnToConfig)

    def names(self, full_name: str) -> bool:
        """Whether it gives this very name, not a pattern that fits it."""
        return isinstance(self.config, FqnToConfig) and full_name in self.config.fqn_to_config


def enclosing_call(config: GrinqhConfig) -> QuantizeCall | None:
    """The innermost ``quantize_`` call on the stack, if ``config`` is what it was given.

    The same object for all that one call hands over.
    """
    code = inspect.unwrap(quantize_).__code__
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    if frame is None:
        return None
    # The names of parameters are public: they can be given by keyword.
    found = frame.f_locals
    given = found["config"]
    named = given.fqn_to_config.values() if isinstance(given, FqnToConfig) else ()
    if given is not config and all(value is not config for value in named):
        return None  # another config's handler is calling ours
    call = QuantizeCall(found["model"], given, found["filter_fn"], found["device"])
    # What is put beside a frame's own variables lasts as long as the call.
    kept: QuantizeCall = found.setdefault("__grinqh_ao__", call)
    return kept


def _by_filter(
    model: nn.Module, config: GrinqhConfig, filter_fn: Callable[[nn.Module, str], bool]
) -> Iterator[Layer]:
    def walk(module: nn.Module, name: str) -> Iterator[Layer]:
        if filter_fn(module, name):
            yield Layer(name, module, config)
            return  # as TorchAO, which does not look inside what it selects
        for parameter, full_name, linear in _experts(module, name):
            if filter_fn(linear, full_name):
                yield Layer(full_name, module, config, parameter)
        for child_name, child in module.named_children():
            yield from walk(child, f"{name}.{child_name}" if name else child_name)

    yield from {(layer.module, layer.parameter): layer for layer in walk(model, "")}.values()


def _by_name(model: nn.Module, config: FqnToConfig) -> Iterator[Layer]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found = _config_for(module, name, config.fqn_to_config)
            if isinstance(found, GrinqhConfig):
                yield Layer(name, module, found)
        for parameter, full_name, linear in _experts(module, name):
            found = _config_for(linear, full_name, config.fqn_to_config)
            if isinstance(found, GrinqhConfig):
                yield Layer(full_name, module, found, parameter)


def _experts(module: nn.Module, name: str) -> Iterator[tuple[str, str, nn.Linear]]:
    """Of experts' projections, quantized or not: their names, and a linear layer like one of them.

    Filters and patterns are written for linear layers: that one is what they are asked about.
    """
    for parameter in projections_of_experts(module):
        held: Any = getattr(module, parameter)
        quantized = isinstance(held, ExpertLinears)
        shape = held.weight.shape if quantized else untransposed(module, held).shape
        _, out_features, in_features = shape
        linear = nn.Linear(in_features, out_features, bias=False, device="meta")
        yield parameter, f"{name}.{parameter}" if name else parameter, linear


def _config_for(module: nn.Module, name: str, configs: dict[str, Any]) -> Any:
    """The config of a linear layer's weight, in TorchAO's order of precedence.

    Names of parameters before names of modules, exact names before patterns; where a parameter is
    named, be it the bias, its module's name is not looked up.
    """
    prefix = f"{name}." if name else ""
    others = [prefix + n for n, _ in module.named_parameters(recurse=False) if n != "weight"]
    weight = f"{prefix}weight"

    def pattern(full_name: str) -> str | None:
        matches = (p for p in configs if p.startswith("re:") and re.fullmatch(p[3:], full_name))
        return next(matches, None)

    if weight in configs:
        return configs[weight]
    parameter_named = any(other in configs for other in others)
    if not parameter_named and name in configs:
        return configs[name]
    if found := pattern(weight):
        return configs[found]
    if parameter_named or any(pattern(other) for other in others):
        return None
    return configs[found] if (found := pattern(name)) else configs.get("_default")
