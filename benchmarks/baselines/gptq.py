"""GPTQ: torchao's prototype, layer after layer, each seeing what was quantized before it.

As it is, it asks for a CUDA device and for a package that has kernels for 4 bits on CUDA only. Four
lines of two of its functions are replaced, and that package's rounding by the same in PyTorch; the
algorithm is torchao's.
"""

from __future__ import annotations

import functools
import inspect

import torch
import torchao.prototype.gptq.api as torchao_gptq
from torch import Tensor, nn
from torchao.quantization import Int4WeightOnlyConfig, quantize_

from baselines.layers import Passes, decoder, is_linear, linears, set_weight

_bits = 4


def gptq(bits: int, group: int, act_order: bool):
    def run(model: nn.Module, batches: list[Tensor]) -> None:
        global _bits
        _bits = bits
        _run_without_cuda()
        base = Int4WeightOnlyConfig(group_size=group, set_inductor_config=False)
        options = {"base_config": base, "percdamp": 0.01, "gptq_quantize_block_size": 4 * group}
        observe = torchao_gptq.GPTQConfig(step="observe", **options)
        convert = torchao_gptq.GPTQConfig(step="convert", **options)
        passes = Passes(model, batches)
        for index, layer in enumerate(decoder(model)):
            quantize_(layer, observe, filter_fn=is_linear)
            passes.run(index, layer)
            for linear in linears(layer).values():
                observed = linear.weight
                dense = _quantized(observed.hessian, observed.hp_data, convert, group, act_order)
                set_weight(linear, dense)
            passes.hidden = passes.run(index, layer)

    return run


@torch.no_grad()
def _quantized(hessian: Tensor, weight: Tensor, config, group: int, act_order: bool) -> Tensor:
    hessian, weight = hessian.clone(), weight.detach().clone()  # it overwrites both
    order = torch.arange(weight.shape[1])
    if act_order:
        order = hessian.diagonal().argsort(descending=True)
    found = torchao_gptq.gptq_quantize(hessian[order][:, order], weight[:, order], config)
    dense = torchao_gptq._int4_row_dequantize_zp(found.qdata, found.scale, found.zero_point, group)
    return dense[:, order.argsort()]


def _row_quantize(weight: Tensor, group_size: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric, from minimum to maximum of each group; zero is the middle of the range."""
    groups = weight.float().split(group_size, dim=-1)
    low = torch.cat([part.amin(1, keepdim=True) for part in groups], 1)
    high = torch.cat([part.amax(1, keepdim=True) for part in groups], 1)
    scale = (high - low).clamp(min=1e-6) / (2**_bits - 1)
    zero = low + scale * 2 ** (_bits - 1)
    scale, zero = (t.half().float().t().contiguous() for t in (scale, zero))
    codes = torchao_gptq._int4_row_quantize_zp_precomputed_qparams(weight, scale, zero, group_size)
    return codes, scale, zero


@functools.cache
def _run_without_cuda() -> None:
    torchao_gptq.int4_row_quantize_zp = _row_quantize
    torchao_gptq.pack_int4 = lambda codes: codes
    torchao_gptq._bits = lambda: _bits
    changes = {
        "_int4_row_quantize_zp_precomputed_qparams": [("n_bit = 4", "n_bit = _bits()")],
        "_int4_row_dequantize_zp": [("n_bit = 4", "n_bit = _bits()")],
        "gptq_quantize": [
            ('assert device.type == "cuda", "GPTQ only supports CUDA currently"', "pass"),
            ("torch.cuda.synchronize()", "pass"),
        ],
    }
    for name, replacements in changes.items():
        source = inspect.getsource(getattr(torchao_gptq, name))
        for old, new in replacements:
            if source.count(old) != 1:
                raise RuntimeError(f"torchao's {name} is not the one this was written for")
            source = source.replace(old, new)
        exec(compile(source, f"<{name} without CUDA>", "exec"), torchao_gptq.__dict__)
