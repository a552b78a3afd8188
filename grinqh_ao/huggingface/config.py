"""GrinqhHfConfig: what ``from_pretrained`` takes, and what a saved model's config.json says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torchao.quantization.quant_api import _is_linear
from transformers.quantizers.auto import register_quantization_config
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from grinqh_ao.checkpoint import FORMAT_VERSION, Attributes
from grinqh_ao.config import GrinqhConfig
from grinqh_ao.errors import CheckpointError
from grinqh_ao.grading import ALL_LEVELS, check_levels

QUANT_METHOD = "grinqh"


@register_quantization_config(QUANT_METHOD)
class GrinqhHfConfig(QuantizationConfigMixin):
    """Quantizes a transformers model while it is loaded.

    >>> AutoModelForCausalLM.from_pretrained(name, quantization_config=GrinqhHfConfig(bits=3))

    gives what ``quantize_(model, GrinqhConfig(bits=3))`` makes of the loaded model, but never holds
    more than one layer in full precision.

    Args:
        bits: as in :class:`grinqh_ao.GrinqhConfig`, like the next two.
        levels: the same.
        head_bits: the same.
        modules_to_not_convert: names of modules to leave dense, their beginnings or ends, or
            regular expressions, as in transformers' other quantization configs.
        format_version: of a saved model; see docs/format.md. Not to be given.
        weights: of a saved model: its quantized weights in groups ``{"levels", "min_bits",
            "names"}``. Not to be given.
        save_id: of a saved model: what its files have in their metadata. Not to be given.

    Raises:
        ValueError: an argument is out of range or unknown, or the saved model has a format that
            this version does not know; of a saved model it is a CheckpointError.
    """

    def __init__(
        self,
        bits: float = 3.0,
        levels: Sequence[int] = ALL_LEVELS,
        head_bits: float | None = 6.0,
        modules_to_not_convert: Sequence[str] | None = None,
        quant_method: str = QUANT_METHOD,
        format_version: int | None = None,
        weights: Sequence[Mapping[str, Any]] | None = None,
        save_id: object = None,
        **unknown: Any,
    ) -> None:
        if format_version not in (None, FORMAT_VERSION):
            raise ValueError(
                f"quantization_config: format_version={format_version!r}: this grinqh_ao reads "
                f"version {FORMAT_VERSION}; another version of grinqh_ao may read it"
            )
        if unknown or quant_method != QUANT_METHOD:
            what = next(iter(unknown), "quant_method")
            raise ValueError(f"quantization_config: {what!r} is none of GRINQH's settings")
        self.quant_method = QUANT_METHOD
        self.save_id = save_id
        self.bits = bits
        self.levels = list(check_levels(levels))
        self.head_bits = head_bits
        self.modules_to_not_convert = _names(modules_to_not_convert)
        checked = self.to_grinqh_config()
        self.bits, self.head_bits = checked.bits, checked.head_bits
        if weights is not None:
            if not isinstance(weights, Sequence) or not all(
                isinstance(group, Mapping) for group in weights
            ):
                raise ValueError(f"quantization_config: weights={weights!r}: expected groups")
            self.format_version = FORMAT_VERSION
            self.weights = [dict(group) for group in weights]
        elif format_version is not None:
            raise ValueError("quantization_config: weights: missing")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Of a saved model, whose config.json has these settings; so errors are CheckpointError."""
        try:
            return super().from_dict(config_dict, *args, **kwargs)
        except ValueError as error:
            raise CheckpointError(str(error)) from None

    def to_grinqh_config(self) -> GrinqhConfig:
        """What ``quantize_`` takes to do the same."""
        return GrinqhConfig(bits=self.bits, levels=self.levels, head_bits=self.head_bits)

    def selects(self, module: nn.Module, name: str) -> bool:
        """Whether a module is to be quantized: a filter for ``quantize_``."""
        skipped = self.modules_to_not_convert
        return bool(_is_linear(module, name) and should_convert_module(name, skipped))

    def attributes(self) -> dict[str, Attributes]:
        """By name, of all quantized weights of a saved model.

        Raises:
            CheckpointError: there are none, or something is wrong with them.
        """
        where = "config.json: quantization_config.weights"
        found: dict[str, Attributes] = {}
        for group in getattr(self, "weights", None) or ():
            if set(group) != {"levels", "min_bits", "names"}:
                raise CheckpointError(
                    f"{where}: {list(group)}: expected levels, min_bits and names"
                )
            names = group["names"]
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise CheckpointError(f"{where}: names={names!r}: expected a list of names")
            one = Attributes.checked(group["levels"], group["min_bits"], where)
            for name in names:
                if name in found:
                    raise CheckpointError(f"{where}: {name}: stands there twice")
                found[name] = one
        if not found:
            raise CheckpointError(f"{where}: names no weight")
        return found


def _names(skipped: Any) -> list[str] | None:
    if skipped is None:
        return None
    if not isinstance(skipped, list | tuple) or not all(isinstance(n, str) for n in skipped):
        raise ValueError(f"modules_to_not_convert={skipped!r}: expected a list of names")
    return list(skipped)


def groups_of(attributes: Mapping[str, Attributes]) -> list[dict[str, Any]]:
    """What :meth:`GrinqhHfConfig.attributes` gives, as config.json has it."""
    groups: dict[Attributes, list[str]] = {}
    for name, one in attributes.items():
        groups.setdefault(one, []).append(name)
    return [
        {"levels": list(one.levels), "min_bits": one.min_bits, "names": names}
        for one, names in groups.items()
    ]
