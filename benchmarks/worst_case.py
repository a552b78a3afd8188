"""How inaccurate can decoding be? A search for the worst activations, not a sample of typical ones.

    python benchmarks/worst_case.py [--minutes 5] [--json FILE]
    TRITON_INTERPRET=1 python benchmarks/worst_case.py --kernels triton [--minutes 5] [--json FILE]

All bits are read, so that decoding and the dense path read the same codes. The largest error of
any output is taken in units of what rounding every product once to the activations' dtype would
allow in the output with the largest products,

    error = max_n |y_n - exact_n| / (eps * max_n sum_k |w_nk x_k|),    exact in float64,

and the search climbs towards the largest of any output: it changes some channels' activations, in
value, by powers of two up to the dtype's largest, to subnormals, zeros or outliers, and keeps what
makes the error larger. Results that overflow the dtype are not counted; where only the dense path
overflows on its way to one that does not, that is counted apart. Kernels for GPUs run in Triton's
interpreter, which is slow: they decode eight candidates at once, as the rows of one x.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

from grinqh_ao import GrinqhTensor
from grinqh_ao.running import describe_machine

SHAPES = {
    "cpu": [(128, 48), (256, 300), (512, 1100)],
    "triton": [(128, 48), (256, 300)],  # the forms fma and, but in float32, mma
}
ROWS = {"cpu": 1, "triton": 8}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RESTART = 400  # changes that were no gain


Decode = Callable[[Tensor, GrinqhTensor], Tensor]


def interpreted(x: Tensor, weight: GrinqhTensor) -> Tensor:
    """By the kernels for GPUs, in two chunks."""
    from grinqh_ao.ops.triton.configurations import Configuration, form_of
    from grinqh_ao.ops.triton.decode import Weight, launch

    counters = torch.zeros(weight.slices.shape[0], dtype=torch.int32)
    one = Weight(weight.slices, weight.scales, weight.vectors, None, None)
    form = form_of(80, x.dtype, weight.slices.shape[-1])
    halves = Configuration(form, chunk=-(-weight.shape[1] // 2))
    return launch(x, [one], weight.levels, halves, counters, interpret=True)[0]


class Layer:
    def __init__(
        self, n: int, k: int, dtype: torch.dtype, seed: int, decode: Decode = F.linear
    ) -> None:
        torch.manual_seed(seed)
        dense = torch.randn(n, k) * torch.logspace(-2, 0, k)[torch.randperm(k)]
        self.weight, self.dtype, self.decode = GrinqhTensor.from_hp(dense, bits=8), dtype, decode
        self.exact = self.weight.dequantize(torch.float64)
        self.rounded = self.weight.dequantize(dtype)

    def errors(self, x: Tensor) -> list[tuple[float, float]]:
        """For each row of ``x``, the largest of any output: decoded, and by the dense path."""
        if self.decode is interpreted and x.dtype == torch.bfloat16:
            # Triton's interpreter (3.7.1) misreads subnormal bfloat16.
            x = torch.where(x.abs() < torch.finfo(x.dtype).tiny, 0, x)
        wide = x.double()
        exact, products = wide @ self.exact.t(), wide.abs() @ self.exact.abs().t()
        info = torch.finfo(self.dtype)
        unit = info.eps * products.amax(1, keepdim=True) + info.tiny
        inside = exact.abs() < 0.99 * info.max

        def largest(y: Tensor) -> list[float]:
            error = ((y.double() - exact).abs() / unit).nan_to_num(math.inf, math.inf)
            found: list[float] = torch.where(inside, error, 0.0).amax(1).tolist()
            return found

        decoded = largest(self.decode(x, self.weight))
        return list(zip(decoded, largest(F.linear(x, self.rounded)), strict=True))


def changed(x: Tensor, chance: random.Random) -> Tensor:
    new, info = x.clone(), torch.finfo(x.dtype)
    some = torch.randperm(x.shape[1])[: chance.choice([1, 1, 2, 8, x.shape[1]])]
    kind = chance.randrange(6)
    if kind == 0:
        new[:, some] *= 2.0 ** chance.randint(-12, 12)
    elif kind == 1:
        typical = x.float().abs().mean().clamp(max=info.max / 16)
        new[:, some] = (torch.randn(1, len(some)) * typical).to(x.dtype)
    elif kind == 2:
        new[:, some] = info.tiny * chance.choice([1, 0.5, 2**-6])
    elif kind == 3:
        new[:, some] = 0
    elif kind == 4:  # an outlier, as large as the sum allows
        new[:, some[:1]] = info.max * 2.0 ** -chance.randint(4, 40)
    else:
        new[:, some] *= 1 + chance.choice([-1, 1]) * 2.0 ** -chance.randint(3, 12)
    return new.clamp(info.min, info.max)


def search(
    layer: Layer,
    chance: random.Random,
    candidates: int = 1,
    seconds: float = math.inf,
    most: float = math.inf,
) -> dict[str, Any]:
    """The worst that was found in this time, or of so many, and how many were tried."""
    worst: dict[str, Any] = {"decoded": 0.0, "dense": 0.0, "dense overflowed": 0, "tried": 0}
    end = time.perf_counter() + seconds
    k = layer.weight.shape[1]
    x, here, stale = torch.randn(1, k).to(layer.dtype), 0.0, 0
    while time.perf_counter() < end and worst["tried"] < most:
        rows = [changed(x, chance) for _ in range(candidates)]
        stale += candidates
        for new, (decoded, dense) in zip(rows, layer.errors(torch.cat(rows)), strict=True):
            worst["tried"] += 1
            if math.isinf(dense):
                worst["dense overflowed"] += 1
            else:
                worst["dense"] = max(worst["dense"], dense)
            if decoded > here:
                x, here, stale = new, decoded, 0
                worst["decoded"] = max(worst["decoded"], decoded)
        if stale > RESTART:
            x, here, stale = torch.randn(1, k).to(layer.dtype), 0.0, 0
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--kernels", choices=list(SHAPES), default="cpu")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.kernels == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("--kernels triton: set TRITON_INTERPRET=1, which PyTorch's import reads")
    decode = interpreted if arguments.kernels == "triton" else F.linear
    shapes, candidates = SHAPES[arguments.kernels], ROWS[arguments.kernels]
    chance, rows = random.Random(0), []
    seconds = 60 * arguments.minutes / (len(shapes) * len(DTYPES))
    for n, k in shapes:
        for dtype in DTYPES:
            found = search(Layer(n, k, dtype, n, decode), chance, candidates, seconds)
            rows.append({"layer": f"{n}x{k}", "dtype": str(dtype).removeprefix("torch."), **found})
    print(tabulate(rows, "keys", "github", floatfmt=".2f"))
    print(describe_machine())
    if arguments.json:
        report = {
            "machine": describe_machine(),
            "kernels": arguments.kernels,
            "minutes": arguments.minutes,
            "worst": rows,
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
