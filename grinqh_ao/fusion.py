"""Projections of the same activations as one launch: q, k and v; gate and up.

On a large GPU a small matrix-vector product takes as long as its launch. The weights stay where
they are, with their own thresholds: only the calls are joined. The first projection of a group
computes all of them, the others find their result waiting.
"""

from __future__ import annotations

import logging
import re
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from grinqh_ao import ops
from grinqh_ao.decode_rule import decoded_together, rows_are_open
from grinqh_ao.layers import GrinqhLinear, adopt
from grinqh_ao.linear import Inner, first_decoded_row, transformed
from grinqh_ao.model import require_quantized_linears
from grinqh_ao.torchao_tensor import GrinqhTensor
from grinqh_ao.tracing import being_traced

logger = logging.getLogger("grinqh_ao")

# Names that Llama, Qwen and most of their relatives give to projections of the same activations.
GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# What modules are called in which q sees other activations than k and v.
CROSS_ATTENTION = re.compile(r"encoder_attn|cross", re.IGNORECASE)


def fuse_projections(model: nn.Module) -> list[list[str]]:
    """Decodes q, k and v, and gate and up, in one launch each, where a model has them.

    Parameters, ``state_dict``, hooks, prompts and gradients are untouched, and so is ``set_bits``:
    every projection keeps its weight and thresholds. Cross-attention is left as it is. Results
    differ by the order of float32 sums at most. Threads, and streams of a GPU, must not share
    activations; and in a compiled function or in inference mode, which counts no versions of
    tensors, nothing must write to them between a group's projections. Graphs compiled for any
    number of rows call projections one by one. Worth it where launches cost more than reading:
    small layers, large GPUs.

    Args:
        model: a model with weights quantized by ``quantize_(model, GrinqhConfig(...))``.

    Returns:
        The names of the modules in each group that was fused, now or before. A group that cannot be
        is logged and left: its weights have different level sets or tile widths, or are not all
        quantized, or adapters or hooks sit on its layers. (A group
        that was fused before they came stays fused; under adapters it is not among the names.)

    Raises:
        ValueError: nothing in ``model`` is quantized.
    """
    require_quantized_linears(model)
    fused = []
    for parent_name, parent in model.named_modules():
        for names in GROUPS:
            members = [parent._modules.get(name) for name in names]
            if None in members or CROSS_ATTENTION.search(parent_name.rpartition(".")[2]):
                continue
            full_names = [f"{parent_name}.{name}".lstrip(".") for name in names]
            if not _are_fused(members):
                if reason := _why_separate(members):
                    logger.warning("%s are not fused: %s", ", ".join(full_names), reason)
                    continue
                _fuse(cast(list[nn.Linear], members))
            fused.append(full_names)
    return fused


def _are_fused(members: Sequence[nn.Module | None]) -> bool:
    groups = {getattr(member, "_group", None) for member in members}
    group = groups.pop()
    return not groups and group is not None and group.members == list(members)


def _fuse(members: list[nn.Linear]) -> None:
    """Some of them may have been fused before, with others or with layers replaced since."""
    for member in members:
        adopt(member)
        if type(member) is GrinqhLinear:
            member.__class__ = FusedLinear
    group = _Group(cast(list[FusedLinear], members))
    for index, member in enumerate(cast(list[FusedLinear], members)):
        member._index, member._group = index, group


def unfuse_projections(model: nn.Module) -> None:
    """Undoes :func:`fuse_projections`."""
    for module in model.modules():
        if isinstance(module, FusedLinear):
            module.__dict__.pop("_group", None)
            # Else what was put on top since, a parametrization or another forward(), goes on.
            if type(module) is FusedLinear and "forward" not in vars(module):
                module.__class__ = GrinqhLinear  # type: ignore[assignment]


def _why_separate(members: Sequence[Any]) -> str:
    """Why modules cannot be decoded in one launch; empty if they can."""
    if any(type(member) not in (nn.Linear, GrinqhLinear, FusedLinear) for member in members):
        return "they are not plain nn.Linear layers"
    if any("forward" in vars(member) for member in members):
        return "something else, as accelerate's hooks, has replaced their forward()"
    weights = [member.weight for member in members]
    if not all(isinstance(weight, GrinqhTensor) for weight in weights):
        return "their weights are not all quantized by GRINQH"
    if not _compatible(weights):
        return "their weights differ in levels, tile width, storage, input size or device"
    return ""


def _compatible(weights: list[Any]) -> bool:
    """Of GrinqhTensors or what is in them."""
    first = weights[0]
    return all(
        weight.levels == first.levels
        and weight.slices.shape[2] == first.slices.shape[2]
        and (weight.low is None) == (first.low is None)
        and weight.scales.shape[1] == first.scales.shape[1]
        and weight.slices.device == first.slices.device
        for weight in weights
    )


def _decoded_alike(x: Tensor, weights: list[Inner], biases: Sequence[Tensor | None]) -> bool:
    """Whether all rows of ``x`` are decoded together, with all weights, by the same op."""
    return (
        not torch.jit.is_tracing()  # type: ignore[attr-defined]  # no lists of what may be None
        and x.is_floating_point()
        and x.dtype.itemsize > 1
        and x.dim() > 0
        and x.shape[-1] == weights[0].scales.shape[1]
        and x.device == weights[0].slices.device
        and x.device.type != "meta"
        and not torch.is_autocast_enabled(x.device.type)
        and decoded_together()
        and not transformed()
        and not rows_are_open(x)
        and _compatible(weights)
        and all(first_decoded_row(x, bias) == 0 for bias in biases)
    )


class _Operands(NamedTuple):
    """What a member multiplies with, and how often that was written to."""

    tensors: list[Tensor]
    versions: list[int]

    def same(self, other: _Operands) -> bool:
        return self.versions == other.versions and all(
            a is b for a, b in zip(self.tensors, other.tensors, strict=True)
        )


class _Results(NamedTuple):
    """What one launch computed, as long as members have not fetched theirs."""

    x: Tensor
    seen: tuple[object, ...]
    operands: list[_Operands | None]  # None in compiled functions, where they do not change
    outputs: list[Tensor]
    left: frozenset[int]  # members to come


def _version(tensor: Tensor) -> int:
    """Counts how often it was written to, where PyTorch does."""
    return 0 if being_traced() or tensor.is_inference() else tensor._version


def _operands(weight: Inner | None, bias: Tensor | None) -> _Operands:
    tensors = [] if weight is None else [weight.slices, weight.vectors]
    if bias is not None:
        tensors.append(bias)
    return _Operands(tensors, [_version(tensor) for tensor in tensors])


def _seen(x: Tensor) -> tuple[object, ...]:
    """Changes when ``x`` is written to, and with the modes that decide how it is multiplied."""
    return (
        _version(x),
        x.requires_grad,
        torch.is_grad_enabled(),
        torch.is_autocast_enabled(x.device.type),
        decoded_together(),
    )


class _Group:
    """Layers that see the same activations, and results that wait to be fetched."""

    def __init__(self, members: Sequence[FusedLinear | None]) -> None:
        # Weakly, for they hold the group: a model is freed as soon as nobody uses it, and so is a
        # layer that another was put in place of, after which the others go alone.
        self._members = [_gone if member is None else weakref.ref(member) for member in members]
        # Replaced as a whole, never changed: a model may run in several threads, whose activations
        # differ.
        self.waiting: _Results | None = None

    @property
    def members(self) -> list[FusedLinear | None]:
        """None where a layer is no more."""
        return [member() for member in self._members]

    def result(self, index: int, x: Tensor) -> Tensor | None:
        """What member ``index`` computes of ``x``; None if the members do not decode it alike."""
        found = self.waiting
        if found is None or not self._fits(found, index, x):
            found = self._compute(x)
        if found is None:
            return None
        left = found.left - {index}
        self.waiting = found._replace(left=left) if left else None
        return found.outputs[index]

    def _fits(self, found: _Results, index: int, x: Tensor) -> bool:
        if index not in found.left or found.x is not x or found.seen != _seen(x):
            return False
        operands, member = found.operands[index], self._members[index]()
        if being_traced():
            return operands is None
        if operands is None or member is None:
            return False
        return operands.same(_operands(member.inner(), member.bias))

    def _compute(self, x: Tensor) -> _Results | None:
        members = [member for member in self.members if member is not None]
        found = [member.inner() for member in members]
        weights = [weight for weight in found if weight is not None]
        biases = [member.bias for member in members]
        if len(weights) < len(self._members) or not _decoded_alike(x, weights, biases):
            return None
        operands = [
            None if being_traced() else _operands(weight, bias)
            for weight, bias in zip(weights, biases, strict=True)
        ]
        outputs = ops.decode_linears(
            x,
            [weight.slices for weight in weights],
            [weight.scales for weight in weights],
            [weight.vectors for weight in weights],
            [None if bias is None else bias.to(x.dtype) for bias in biases],
            [weight.low for weight in weights],
            weights[0].levels,
        )
        return _Results(x, _seen(x), operands, outputs, frozenset(range(len(weights))))

    def __reduce__(self) -> tuple[Any, ...]:
        # Members come second: they refer to the group, which has to be there before.
        return _Group, ([],), {"members": self.members}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["members"])  # type: ignore[misc]


def _gone() -> None:
    """In place of a reference to a layer that is no more."""


class FusedLinear(GrinqhLinear):
    """An ``nn.Linear`` that decodes together with others; see :func:`fuse_projections`."""

    _group: _Group | None = None
    _index: int

    def forward(self, input: Tensor) -> Tensor:
        if self._group is None or isinstance(input, torch.fx.Proxy):
            return super().forward(input)
        result = self._group.result(self._index, input)
        return super().forward(input) if result is None else result
