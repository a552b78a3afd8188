"""Launches kernels as on a GPU, up to the point where a GPU would be needed.

    python tests/kernels/jit.py 90

prints one JSON object per launch. Other than in ``aot.py``, Triton sees the real arguments: which
are one, which are divisible by 16, tuples and None. A process of its own, as there.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from grinqh_ao import GrinqhTensor
from grinqh_ao.ops.triton import decode, dequantize
from grinqh_ao.ops.triton.configurations import Gpu
from grinqh_ao.ops.triton.decode import Weight


class Binaries:
    """Loads nothing."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 48 << 10}  # of every GPU, without asking

    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        return 0, 0, 0, 0, 1024

    def unload_module(self, *_: Any) -> None: ...


class Launcher:
    """Says what would be launched."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.metadata = metadata

    def __call__(self, *arguments: Any) -> None:
        about = ("name", "num_warps", "launch_pdl", "enable_fp_fusion")
        launch = {name: getattr(self.metadata, name) for name in about}
        print(json.dumps(launch | {"grid": arguments[:3]}), flush=True)


class Driver:
    """As much of a GPU's driver as Triton asks for on the way to a launch."""

    launcher_cls = Launcher
    utils = Binaries()

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def main(capability: int) -> None:
    driver.set_active(Driver(capability))
    decode.gpu_of = lambda index: Gpu(capability, 132)
    decode.arrivals = lambda tiles, device: torch.zeros(tiles, dtype=torch.int32)
    for n, k, rows, dtype in [
        (1, 1, 1, torch.float32),  # as many ones as there can be
        (70, 12, 1, torch.float16),
        (500, 40, 3, torch.bfloat16),
        (1024, 4096, 1, torch.bfloat16),
    ]:
        w = GrinqhTensor.from_hp(torch.randn(n, k, dtype=dtype))
        x, bias = torch.randn(rows, k).to(dtype), torch.randn(n).to(dtype)
        decode.decode_linears(x, [Weight(w.slices, w.scales, w.vectors, bias, None)], w.levels)
        dequantize.dequantize(w.slices, w.scales, w.vectors, None, 8, dtype)
    weights = [GrinqhTensor.from_hp(torch.randn(n, 64).bfloat16()) for n in (512, 512, 1024)]
    x, levels = torch.randn(2, 64).bfloat16(), weights[0].levels
    arguments = [Weight(w.slices, w.scales, w.vectors, None, None) for w in weights]
    decode.decode_linears(x[:1], arguments, levels)
    stack = GrinqhTensor.stack(weights[:2])
    experts = Weight(stack.slices, stack.scales, stack.vectors, None, None)
    decode.decode_experts(x, torch.tensor([1, 0]), experts, levels)


if __name__ == "__main__":
    main(int(sys.argv[1]))
