"""Mixtures of experts as transformers 5 keeps them: one 3-D parameter for all experts of a layer.

Such a parameter becomes an :class:`ExpertLinears`, whose weight is a stack of nested weights, and
the module that held it calls that through transformers' interface for experts. Decoding then reads
only the experts that tokens are routed to, without waiting for the device to know which.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grinqh_ao import ops
from grinqh_ao.decode_rule import decoded_tokens
from grinqh_ao.linear import autocast, wants_grad
from grinqh_ao.tails import as_compact, formula_curve
from grinqh_ao.torchao_tensor import GrinqhTensor

IMPLEMENTATION = "grinqh"
PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")


class ExpertLinears(nn.Module):
    """Linear layers, one per expert, without their biases; each row uses one of them.

    Args:
        weight: a stack [E, N, K] of nested weights, or a place for one.
    """

    weight: GrinqhTensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)  # type: ignore[assignment]

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        """Multiplies each row with the weight of its expert.

        Up to 8 tokens are decoded, each for each of its experts by itself: unlike rows of a linear
        layer, tokens that meet at an expert do not share what is read.

        Args:
            x: [T, R, K], or [T, 1, K] if a token's R experts see the same.
            experts: integers [T, R].

        Returns:
            [T, R, N] in the dtype of ``x``.
        """
        x, experts = autocast(x), experts.long()
        tokens, routed = experts.shape
        if wants_grad(x):
            return _one_by_one(self.weight, x.expand(tokens, routed, -1), experts)
        decoded = decoded_tokens(tokens)
        if isinstance(decoded, bool):
            return (self._decode if decoded else self._dense)(x, experts)
        decoded = decoded.to(x.device)
        y = x.new_empty(tokens, routed, self.weight.shape[1])
        y[decoded] = self._decode(x[decoded], experts[decoded])
        y[~decoded] = self._dense(x[~decoded], experts[~decoded])
        return y

    def _decode(self, x: Tensor, experts: Tensor) -> Tensor:
        return self._by(ops.decode_experts, x, experts, self.weight.levels)

    def _dense(self, x: Tensor, experts: Tensor) -> Tensor:
        return self._by(ops.dense_experts, x, experts, self.weight.levels[-1])

    def _by(self, op: Callable[..., Tensor], x: Tensor, experts: Tensor, levels: Any) -> Tensor:
        weight = self.weight
        y = op(
            x.expand(*experts.shape, -1).flatten(0, 1),
            experts.flatten(),
            weight.slices,
            weight.scales,
            weight.vectors,
            levels,
        )
        return y.view(*experts.shape, weight.shape[1])

    def restack(self, weights: Sequence[GrinqhTensor]) -> None:
        """Takes experts' weights back whose tensor data may have been replaced by calibration."""
        if any(weight.curve is not None for weight in weights):
            for weight in weights:
                if weight.curve is None:  # no token was routed there
                    weight.curve = formula_curve().to(weight.device)
            curves = [cast(Tensor, weight.curve) for weight in weights]
            longest = max(map(len, curves))
            for weight, curve in zip(weights, curves, strict=True):
                weight.curve = as_compact(curve) if len(curve) < longest else curve
        self.weight = nn.Parameter(GrinqhTensor.stack(weights), requires_grad=False)  # type: ignore[assignment]

    def extra_repr(self) -> str:
        e, n, k = self.weight.shape
        return f"experts={e}, in_features={k}, out_features={n}, grinqh: " + (
            self.weight._quantization_type()
        )


def projections_of_experts(module: nn.Module) -> list[str]:
    """Names of the 3-D parameters of ``module`` that can become ExpertLinears, or that did.

    Empty unless ``module`` calls its experts through transformers' interface.
    """
    interface = ("_apply_gate", "is_transposed", "has_bias")
    if not all(hasattr(module, name) for name in interface):
        return []
    if getattr(module, "_is_expert_parallel", False):  # its experts are elsewhere
        return []
    held, quantized = module._parameters, module._modules
    found = [
        name
        for name in PROJECTIONS
        if ((p := held.get(name)) is not None and p.dim() == 3)
        or isinstance(quantized.get(name), ExpertLinears)
    ]
    return found if len(found) == 2 else []


def expert_parameters(module: nn.Module) -> list[str]:
    """Those of :func:`projections_of_experts` that are parameters still."""
    return [name for name in projections_of_experts(module) if name in module._parameters]


def expert_biases(module: nn.Module) -> list[Tensor]:
    """Those of a module with experts, [E, N]. They stay there, dense."""
    if not getattr(module, "has_bias", False):
        return []
    found = (module._parameters.get(f"{name}_bias") for name in PROJECTIONS)
    return [bias for bias in found if bias is not None]


def untransposed(module: nn.Module, weight: Tensor) -> Tensor:
    """A parameter of a linear layer, or of experts, as [..., N, K] whichever way it is held."""
    return weight.mT if getattr(module, "is_transposed", False) else weight


def put_experts(module: nn.Module, name: str, weight: Tensor) -> None:
    """Replaces a parameter that :func:`expert_parameters` names by an ExpertLinears.

    Args:
        weight: a stack [E, N, K], or a place for one that is still to be loaded.
    """
    # A config of its own: the model's other layers may be dense.
    config: Any = copy.copy(module.config)
    config._experts_implementation = IMPLEMENTATION
    module.config = config
    # The module first: as long as both are there, the parameter is found, and an interrupt does no
    # harm.
    module._modules[name] = ExpertLinears(weight)
    del module._parameters[name]


def experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """What transformers' interface for experts asks for.

    Args:
        hidden_states: [T, D].
        top_k_index: int64 [T, R], the experts of each token.
        top_k_weights: [T, R].

    Returns:
        [T, D], the sum over a token's experts.
    """
    up = "gate_up_proj" if self.has_gate else "up_proj"
    y = _project(self, up, hidden_states[:, None], top_k_index)
    y = self._apply_gate(y) if self.has_gate else self.act_fn(y)
    y = _project(self, "down_proj", y, top_k_index)
    if getattr(self, "has_post_expert_norm", False):
        y = self.post_expert_norm(y)
    return (y * top_k_weights[..., None]).sum(dim=1).to(hidden_states.dtype)


def _project(module: Any, name: str, x: Tensor, experts: Tensor) -> Tensor:
    projection = getattr(module, name)
    if isinstance(projection, ExpertLinears):
        y: Tensor = projection(x, experts)
    else:  # the other parameter alone was quantized
        weights = untransposed(module, projection)
        y = _one_by_one(weights, x.expand(*experts.shape, x.shape[-1]), experts)
    if module.has_bias:
        y = y + getattr(module, f"{name}_bias")[experts].to(y.dtype)
    return y


def _one_by_one(weights: Tensor, x: Tensor, experts: Tensor) -> Tensor:
    """The dense path with a gradient for ``x``; waits for the device."""
    tokens, slots, y = [], [], []
    for expert in experts.unique().tolist():
        token, slot = (experts == expert).nonzero(as_tuple=True)
        y.append(F.linear(x[token, slot], weights[expert]))
        tokens.append(token)
        slots.append(slot)
    if not y:
        return x.new_zeros(*experts.shape, weights.shape[1])
    rows = torch.cat(y)  # of autocast's dtype where that is on
    out = rows.new_zeros(*experts.shape, weights.shape[1])
    return out.index_put((torch.cat(tokens), torch.cat(slots)), rows)
