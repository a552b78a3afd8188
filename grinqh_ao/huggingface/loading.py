"""Between what transformers reads from files and the weights that a model gets."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.core_model_loading import ConversionOps

from grinqh_ao.checkpoint import SUFFIXES, from_tensors
from grinqh_ao.errors import CheckpointError
from grinqh_ao.experts import expert_parameters, put_experts, untransposed
from grinqh_ao.memory import give_back
from grinqh_ao.quantization import nested_weight

if TYPE_CHECKING:
    from grinqh_ao.huggingface.quantizer import GrinqhHfQuantizer

_WEIGHT = ".weight"
GIVE_BACK_EVERY = 1 << 24


class Quantize(ConversionOps):
    """A weight in full precision -> nested."""

    def __init__(self, quantizer: GrinqhHfQuantizer) -> None:
        self.hf_quantizer = quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        *args: Any,
        full_layer_name: str = "",
        missing_keys: set[str] | None = None,
        model: Any = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        check_whole(model.get_parameter(full_layer_name), full_layer_name)
        (dense,) = input_dict.values()
        dense = dense[0] if isinstance(dense, list) else dense
        layer, is_head = self.hf_quantizer.planned[full_layer_name]
        try:
            nested = nested_weight(untransposed(layer.module, dense), layer.config, is_head)
        except ValueError as error:
            raise ValueError(f"{layer}: {error}") from None
        if not layer.holds_experts:
            nested = self.hf_quantizer.cut(nested, model, full_layer_name)
        self.hf_quantizer.weights_since_giving_back += dense.numel()
        if self.hf_quantizer.weights_since_giving_back >= GIVE_BACK_EVERY:
            self.hf_quantizer.weights_since_giving_back = 0
            give_back()
        if not layer.holds_experts:
            return {full_layer_name: nn.Parameter(nested, requires_grad=False)}
        put_experts(layer.module, layer.parameter, nested)
        experts = layer.module.get_submodule(layer.parameter)
        initialized: Any
        for initialized in (experts, experts.weight):  # but not what else the module holds
            initialized._is_hf_initialized = True
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        return {}

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("quantizing cannot be undone")


class Deserialize(ConversionOps):
    """The tensors that a weight is stored as -> the weight."""

    def __init__(self, quantizer: GrinqhHfQuantizer) -> None:
        self.hf_quantizer = quantizer

    @staticmethod
    def patterns(names: Iterable[str]) -> tuple[list[str], str]:
        """(source patterns, target) of these weights' tensors for transformers' converter."""
        modules = "|".join(re.escape(name.removesuffix(_WEIGHT)) for name in names)
        return [rf"^({modules})\.weight{suffix}$" for suffix in SUFFIXES.values()], r"\1.weight"

    def convert(
        self,
        input_dict: dict[str, Any],
        *args: Any,
        full_layer_name: str = "",
        model: Any = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        tensors = {}
        for pattern, found in input_dict.items():
            suffix = pattern.rpartition(_WEIGHT)[2].removesuffix("$")
            tensors[suffix] = found[0] if isinstance(found, list) else found
        empty = model.get_parameter(full_layer_name)
        check_whole(empty, full_layer_name)
        weight = from_tensors(
            tensors,
            empty.shape,
            self.hf_quantizer.stored[full_layer_name],
            empty.dtype,
            full_layer_name,
        )
        weight = self.hf_quantizer.cut(weight, model, full_layer_name)
        return {full_layer_name: nn.Parameter(weight, requires_grad=False)}

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("the quantizer flattens weights itself")


def check_whole(place: Tensor, name: str) -> None:
    """Raises ValueError if transformers is about to cut a quantized weight in its own way."""
    if isinstance(place, DTensor):
        raise ValueError(  # noqa: TRY004
            f"{name}: is to be cut as {place.placements}, which quantized weights cannot be; "
            "expected transformers 5.23 or newer, and a tp_plan that cuts linear layers as colwise "
            "or rowwise and leaves experts whole"
        )


def prepare_places(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Of stored weights, by their names in files, what ``model`` calls them.

    They differ where a model is loaded without the head it was saved with, or with one. Experts
    among them are given their place in the model, which has no data yet.

    Raises:
        CheckpointError: a model of the class that was saved has no such weight.
    """
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    experts = {
        f"{module_name}.{parameter}{_WEIGHT}": (module, parameter)
        for module_name, module in model.named_modules()
        for parameter in expert_parameters(module)
    }
    prefix = f"{model.base_model_prefix}."
    places = {}
    for name in names:
        candidates = (name, prefix + name, name.removeprefix(prefix))
        own = next((one for one in candidates if one in known or one in experts), None)
        if own is not None:
            places[name] = own
        elif type(model).__name__ in (model.config.architectures or ()):
            raise CheckpointError(
                f"config.json: quantization_config.weights: {name}: {type(model).__name__} has no "
                "such weight"
            )
        if own in experts:
            module, parameter = experts[own]
            put_experts(module, parameter, untransposed(module, module._parameters[parameter]))
    return places
