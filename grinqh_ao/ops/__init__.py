"""The ops ``grinqh::*``: schemas, shapes for tracing, and one implementation per device.

Defined through :class:`torch.library.Library`, whose eager call costs a third of a
``custom_op``'s. A new device registers its kernel here under its dispatch key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from grinqh_ao.ops import oracle
from grinqh_ao.ops.cpu import dequantize as dequantize_on_cpu
from grinqh_ao.ops.cpu.build import kernels as cpu_kernels
from grinqh_ao.ops.triton.support import has_kernels
from grinqh_ao.vectors import outputs_of

_library = torch.library.Library("grinqh", "DEF")

_DECODE_OPS = {
    "decode_linear": "(Tensor x, Tensor slices, Tensor scales, Tensor vectors, Tensor? bias, "
    "Tensor? low, int[] levels, Tensor? mean=None) -> Tensor",
    "decode_linears": "(Tensor x, Tensor[] slices, Tensor[] scales, Tensor[] vectors, "
    "Tensor?[] biases, Tensor?[] lows, int[] levels) -> Tensor[]",
    "decode_experts": "(Tensor x, Tensor experts, Tensor slices, Tensor scales, Tensor vectors, "
    "int[] levels) -> Tensor",
}
_library.define(
    "dense_experts(Tensor x, Tensor experts, Tensor slices, Tensor scales, Tensor vectors, "
    "int level) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),  # it waits for the device, to know which experts it needs
)
_library.define(  # where the number of rows is known when it runs
    "linear(Tensor x, Tensor slices, Tensor scales, Tensor vectors, Tensor? bias, Tensor? low, "
    "int[] levels, int max_decoded) -> Tensor"
)
_library.define(
    "dense_linear(Tensor x, Tensor slices, Tensor scales, Tensor vectors, Tensor? bias, "
    "Tensor? low, int level) -> Tensor"
)
_library.define(
    "dequantize(Tensor slices, Tensor scales, Tensor vectors, Tensor? low, int level, "
    "ScalarType dtype) -> Tensor"
)
_library.define(  # for CPUs only, some tiles or all
    "dequantize_into(Tensor slices, Tensor scales, Tensor vectors, Tensor? low, int level, "
    "int stored_bits, int first, bool transposed, Tensor(a!) out) -> ()"
)


def _define_decode_op(name: str, schema: str) -> None:
    """Overload "oracle" is plain PyTorch; the op itself is that wherever there is no kernel."""
    _library.define(name + schema)
    _library.define(f"{name}.oracle{schema}")
    op = getattr(torch.ops.grinqh, name)
    in_plain_pytorch: Callable[..., Any] = getattr(oracle, name)

    def without_kernel(x: Tensor, *rest: Any) -> Any:
        if x.device.type == "cpu" and cpu_kernels() is not None:  # from now on there is one
            return op(x, *rest)
        return in_plain_pytorch(x, *rest)

    _library.impl(name, without_kernel, "CompositeExplicitAutograd")
    _library.impl(f"{name}.oracle", in_plain_pytorch, "CompositeExplicitAutograd")


for _name, _schema in _DECODE_OPS.items():
    _define_decode_op(_name, _schema)

_library.impl("dense_experts", oracle.dense_experts, "CompositeExplicitAutograd")
_library.impl("dense_linear", oracle.dense_linear, "CompositeExplicitAutograd")
_library.impl("dequantize", oracle.dequantize, "CompositeExplicitAutograd")

_library.impl("dense_linear", dequantize_on_cpu.dense_linear, "CPU")
_library.impl("dequantize", dequantize_on_cpu.dequantize, "CPU")


def _linear(
    x: Tensor,
    slices: Tensor,
    scales: Tensor,
    vectors: Tensor,
    bias: Tensor | None,
    low: Tensor | None,
    levels: Sequence[int],
    max_decoded: int,
) -> Tensor:
    weight = (slices, scales, vectors, bias, low)
    if 1 <= x.numel() // x.shape[-1] <= max_decoded:
        return decode_linear(x, *weight, levels)
    return dense_linear(x, *weight, levels[-1])


_library.impl("linear", _linear, "CompositeExplicitAutograd")


# Kernels are imported when first needed: Triton takes long to load.
def _decode_linears_cuda(
    x: Tensor,
    slices: Sequence[Tensor],
    scales: Sequence[Tensor],
    vectors: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lows: Sequence[Tensor | None],
    levels: Sequence[int],
    mean: Tensor | None = None,
) -> list[Tensor]:
    tensors = list(zip(slices, scales, vectors, biases, lows, strict=True))
    if has_kernels(x.device):
        from grinqh_ao.ops.triton import decode

        if decode.supports(x, slices, lows):
            with torch.cuda.device(x.device):
                return decode.decode_linears(x, [decode.Weight(*t) for t in tensors], levels, mean)
    return [oracle.decode_linear(x, *weight, levels, mean) for weight in tensors]


def _decode_linear_cuda(
    x: Tensor,
    slices: Tensor,
    scales: Tensor,
    vectors: Tensor,
    bias: Tensor | None,
    low: Tensor | None,
    levels: Sequence[int],
    mean: Tensor | None = None,
) -> Tensor:
    return _decode_linears_cuda(x, [slices], [scales], [vectors], [bias], [low], levels, mean)[0]


def _decode_experts_cuda(
    x: Tensor,
    experts: Tensor,
    slices: Tensor,
    scales: Tensor,
    vectors: Tensor,
    levels: Sequence[int],
) -> Tensor:
    stack = (slices, scales, vectors)
    if has_kernels(x.device):
        from grinqh_ao.ops.triton import decode

        weights = decode.Weight(*stack, None, None)
        if decode.supports_experts(x, weights):
            with torch.cuda.device(x.device):
                return decode.decode_experts(x, experts, weights, levels)
    return oracle.decode_experts(x, experts, *stack, levels)


def _dequantize_cuda(
    slices: Tensor,
    scales: Tensor,
    vectors: Tensor,
    low: Tensor | None,
    level: int,
    dtype: torch.dtype,
) -> Tensor:
    if dtype == torch.float64 or not has_kernels(slices.device):
        return oracle.dequantize(slices, scales, vectors, low, level, dtype)
    from grinqh_ao.ops.triton.dequantize import dequantize as kernel

    with torch.cuda.device(slices.device):
        return kernel(slices, scales, vectors, low, level, dtype)


_library.impl("decode_linear", _decode_linear_cuda, "CUDA")
_library.impl("decode_linears", _decode_linears_cuda, "CUDA")
_library.impl("decode_experts", _decode_experts_cuda, "CUDA")
_library.impl("dequantize", _dequantize_cuda, "CUDA")


@torch.library.register_fake("grinqh::decode_linear")
def _(
    x: Tensor,
    slices: Tensor,
    scales: Tensor,
    vectors: Tensor,
    bias: Tensor | None,
    low: Tensor | None,
    levels: Sequence[int],
    mean: Tensor | None = None,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs_of(vectors, x.shape[-1]))


@torch.library.register_fake("grinqh::decode_linears")
def _(
    x: Tensor,
    slices: Sequence[Tensor],
    scales: Sequence[Tensor],
    vectors: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lows: Sequence[Tensor | None],
    levels: Sequence[int],
) -> list[Tensor]:
    return [x.new_empty(*x.shape[:-1], outputs_of(v, x.shape[-1])) for v in vectors]


@torch.library.register_fake("grinqh::decode_experts")
@torch.library.register_fake("grinqh::dense_experts")
def _(
    x: Tensor,
    experts: Tensor,
    slices: Tensor,
    scales: Tensor,
    vectors: Tensor,
    *rest: object,
) -> Tensor:
    return x.new_empty(x.shape[0], outputs_of(vectors, x.shape[1]))


@torch.library.register_fake("grinqh::dense_linear")
@torch.library.register_fake("grinqh::linear")
def _(
    x: Tensor,
    slices: Tensor,
    scales: Tensor,
    vectors: Tensor,
    *rest: object,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs_of(vectors, x.shape[-1]))


@torch.library.register_fake("grinqh::dequantize")
def _(
    slices: Tensor,
    scales: Tensor,
    vectors: Tensor,
    low: Tensor | None,
    level: int,
    dtype: torch.dtype,
) -> Tensor:
    k = scales.shape[1]
    return slices.new_empty(outputs_of(vectors, k), k, dtype=dtype)


decode_linear: Callable[..., Tensor] = torch.ops.grinqh.decode_linear.default
decode_linears: Callable[..., list[Tensor]] = torch.ops.grinqh.decode_linears.default
decode_experts: Callable[..., Tensor] = torch.ops.grinqh.decode_experts.default
dense_experts: Callable[..., Tensor] = torch.ops.grinqh.dense_experts.default
dense_linear: Callable[..., Tensor] = torch.ops.grinqh.dense_linear.default
linear: Callable[..., Tensor] = torch.ops.grinqh.linear.default
dequantize: Callable[..., Tensor] = torch.ops.grinqh.dequantize.default
