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
from grinqh_ao.model import quantized_linears
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
    data: str | Sequence[str] | Iterable[Batch],
    bits: float | None = None,
    *,
    tokenizer: Callable[..., Any] | None = None,
    tokens: int = 4096,
    relative: float = RELATIVE,
) -> None:
    """Measures activations once, so that ``bits`` is met on average, and bits go where they help.

    Without it, thresholds follow from a formula. One forward pass in the dense path; each layer
    keeps a curve of 1.5 KB, from which the thresholds for any ``bits`` follow: the data is not
    needed again. In units of their average |x|, all layers get the same thresholds: they read
    ``bits`` together, some more and some less, which is closer to the full-precision model than
    equal bits in each (docs/quality.md). An output head keeps bits of its own. Works wherever the
    model runs: on a GPU, sharded, offloaded. Calibrate before ``torch.compile``: a compiled model
    compiles once more.

    Args:
        model: a model with weights quantized by ``quantize_(model, GrinqhConfig(...))``.
        data: texts, or batches of what the model takes: token ids [B, S], or a mapping with
            ``input_ids`` and maybe ``attention_mask`` (whose zeros are not counted). A few hundred
            tokens are enough. The first 16 positions of a sequence are not counted.
        bits: as in :func:`grinqh_ao.set_bits`; None keeps what each layer aims at now.
        tokenizer: of transformers; needed for texts.
        tokens: how many tokens of the texts to use at most, in sequences of 512.
        relative: how much a token's thresholds follow its own mean |x|, from 0 (not at all) to 1.
            The more, the less bits drift on text of another kind; the less, the more bits go to
            the tokens that are large. Quality hardly depends on it (docs/quality.md).

    Raises:
        ValueError: nothing in ``model`` is quantized, ``bits`` is out of range for a layer, texts
            come without a tokenizer, or there is no token to count; the model is unchanged.
    """
    layers = list(quantized_linears(model))
    if not layers:
        raise ValueError(
            f"model={type(model).__name__}: no layer is quantized; "
            "call quantize_(model, GrinqhConfig(bits=...)) first"
        )
    if not 0 <= relative <= 1:
        raise ValueError(f"relative={relative!r}: expected a number from 0 to 1")
    if bits is not None:
        for name, _, weight in layers:
            check_bits(bits, weight.levels, name=f"bits of {name or 'the layer'}")
    calibrate_layers(model, layers, _batches(data, tokenizer, tokens), bits, relative)


def calibrate_layers(
    model: nn.Module,
    layers: list[tuple[str, nn.Module, GrinqhTensor]],
    batches: Iterable[Batch],
    bits: float | None = None,
    relative: float = RELATIVE,
) -> None:
    """:func:`calibrate` of some layers, as ``model.quantized_linears`` gives them."""
    histograms = _collect(model, batches, layers, relative)
    if all(histogram.empty for histogram in histograms.values()):
        raise ValueError(
            f"data has no token to count: sequences must be longer than {FIRST_POSITIONS} tokens"
        )
    seen = {weight: histograms[n] for n, _, weight in layers if not histograms[n].empty}
    missed = [name for name, _, weight in layers if weight not in seen]
    # An output head has bits of its own; all others share what is asked for.
    heads = [[weight] for weight in seen if weight.min_bits]
    for group in [[weight for weight in seen if not weight.min_bits], *heads]:
        sizes = [weight.numel() for weight in group]
        found = common_curves([seen[weight] for weight in group], sizes) if group else []
        for weight, curve in zip(group, found, strict=True):
            weight.calibrate(curve, bits)
    if missed:
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


def _batches(
    data: str | Sequence[str] | Iterable[Batch],
    tokenizer: Callable[..., Any] | None,
    tokens: int,
) -> Iterable[Batch]:
    texts: Any = None
    if isinstance(data, str) or (isinstance(data, Sequence) and data and isinstance(data[0], str)):
        texts = data
    if texts is None:
        return data  # type: ignore[return-value]
    if tokenizer is None:
        raise ValueError("tokenizer=None: expected the model's tokenizer, because data is text")
    return token_batches(texts, tokenizer, tokens)


@torch.no_grad()
def _collect(
    model: nn.Module,
    batches: Iterable[Batch],
    layers: list[tuple[str, nn.Module, GrinqhTensor]],
    relative: float,
) -> dict[str, Histogram]:
    histograms = {name: Histogram(relative, weight.device) for name, _, weight in layers}
    counter = _Counter()
    handles = []
    for name, module, _ in layers:
        hook = functools.partial(counter.count, histograms[name])
        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    device = next(model.parameters()).device
    try:
        with torch.compiler.set_stance("force_eager"), _evaluating(model):  # hooks must run
            for batch in tqdm(batches, desc="calibrating", unit="batch", disable=None):
                inputs = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
                for key, value in inputs.items():
                    inputs[key] = value.to(device) if isinstance(value, Tensor) else value
                counter.mask = inputs.get("attention_mask")
                model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return histograms


class _Counter:
    """Counts what layers see; what several layers see one after the other is counted once."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self._input: Tensor | None = None
        self._counted_before: Histogram | None = None
        self._before = Tensor()

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
        histogram.add(self._counted(x))

    def _counted(self, x: Tensor) -> Tensor:
        """[tokens, K]: of x [B, S, K] what is no padding and no first position."""
        if x.dim() == 3:
            keep = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
            if self.mask is not None and self.mask.shape == keep.shape:
                keep = self.mask.bool().to(x.device)
            return x[keep & (keep.cumsum(1) > FIRST_POSITIONS)]
        return x.reshape(-1, x.shape[-1])


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
