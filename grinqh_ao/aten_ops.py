"""The ATen ops that a GrinqhTensor answers to, beyond those its base class knows."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from grinqh_ao.linear import embedding, linear
from grinqh_ao.shards import shard
from grinqh_ao.torchao_tensor import GrinqhTensor

logger = logging.getLogger("grinqh_ao")
aten = torch.ops.aten

Op = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def _alias(weight: GrinqhTensor, **attributes: Any) -> GrinqhTensor:
    return weight.with_data(lambda data: data, **attributes)


def _view(handler: Op) -> Op:
    """For ops whose results are views of a weight: they must be from inference mode or from outside
    of it as the weight is, whatever the mode is now."""

    @functools.wraps(handler)
    def run(func: Op, types: Any, args: Args, kwargs: Kwargs) -> Any:
        with torch.inference_mode(args[0].is_inference()):
            return handler(func, types, args, kwargs)

    return run


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, GrinqhTensor):
        raise TypeError("a GrinqhTensor can be the weight of a linear layer, not its input or bias")
    return linear(input, weight, bias)


@GrinqhTensor.implements(aten.linear.default)
@GrinqhTensor.implements_torch_function(F.linear)
def _(func: Op, types: Any, args: Args, kwargs: Kwargs) -> Tensor:
    return _linear(*args, **kwargs)


@GrinqhTensor.implements(aten.embedding.default)
def _(func: Op, types: Any, args: Args, kwargs: Kwargs) -> Tensor:
    weight, indices = args[:2]  # the rest only matters for gradients
    return embedding(indices, weight)


# Nested codes have no such forms; a dense one is right for whatever product follows.
@GrinqhTensor.implements(
    [aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default,
     aten.mT.default, aten.expand.default, aten.unsqueeze.default]
)  # fmt: skip
@_view
def _(func: Op, types: Any, args: Args, kwargs: Kwargs) -> Tensor:
    weight, *rest = args
    view: Tensor = func(weight.dequantize(), *rest, **kwargs)
    return view


# Products other than linear layers, as Mamba's with its time steps.
@GrinqhTensor.implements(
    [aten.mm.default, aten.mv.default, aten.matmul.default, aten.einsum.default]
)
def _(func: Op, types: Any, args: Args, kwargs: Kwargs) -> Tensor:
    product: Tensor = func(*tree_map_only(GrinqhTensor, GrinqhTensor.dequantize, args), **kwargs)
    return product


@GrinqhTensor.implements(aten.select.int)
@_view
def _(func: Op, types: Any, args: Args, kwargs: Kwargs) -> GrinqhTensor:
    stack, dim, index = args
    if stack.dim() != 3 or dim not in (0, -3):
        raise TypeError(
            f"select(dim={dim}) of a GrinqhTensor of shape {tuple(stack.shape)}: only single "
            "experts can be taken out of a stack of them"
        )
    expert: GrinqhTensor = stack.with_data(lambda data: data.select(0, index))
    return expert


@GrinqhTensor.implements(aten.slice.Tensor)
@_view
def _(func: Op, types: Any, args: Args, kwargs: Kwargs) -> GrinqhTensor:
    weight, *rest = args
    given: tuple[Any, ...] = (*rest, *(0, None, None, 1)[len(rest) :])
    dim, start, stop, step = given
    dim %= weight.dim()
    size = weight.shape[dim]
    start, stop, _ = slice(start, stop).indices(size)
    if (start, stop, step) == (0, size, 1):
        return _alias(weight)
    if step != 1:
        raise TypeError(f"slice(step={step}) of a GrinqhTensor: expected a step of 1")
    return shard(weight, dim, start, stop)


@GrinqhTensor.implements(aten.split.Tensor)
@_view
def _(func: Op, types: Any, args: Args, kwargs: Kwargs) -> list[Tensor]:
    weight, size, *rest = args
    dim = (rest[0] if rest else kwargs.get("dim", 0)) % weight.dim()
    starts = range(0, weight.shape[dim], size)
    return [aten.slice.Tensor(weight, dim, start, start + size) for start in starts]


@GrinqhTensor.implements(aten.view.default)
@_view
def _(func: Op, types: Any, args: Args, kwargs: Kwargs) -> GrinqhTensor:
    weight, shape = args
    # FSDP2 wants a flat one of every parameter, and uses it of dense ones.
    if tuple(shape) not in (tuple(weight.shape), (-1,)):
        raise TypeError(f"view({list(shape)}) of a GrinqhTensor of shape {tuple(weight.shape)}")
    return _alias(weight)


# FSDP2 makes room for a rank's part, and shows what it gathered as a tensor of its own.
@GrinqhTensor.implements(aten.new_zeros.default)
def _(func: Op, types: Any, args: Args, kwargs: Kwargs) -> GrinqhTensor:
    weight, (outputs, inputs) = args
    if inputs != weight.shape[1]:
        raise TypeError(f"new_zeros({[outputs, inputs]}) of a GrinqhTensor {tuple(weight.shape)}")
    return shard(weight, 0, 0, outputs).with_data(torch.zeros_like)


@GrinqhTensor.implements(aten.as_strided.default)
@_view
def _(func: Op, types: Any, args: Args, kwargs: Kwargs) -> GrinqhTensor:
    weight, size, stride = args[:3]
    if (tuple(size), tuple(stride)) != (tuple(weight.shape), weight.stride()):
        raise TypeError(f"as_strided({list(size)}, {list(stride)}) of a GrinqhTensor")
    return _alias(weight)


@GrinqhTensor.implements(aten.equal.default)
def _(func: Op, types: Any, args: Args, kwargs: Kwargs) -> bool:
    one, other = args
    if not (isinstance(one, GrinqhTensor) and isinstance(other, GrinqhTensor)):
        return False  # what transformers asks of a head and an embedding that may be tied
    same: bool = (
        one.shape == other.shape
        and (one.levels, one.min_bits, one.dtype) == (other.levels, other.min_bits, other.dtype)
        and one.data_names == other.data_names
        and all(torch.equal(getattr(one, n), getattr(other, n)) for n in one.data_names)
    )
    return same


@GrinqhTensor.implements(aten.unbind.int)
@_view
def _(func: Op, types: Any, args: Args, kwargs: Kwargs) -> list[Tensor]:
    return [args[0].select(0, index) for index in range(len(args[0]))]


@GrinqhTensor.implements(
    [aten.add_.Tensor, aten.sub_.Tensor, aten.mul_.Tensor, aten.add.Tensor, aten.sub.Tensor]
)
def _(func: Op, types: Any, args: Args, kwargs: Kwargs) -> Tensor:
    # What adapters do to merge. No TypeError: Python would replace it by one of its own.
    raise NotImplementedError(
        f"{func}: nested codes cannot be added to; merge adapters into the full-precision model "
        "and quantize that, or take weight.dequantize()"
    )


# Through the storage, which a tensor subclass does not have, sharing would end the process.
@GrinqhTensor.implements_torch_function(torch.Tensor.share_memory_)
def _(func: Op, types: Any, args: Args, kwargs: Kwargs) -> Tensor:
    weight: GrinqhTensor = args[0]
    for name in weight.data_names:
        getattr(weight, name).share_memory_()
    return weight


@GrinqhTensor.implements_torch_function(torch.Tensor.is_shared)
def _(func: Op, types: Any, args: Args, kwargs: Kwargs) -> bool:
    return all(getattr(args[0], name).is_shared() for name in args[0].data_names)


@GrinqhTensor.implements_torch_function(torch.Tensor.data.__set__)  # type: ignore[attr-defined]
def _(func: Op, types: Any, args: Args, kwargs: Kwargs) -> None:
    weight, other = args
    if not isinstance(other, GrinqhTensor):
        raise TypeError(
            f"cannot make a {type(other).__name__} the data of a GrinqhTensor; assign a parameter "
            "to the module instead"
        )
    with torch._C.DisableTorchFunctionSubclass():
        func(weight, other)  # what the tensor presents itself as, but not what it holds
    held = {name: getattr(other, name) for name in other.data_names}
    GrinqhTensor.__init__(weight, **held, **other._attributes)


@GrinqhTensor.implements_torch_function(
    [torch.Tensor.requires_grad_, torch.Tensor.requires_grad.__set__]  # type: ignore[attr-defined]
)
def _(func: Op, types: Any, args: Args, kwargs: Kwargs) -> Tensor | None:
    weight, wanted = args[0], [*args[1:], *kwargs.values(), True][0]
    if wanted:
        _say_that_codes_are_not_trained()
    with torch._C.DisableTorchFunctionSubclass():
        result: Tensor | None = func(weight, False)
    return result


@functools.cache  # models have many weights
def _say_that_codes_are_not_trained() -> None:
    logger.warning("requires_grad=True has no effect on a GrinqhTensor: codes are not trained")


@GrinqhTensor.implements(aten.is_pinned.default)
def _(func: Op, types: Any, args: Args, kwargs: Kwargs) -> bool:
    return all(getattr(args[0], name).is_pinned() for name in args[0].data_names)


@GrinqhTensor.implements(aten._pin_memory.default)
def _(func: Op, types: Any, args: Args, kwargs: Kwargs) -> GrinqhTensor:
    pinned: GrinqhTensor = args[0].with_data(lambda data: data.pin_memory())
    return pinned


# .to(device) moves everything; .to(dtype) changes what the tensor presents itself as.
@GrinqhTensor.implements(
    [aten._to_copy.default,
     # Which inference mode does not turn into the former.
     aten.to.dtype, aten.to.device, aten.to.dtype_layout]
)  # fmt: skip
def _(func: Op, types: Any, args: Args, kwargs: Kwargs) -> GrinqhTensor:
    names = [argument.name for argument in func._schema.arguments]  # type: ignore[attr-defined]
    given: Kwargs = dict(zip(names, args, strict=False)) | kwargs
    weight: GrinqhTensor = given["self"]
    dtype, device = given.get("dtype") or weight.dtype, given.get("device") or weight.device
    if not dtype.is_floating_point:
        raise TypeError(f"dtype={dtype}: a GrinqhTensor can present itself as floating point only")
    as_it_is = func is not aten._to_copy.default and dtype == weight.dtype
    copy = given.get("copy") or not as_it_is
    new: GrinqhTensor = weight.with_data(lambda data: data.to(device, copy=copy), dtype=dtype)
    return weight if new.slices is weight.slices else new


for _op in (aten.detach.default, aten.alias.default):
    _of_base_class = GrinqhTensor._ATEN_OP_TABLE[GrinqhTensor][_op]
    GrinqhTensor.implements(_op)(_view(_of_base_class))

_copy_same_type = GrinqhTensor._ATEN_OP_TABLE[GrinqhTensor][aten.copy_.default]


@GrinqhTensor.implements(aten.copy_.default)
def _(func: Op, types: Any, args: Args, kwargs: Kwargs) -> Tensor:
    if not all(isinstance(tensor, GrinqhTensor) for tensor in args[:2]):
        raise TypeError(
            f"cannot copy a {type(args[1]).__name__} into a {type(args[0]).__name__} in place; "
            "load_state_dict(..., assign=True) replaces the weight instead"
        )
    into, source = args[:2]
    if into.data_names != source.data_names:
        raise ValueError(
            f"cannot copy {source} into {into} in place: only one of them is calibrated, or "
            "compact; load_state_dict(..., assign=True) replaces the weight instead"
        )
    # The codes know no dtype: a model that presents itself in another one takes them as they are.
    alike = _alias(source, dtype=into.dtype)
    copied: Tensor = _copy_same_type(func, types, (into, alike, *args[2:]), kwargs)
    return copied
