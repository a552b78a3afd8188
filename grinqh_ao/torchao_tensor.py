"""GrinqhTensor: a linear layer's weight as nested codes.

The module's name matters: accelerate moves tensors from modules named "torchao" as they are, and
tries to construct anything else anew, which a tensor with inner tensors cannot serve.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchao.utils import TorchAOBaseTensor

from grinqh_ao import ops
from grinqh_ao.codec import (
    CODE_BITS,
    SCALE_GROUP,
    check_values,
    default_gains,
    quantize,
    sensitivity,
)
from grinqh_ao.compact import levels_fit
from grinqh_ao.grading import (
    ALL_LEVELS,
    bits_of,
    check_bits,
    check_levels,
    grade,
    most_bits,
    thresholds_for,
)
from grinqh_ao.slices import (
    FIELDS_PER_WORD,
    drop_low,
    pack,
    tile_width,
)
from grinqh_ao.tails import check_curve
from grinqh_ao.vectors import (
    gains_of,
    join,
    outputs_of,
    row_scale_of,
    sensitivity_of,
    thresholds_of,
)

SUPPORTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


# Names of the tensor data there are, with and without a curve, and low.
_DATA_NAMES = {
    (curve, low): ["slices", "scales", "vectors"] + ["curve"] * curve + ["low"] * low
    for curve in (False, True)
    for low in (False, True)
}


class GrinqhTensor(TorchAOBaseTensor):
    """A weight [N, K] stored once as nested codes, read at 0, 2, 4, 6 or 8 bits per channel.

    Or a stack [E, N, K] of such weights, those of the experts of a mixture: then all tensor data
    have a first dimension E, and ``stack[e]`` is one of them, on the same memory.

    Up to 8 rows of activations go to ``grinqh::decode_linear``, which chooses the level of every
    channel from them. More rows, and inputs that want gradients, take the dense path: the weight
    at its highest level, dequantized to the dtype of the input.

    Tensor data:
        slices: int32 [tiles, lines, tile / 16], the codes cut into 2-bit slices (:mod:`.slices`).
        scales: uint8 [tiles, K, tile / 64], logarithmic scales of 64 outputs of one channel.
        vectors: float32 [L], thresholds, gains, sensitivity and row_scale (:mod:`.vectors`).
        curve: float32 [387], or [772] in compact storage, where calibrated, else None (see
            :mod:`.tails`).
        low: int32 [K] in compact storage, which channels have low slices; else None.

    Attributes:
        levels: the bits a channel may be read at, ascending; J + 1 of them.
        min_bits: ``set_bits`` never asks this weight to read fewer; above 0 for output heads.
        dtype: the dtype the tensor presents itself with; the codes know none.
        sharing: of a part with some inputs of a weight, (name, K): the process group whose ranks
            have the others, and inputs of the whole. Else None.
        thresholds: float32 [2, J], what ``set_bits`` changes in place (see :mod:`.grading`).
        gains: float32 [4], of levels 2, 4, 6 and 8 (see :mod:`.codec`).
        sensitivity: float32 [K], what rounding errors in each channel weigh where calibrated,
            else 1.
        row_scale: float32 [N].
    """

    tensor_data_names = ["slices", "scales", "vectors"]
    tensor_attribute_names = ["levels", "min_bits", "dtype"]
    optional_tensor_data_names = ["curve", "low"]
    optional_tensor_attribute_names = ["sharing"]

    slices: Tensor
    scales: Tensor
    vectors: Tensor
    curve: Tensor | None
    low: Tensor | None
    levels: tuple[int, ...]
    min_bits: float

    def __new__(
        cls,
        slices: Tensor,
        scales: Tensor,
        vectors: Tensor,
        levels: tuple[int, ...],
        min_bits: float,
        dtype: torch.dtype,
        curve: Tensor | None = None,
        low: Tensor | None = None,
        sharing: tuple[str, int] | None = None,
        size: torch.Size | None = None,
    ) -> GrinqhTensor:
        if size is None:
            k = scales.shape[-2]
            size = torch.Size([*vectors.shape[:-1], outputs_of(vectors, k), k])
        return torch.Tensor._make_wrapper_subclass(
            cls, size, device=slices.device, dtype=dtype, requires_grad=False
        )

    def __init__(
        self,
        slices: Tensor,
        scales: Tensor,
        vectors: Tensor,
        levels: tuple[int, ...],
        min_bits: float,
        dtype: torch.dtype,
        curve: Tensor | None = None,
        low: Tensor | None = None,
        sharing: tuple[str, int] | None = None,
        size: torch.Size | None = None,
    ) -> None:
        super().__init__()
        self.slices = slices
        self.scales = scales
        self.vectors = vectors
        self.levels = tuple(levels)
        self.min_bits = min_bits
        self.sharing = sharing
        self._attributes: dict[str, Any] = {
            "levels": self.levels,
            "min_bits": min_bits,
            "dtype": dtype,
            "sharing": sharing,
        }
        self.curve = curve
        self.low = low

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        # Compiled models ask this of every weight twice at every step: so nothing is built here.
        return _DATA_NAMES[self.curve is not None, self.low is not None], self._attributes

    @classmethod
    def __tensor_unflatten__(
        cls,
        tensor_data_dict: dict[str, Any],
        tensor_attributes: dict[str, Any],
        outer_size: torch.Size | None,
        outer_stride: tuple[int, ...] | None,
    ) -> GrinqhTensor:
        # With dynamic=True sizes are symbols, and guards know the outer ones by these names only.
        return cls(**tensor_data_dict, **tensor_attributes, size=outer_size)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        from grinqh_ao.checkpoint import rebuild  # which needs this class

        data = {name: getattr(self, name) for name in self.data_names}
        return rebuild, (data, self._attributes, getattr(self, "_is_param", False))

    @classmethod
    @torch.compiler.disable  # done once per weight, and to give the same codes everywhere
    def from_hp(
        cls,
        weight: Tensor,
        bits: float = 3.0,
        levels: Sequence[int] = ALL_LEVELS,
        min_bits: float = 0.0,
    ) -> GrinqhTensor:
        """Quantizes a high-precision weight.

        Args:
            weight: [N, K], float32, float16 or bfloat16, finite.
            bits: average bits to read per weight, between the lowest and the highest level.
            levels: ascending bit widths out of 0, 2, 4, 6, 8. The highest is what is stored.
            min_bits: raises ``bits``, now and in :meth:`set_bits`; at most the highest level.

        Raises:
            ValueError: ``bits``, ``levels`` or ``min_bits`` out of range; ``weight`` not 2-D, not
                finite, without data (meta), or with values beyond 1.3e30.
            TypeError: ``weight`` has another dtype.
        """
        levels = check_levels(levels)
        check_bits(bits, levels)
        if not isinstance(min_bits, int | float) or not 0 <= min_bits <= levels[-1]:
            raise ValueError(f"min_bits={min_bits!r}: expected a number from 0 to {levels[-1]}")
        thresholds = thresholds_for(max(bits, min_bits), levels)
        if weight.dim() != 2:
            raise ValueError(f"weight of shape {tuple(weight.shape)}: expected [out, in]")
        if weight.dtype not in SUPPORTED_DTYPES:
            raise TypeError(f"weight of dtype {weight.dtype}: expected one of {SUPPORTED_DTYPES}")
        weight = weight.detach()
        check_values(weight)
        n, k = weight.shape
        tile = tile_width(n)
        codes, scale_codes, row_scale = quantize(weight, max_level=levels[-1])
        codes >>= CODE_BITS - levels[-1]
        tiles, groups = -(-n // tile), tile // SCALE_GROUP
        scale_codes = F.pad(scale_codes, (0, 0, 0, tiles * groups - scale_codes.shape[0]))
        return cls(
            pack(codes, levels[-1] // 2, tile),
            scale_codes.view(tiles, groups, k).transpose(1, 2).contiguous(),
            join(
                thresholds.to(weight.device),
                default_gains(weight.device),
                torch.ones(k, device=weight.device),
                row_scale,
            ),
            levels,
            float(min_bits),
            weight.dtype,
        )

    def set_bits(self, bits: float) -> None:
        """Changes in place how many bits are read on average; no requantization, no recompile.

        Raises:
            ValueError: ``bits`` is not an average that the levels can reach.
        """
        self.check_bits(bits)
        if self.dim() == 3:
            for weight in self.unbind():  # on the same memory
                weight.set_bits(bits)
            return
        thresholds = thresholds_for(max(bits, self.min_bits), self.levels, self.curve)
        # In inference mode even thresholds that were made there may be written to.
        with torch.inference_mode():
            self.thresholds.copy_(thresholds)

    def check_bits(self, bits: float, name: str = "bits") -> None:
        """Raises ValueError unless ``bits`` is an average that this weight can be read at."""
        if self.dim() == 3:
            for expert, weight in enumerate(self.unbind()):
                weight.check_bits(bits, f"{name} of expert {expert}")
            return
        check_bits(bits, self.levels, name, most_bits(self.levels, self.curve))

    def calibrate(
        self, curve: Tensor, bits: float | None = None, kept: Tensor | None = None
    ) -> None:
        """Replaces the formula behind ``bits`` by what calibration measured, in place.

        Args:
            curve: float32 [387], or [772] for compact storage, see :mod:`.tails`: of activations
                times :meth:`measured_sensitivity`.
            bits: as in :meth:`set_bits`; None keeps what the tensor aims at now.
            kept: bool [K], goes over to compact storage: the channels that keep low slices. The
                others are read at 4 bits at most from now on.

        Raises:
            ValueError: ``curve`` is no curve for this storage, ``bits`` out of range, or the tensor
                cannot be stored compactly: its levels are without 4 or 8, or it is already; or it
                has some inputs only of a larger weight; or it is a stack.
        """
        if self.dim() == 3:
            raise ValueError(
                f"a stack of {self.shape[0]} experts' weights: grinqh_ao.calibrate(model, ...) "
                "calibrates each by what it sees"
            )
        if self.sharing is not None:
            raise ValueError("a part of a weight cannot be calibrated: calibrate the whole first")
        if kept is not None and not self.can_be_compact:
            raise ValueError(
                f"kept: {self._quantization_type()} cannot be stored compactly: expected levels "
                "4 and 8, no min_bits, and low slices of all channels"
            )
        check_curve(curve, compact=kept is not None or self.low is not None)
        bits = self.bits if bits is None else bits
        check_bits(bits, self.levels, most=most_bits(self.levels, curve))
        thresholds = thresholds_for(max(bits, self.min_bits), self.levels, curve)
        if kept is not None:
            self.slices, self.low = drop_low(self.slices, kept.to(self.device))
        self.curve = curve.to(self.device, copy=True)
        with torch.inference_mode():
            self.sensitivity.copy_(self.measured_sensitivity())
            self.thresholds.copy_(thresholds)

    def measured_sensitivity(self) -> Tensor:
        """bfloat16 [K]: what :meth:`calibrate` grades activations with."""
        return sensitivity(self.scales, self.row_scale)

    @property
    def can_be_compact(self) -> bool:
        """Whether low slices may be dropped: not of output heads, which need them all."""
        return levels_fit(self.levels) and not self.min_bits and self.low is None

    @property
    def bits(self) -> float:
        """Average bits per weight that the thresholds aim at. Waits for the device."""
        if self.dim() == 3:
            every: list[float] = [weight.bits for weight in self.unbind()]
            return sum(every) / len(every)
        return bits_of(self.thresholds, self.levels, self.curve)

    @property
    def thresholds(self) -> Tensor:
        return thresholds_of(self.vectors, len(self.levels))

    @property
    def gains(self) -> Tensor:
        return gains_of(self.vectors)

    @property
    def sensitivity(self) -> Tensor:
        return sensitivity_of(self.vectors, self.scales.shape[-2])

    @property
    def row_scale(self) -> Tensor:
        return row_scale_of(self.vectors, self.scales.shape[-2])

    @property
    def tile(self) -> int:
        """Outputs per tile."""
        return self.slices.shape[-1] * FIELDS_PER_WORD

    def dequantize(
        self, output_dtype: torch.dtype | None = None, level: int | None = None
    ) -> Tensor:
        """The dense weight, [N, K] or [E, N, K], as read at ``level`` (default: the highest).

        Raises:
            ValueError: ``level`` is not one of 0, 2, 4, 6 and 8, or more than is stored.
            TypeError: ``output_dtype`` is not floating point.
        """
        if output_dtype is not None and not output_dtype.is_floating_point:
            raise TypeError(f"output_dtype={output_dtype}: expected floating point")
        level = self.levels[-1] if level is None else level
        if level not in ALL_LEVELS or level > self.levels[-1]:
            raise ValueError(
                f"level={level!r}: expected one of {ALL_LEVELS}, at most {self.levels[-1]}"
            )
        if self.dim() == 3:
            return torch.stack([weight.dequantize(output_dtype, level) for weight in self.unbind()])
        return ops.dequantize(
            self.slices,
            self.scales,
            self.vectors,
            self.low,
            level,
            output_dtype or self.dtype,
        )

    def grade(self, x: Tensor) -> Tensor:
        """uint8 [..., K]: the level that each channel of ``x`` [..., K] is read at."""
        mean = self.shared_mean(x)
        return grade(x, self.sensitivity, self.thresholds, self.levels, self.low, mean)

    def shared_mean(self, x: Tensor) -> Tensor | None:
        """Of a part with some inputs: float32 [...], the mean magnitudes over all of ``x``."""
        if self.sharing is None:
            return None
        from torch.distributed import _functional_collectives as collectives

        group, k = self.sharing
        here = (x.abs().float() * self.sensitivity).sum(-1)
        total = collectives.all_reduce(here, "sum", group)  # type: ignore[arg-type]
        mean: Tensor = collectives.wait_tensor(total) / k
        return mean

    @property
    def data_names(self) -> list[str]:
        """Names of the tensor data that there is."""
        names: list[str] = self.__tensor_flatten__()[0]
        return names

    @property
    def stored_bytes(self) -> int:
        """Bytes of everything stored for this weight."""
        return sum(getattr(self, name).nbytes for name in self.data_names)

    def with_data(self, function: Callable[[Tensor], Tensor], **attributes: Any) -> GrinqhTensor:
        """This weight with ``function`` applied to all its data, and ``attributes`` replaced."""
        data: dict[str, Any] = {name: function(getattr(self, name)) for name in self.data_names}
        return GrinqhTensor(**data, **(self._attributes | attributes))

    @classmethod
    def stack(cls, weights: Sequence[GrinqhTensor]) -> GrinqhTensor:
        """Weights [N, K] with the same levels and data as one [E, N, K]."""
        names = weights[0].data_names
        data: dict[str, Any] = {n: torch.stack([getattr(w, n) for w in weights]) for n in names}
        return cls(**data, **weights[0]._attributes)

    def _quantization_type(self) -> str:  # what TorchAO asks for
        calibrated = "" if self.curve is None else ", calibrated"
        compact = "" if self.low is None else ", compact"
        return (
            f"levels={self.levels}, min_bits={self.min_bits:g}, tile={self.tile}"
            f"{calibrated}{compact}"
        )

    def _stable_hash_for_caching(self) -> str:
        # Everything a compiled graph depends on. Names and shapes of the inner tensors too: compact
        # storage differs in them, and graphs of another version of this class may lie on disk.
        inner = ",".join(f"{name}{tuple(getattr(self, name).shape)}" for name in self.data_names)
        return (
            f"{inner};{tuple(self.shape)},{self.levels},{self.min_bits},{self.dtype},{self.sharing}"
        )

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return (
            f"GrinqhTensor(shape={tuple(self.shape)}, {self._quantization_type()}, "
            f"dtype={self.dtype}, device={self.device})"
        )
