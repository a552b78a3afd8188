"""A saved model's files, checked as a whole before any of it is loaded."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from grinqh_ao.checkpoint import SUFFIXES, Attributes, check
from grinqh_ao.errors import CheckpointError

SAVE_ID = "grinqh_save_id"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class _InFile:
    """A tensor whose data is read when asked for."""

    file: str
    _slice: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._slice.get_shape())

    @property
    def dtype(self) -> torch.dtype:
        name = self._slice.get_dtype()
        if name not in _DTYPES:
            raise CheckpointError(f"{self.file}: has dtype {name}, expected one of {list(_DTYPES)}")
        return _DTYPES[name]

    @property
    def nbytes(self) -> int:
        return int(self.dtype.itemsize) * math.prod(self.shape)

    def __getitem__(self, index: Any) -> Tensor:
        tensor: Tensor = self._slice[index]
        return tensor


def files_of(directory: Path) -> list[str]:
    """The files of a saved model's tensors; others may lie beside them.

    Raises:
        CheckpointError: its index names a file that is not there, or is no index.
    """
    single, index = directory / SAFE_WEIGHTS_NAME, directory / SAFE_WEIGHTS_INDEX_NAME
    if single.exists() or not index.exists():
        return [str(single)]
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index}: is no index: {error!r}") from None
    for name in names:
        if not (directory / name).exists():
            raise CheckpointError(f"{index}: names {name}, which is missing")
    return [str(directory / name) for name in names]


@contextlib.contextmanager
def open_tensors(files: Sequence[str], save_id: object = None) -> Iterator[dict[str, _InFile]]:
    """All tensors of some files, by name.

    Args:
        save_id: of config.json, and so of all files. With it, files of two models are told apart
            where saving one over the other was interrupted.

    Raises:
        CheckpointError: a file is damaged, or was saved at another time.
    """
    with contextlib.ExitStack() as stack:
        tensors: dict[str, _InFile] = {}
        for path in files:
            try:
                opened = stack.enter_context(safe_open(path, "pt"))
            except SafetensorError as error:
                raise CheckpointError(f"{path}: not a complete safetensors file: {error}") from None
            found = (opened.metadata() or {}).get(SAVE_ID)
            if found != save_id:
                raise CheckpointError(
                    f"{path}: was saved at another time than config.json, as where saving was "
                    "interrupted, or is left of another model that was saved here: expected "
                    f"{SAVE_ID}={save_id!r}, found {found!r}"
                )
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                tensors[name] = _InFile(Path(path).name, opened.get_slice(name))
        yield tensors


def check_files(
    files: Sequence[str],
    model: Any,
    attributes: Mapping[str, Attributes],
    shapes: Mapping[str, Sequence[int]],
    save_id: object,
) -> None:
    """Refuses files that do not hold all of ``model``, or not what their weights claim to be.

    Reads headers and small tensors.

    Args:
        files: in safetensors' format.
        attributes: of the quantized weights, by their names in the files.
        shapes: of the same; of those that the model has.
        save_id: see :func:`open_tensors`.

    Raises:
        CheckpointError: names the file, the layer and what is wrong with it.
    """
    with torch.device("cpu"), open_tensors(files, save_id) as tensors:  # not on "meta"
        whole = Path(files[0]).parent
        for name, one in attributes.items():
            parts = {
                key.removeprefix(name): tensor
                for key, tensor in tensors.items()
                if key == name or key.startswith(f"{name}_")
            }
            if not parts:
                raise CheckpointError(f"{whole}: {name}: missing")
            file = next(iter(parts.values())).file
            if name in shapes:
                check(parts, shapes[name], one, f"{file}: {name}")
        _check_strangers(tensors, attributes)
        _check_complete(tensors, attributes, model, whole)


def _check_strangers(tensors: Mapping[str, _InFile], attributes: Mapping[str, Attributes]) -> None:
    """Parts of a quantized weight that config.json does not know of."""
    inner = "|".join(re.escape(suffix) for suffix in SUFFIXES.values() if suffix)
    for name, tensor in tensors.items():
        match = re.fullmatch(rf"(.*\.weight)({inner})", name)
        if match and match[1] not in attributes:
            raise CheckpointError(
                f"{tensor.file}: {name}: config.json does not name {match[1]} as quantized"
            )


def _check_complete(
    tensors: Mapping[str, _InFile],
    attributes: Mapping[str, Attributes],
    model: Any,
    where: Path,
) -> None:
    """transformers would only warn of what is missing, and leave it random."""
    prefix = f"{model.base_model_prefix}."
    same_class = type(model).__name__ in (getattr(model.config, "architectures", None) or ())
    is_base = not hasattr(model, model.base_model_prefix)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    ignored = list(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())
    for name in model.state_dict():
        # Another kind of model than was saved may well have layers of its own, beside the base.
        if not (same_class or is_base or name.startswith(prefix)):
            continue
        if name in tied or any(re.search(pattern, name) for pattern in ignored):
            continue
        if not {name, prefix + name, name.removeprefix(prefix)} & {*tensors, *attributes}:
            raise CheckpointError(f"{where}: {name}: missing")
