"""Calibration: how large each layer's activations get, so that ``bits`` is met layer by layer."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from grinqh_ao.grading import check_bits
from grinqh_ao.model import some_quantized_linears
from grinqh_ao.tails import Histogram, common_curves
from grinqh_ao.tensor import GrinqhTensor

logger = logging.getLogger("grinqh_ao")

SEQUENCE = 512
# The first positions of a text attract massive activations, and take the dense path as a prompt.
FIRST_POSITIONS = 16

RELATIVE = 0.25
# Of a token, on average: a longer text is not tokenized to its end.
_MOST_CHARACTERS = 32

Batch = Tensor | Mapping[str, Any]


def calibrate(
    model: nn.Module,
    data: str | Sequence[str] | Batch | Iterable[Batch],
    bits: float | None = None,
    *,
    tokenizer: Callable[..., Any] | None = None,
    tokens: int = 4096,
    relative: float = RELATIVE,
) -> None:
    """Measures activations once, so that ``bits`` is met on average, and bits go where they help.

    Without it, thresholds follow from a formula. One forward pass, of prompts, so in the dense
    path; each layer keeps a curve of 1.5 KB, from which the thresholds for any ``bits`` follow: the
    data is not needed again. In units of their average |x|, all layers get the same thresholds:
    they read ``bits`` together, some more and some less. An output head keeps bits of its own.
    Batches are moved to the device of the model's first parameter. Calibrate before
    ``torch.compile``: a compiled model compiles once more.

    Args:
        model: a model with weights quantized by ``quantize_(model, GrinqhConfig(...))``.
        data: texts, or a batch or batches of what the model takes: token ids [B, S], or a mapping
            with ``input_ids`` and maybe ``attention_mask`` (whose zeros are not counted). A few
            hundred tokens are enough. The first 16 positions of a sequence are not counted, but for
            layers that see only some of the positions, as the experts of a mixture do.
        bits: as in :func:`grinqh_ao.set_bits`; None keeps what each layer aims at now.
        tokenizer: of transformers; needed for texts.
        tokens: how many tokens of the texts to use at most, in sequences of 512.
        relative: how much a token's thresholds follow its own mean |x|, from 0 (not at all) to 1.
            The more, the less bits drift on text of another kind; the less, the more bits go to
            the tokens that are large.

    Raises:
        TypeError: ``data`` is neither texts nor batches.
        ValueError: nothing in ``model`` is quantized or a layer is offloaded to the meta device,
            an argument is out of range, texts come without a tokenizer, or there is nothing to
            count; the model is unchanged.
    """
    layers = some_quantized_linears(model)
    calibrate_layers(model, layers, _batches(data, tokenizer, tokens), bits, relative)


def calibrate_layers(
    model: nn.Module,
    layers: list[tuple[str, nn.Module, GrinqhTensor]],
    batches: Iterable[Batch],
    bits: float | None = None,
    relative: float = RELATIVE,
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
    # Layers with one weight, tied ones, have one histogram.
    histograms = {weight: Histogram(relative) for _, _, weight in layers}
    _collect(model, batches, layers, histograms)
    if all(histogram.empty for histogram in histograms.values()):
        raise ValueError(
            "data has nothing to count: expected sequences of more than "
            f"{FIRST_POSITIONS} tokens, and activations that are finite"
        )
    seen = {weight: histogram for weight, histogram in histograms.items() if not histogram.empty}
    # An output head has bits of its own; all others share what is asked for.
    heads = [[weight] for weight in seen if weight.min_bits]
    for group in [[weight for weight in seen if not weight.min_bits], *heads]:
        sizes = [weight.numel() for weight in group]
        found = common_curves([seen[weight] for weight in group], sizes) if group else []
        for weight, curve in zip(group, found, strict=True):
            weight.calibrate(curve, bits)
    if missed := [name for name, _, weight in layers if weight not in seen]:
        logger.warning(
            "%d of %d layers saw no token and keep the formula: %s%s",
            len(missed),
            len(layers),
            ", ".join(missed[:4]),
            ", ..." if len(missed) > 4 else "",
        )


def token_batches(
    texts: str | Sequence[str], tokenizer: Callable[..., Any], tokens: int = 4096
) -> list[Tensor]:
    """Texts as batches of token ids for :func:`calibrate`, int64 [1, 512] each.

    Texts are put one after the other, up to ``tokens`` tokens; the last batch may be shorter.
    """
    texts = [texts] if isinstance(texts, str) else texts
    ids: list[int] = []
    for text in texts:
        if len(ids) >= tokens:
            break
        ids += tokenizer(text[: tokens * _MOST_CHARACTERS])["input_ids"]
    found = torch.tensor(ids[:tokens], dtype=torch.int64)
    return [batch[None] for batch in found.split(SEQUENCE) if len(batch) > FIRST_POSITIONS]


def check_batches(data: object, name: str = "data") -> None:
    """Raises TypeError or ValueError unless ``data`` may be batches."""
    if isinstance(data, str | bytes | Tensor | Mapping) or not isinstance(data, Iterable):
        raise TypeError(
            f"{name} is a {type(data).__name__}: expected batches of token ids [B, S], or of "
            "mappings with input_ids"
        )
    if isinstance(data, Sequence):
        if not data:
            raise ValueError(f"{name} is empty: expected batches of token ids [B, S]")
        for batch in data:
            _check_batch(batch, name)


def _check_batch(batch: object, name: str = "data") -> None:
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        what = f"shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(batch).__name__
        raise TypeError(
            f"{name} has a batch of {what}: expected token ids [B, S], or a mapping with input_ids"
        )


def _batches(data: Any, tokenizer: Callable[..., Any] | None, tokens: int) -> Iterable[Batch]:
    if isinstance(data, Tensor | Mapping):
        data = [data]
    if isinstance(data, str) or (isinstance(data, Sequence) and data and isinstance(data[0], str)):
        if tokenizer is None:
            raise ValueError("tokenizer=None: expected the model's tokenizer, because data is text")
        if not isinstance(tokens, int) or tokens <= FIRST_POSITIONS:
            raise ValueError(f"tokens={tokens!r}: expected a whole number above {FIRST_POSITIONS}")
        return token_batches(data, tokenizer, tokens)
    check_batches(data)
    batches: Iterable[Batch] = data
    return batches


@torch.no_grad()
def _collect(
    model: nn.Module,
    batches: Iterable[Batch],
    layers: list[tuple[str, nn.Module, GrinqhTensor]],
    histograms: dict[GrinqhTensor, Histogram],
) -> None:
    counter = _Counter()
    handles = []
    for _, module, weight in layers:
        hook = functools.partial(counter.count, histograms[weight])
        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    device = next(model.parameters()).device
    try:
        with torch.compiler.set_stance("force_eager"), _evaluating(model):  # hooks must run
            for batch in tqdm(batches, desc="calibrating", unit="batch", disable=None):
                _check_batch(batch)
                inputs = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
                for key, value in inputs.items():
                    inputs[key] = value.to(device) if isinstance(value, Tensor) else value
                counter.start(inputs["input_ids"], inputs.get("attention_mask"))
                model(**inputs)
    finally:
        for handle in handles:
            handle.remove()


class _Counter:
    """Counts what layers see; what several layers see one after the other is counted once."""

    def __init__(self) -> None:
        self._keep = Tensor()
        self._input: Tensor | None = None
        self._counted_before: Histogram | None = None
        self._before = Tensor()

    def start(self, input_ids: Tensor, mask: Tensor | None) -> None:
        """A new batch; of its positions no padding counts, and not the first ones."""
        keep = torch.ones_like(input_ids, dtype=torch.bool)
        if mask is not None and mask.shape == keep.shape:
            keep = mask.bool()
        self._keep = keep & (keep.cumsum(1) > FIRST_POSITIONS)

    def count(
        self,
        histogram: Histogram,
        module: nn.Module,
        args: tuple[Tensor, ...],
        kwargs: dict[str, Tensor],
    ) -> None:
        x = args[0] if args else kwargs["input"]
        other = self._counted_before
        if x is self._input and other and histogram.average in (None, other.average):
            histogram.average = other.average
            histogram.counts += other.counts - self._before
            return
        self._input, self._counted_before, self._before = x, histogram, histogram.counts.clone()
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) == self._keep.numel():  # else a part of the positions, in an order of its own
            rows = rows[self._keep.flatten().to(x.device)]
        histogram.add(rows)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout; afterwards every module is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
