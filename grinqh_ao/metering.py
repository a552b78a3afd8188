"""Measuring what decoding reads: bits, levels, bytes per token, stored size."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from grinqh_ao import decode_rule
from grinqh_ao.codec import SCALE_GROUP
from grinqh_ao.decode_rule import decoded_together, decoded_tokens
from grinqh_ao.eager import eagerly
from grinqh_ao.experts import ExpertLinears
from grinqh_ao.grading import ALL_LEVELS
from grinqh_ao.linear import first_decoded_row, wants_grad
from grinqh_ao.model import quantized_modules, require_quantized_linears
from grinqh_ao.torchao_tensor import GrinqhTensor

logger = logging.getLogger("grinqh_ao")


@dataclass(frozen=True)
class Reading:
    """What one layer, or a set of layers, read per decoded token.

    Up to 8 rows that are decoded together (a batch, beams, an assistant's draft) are read once, at
    the highest level any of them asks for, and count as one token.

    Attributes:
        weights: number of weights; of experts, of those that a token is routed to.
        code_bits: bits of codes read, per token.
        scale_bits: bits read per token of scales, and of what there is for each channel and row.
        padding_bits: bits of codes read per token for outputs that only pad a tile.
        shares: level -> share of the weights read at that level.
        stored_bytes: everything stored.
        stored_weights: number of weights stored: of experts all, of tied layers one layer's.
    """

    weights: int
    code_bits: float
    scale_bits: float
    padding_bits: float
    shares: dict[int, float]
    stored_bytes: int
    stored_weights: int

    @property
    def bits(self) -> float:
        """Average bits read per weight, without scales: what ``GrinqhConfig(bits=...)`` asks."""
        return self.code_bits / self.weights

    @property
    def bits_with_scales(self) -> float:
        """Average bits read per weight, ``scale_bits`` included."""
        return (self.code_bits + self.scale_bits) / self.weights

    @property
    def bytes_per_token(self) -> float:
        """Bytes of codes read per token, padding included."""
        return (self.code_bits + self.padding_bits) / 8

    @property
    def bytes_per_token_with_scales(self) -> float:
        """Bytes read per token: codes, padding and ``scale_bits``."""
        return self.bytes_per_token + self.scale_bits / 8

    @property
    def stored_bits(self) -> float:
        """Bits stored per weight, everything included."""
        return 8 * self.stored_bytes / self.stored_weights


@dataclass
class _Counter:
    """Channels seen at each level in one layer; kept on the device, so that nothing waits."""

    counts: Tensor
    levels: tuple[int, ...]
    shape: tuple[int, int]
    padded_outputs: int
    bytes_per_call: int
    stored_bytes: int
    stored_weights: int
    storage: int
    is_head: bool
    tokens: int = 0
    rows: int = 0  # more than tokens where each is routed to several experts
    tokens_with_gradient: int = 0

    @classmethod
    def of(cls, weight: GrinqhTensor) -> _Counter:
        one = weight[0] if weight.dim() == 3 else weight
        read_once = [one.vectors, one.low]
        return cls(
            counts=torch.zeros(len(ALL_LEVELS), dtype=torch.int64, device=weight.device),
            levels=weight.levels,
            shape=(one.shape[0], one.shape[1]),
            padded_outputs=one.slices.shape[0] * one.tile,
            bytes_per_call=sum(tensor.nbytes for tensor in read_once if tensor is not None),
            stored_bytes=weight.stored_bytes,
            stored_weights=weight.numel(),
            storage=weight.slices.data_ptr(),
            is_head=weight.min_bits > 0,
        )

    def add(self, bits: Tensor, tokens: int) -> None:
        """Counts the levels [rows, K] that were read of a weight."""
        # Not bincount(), which waits for the device.
        counts = torch.stack([(bits == level).sum() for level in ALL_LEVELS])
        self.counts += counts.to(self.counts.device)
        self.rows += len(bits)
        self.tokens += tokens

    def reading(self) -> Reading:
        n, k = self.shape
        routed = self.rows / self.tokens
        per_token = [count / self.tokens for count in self.counts.tolist()]
        counted = zip(ALL_LEVELS, per_token, strict=True)
        # Other levels too, where the weight was replaced meanwhile.
        channels = {level: count for level, count in counted if count or level in self.levels}
        active = sum(count for level, count in channels.items() if level)
        bits = sum(level * count for level, count in channels.items())
        return Reading(
            weights=round(n * k * routed),
            code_bits=bits * n,
            scale_bits=8
            * (active * self.padded_outputs / SCALE_GROUP + self.bytes_per_call * routed),
            padding_bits=bits * (self.padded_outputs - n),
            shares={level: count / (k * routed) for level, count in channels.items()},
            stored_bytes=self.stored_bytes,
            stored_weights=self.stored_weights,
        )


@dataclass(repr=False)
class Measurement:
    """What was read while :func:`measure` was active. ``print`` it for a table of layers."""

    _counters: dict[str, _Counter] = field(default_factory=dict)

    @property
    def layers(self) -> dict[str, Reading]:
        """Per layer that decoded at least one token, by module name. Waits for the device."""
        return {name: c.reading() for name, c in self._counters.items() if c.tokens}

    @property
    def body(self) -> Reading | None:
        """All layers but output heads: those whose average ``bits`` sets. None if none decoded."""
        return self._sum([name for name, c in self._counters.items() if not c.is_head])

    @property
    def head(self) -> Reading | None:
        """Output heads, which read at least ``GrinqhConfig.head_bits``. None if none decoded."""
        return self._sum([name for name, c in self._counters.items() if c.is_head])

    @property
    def total(self) -> Reading:
        """All quantized layers, each averaged over the tokens that it decoded itself.

        Raises:
            ValueError: nothing was decoded.
        """
        total = self._sum(list(self._counters))
        if total is None:
            raise ValueError(self._why_nothing())
        return total

    def _why_nothing(self) -> str:
        """Empty if something was decoded."""
        if any(counter.tokens for counter in self._counters.values()):
            return ""
        wanted = any(counter.tokens_with_gradient for counter in self._counters.values())
        return "nothing was decoded by this thread while measuring: " + (
            "rows that want gradients take the dense path, use torch.no_grad()"
            if wanted
            else "no quantized layer was given rows to decode; more than 8 at once are a prompt"
        )

    def __repr__(self) -> str:
        decoded = self._sum(list(self._counters))
        bits = f", bits={decoded.bits:.2f}" if decoded else ""
        return f"{type(self).__name__}(layers={len(self.layers)}{bits})"

    def _sum(self, names: list[str]) -> Reading | None:
        layers = self.layers
        readings = [layers[name] for name in names if name in layers]
        if not readings:
            return None
        weights = sum(r.weights for r in readings)
        counters = [self._counters[name] for name in names if name in layers]
        stored = {c.storage: c for c in counters}.values()  # tied weights are stored once
        levels = sorted({level for r in readings for level in r.shares})
        return Reading(
            weights=weights,
            code_bits=sum(r.code_bits for r in readings),
            scale_bits=sum(r.scale_bits for r in readings),
            padding_bits=sum(r.padding_bits for r in readings),
            shares={
                level: sum(r.weights * r.shares.get(level, 0.0) for r in readings) / weights
                for level in levels
            },
            stored_bytes=sum(c.stored_bytes for c in stored),
            stored_weights=sum(c.stored_weights for c in stored),
        )

    def __str__(self) -> str:
        rows = [("layer", "bits", "+scales", "KB/token", "+scales", "stored MB", "levels")]
        readings = self.layers
        if len(readings) > 1:
            readings |= {"total": self.total}
        for name, r in readings.items():
            shares = " ".join(f"{level}:{share:.0%}" for level, share in r.shares.items())
            rows.append(
                (
                    name or "(root)",
                    f"{r.bits:.2f}",
                    f"{r.bits_with_scales:.2f}",
                    f"{r.bytes_per_token / 1e3:.1f}",
                    f"{r.bytes_per_token_with_scales / 1e3:.1f}",
                    f"{r.stored_bytes / 1e6:.2f}",
                    shares,
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )


@contextmanager
def measure(model: nn.Module) -> Iterator[Measurement]:
    """Measures what decoding reads, in every quantized linear layer of ``model``.

    >>> with measure(model) as measured:
    ...     model.generate(**inputs, max_new_tokens=64)
    >>> print(measured.total.bits, measured.total.bytes_per_token_with_scales)

    Counts the rows that are decoded by this thread: not prompts, and not rows that want gradients.
    While it is active, compiled models run eagerly, in all threads, because compiled graphs do not
    run hooks; afterwards nothing of it remains. Says at the end if nothing was decoded, and why.

    Raises:
        ValueError: nothing in ``model`` is quantized.
    """
    require_quantized_linears(model)
    measurement = Measurement()
    handles = []
    for name, module, weight in quantized_modules(model):
        counter = measurement._counters[name] = _Counter.of(weight)
        count = _count_experts if isinstance(module, ExpertLinears) else _count
        hook = functools.partial(_if_of_thread, threading.get_ident(), count, counter, weight)
        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        with eagerly():
            yield measurement
        if why := measurement._why_nothing():
            logger.warning(why)
    finally:
        for handle in handles:
            handle.remove()


def _if_of_thread(thread: int, count: Callable[..., None], *args: Any) -> None:
    if threading.get_ident() == thread:
        count(*args)


def _weight_now(module: nn.Module, weight: GrinqhTensor) -> GrinqhTensor | None:
    """What ``module`` has in place of ``weight``; None if that is not quantized."""
    found = module._parameters.get("weight")
    if found is None or found.is_meta:  # behind a parametrization; or offloaded, and this has data
        return weight
    return found if isinstance(found, GrinqhTensor) else None


def _count(
    counter: _Counter,
    weight: GrinqhTensor,
    module: nn.Linear,
    args: tuple[Tensor, ...],
    kwargs: dict[str, Tensor],
) -> None:
    x = decode_rule.in_sequences(args[0] if args else kwargs["input"])
    now = _weight_now(module, weight)
    if now is None:
        return
    start = first_decoded_row(x, module.bias)
    if start is None:
        if decode_rule.first_row_by_shape(x) is not None:
            counter.tokens_with_gradient += 1
        return
    rows = x.detach()[..., start:, :] if x.dim() > 1 else x.detach()[None]
    bits = now.grade(rows.to(now.device)).flatten(0, -2)
    if decoded_together():
        bits = bits.amax(0, keepdim=True)
    counter.add(bits, tokens=len(bits))


def _count_experts(
    counter: _Counter,
    weights: GrinqhTensor,
    module: ExpertLinears,
    args: tuple[Tensor, Tensor],
    kwargs: dict[str, Tensor],
) -> None:
    x, experts = args
    now = _weight_now(module, weights)
    decoded = decoded_tokens(len(experts))
    if decoded is False or now is None:
        return
    if wants_grad(x):
        counter.tokens_with_gradient += 1
        return
    if isinstance(decoded, Tensor):
        experts, x = experts[decoded.to(x.device)], x[decoded.to(x.device)]
    rows = x.detach().expand(*experts.shape, -1)
    for expert in experts.unique().tolist():
        bits = now[expert].grade(rows[experts == expert].to(now.device))
        counter.add(bits, tokens=0)
    counter.tokens += len(experts)
