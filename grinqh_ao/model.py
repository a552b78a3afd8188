"""What a whole quantized model offers: its quantized weights, ``set_bits``, ``summary``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from grinqh_ao.grading import check_bits
from grinqh_ao.tensor import GrinqhTensor


def quantized_linears(model: nn.Module) -> Iterator[tuple[str, nn.Module, GrinqhTensor]]:
    """Yields (name, module, weight) of every linear layer with a quantized weight."""
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if isinstance(module, nn.Linear) and isinstance(weight, GrinqhTensor):
            yield name, module, weight


def set_bits(model: nn.Module, bits: float) -> None:
    """Sets the average number of weight bits read per token, in place.

    Takes effect from the next decode step on: nothing is requantized and nothing recompiles.
    A layer with a floor of its own (an output head, see ``GrinqhConfig.head_bits``) keeps it.

    Args:
        model: a model with weights quantized by ``quantize_(model, GrinqhConfig(...))``.
        bits: average over the weights of a layer; from above 0 to the highest level.

    Raises:
        ValueError: nothing in ``model`` is quantized, or ``bits`` is out of range for a layer;
            the model is unchanged.
    """
    layers = list(quantized_linears(model))
    if not layers:
        raise ValueError(
            f"model={type(model).__name__}: no layer is quantized; "
            "call quantize_(model, GrinqhConfig(bits=...)) first"
        )
    for name, _, weight in layers:
        check_bits(bits, weight.levels, name=f"bits of {name or 'the layer'}")
    for _, _, weight in layers:
        weight.set_bits(bits)


@dataclass(frozen=True)
class Summary:
    """How much of a model is quantized, and what is not. ``print`` it.

    Attributes:
        quantized: names of the quantized linear layers.
        heads: those of them that read more than ``bits`` says, with what they read.
        dense: names of the linear layers that are not quantized.
        tied: groups of module names that share one quantized weight.
        bits: average bits per weight aimed at by the layers that are not heads (nan: none is).
        weights: number of weights in quantized linear layers.
        all_weights: number of weights in all linear layers.
        stored_bytes: of the whole model, as it is now.
        dense_bytes: of the whole model, had nothing been quantized.
    """

    quantized: list[str]
    heads: dict[str, float]
    dense: list[str]
    tied: list[list[str]]
    bits: float
    weights: int
    all_weights: int
    stored_bytes: int
    dense_bytes: int

    def __str__(self) -> str:
        linears = len(self.quantized) + len(self.dense)
        lines = [
            f"GRINQH: {len(self.quantized)} of {linears} linear layers quantized, "
            f"{self.weights / 1e6:.1f}M of {self.all_weights / 1e6:.1f}M weights",
            f"  stored: {self.stored_bytes / 1e6:.1f} MB, was {self.dense_bytes / 1e6:.1f} MB",
        ]
        if len(self.quantized) > len(self.heads):
            lines.append(f"  bits read per weight and token: {self.bits:.2f}")
        lines += [f"  output head {name}: {bits:.2f} bits" for name, bits in self.heads.items()]
        lines += [f"  tied, one quantized weight: {' = '.join(names)}" for names in self.tied]
        if self.dense:
            shown = ", ".join(self.dense[:8]) + (", ..." if len(self.dense) > 8 else "")
            lines.append(f"  left dense: {shown}")
        return "\n".join(lines)


def summary(model: nn.Module) -> Summary:
    """Says how much of ``model`` is quantized and what is not. Waits for the device."""
    quantized, heads, dense = [], {}, []
    weights = dense_weights = 0
    bits_times_weights, body_weights = 0.0, 0
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if not isinstance(module, nn.Linear) or weight is None:
            continue
        if not isinstance(weight, GrinqhTensor):
            dense.append(name)
            dense_weights += weight.numel()
            continue
        quantized.append(name)
        weights += weight.numel()
        if weight.min_bits:
            heads[name] = weight.bits
        else:
            bits_times_weights += weight.bits * weight.numel()
            body_weights += weight.numel()

    names_of: dict[torch.Tensor, list[str]] = {}  # tensors hash by identity
    for name, tensor in _parameters_and_buffers(model):
        names_of.setdefault(tensor, []).append(name.removesuffix(".weight"))
    nested = [t for t in names_of if isinstance(t, GrinqhTensor)]
    plain = sum(t.nbytes for t in names_of if not isinstance(t, GrinqhTensor))
    return Summary(
        quantized=quantized,
        heads=heads,
        dense=dense,
        tied=[names_of[t] for t in nested if len(names_of[t]) > 1],
        bits=bits_times_weights / body_weights if body_weights else float("nan"),
        weights=weights,
        all_weights=weights + dense_weights,
        stored_bytes=plain + sum(t.stored_bytes for t in nested),
        dense_bytes=plain + sum(t.numel() * t.dtype.itemsize for t in nested),
    )


def _parameters_and_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
