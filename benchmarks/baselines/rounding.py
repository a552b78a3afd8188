"""Quantizers that see weights only: torchao's round to nearest, and its HQQ."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.quantization import (
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    MappingType,
    PerGroup,
    PerRow,
    quantize_,
)
from torchao.quantization.quant_primitives import _choose_qparams_and_quantize_affine_hqq

from baselines.layers import decoder, is_linear, linears, replace_weights


def int8(model: nn.Module, batches: list[Tensor]) -> None:
    config = Int8WeightOnlyConfig(granularity=PerRow(), set_inductor_config=False)
    quantize_(decoder(model), config, filter_fn=is_linear)
    replace_weights(model, lambda weight: weight.dequantize())


def int4(group: int, algorithm: str):
    def run(model: nn.Module, batches: list[Tensor]) -> None:
        for name, layer in linears(decoder(model)).items():
            if layer.in_features % group:  # torchao would leave it as it is, and not say so
                raise ValueError(f"{name}: {layer.in_features} channels, groups of {group}")
        config = PrototypeInt4WeightOnlyConfig(
            group_size=group, int4_choose_qparams_algorithm=algorithm, set_inductor_config=False
        )
        quantize_(decoder(model), config, filter_fn=is_linear)
        # Its tensor has no dequantize(); multiplying the unit matrix does it.
        replace_weights(model, lambda weight: F.linear(torch.eye(weight.shape[1]), weight).t())

    return run


def intx_config(bits: int, group: int) -> IntxWeightOnlyConfig:
    return IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"),
        granularity=PerGroup(group),
        mapping_type=MappingType.ASYMMETRIC,
        scale_dtype=torch.float16,
    )


def intx(bits: int, group: int):
    def run(model: nn.Module, batches: list[Tensor]) -> None:
        quantize_(decoder(model), intx_config(bits, group), filter_fn=is_linear)
        replace_weights(model, lambda weight: weight.dequantize())

    return run


def hqq_scale(bits: int, group: int):
    def run(model: nn.Module, batches: list[Tensor]) -> None:
        config = IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{bits}"),
            granularity=PerGroup(group),
            intx_choose_qparams_algorithm="hqq_scale_only",
        )
        quantize_(decoder(model), config, filter_fn=is_linear)

        def dense(weight):
            weight.scale = weight.scale.half().to(weight.dtype)
            return weight.dequantize()

        replace_weights(model, dense)

    return run


def hqq(bits: int, group: int):
    def run(model: nn.Module, batches: list[Tensor]) -> None:
        def dense(weight: Tensor) -> Tensor:
            if weight.shape[1] % group:  # groups would run over the ends of rows
                raise ValueError(f"{weight.shape[1]} channels, groups of {group}")
            codes, scale, zero, _ = _choose_qparams_and_quantize_affine_hqq(
                weight, nbits=bits, group_size=group, axis=1, compute_dtype=torch.float16,
                device="cpu", raw_output=True,
            )  # fmt: skip
            spread = [t.float().repeat_interleave(group, dim=1) for t in (scale, zero)]
            return (codes.float() - spread[1]) * spread[0]

        replace_weights(model, dense)

    return run
