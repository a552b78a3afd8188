"""``grinqh info``"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from grinqh_ao.cli.options import Json

AnyRow = TypeVar("AnyRow", "Row", "DenseRow")


@dataclass(frozen=True)
class Row:
    """A quantized weight, or several of the same kind."""

    name: str
    count: int
    shape: tuple[int, ...]
    levels: str
    bits: float
    stored_bits: float
    megabytes: float
    notes: str


@dataclass(frozen=True)
class DenseRow:
    """A tensor that is not quantized, or several of the same kind."""

    name: str
    count: int
    shape: tuple[int, ...]
    dtype: str
    megabytes: float


def info(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A saved, quantized model.")],
    every: Annotated[bool, typer.Option("--all", help="Every layer, not every kind of.")] = False,
    json_file: Json = None,
) -> None:
    """Shows what DIR holds: layers, the bits they aim at, sizes, what was not quantized.

    Reads no weights. Checks what is quantized as loading would, and that no file is missing.
    """
    from tabulate import tabulate

    quantized, dense = read(directory)
    shown = quantized if every else merged(quantized)
    shown_dense = dense if every else merged_dense(dense)
    headers = ["layer", "n", "shape", "levels", "bits", "stored bits", "MB", ""]
    cells = [
        [r.name, r.count, "x".join(map(str, r.shape)), r.levels, r.bits, r.stored_bits, r.megabytes,
         r.notes] for r in shown
    ]  # fmt: skip
    forms = ["", "", "", "", ".2f", ".2f", ".2f", ""]
    print(tabulate(cells, headers, "github", floatfmt=forms))
    print("\nnot quantized:\n")
    cells = [[r.name, r.count, "x".join(map(str, r.shape)), r.dtype, r.megabytes]
             for r in shown_dense]  # fmt: skip
    print(tabulate(cells, ["tensor", "n", "shape", "dtype", "MB"], "github", floatfmt=".2f"))
    weights = sum(math.prod(row.shape) for row in quantized)
    stored = sum(row.megabytes for row in quantized)
    rest = sum(row.megabytes for row in dense)
    print(
        f"\n{weights / 1e6:.1f}M weights quantized, {stored:.1f} MB "
        f"({8 * stored * 1e6 / weights:.2f} bits each); {rest:.1f} MB not"
    )
    if json_file is not None:
        report = {"quantized": [asdict(r) for r in quantized], "dense": [asdict(r) for r in dense]}
        json_file.write_text(json.dumps(report, indent=1) + "\n")


def read(directory: Path) -> tuple[list[Row], list[DenseRow]]:
    """All quantized weights and all other tensors of a saved model.

    Raises:
        ValueError: it is not what it claims to be.
    """
    from grinqh_ao.checkpoint import SUFFIXES, check
    from grinqh_ao.grading import bits_of
    from grinqh_ao.huggingface.config import QUANT_METHOD, GrinqhHfConfig
    from grinqh_ao.huggingface.files import files_of, open_tensors

    config = json.loads((directory / "config.json").read_text())
    settings = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(settings, dict) or settings.get("quant_method") != QUANT_METHOD:
        raise ValueError(f"{directory}: not quantized by GRINQH")
    quantized = GrinqhHfConfig(**settings)
    attributes = quantized.attributes()
    rows, taken = [], set()
    with open_tensors(files_of(directory), quantized.save_id) as tensors:
        for name, one in attributes.items():
            parts = {s: tensors[name + s] for s in SUFFIXES.values() if name + s in tensors}
            taken |= {name + suffix for suffix in parts}
            if "_row_scale" not in parts or "_scales" not in parts:
                raise ValueError(f"{directory}: {name}: missing")
            shape = (*parts["_row_scale"].shape, parts["_scales"].shape[-2])
            check(parts, shape, one, f"{parts['_scales'].file}: {name}")
            thresholds = parts["_thresholds"][...]
            curve = parts["_curve"][...] if "_curve" in parts else None
            experts = [(thresholds, curve)]
            if len(shape) == 3:
                curves = [None] * shape[0] if curve is None else curve.unbind()
                experts = list(zip(thresholds.unbind(), curves, strict=True))
            every = [bits_of(t, one.levels, c) for t, c in experts]
            stored = sum(tensor.nbytes for tensor in parts.values())
            notes = [
                f"head, at least {one.min_bits:g}" if one.min_bits else "",
                f"{shape[0]} experts" if len(shape) == 3 else "",
                "calibrated" if curve is not None else "",
                "compact" if "_low" in parts else "",
            ]
            rows.append(
                Row(
                    name=name.removesuffix(".weight"),
                    count=1,
                    shape=shape,
                    levels=",".join(map(str, one.levels)),
                    bits=sum(every) / len(every),
                    stored_bits=8 * stored / math.prod(shape),
                    megabytes=stored / 1e6,
                    notes=", ".join(filter(None, notes)),
                )
            )
        dense = [
            DenseRow(
                name=name,
                count=1,
                shape=tuple(tensor.shape),
                dtype=str(tensor.dtype).removeprefix("torch."),
                megabytes=tensor.nbytes / 1e6,
            )
            for name, tensor in tensors.items()
            if name not in taken
        ]
    return rows, dense


def merged(rows: Iterable[Row]) -> list[Row]:
    """Layers that differ by their number only as one row, with averages and sums."""
    return [
        replace(
            group[0],
            name=name,
            count=len(group),
            bits=sum(row.bits for row in group) / len(group),
            stored_bits=sum(row.stored_bits for row in group) / len(group),
            megabytes=sum(row.megabytes for row in group),
        )
        for name, group in _alike(rows, lambda row: (row.shape, row.levels, row.notes))
    ]


def merged_dense(rows: Iterable[DenseRow]) -> list[DenseRow]:
    """The same for tensors that are not quantized."""
    return [
        replace(
            group[0],
            name=name,
            count=len(group),
            megabytes=sum(row.megabytes for row in group),
        )
        for name, group in _alike(rows, lambda row: (row.shape, row.dtype))
    ]


def _alike(
    rows: Iterable[AnyRow], kind: Callable[[AnyRow], Any]
) -> Iterator[tuple[str, list[AnyRow]]]:
    """Rows of one kind whose names differ by numbers only, under a name for all of them."""
    groups: dict[tuple[str, Any], list[AnyRow]] = {}
    for row in rows:
        name = re.sub(r"(?<=\.)\d+(?=\.)", "*", row.name)
        groups.setdefault((name, kind(row)), []).append(row)
    for (name, _), group in groups.items():
        yield name if len(group) > 1 else group[0].name, group
