"""Other quantizers, by others' code, as dense weights: what they cost in quality at their bits.

A method takes a model in float32 and replaces the weights of the linear layers of its decoder by
what they become when they are quantized and dequantized again. Scales are counted
as 16 bits each, zero points as 16 or, where they are integers, as the codes' bits; both are rounded
to float16 where torchao does not keep them in float32 itself (int8, int4).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from baselines import awq, gptq, k_quants, rounding

GROUP = 64
"""Weights that share a scale. The largest power of two that divides SmolLM2's 576 and 1536."""


@dataclass(frozen=True)
class Method:
    """One quantizer at one number of bits.

    Attributes:
        bits_with_scales: bits per weight, scales and zero points included; read and stored.
        run: takes a model, batches of token ids to calibrate with, and changes the model.
        source: whose code it is, and what had to be changed to run it here.
    """

    name: str
    bits: float
    bits_with_scales: float
    run: Callable[[nn.Module, list[Tensor]], None]
    source: str


def methods() -> list[Method]:
    symmetric, asymmetric = 16 / GROUP, 32 / GROUP
    found = [
        Method("int8, per row", 8, 8.03, rounding.int8, "torchao Int8WeightOnlyConfig"),
        Method(
            "RTN int4", 4, 4 + asymmetric, rounding.int4(GROUP, "tinygemm"),
            "torchao PrototypeInt4WeightOnlyConfig, the int4 that runs on CPUs",
        ),
        Method(
            "HQQ int4", 4, 4 + asymmetric, rounding.int4(GROUP, "hqq"),
            "torchao PrototypeInt4WeightOnlyConfig, algorithm hqq",
        ),
    ]  # fmt: skip
    for bits in (4, 3, 2):
        found += [
            Method(
                f"RTN intx {bits}", bits, bits + (16 + bits) / GROUP, rounding.intx(bits, GROUP),
                "torchao IntxWeightOnlyConfig, asymmetric",
            ),
            Method(
                f"HQQ {bits}, scale only", bits, bits + symmetric, rounding.hqq_scale(bits, GROUP),
                "torchao IntxWeightOnlyConfig, algorithm hqq_scale_only",
            ),
            Method(
                f"HQQ {bits}", bits, bits + asymmetric, rounding.hqq(bits, GROUP),
                "torchao _choose_qparams_and_quantize_affine_hqq",
            ),
            Method(
                f"GPTQ {bits}", bits, bits + asymmetric, gptq.gptq(bits, GROUP, act_order=False),
                "torchao prototype.gptq; made to run without CUDA and at 2 and 3 bits",
            ),
            Method(
                f"GPTQ {bits}, act-order", bits, bits + asymmetric,
                gptq.gptq(bits, GROUP, act_order=True),
                "the same, channels sorted by activation first",
            ),
            Method(
                f"AWQ {bits}", bits, bits + (16 + bits) / GROUP, awq.awq(bits, GROUP),
                "torchao prototype.awq over IntxWeightOnlyConfig; made to accept that",
            ),
        ]  # fmt: skip
    if k_quants.available():
        found += [
            Method(name, int(name[1]), k_quants.bits(name), k_quants.quantizer(name),
                   "llama.cpp's ggml_quantize_chunk, without importance matrix")
            for name in k_quants.NAMES
        ]  # fmt: skip
    return found
