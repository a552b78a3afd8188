"""A ``quantize_`` call: all its layers checked before one is changed; then one layer at a time.

TorchAO hands a config's handler one module at a time, without its name and without the model.
Neither a useful error, nor "checked before any is changed", nor tied weights can be done with
that, so the handler looks up the ``quantize_`` call it was called from, and does the whole of its
work when the first module arrives. For the modules that follow nothing is left to do.
"""

from __future__ import annotations

import logging
import operator
import sys
from collections import deque
from collections.abc import Iterable
from itertools import repeat
from typing import Any, cast

from torch import Tensor, nn
from tqdm import tqdm

from grinqh_ao.calibration import calibrate_layers
from grinqh_ao.codec import check_values
from grinqh_ao.config import HEAD_NAMES, GrinqhConfig
from grinqh_ao.experts import projections_of_experts, put_experts, untransposed
from grinqh_ao.layers import adopt
from grinqh_ao.memory import give_back
from grinqh_ao.model import by_type, first_few, quantized_linears, summary
from grinqh_ao.selection import Layer, QuantizeCall, enclosing_call
from grinqh_ao.ties import Owners, held_elsewhere, owners_of_parameters
from grinqh_ao.torchao_tensor import SUPPORTED_DTYPES, GrinqhTensor

logger = logging.getLogger("grinqh_ao")

# A weight that is also an embedding's needs a highest level of at least this many bits.
_LOWEST_EMBEDDING_LEVEL = 6


def handle(module: nn.Module, config: GrinqhConfig, parameter_name: str) -> None:
    """Called by ``quantize_`` for every module it selects.

    Raises:
        TypeError: the filter selected something that is no linear layer.
        ValueError: a weight is not finite or has no data; nothing has been changed.
    """
    call = enclosing_call(config) or QuantizeCall(module, config, None)
    is_linear = parameter_name == "weight" and isinstance(module, nn.Linear)
    if call.by_name and not is_linear and parameter_name not in projections_of_experts(module):
        _say_what_cannot_be_served(call, module, parameter_name)
        return
    if module not in call.modules:
        # Called by hand, or by a filter that changed its mind since TorchAO asked it.
        call.add(module, config)
    elif call.done:
        return
    call.done = True
    _quantize(call)


def _quantize(call: QuantizeCall) -> None:
    owners = owners_of_parameters(call.model)
    before = [layer for layer in call.layers if isinstance(layer.weight, GrinqhTensor)]
    todo = plan(call, owners)
    for layer in todo:
        try:
            check_values(cast(Tensor, layer.weight))
        except ValueError as error:
            raise ValueError(f"{layer}: {error}; nothing was quantized") from None
    # Up to here nothing has been changed.
    for layer in before:  # which a call that was interrupted may have left out
        _adopt_all(owners.get(cast(Tensor, layer.weight), []))
    try:
        _quantize_layers(todo, owners, call.device)
    finally:
        give_back()
        if any(isinstance(layer.weight, GrinqhTensor) for layer in call.layers):
            _tell_transformers(call.model)
    # A call that goes on where another was interrupted also calibrates what that one quantized.
    uncalibrated = [layer for layer in before if cast(GrinqhTensor, layer.weight).curve is None]
    wanted = [layer for layer in [*todo, *uncalibrated] if layer.config._calibration is not None]
    _calibrate(call.model, wanted)
    if todo:
        after = summary(call.model)
        for line in by_type(after.dense, but=("Linear", "Embedding")):
            logger.warning(
                "GrinqhConfig quantizes nn.Linear layers and experts in transformers' form; "
                "left dense: %s",
                line,
            )
        logger.info("%s", after)
    elif before and not wanted:
        logger.warning(
            "quantize_ changed nothing: %d layers it selected are quantized already, and their "
            "bits and calibration stay as they are; set_bits(model, ...) and calibrate(model, ...) "
            "change them",
            len(before),
        )


def _quantize_layers(todo: dict[Layer, bool], owners: Owners, device: Any) -> None:
    with tqdm(todo.items(), desc="quantizing", unit="layer", disable=None) as progress:
        for done, (layer, is_head) in enumerate(progress):
            try:
                _quantize_layer(layer, is_head, owners, device)
            except BaseException as error:
                error.add_note(
                    f"while quantizing {layer}; {done} of {len(todo)} layers are quantized and "
                    "the others unchanged: call quantize_ again to go on"
                )
                raise


def _tell_transformers(model: nn.Module) -> None:
    """So that ``save_pretrained`` works."""
    saving: Any = sys.modules.get("grinqh_ao.huggingface.quantizer")  # absent without transformers
    if saving is None:
        return
    told: set[nn.Module] = set()  # with a model those within it
    for part in saving.quantized_models(model):
        if part in told:
            continue
        told.update(part.modules())
        try:
            saving.attach(part)
        except ValueError as error:
            logger.warning("save_pretrained will not work: %s", error)


def _calibrate(model: nn.Module, layers: Iterable[Layer]) -> None:
    """With the data of the layers' configs, each of which most layers will share."""
    alike: dict[tuple[int, float | None], list[Layer]] = {}
    for layer in layers:
        key = id(layer.config._calibration), layer.config._stored_bits
        alike.setdefault(key, []).append(layer)
    batches: dict[int, list[Any]] = {}  # several groups may share what can be read but once
    for (shared, stored_bits), group in alike.items():
        holders = {layer.linear for layer in group}
        found = [(n, module, w) for n, module, w in quantized_linears(model) if module in holders]
        try:
            if shared not in batches:
                batches[shared] = list(group[0].config._calibration)
            calibrate_layers(model, found, batches[shared], stored_bits=stored_bits)
        except BaseException as error:
            error.add_note(
                f"{len(group)} layers are quantized, but not calibrated: call quantize_ again, or "
                "calibrate(model, ...)"
            )
            raise


def plan(call: QuantizeCall, owners: Owners) -> dict[Layer, bool]:
    """The layers to quantize, and whether each is an output head. Says which are left dense.

    Values are not looked at, so that a model whose weights are still to come can be planned for.
    """
    for layer in call.layers:
        layer.config.check()
        if layer.config._calibration is not None and layer.module is call.model:
            raise ValueError(
                f"calibration: {layer} is quantized without the model around it; "
                "leave calibration out and call calibrate(model, ...) afterwards"
            )
        if not isinstance(layer.module, nn.Linear) and not layer.holds_experts:
            raise TypeError(
                f"{layer}: filter_fn selected a {type(layer.module).__name__}; "
                "GrinqhConfig quantizes nn.Linear layers"
            )
    todo, reasons = {}, {}
    selected = {layer.module: layer for layer in call.layers}
    adapters = _modules_of_adapters(call.model)
    if found := adapters & call.modules:
        logger.info("%d layers of adapters are left dense, to be trained", len(found))
    for layer in call.layers:
        if isinstance(layer.weight, GrinqhTensor) or layer.module in adapters:
            continue
        is_head = _is_head(call.model, layer, owners)
        if reason := _why_dense(layer, selected, owners):
            reasons[layer] = reason
        elif is_head and layer.config.head_bits is None:
            reasons[layer] = "it is the output head, and head_bits is None"
        else:
            todo[layer] = is_head
    for layer, reason in held_elsewhere(todo, owners).items():
        del todo[layer]
        reasons[layer] = reason
    _say_what_stays_dense(reasons)
    return todo


def _say_what_stays_dense(reasons: dict[Layer, str]) -> None:
    """One line for each reason."""
    alike: dict[str, list[str]] = {}
    for layer, reason in reasons.items():
        alike.setdefault(reason, []).append(str(layer))
    for reason, names in alike.items():
        if len(names) == 1:
            logger.warning("%s is left dense: %s", names[0], reason)
        else:
            few = first_few(names)
            logger.warning("%d layers are left dense: %s (%s)", len(names), reason, few)


def _quantize_layer(layer: Layer, is_head: bool, owners: Owners, device: Any) -> None:
    weight = layer.weight
    if weight is None or isinstance(weight, GrinqhTensor):  # tied to one done before
        return
    dense = untransposed(layer.module, weight.to(device or weight.device))
    nested = nested_weight(dense, layer.config, is_head)
    del dense
    # pop: lets go of the dense weight
    holders = owners.pop(weight, [(layer.name, layer.module)])
    if layer.holds_experts:
        put_experts(layer.module, layer.parameter, nested)
        return
    parameter = nn.Parameter(nested, requires_grad=False)
    tables = [holder._parameters for _, holder in holders]
    # One call into C, which Ctrl-C cannot split: tied modules stay tied.
    deque(map(operator.setitem, tables, repeat("weight"), repeat(parameter)), maxlen=0)
    _adopt_all(holders)


def _adopt_all(holders: list[tuple[str, nn.Module]]) -> None:
    """All modules that have a weight."""
    for _, holder in holders:
        adopt(holder, shared=len(holders) > 1)


def nested_weight(dense: Tensor, config: GrinqhConfig, is_head: bool) -> GrinqhTensor:
    """The weight [N, K], or experts' weights [E, N, K], quantized as ``config`` says."""
    min_bits = 0.0
    if is_head and config.head_bits is not None:
        min_bits = float(min(config.head_bits, config.levels[-1]))
    experts: list[GrinqhTensor] = [
        GrinqhTensor.from_hp(weight, config.bits, config.levels, min_bits)
        for weight in (dense if dense.dim() == 3 else [dense])
    ]
    return GrinqhTensor.stack(experts) if dense.dim() == 3 else experts[0]


def _why_dense(layer: Layer, selected: dict[nn.Module, Layer], owners: Owners) -> str:
    """Why a linear layer cannot be quantized; empty if it can."""
    weight = layer.weight
    if weight is None:
        return "its weight is not a plain parameter"
    if nn.parameter.is_lazy(weight):
        return "its weight is not initialized yet"
    if type(weight) not in (Tensor, nn.Parameter):
        return f"its weight is a {type(weight).__name__} already"
    if weight.dtype not in SUPPORTED_DTYPES:
        return f"its weight has dtype {weight.dtype}, expected one of {SUPPORTED_DTYPES}"
    if weight.numel() == 0:
        return f"its weight is empty, of shape {tuple(weight.shape)}"
    for name, owner in owners.get(weight, ()):
        if owner is layer.module:
            continue
        if isinstance(owner, nn.Embedding):
            if owner.max_norm is not None:
                return f"it shares its weight with {name}, an embedding that changes it (max_norm)"
            if layer.config.levels[-1] < _LOWEST_EMBEDDING_LEVEL:
                return f"it shares its weight with {name}, an embedding: too coarse for it"
        elif not isinstance(owner, nn.Linear):
            return f"it shares its weight with {name}, a {type(owner).__name__}"
        elif owner not in selected or selected[owner].config != layer.config:
            return f"it shares its weight with {name}, which is not to be quantized alike"
    return ""


def _modules_of_adapters(model: nn.Module) -> set[nn.Module]:
    """What PEFT added."""
    found: set[nn.Module] = set()
    for module in model.modules():
        for name in getattr(module, "adapter_layer_names", ()):
            added = getattr(module, name, None)
            if isinstance(added, nn.Module):
                found.update(added.modules())
    return found


def _is_head(model: nn.Module, layer: Layer, owners: Owners) -> bool:
    """Whether a layer, or one that shares its weight, turns hidden states into logits."""
    find = cast(Any, getattr(model, "get_output_embeddings", None))  # transformers
    head = find() if find else None
    holders = owners.get(layer.weight, []) if layer.weight is not None else []
    return any(
        name.rpartition(".")[2] in HEAD_NAMES or owner is head or isinstance(owner, nn.Embedding)
        for name, owner in [(layer.name, layer.module), *holders]
    )


def _say_what_cannot_be_served(call: QuantizeCall, module: nn.Module, parameter_name: str) -> None:
    """A pattern as wide as "re:.*" reaches norms and biases too, but a name is meant."""
    name = next((n for n, m in call.model.named_modules() if m is module), "")
    parameter = f"{name}.{parameter_name}" if name else parameter_name
    if call.names(parameter) or (parameter_name == "weight" and call.names(name)):
        logger.warning(
            "%s is left dense: GrinqhConfig quantizes the weights of nn.Linear layers, this is in "
            "a %s",
            parameter,
            type(module).__name__,
        )
