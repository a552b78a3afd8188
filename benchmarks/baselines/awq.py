"""AWQ: torchao's prototype over its IntxWeightOnlyConfig, layer after layer.

The prototype insists on a tensor that can hold the scales of activations, which Intx's cannot:
they are remembered beside it and divided out again, which is the same product. Clipping, which
the paper's AWQ has as well, is not part of it.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torchao.prototype.awq import AWQConfig, AWQObservedLinear
from torchao.prototype.awq.core import AWQObserver
from torchao.quantization import quantize_
from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import (
    IntxUnpackedToInt8Tensor,
)

from baselines.layers import Passes, decoder, is_linear, linears, set_weight
from baselines.rounding import intx_config

# The search multiplies with these 40 times per layer.
TOKENS = 1024


def awq(bits: int, group: int):
    @torch.no_grad()
    def run(model: nn.Module, batches: list[Tensor]) -> None:
        _remember_scales()
        base = intx_config(bits, group)
        passes = Passes(model, batches)
        for index, layer in enumerate(decoder(model)):
            quantize_(layer, AWQConfig(base, step="prepare"), filter_fn=is_linear)
            passes.run(index, layer)
            observers = {name: linear.act_obs for name, linear in linears(layer).items()}
            for observer in observers.values():
                x = torch.cat([t.reshape(-1, t.shape[-1]) for t in observer.inputs])
                chosen = torch.linspace(0, len(x) - 1, min(TOKENS, len(x))).long()
                observer.inputs = [x[chosen]]
            quantize_(
                layer,
                AWQConfig(base, step="convert"),
                filter_fn=lambda module, name: isinstance(module, AWQObservedLinear),
            )
            for name, linear in linears(layer).items():
                set_weight(linear, linear.weight.dequantize() / observers[name].best_scales)
            passes.hidden = passes.run(index, layer)

    return run


@functools.cache
def _remember_scales() -> None:
    IntxUnpackedToInt8Tensor.act_pre_scale = None
    calculate = AWQObserver.calculate_qparams

    def calculate_and_remember(self):
        self.best_scales = calculate(self)
        return self.best_scales

    AWQObserver.calculate_qparams = calculate_and_remember
