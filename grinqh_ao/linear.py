"""What ``F.linear`` and ``F.embedding`` compute with a GrinqhTensor."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from grinqh_ao import decode_rule, ops
from grinqh_ao.codec import SCALE_GROUP, decode_scales, level_values, lookup, narrowed
from grinqh_ao.ops.dense_products import dense_product, product_dtype
from grinqh_ao.slices import split, unpack_rows
from grinqh_ao.torchao_tensor import GrinqhTensor
from grinqh_ao.tracing import being_traced
from grinqh_ao.vectors import outputs_of


class Inner(NamedTuple):
    """What a whole weight [N, K] holds, as far as computing takes it; see :class:`GrinqhTensor`."""

    slices: Tensor
    scales: Tensor
    vectors: Tensor
    low: Tensor | None
    levels: tuple[int, ...]
    sharing: None = None

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return ops.dequantize(
            self.slices, self.scales, self.vectors, self.low, self.levels[-1], dtype
        )

    def shared_mean(self, x: Tensor) -> None:
        """Inputs are not shared with anything."""


def linear(x: Tensor, weight: GrinqhTensor | Inner, bias: Tensor | None = None) -> Tensor:
    """x [..., K] -> [..., N] in the dtype of ``x``; bias [N] or None.

    Raises:
        ValueError: shapes do not fit, or ``weight`` is a stack of experts' weights.
        TypeError: ``x`` is not floating point, or of 8 bits.
    """
    # What is asked of a plain tensor is answered faster.
    tiles, shape = weight.scales.shape, x.shape
    if len(tiles) != 3:
        raise ValueError(f"weight: a stack of {tiles[0]} experts; expected one expert's [out, in]")
    if not shape or shape[-1] != tiles[1]:
        raise ValueError(f"input of shape {tuple(shape)}: expected [..., {tiles[1]}]")
    if not x.is_floating_point() or x.dtype.itemsize < 2:
        raise TypeError(f"input of dtype {x.dtype}: expected floating point of 16 bits or more")
    x = autocast(x)
    bias = None if bias is None else bias.to(x.dtype)
    if decode_rule.rows_are_open(x) and not wants_grad(x, bias) and weight.sharing is None:
        return ops.linear(
            x,
            weight.slices,
            weight.scales,
            weight.vectors,
            bias,
            weight.low,
            weight.levels,
            decode_rule.MAX_DECODED_TOGETHER,
        )
    together = decode_rule.decoded_together()
    if not together:
        decode_rule.note_sequence(x)
        if (sequences := decode_rule.in_sequences(x)) is not x:
            return linear(sequences, weight, bias).flatten(0, 1)
    start = first_decoded_row(x, bias)
    if start is None:
        return _dense(x, weight, bias)
    if together or x.numel() == x.shape[-1]:
        return ops.decode_linear(
            x,
            weight.slices,
            weight.scales,
            weight.vectors,
            bias,
            weight.low,
            weight.levels,
            weight.shared_mean(x),
        )
    assert isinstance(weight, GrinqhTensor), "layers hand over what they decode together"
    decoded = decode_each_row(x[..., start:, :], weight, bias)
    if start == 0:
        return decoded
    return torch.cat([_dense(x[..., :start, :], weight, bias), decoded], dim=-2)


def first_decoded_row(x: Tensor, bias: Tensor | None = None) -> int | None:
    """Rows of ``x`` [..., rows, K] from this index on are decoded; None when none is."""
    # The decode ops have no gradient; the dense path does, for x and bias.
    return None if wants_grad(x, bias) else decode_rule.first_row_by_shape(x)


def decode_each_row(x: Tensor, weight: GrinqhTensor, bias: Tensor | None) -> Tensor:
    """The decode rule on every row by itself: a dense product per level, in float32 or more."""
    bits = weight.grade(x)
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = x.new_zeros(*x.shape[:-1], weight.shape[0], dtype=dtype)
    stored = weight.slices, weight.scales, weight.vectors, None, weight.low
    with torch.autocast(x.device.type, enabled=False):
        for level in weight.levels:
            if level:
                y += ops.dense_linear(torch.where(bits == level, x, 0).to(dtype), *stored, level)
    return (y if bias is None else y + bias.to(dtype)).to(x.dtype)


def _dense(x: Tensor, weight: GrinqhTensor | Inner, bias: Tensor | None) -> Tensor:
    outputs = outputs_of(weight.vectors, weight.scales.shape[1])
    if bias is not None and bias.numel() != outputs:  # when decoding, ops see to that
        raise ValueError(f"bias of shape {tuple(bias.shape)}: expected [{outputs}]")
    wanted = wants_grad(x, bias)
    if x.device.type == "cpu" and not wanted:  # in blocks; on GPUs compilers fuse more
        return ops.dense_linear(
            x,
            weight.slices,
            weight.scales,
            weight.vectors,
            bias,
            weight.low,
            weight.levels[-1],
        )
    dtype = product_dtype(x)
    if not wanted or being_traced() or transformed():
        # Compilers keep the dense weight for the backward pass: as small as it can be.
        return dense_product(x, weight.dequantize(x.dtype).to(dtype), bias)
    dense = weight.dequantize(dtype)
    # A backward pass dequantizes again, so that between the passes there is no dense weight.
    place = dense.data_ptr()

    def pack(saved: Tensor) -> Any:
        return (saved.shape, saved.stride()) if saved.data_ptr() == place else saved

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        return weight.dequantize(dtype).as_strided(*packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return dense_product(x, dense, bias)


def embedding(indices: Tensor, weight: GrinqhTensor) -> Tensor:
    """Rows of the weight at its highest level, in its own dtype: ``[*indices.shape, K]``."""
    if weight.low is not None:
        return F.embedding(indices, weight.dequantize())
    rows = indices.flatten()
    row_scale = weight.row_scale.index_select(0, rows)  # says if an index is out of range
    codes = unpack_rows(split(weight.slices, weight.shape[1]), rows)
    groups = weight.scales[rows // weight.tile, :, rows % weight.tile // SCALE_GROUP]
    values = lookup(level_values(weight.gains, weight.levels[-1]), codes)
    found = values * decode_scales(groups) * row_scale[:, None]
    return narrowed(found, weight.dtype).view(*indices.shape, -1)


def autocast(x: Tensor) -> Tensor:
    """``x`` as ``torch.autocast`` would have it, where that is on."""
    device = x.device.type
    if x.dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


def transformed() -> bool:
    """Whether a transform of torch.func is at work, which hooks and some ops know nothing of."""
    if being_traced():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None


def wants_grad(x: Tensor, bias: Tensor | None = None) -> bool:
    """Backwards or forwards."""
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return True
    if being_traced() or forward_ad._current_level < 0:
        return False
    given = [x] if bias is None else [x, bias]
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in given)
