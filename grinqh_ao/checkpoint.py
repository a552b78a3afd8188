"""What a GrinqhTensor is in a file: named plain tensors, and whether they are what they claim.

docs/format.md describes the format byte by byte.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from grinqh_ao.codec import SCALE_GROUP
from grinqh_ao.compact import levels_fit
from grinqh_ao.errors import CheckpointError
from grinqh_ao.grading import check_levels
from grinqh_ao.slices import FIELDS_PER_WORD, HIGH_SLICES, TILE_WIDTHS
from grinqh_ao.tails import check_curve
from grinqh_ao.torchao_tensor import GrinqhTensor
from grinqh_ao.vectors import join, outputs_of

FORMAT_VERSION = 1

# In a file the parts of a weight's vectors are tensors of their own.
_PARTS = ("row_scale", "sensitivity", "thresholds", "gains")
_REQUIRED = ("slices", "scales", *_PARTS)
# What follows the name of a weight. Slices take the weight's own name: where nothing knows of this
# package, they do not fit there, and loading fails rather than leave the weight random.
SUFFIXES = {"slices": ""} | {
    name: f"_{name}" for name in ("scales", *_PARTS, *GrinqhTensor.optional_tensor_data_names)
}
_DTYPES = {
    "slices": torch.int32,
    "scales": torch.uint8,
    "row_scale": torch.bfloat16,
    "sensitivity": torch.bfloat16,
    "thresholds": torch.float32,
    "gains": torch.float32,
    "curve": torch.float32,
    "low": torch.int32,
}


class Stored(Protocol):
    """A tensor, or one that is still in a file."""

    @property
    def shape(self) -> Sequence[int]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def __getitem__(self, index: Any, /) -> Tensor: ...


@dataclass(frozen=True)
class Attributes:
    """What a weight needs to be read, beside its tensors."""

    levels: tuple[int, ...]
    min_bits: float

    @classmethod
    def of(cls, weight: GrinqhTensor) -> Attributes:
        return cls(weight.levels, weight.min_bits)

    @classmethod
    def checked(cls, levels: object, min_bits: object, where: str) -> Attributes:
        """Raises CheckpointError for what no weight has."""
        try:
            found = check_levels(levels)
        except ValueError as error:
            raise CheckpointError(f"{where}: {error}") from None
        number = isinstance(min_bits, int | float) and not isinstance(min_bits, bool)
        if not number or not 0 <= min_bits <= found[-1]:  # type: ignore[operator]
            raise CheckpointError(
                f"{where}: min_bits={min_bits!r}: expected a number from 0 to {found[-1]}"
            )
        return cls(found, float(min_bits))  # type: ignore[arg-type]


def to_tensors(weight: GrinqhTensor) -> dict[str, Tensor]:
    """Suffix -> tensor: what is stored of ``weight``, beside its attributes."""
    names = [name for name in weight.data_names if name != "vectors"]
    data = {name: getattr(weight, name) for name in names}
    # Copies: files have no tensors that share memory.
    data |= {name: getattr(weight, name).to(_DTYPES[name], copy=True) for name in _PARTS}
    return {SUFFIXES[name]: data[name] for name in SUFFIXES if name in data}


def from_tensors(
    tensors: Mapping[str, Tensor],
    shape: Sequence[int],
    attributes: Attributes,
    dtype: torch.dtype,
    where: str,
) -> GrinqhTensor:
    """The weight that :func:`to_tensors` took apart.

    Raises:
        CheckpointError: see :func:`check`.
    """
    check(tensors, shape, attributes, where)
    data: dict[str, Any] = {name: tensors.get(suffix) for name, suffix in SUFFIXES.items()}
    parts = {name: data.pop(name) for name in _PARTS}
    return GrinqhTensor(
        **data,
        vectors=join(**parts),
        levels=attributes.levels,
        min_bits=attributes.min_bits,
        dtype=dtype,
    )


def rebuild(
    data: Mapping[str, Tensor], attributes: Mapping[str, Any], is_parameter: bool
) -> GrinqhTensor:
    """A weight from a pickle.

    ``torch.load(weights_only=True)``, for files that nobody trusts, may call this, and never
    GrinqhTensor itself.

    Raises:
        CheckpointError: see :func:`check`.
    """
    where = "pickled weight"
    required = set(GrinqhTensor.tensor_data_names)
    if not required <= set(data) <= required | set(GrinqhTensor.optional_tensor_data_names):
        raise CheckpointError(f"{where}: has {sorted(data)}, expected {sorted(required)}")
    for name, tensor in data.items():
        plain = isinstance(tensor, Tensor) and tensor.layout is torch.strided
        if not (plain and tensor.is_contiguous() and tensor.device == data["slices"].device):
            raise CheckpointError(f"{where}: {name}: expected a contiguous tensor, beside slices")
    scales, vectors = data["scales"], data["vectors"]
    dimensions = vectors.dim() + 2
    if vectors.dtype != torch.float32 or scales.dim() != dimensions or dimensions not in (3, 4):
        raise CheckpointError(
            f"{where}: vectors: has shape {tuple(vectors.shape)} and dtype {vectors.dtype}, "
            "expected float32 [L] or [E, L], and two dimensions more of scales"
        )
    if outputs_of(vectors, scales.shape[-2]) < 1:
        raise CheckpointError(f"{where}: vectors: has shape {tuple(vectors.shape)}, too short")
    expected = {"levels", "min_bits", "dtype", "sharing"}
    if set(attributes) != expected or not isinstance(attributes["dtype"], torch.dtype):
        raise CheckpointError(f"{where}: has attributes {attributes}, expected {expected}")
    found = Attributes.checked(attributes["levels"], attributes["min_bits"], where)
    weight = GrinqhTensor(**{**data, **attributes, **vars(found)})
    if not weight.is_meta:
        check(to_tensors(weight), weight.shape, found, where)
    if is_parameter:
        weight = nn.Parameter(weight, requires_grad=False)  # type: ignore[assignment]
    return weight


torch.serialization.add_safe_globals([rebuild])


def check(
    tensors: Mapping[str, Stored], shape: Sequence[int], attributes: Attributes, where: str
) -> None:
    """Refuses what kernels could not read, or would read past the end of.

    Args:
        tensors: by suffix.
        shape: of the weight, [N, K] or [E, N, K].
        where: the file and the layer, for messages.

    Raises:
        CheckpointError: a tensor is missing or unknown, or has the wrong dtype, shape or values.
    """
    names = {suffix: name for name, suffix in SUFFIXES.items()}
    for suffix in tensors:
        if suffix not in names:
            raise CheckpointError(f"{where}: tensor {suffix!r}: unknown, expected {list(names)}")
    found = {names[suffix]: tensor for suffix, tensor in tensors.items()}
    for name in _REQUIRED:
        if name not in found:
            raise CheckpointError(f"{where}: {name}: missing")
    for name, tensor in found.items():
        if tensor.dtype != _DTYPES[name]:
            raise CheckpointError(
                f"{where}: {name}: has dtype {tensor.dtype}, expected {_DTYPES[name]}"
            )
    _check_shapes({name: tuple(t.shape) for name, t in found.items()}, shape, attributes, where)
    for name in set(_RULES) & set(found):
        if problem := _RULES[name](found[name][...]):
            raise CheckpointError(f"{where}: {name}: {problem}")
    if "low" in found:
        kept = (found["slices"].shape[-2] - HIGH_SLICES * shape[-1]) // HIGH_SLICES
        _check_low(found["low"][...], kept, where)
    if "curve" in found:
        curves = found["curve"][...]
        for curve in curves if curves.dim() == 2 else [curves]:
            try:
                check_curve(curve, compact="low" in found)
            except ValueError as error:
                raise CheckpointError(f"{where}: curve: {error}") from None


def _check_shapes(
    found: Mapping[str, tuple[int, ...]],
    shape: Sequence[int],
    attributes: Attributes,
    where: str,
) -> None:
    *experts, n, k = shape
    slices = found["slices"]
    if len(slices) != len(shape) + 1 or slices[-1] * FIELDS_PER_WORD not in TILE_WIDTHS:
        known = [tile // FIELDS_PER_WORD for tile in TILE_WIDTHS]
        raise CheckpointError(
            f"{where}: slices: has shape {slices}, expected {len(shape) + 1} dimensions, the last "
            f"one of {known}"
        )
    words = slices[-1]
    tile = words * FIELDS_PER_WORD
    tiles = -(-n // tile)
    lines = attributes.levels[-1] // 2 * k
    if "low" in found:
        # As many as there are; they are counted with the values of low.
        least = HIGH_SLICES * k
        if experts or not levels_fit(attributes.levels) or attributes.min_bits:
            raise CheckpointError(
                f"{where}: low: only weights with levels 4 and 8 that are neither experts nor an "
                "output head are stored compactly"
            )
        lines = slices[-2] if slices[-2] >= least and slices[-2] % 2 == 0 else least
    expected = {
        "slices": (tiles, lines, words),
        "scales": (tiles, k, tile // SCALE_GROUP),
        "row_scale": (n,),
        "sensitivity": (k,),
        "thresholds": (2, len(attributes.levels) - 1),
        "gains": (4,),
        "low": (k,),
    }
    for name, one in expected.items():
        if name in found and found[name] != (*experts, *one):
            hint = f", for levels {attributes.levels}" if name in ("slices", "thresholds") else ""
            raise CheckpointError(
                f"{where}: {name}: has shape {found[name]}, expected {(*experts, *one)}{hint}"
            )
    if "curve" in found and found["curve"][:-1] != tuple(experts):
        raise CheckpointError(
            f"{where}: curve: has shape {found['curve']}, expected {(*experts, '...')}"
        )


def _finite(values: Tensor) -> str:
    return "" if values.isfinite().all() else "has values that are not finite"


def _not_negative(values: Tensor) -> str:
    return _finite(values) or ("has negative values" if (values < 0).any() else "")


def _positive(values: Tensor) -> str:
    return _finite(values) or ("" if (values > 0).all() else "has values that are not positive")


def _ascending(values: Tensor) -> str:
    ordered = (values.diff(dim=-1) >= 0).all()
    return _not_negative(values) or ("" if ordered else "are not in ascending order")


_RULES = {
    "row_scale": _not_negative,
    "sensitivity": _not_negative,
    "thresholds": _ascending,
    "gains": _positive,
}


def _check_low(low: Tensor, kept: int, where: str) -> None:
    """Every place among the low slices belongs to one channel."""
    places = low[low >= 0].sort().values
    if (low < -1).any() or not torch.equal(
        places, torch.arange(kept, dtype=low.dtype, device=low.device)
    ):
        raise CheckpointError(
            f"{where}: low: expected -1, or each place from 0 to {kept - 1} once, for as many "
            "channels as slices has low lines"
        )
