"""The quantizer that transformers calls while it loads and saves."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantizer

from grinqh_ao.checkpoint import Attributes, to_tensors
from grinqh_ao.codec import SCALE_GROUP
from grinqh_ao.errors import CheckpointError
from grinqh_ao.huggingface.config import QUANT_METHOD, GrinqhHfConfig, groups_of
from grinqh_ao.huggingface.files import SAVE_ID, check_files
from grinqh_ao.huggingface.loading import Deserialize, Quantize, prepare_places
from grinqh_ao.layers import adopt
from grinqh_ao.memory import give_back
from grinqh_ao.model import is_quantized, is_sharded, quantized_modules, summary
from grinqh_ao.quantization import plan
from grinqh_ao.selection import Layer, QuantizeCall
from grinqh_ao.ties import owners_of_parameters
from grinqh_ao.torchao_tensor import GrinqhTensor

ALIGNMENT = 64


@register_quantizer(QUANT_METHOD)
class GrinqhHfQuantizer(HfQuantizer):
    """Quantizes layer by layer while transformers loads, or loads and saves what is quantized."""

    quantization_config: GrinqhHfConfig

    def __init__(self, quantization_config: GrinqhHfConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self.planned: dict[str, tuple[Layer, bool]] = {}  # by parameter; whether it is a head
        self.stored: dict[str, Attributes] = {}  # by parameter
        self.places: dict[str, str] = {}  # names in files -> parameters
        self.weights_since_giving_back = 0

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        devices = device_map.values() if isinstance(device_map, dict) else [device_map]
        if any(str(device) in ("disk", "meta") for device in devices):
            raise ValueError(
                "device_map: quantized weights cannot be offloaded to disk or meta, only to the CPU"
            )

    # ---- loading

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        if self.pre_quantized:
            attributes = self.quantization_config.attributes()
            self.places = prepare_places(model, attributes)
            self.stored = {own: attributes[name] for name, own in self.places.items()}
            files = checkpoint_files or ()
            if files and all(file.endswith(".safetensors") for file in files):
                shapes = {n: model.get_parameter(own).shape for n, own in self.places.items()}
                check_files(files, model, attributes, shapes, self.quantization_config.save_id)
            return
        config = self.quantization_config
        call = QuantizeCall(model, config.to_grinqh_config(), config.selects)
        for target, source in model.all_tied_weights_keys.items():  # transformers does it later
            module, _, name = target.rpartition(".")
            setattr(model.get_submodule(module), name, model.get_parameter(source))
        owners = owners_of_parameters(model)
        for layer, is_head in plan(call, owners).items():
            assert layer.weight is not None
            if layer.holds_experts:
                self.planned[layer.name] = layer, False
                continue
            for name, _ in owners[layer.weight]:  # tied ones: any may be what the file has
                self.planned[f"{name}.weight"] = layer, is_head

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.planned or param_name in self.stored

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        levels = self.quantization_config.levels
        if param_name in self.stored:
            levels = list(self.stored[param_name].levels)
        elif param_name not in self.planned:
            return param.element_size()
        return levels[-1] / 8 + 1 / SCALE_GROUP

    def update_parallel_plan(self, model: Any, plan: dict[str, str]) -> None:
        # transformers 5.23; older ones do not call this.
        from grinqh_ao.huggingface.tensor_parallel import plan_cuts

        plan_cuts(model, plan, [*self.planned, *self.stored])

    def cut(self, weight: GrinqhTensor, model: Any, name: str) -> GrinqhTensor:
        """This rank's part of a weight, under tensor parallelism; else all of it."""
        if not is_sharded(model):
            return weight
        from grinqh_ao.huggingface.tensor_parallel import cut

        return cut(weight, model.get_submodule(name.rpartition(".")[0]))

    def get_quantize_ops(self) -> Quantize:
        return Quantize(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        if not self.stored:
            return []
        # Exactly the stored weights: what is dense is loaded as in any model.
        patterns, target = Deserialize.patterns(self.places)
        converter = WeightConverter(patterns, target, [Deserialize(self)])
        # Cut before they go to a GPU: then only this rank's part is read from the file.
        converter.force_cpu = distributed.is_available() and distributed.is_initialized()
        return [converter]

    def update_weight_conversions(self, weight_conversions: Any, *model: Any) -> Any:
        # Saved names are the model's own already, and not all renamings would leave them alone.
        return self.get_weight_conversions() if self.pre_quantized else weight_conversions

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name in self.stored:
            if type(parameters[name]) is nn.Parameter:
                # In a state_dict: files are checked before.
                raise CheckpointError(f"{name}: missing")
        owners = owners_of_parameters(model)
        for _, module, _ in quantized_modules(model):
            held: Any = module.weight
            held.requires_grad_(False)  # transformers made a parameter of it anew
            adopt(module, shared=len(owners[held]) > 1)
        for parameter in model.parameters():
            # Tensors mapped from a file lie anywhere, and products of dense ones differ by that in
            # their last bit.
            if isinstance(parameter, GrinqhTensor) or parameter.device.type != "cpu":
                continue
            if parameter.data_ptr() % ALIGNMENT:
                parameter.data = parameter.data.clone()
        give_back()
        for part in quantized_models(model):
            part.hf_quantizer = self
        self.planned = {}  # it holds modules and would be copied with the model
        return model

    # ---- saving

    @torch.inference_mode(False)  # there tensors from outside of it cannot be detached
    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        if is_sharded(model):
            raise ValueError(
                "a model under tensor parallelism has parts of its weights only: save it before or "
                "load it without tp_plan"
            )
        state = model.state_dict()
        attributes: dict[str, Attributes] = {}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        tied = {
            target: source
            for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items()
            if _same(parameters.get(target), parameters.get(source))
        }
        with_data = {f"{name}.weight": weight for name, _, weight in quantized_modules(model)}
        with_data |= {tied[name]: weight for name, weight in with_data.items() if name in tied}
        for name, parameter in parameters.items():
            if not isinstance(parameter, GrinqhTensor):
                continue
            del state[name]
            if name not in tied:
                weight = with_data.get(name, parameter)
                attributes[name] = Attributes.of(weight)
                state |= {name + suffix: data for suffix, data in to_tensors(weight).items()}
        for name, tensor in state.items():
            if tensor.is_meta:
                state[name] = load_offloaded_parameter(model, name)
        bits = summary(model).bits
        found = self.quantization_config
        levels = {level for one in attributes.values() for level in one.levels}
        self.quantization_config = GrinqhHfConfig(
            found.bits if math.isnan(bits) else bits,
            sorted(levels),
            found.head_bits,
            found.modules_to_not_convert,
            weights=groups_of(attributes),
            save_id=secrets.token_hex(8),
        )
        for part in model.modules():
            if isinstance(part, PreTrainedModel) and hasattr(part.config, "quantization_config"):
                del part.config.quantization_config
        model.config.quantization_config = self.quantization_config
        # Names are saved as the model has them: conversions are made for dense weights.
        model._weight_conversions = []
        return state, {SAVE_ID: str(self.quantization_config.save_id)}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters are

    @property
    def is_compileable(self) -> bool:
        return True


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two parameters are one. Offloaded, they are two even where their data is one."""
    if one is None or other is None:
        return False
    return one is other or (one.is_meta and other.is_meta)


def quantized_models(model: nn.Module) -> Iterator[Any]:
    """``model`` and the models within it, as the one without a head, if they are quantized."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and is_quantized(part):
            yield part


def attach(model: PreTrainedModel) -> None:
    """Lets ``save_pretrained`` know that ``model`` is quantized, however that came about.

    ``quantize_`` calls it for whole models.

    Raises:
        ValueError: nothing in ``model`` is quantized by GRINQH, or something by another quantizer.
    """
    weights = [weight for _, _, weight in quantized_modules(model)]
    if not weights:
        raise ValueError(f"model={type(model).__name__}: no layer is quantized by GRINQH")
    if others := summary(model).otherwise:
        raise ValueError(
            f"model={type(model).__name__}: {len(others)} weights are quantized otherwise, among "
            f"them {next(iter(others))}; they cannot be saved together"
        )
    if isinstance(getattr(model, "hf_quantizer", None), GrinqhHfQuantizer):
        return
    body = [weight for weight in weights if not weight.min_bits] or weights
    heads = [weight.min_bits for weight in weights if weight.min_bits]
    config = GrinqhHfConfig(body[0].bits, body[0].levels, heads[0] if heads else None)
    for part in quantized_models(model):
        # Also in place of another quantizer, of a model that came from GGUF and was made dense.
        # Configs, which models may share, are changed by saving only. Not is_quantized either,
        # with which transformers would refuse half() and float().
        part.hf_quantizer = GrinqhHfQuantizer(config, pre_quantized=False)
