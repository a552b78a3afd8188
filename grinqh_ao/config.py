"""GrinqhConfig and its registration with ``torchao.quantization.quantize_``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any

from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization.transform_module import register_quantize_module_handler

from grinqh_ao.batches import check_batches
from grinqh_ao.compact import FULL_LEVEL, check_stored_bits, levels_fit
from grinqh_ao.grading import ALL_LEVELS, check_bits, check_levels
from grinqh_ao.slices import HIGH_LEVEL

HEAD_NAMES = ("lm_head", "embed_out")


@dataclass
class GrinqhConfig(AOBaseConfig):
    """Quantizes linear layers to nested codes that are read at a level chosen per token.

    ``quantize_(model, GrinqhConfig(bits=3))`` needs no calibration data and changes ``model`` in
    place. Weights shared by several modules stay shared. Layers that are quantized already stay as
    they are, but for those not calibrated, where ``calibration`` is given.

    Args:
        bits: average number of weight bits to read per token, over the weights of a layer: any
            number above 0 that the levels can average to. ``set_bits`` changes it later.
        levels: bit widths a channel may be read at: ascending, out of 0, 2, 4, 6 and 8. The
            highest is what is stored, and what prefill uses.
        head_bits: the output head (``lm_head``) reads at least this many bits, because its
            errors go straight into the logits. None leaves the head dense. Why 6: docs/method.md.
        calibration: batches for :func:`grinqh_ao.calibrate`, which is then called with the whole
            model once its layers are quantized; ``token_batches`` makes them from texts. No part
            of the config once it is saved or copied. Not where layers are quantized one by one, as
            transformers does while loading: call ``calibrate`` then.
        stored_bits: store this many bits per weight, above 4 and below 8, instead of as many as the
            highest level: see :func:`grinqh_ao.calibrate`. Needs ``calibration``.

    ``quantize_`` raises, before it changes anything, a TypeError where its filter selects other
    modules than linear layers and experts, and a ValueError for weights that are not finite, beyond
    1.3e30 or on meta. Weights of another dtype than float32, float16 and bfloat16 are left dense,
    with a warning.

    Raises:
        TypeError: ``calibration`` is not batches.
        ValueError: a field is out of range, or ``stored_bits`` comes without ``calibration``, with
            levels without 4 or 8, or with as many ``bits`` to read.
    """

    bits: float = 3.0
    levels: Sequence[int] = field(default_factory=lambda: list(ALL_LEVELS))
    head_bits: float | None = 6.0
    calibration: InitVar[Any] = None
    stored_bits: InitVar[float | None] = None

    def __post_init__(self, calibration: Any, stored_bits: float | None) -> None:
        self.check()
        if stored_bits is not None:
            check_stored_bits(stored_bits)
            if calibration is None:
                raise ValueError(
                    f"stored_bits={stored_bits!r} without calibration: expected batches, from "
                    "which the channels to keep are chosen"
                )
            if not levels_fit(self.levels):
                raise ValueError(
                    f"stored_bits={stored_bits!r} with levels {tuple(self.levels)}: expected "
                    f"{HIGH_LEVEL} and {FULL_LEVEL} among them"
                )
            if self.bits >= stored_bits:
                raise ValueError(
                    f"bits={self.bits!r}: expected less than stored_bits={stored_bits!r}"
                )
        if calibration is not None:
            check_batches(calibration, name="calibration")
        # TorchAO's JSON knows Python's numbers only, and no tuples.
        self.bits, self.head_bits = _python_number(self.bits), _python_number(self.head_bits)
        self.levels = list(self.levels)
        self._calibration = calibration  # TorchAO saves no attribute with an underscore
        self._stored_bits = stored_bits

    def check(self) -> None:
        """Raises ValueError if a field is out of range."""
        check_bits(self.bits, check_levels(self.levels))
        if self.head_bits is not None:
            check_bits(self.head_bits, ALL_LEVELS, name="head_bits")


def _python_number(value: Any) -> Any:
    """A number, be it one of NumPy's, as Python's; None as it is."""
    return value.item() if hasattr(value, "item") else value


def all_but_head(module: nn.Module, fqn: str) -> bool:
    """A filter for ``quantize_``: every linear layer not named as an output head.

    Filters see names only: ``lm_head`` and ``embed_out``. ``GrinqhConfig(head_bits=None)``, which
    sees the model, also knows heads of other names.
    """
    return isinstance(module, nn.Linear) and fqn.rpartition(".")[2] not in HEAD_NAMES


@register_quantize_module_handler(GrinqhConfig)
def _handle(
    module: nn.Module, config: GrinqhConfig, *, parameter_name: str = "weight"
) -> nn.Module:
    from grinqh_ao import quantization  # it needs the config above

    quantization.handle(module, config, parameter_name)
    return module
