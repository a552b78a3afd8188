"""Calibration: how large each layer's activations get, so that ``bits`` is met layer by layer."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from grinqh_ao.batches import FIRST_POSITIONS, Batch, check_batches, token_batches
from grinqh_ao.compact import ChannelUse, check_stored_bits
from grinqh_ao.experts import ExpertLinears
from grinqh_ao.grading import check_bits, most_bits
from grinqh_ao.model import first_few, is_sharded, require_quantized_linears
from grinqh_ao.observing import Layers, Observer, observe
from grinqh_ao.tails import Histogram, common_curves
from grinqh_ao.torchao_tensor import GrinqhTensor

logger = logging.getLogger("grinqh_ao")

# Importance makes no layer's thresholds larger or smaller than by this.
MAX_UNIT_RATIO = 4.0


def calibrate(
    model: nn.Module,
    data: str | Sequence[str] | Batch | Iterable[Batch],
    bits: float | None = None,
    *,
    tokenizer: Callable[..., Any] | None = None,
    tokens: int = 4096,
    relative: float = 0.0,
    importance: bool = True,
    stored_bits: float | None = None,
) -> None:
    """Measures activations once, so that ``bits`` is met on average, and bits go where they help.

    Without it, thresholds follow from a formula. One pass over the data, of prompts, so in the
    dense path; each layer keeps a curve of 1.5 KB (3 KB in compact storage), from which the
    thresholds for any ``bits`` follow: the data is not needed again. Layers read ``bits`` together,
    more where errors cost more and fewer where they cost less. An output head keeps bits of its
    own. Batches are moved to the device of the model's first parameter. Calibrate before
    ``torch.compile``: a compiled model compiles once more.

    Args:
        model: a model with weights quantized by ``quantize_(model, GrinqhConfig(...))``.
        data: texts, or a batch or batches of what the model takes: token ids [B, S], or a mapping
            with ``input_ids`` and maybe ``attention_mask`` (whose zeros are not counted). A few
            hundred tokens are enough, more for the experts of a mixture, each of which sees a part
            of them. The first 16 positions of a sequence are not counted, but for linear layers
            that see only some of the positions.
        bits: as in :func:`grinqh_ao.set_bits`; None keeps what each layer aims at now.
        tokenizer: of transformers; needed for texts.
        tokens: how many tokens of the texts to use at most, in sequences of 512.
        relative: how much a token's thresholds follow its own mean ``|x|``, from 0 (not at all,
            which GPUs decode faster: there is no mean to compute) to 1. The more, the less bits
            drift on text of another kind; the less, the more bits go to tokens that are large.
        importance: find out what errors in each layer cost, by a backward pass for each batch, and
            share out bits accordingly. The model has to return logits. Takes memory for the
            activations of one batch, and brings all offloaded weights to their device at once;
            without it, the thresholds of all layers are the same in units of their average ``|x|``.
        stored_bits: compact storage, above 4 and below 8: levels above 4 are dropped of all
            channels but those that need them most, so that this many bits are stored per weight,
            scales aside. Cannot be undone. A second pass. Not for output heads, experts, nor for
            weights without levels 4 and 8.

    Raises:
        TypeError: ``data`` is neither texts nor batches.
        ValueError: nothing in ``model`` is quantized or a layer is offloaded to the meta device,
            an argument is out of range, texts come without a tokenizer, there is nothing to
            count, the model gives no logits with gradients or was made in inference mode (with
            ``importance``), no layer can be stored compactly, more ``bits`` are to be read than
            stored, or ``model`` is under tensor parallelism; it is unchanged.
    """
    layers = require_quantized_linears(model)
    if is_sharded(model):
        raise ValueError(
            "a model under tensor parallelism has only parts of its weights: calibrate it before"
        )
    batches = _batches(data, tokenizer, tokens)
    calibrate_layers(model, layers, batches, bits, relative, importance, stored_bits)


@torch.inference_mode(False)  # what is made there could not be counted on later
def calibrate_layers(
    model: nn.Module,
    layers: Layers,
    batches: Iterable[Batch],
    bits: float | None = None,
    relative: float = 0.0,
    importance: bool = True,
    stored_bits: float | None = None,
) -> None:
    """:func:`calibrate` of some layers, as ``model.quantized_linears`` gives them."""
    number = isinstance(relative, int | float) and not isinstance(relative, bool)
    if not number or not 0 <= relative <= 1:
        raise ValueError(f"relative={relative!r}: expected a number from 0 to 1")
    for name, _, weight in layers:
        if bits is not None:
            check_bits(bits, weight.levels, name=f"bits of {name or 'the layer'}")
        if weight.is_meta:
            raise ValueError(f"{name}: is on the meta device, offloaded or without data")
    for name, module, _ in layers:
        if isinstance(module, ExpertLinears) and module.weight.is_meta:
            raise ValueError(f"{name}: experts are offloaded; calibrate before offloading")
    kept: dict[GrinqhTensor, Tensor] = {}
    if stored_bits is not None:
        check_stored_bits(stored_bits)
        batches = list(batches)
        kept = _channels_to_keep(model, layers, batches, bits, stored_bits)

    observers = {
        weight: Observer(weight, Histogram(relative, kept.get(weight, _kept_before(weight))))
        for _, _, weight in layers  # tied layers have one weight
    }
    observe(model, batches, layers, observers, gradients=importance)
    seen = {weight: o for weight, o in observers.items() if not o.histogram.empty}
    if not seen:
        raise ValueError(
            "data has nothing to count: expected sequences of more than "
            f"{FIRST_POSITIONS} tokens, and activations that are finite"
        )
    # An output head has bits of its own; all others share what is asked for.
    heads = [[weight] for weight in seen if weight.min_bits]
    curves: dict[GrinqhTensor, Tensor] = {}
    for group in [[weight for weight in seen if not weight.min_bits], *heads]:
        if group:
            found = [seen[weight] for weight in group]
            histograms = [o.histogram for o in found]
            # What a layer reads: outputs times channels times tokens, and not all experts see all.
            sizes = [w.shape[0] * h.magnitudes for w, h in zip(group, histograms, strict=True)]
            made = common_curves(histograms, sizes, _units(found))
            curves |= dict(zip(group, made, strict=True))
    for name, _, weight in layers:
        if weight in curves or bits is not None:
            # Of several levels, or stored compactly, not all may reach the bits.
            most = most_bits(weight.levels, curves.get(weight, weight.curve))
            wanted = weight.bits if bits is None else bits
            check_bits(wanted, weight.levels, f"bits of {name or 'the layer'}", most)
    for weight, curve in curves.items():
        weight.calibrate(curve, bits, kept.get(weight))
    missed = {weight: name for name, _, weight in layers if weight not in seen}
    if bits is not None:
        for weight in missed:
            weight.set_bits(bits)
    for module in {module for _, module, _ in layers}:
        if isinstance(module, ExpertLinears):
            module.restack([weight for _, holder, weight in layers if holder is module])
    if missed:
        logger.warning(
            "%d of %d layers saw no token and keep the formula: %s",
            len(missed),
            len(layers),
            first_few([*missed.values()]),
        )


def _units(observers: Sequence[Observer]) -> list[float]:
    """What the thresholds of layers are to be in proportion to, beside their average magnitude.

    An error costs most in total where the product of the importance of a layer's errors and the
    square of its thresholds is the largest; bits are shared out best where it is equal everywhere.
    """
    found = {o: o.importance for o in observers}
    wanted = {
        o: 1 / (o.histogram.average * math.sqrt(cost))
        for o, cost in found.items()
        if cost and math.isfinite(cost) and o.histogram.average
    }
    if not wanted:
        return [1.0] * len(observers)
    middle = statistics.median(wanted.values())
    least, most = 1 / MAX_UNIT_RATIO, MAX_UNIT_RATIO
    return [min(max(wanted.get(o, middle) / middle, least), most) for o in observers]


def _channels_to_keep(
    model: nn.Module,
    layers: Layers,
    batches: Iterable[Batch],
    bits: float | None,
    stored_bits: float,
) -> dict[GrinqhTensor, Tensor]:
    """bool [K] for each weight that can be stored compactly and saw anything."""
    observers = {
        weight: Observer(weight, Histogram(1.0), ChannelUse(weight.shape[1], bits or weight.bits))
        for _, module, weight in layers
        if weight.can_be_compact and not isinstance(module, ExpertLinears)
    }
    if not observers:
        raise ValueError(
            f"stored_bits={stored_bits!r}: no layer can be stored compactly; expected weights with "
            "levels 4 and 8, not stored compactly before, other than output heads"
        )
    for weight in observers:
        wanted = weight.bits if bits is None else bits
        if wanted >= stored_bits:
            raise ValueError(f"bits={wanted:.4g}: expected less than stored_bits={stored_bits!r}")
    some = [(name, module, weight) for name, module, weight in layers if weight in observers]
    observe(model, batches, some, observers, gradients=False)
    return {
        weight: observer.use.kept(stored_bits)
        for weight, observer in observers.items()
        if observer.use and not observer.histogram.empty
    }


def _kept_before(weight: GrinqhTensor) -> Tensor | None:
    return None if weight.low is None else (weight.low >= 0).cpu()


def _batches(data: Any, tokenizer: Callable[..., Any] | None, tokens: int) -> Iterable[Batch]:
    if isinstance(data, Tensor | Mapping):
        data = [data]
    if isinstance(data, str) or (isinstance(data, Sequence) and data and isinstance(data[0], str)):
        if tokenizer is None:
            raise ValueError("tokenizer=None: expected the model's tokenizer, because data is text")
        return token_batches(data, tokenizer, tokens)
    check_batches(data)
    batches: Iterable[Batch] = data
    return batches
