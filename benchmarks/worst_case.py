"""How inaccurate can decoding be? A search for the worst activations, not a sample of typical ones.

    python benchmarks/worst_case.py [--minutes 5] [--json FILE]

All bits are read, so that decoding and the dense path read the same codes. The largest error of
any output is taken in units of what rounding every product once to the activations' dtype would
allow in the output with the largest products,

    error = max_n |y_n - exact_n| / (eps * max_n sum_k |w_nk x_k|),    exact in float64,

and the search climbs towards the largest of any output: it changes some channels' activations, in
value, by powers of two up to the dtype's largest, to subnormals, zeros or outliers, and keeps what
makes the error larger. Results that overflow the dtype are not counted; where only the dense path
overflows on its way to one that does not, that is counted apart.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

from grinqh_ao import GrinqhTensor
from grinqh_ao.running import describe_machine

SHAPES = [(128, 48), (256, 300), (512, 1100)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RESTART = 400  # changes that were no gain


class Layer:
    def __init__(self, n: int, k: int, dtype: torch.dtype, seed: int) -> None:
        torch.manual_seed(seed)
        dense = torch.randn(n, k) * torch.logspace(-2, 0, k)[torch.randperm(k)]
        self.weight, self.dtype = GrinqhTensor.from_hp(dense, bits=8), dtype
        self.exact = self.weight.dequantize(torch.float64)
        self.rounded = self.weight.dequantize(dtype)

    def errors(self, x: Tensor) -> tuple[float, float]:
        """The largest of any output: decoded, and by the dense path."""
        wide = x.double()
        exact, scale = wide @ self.exact.t(), wide.abs() @ self.exact.abs().t()
        unit = torch.finfo(self.dtype).eps * scale.max() + torch.finfo(self.dtype).tiny
        inside = exact.abs() < 0.99 * torch.finfo(self.dtype).max
        found = []
        for y in (F.linear(x, self.weight), F.linear(x, self.rounded)):
            error = ((y.double() - exact).abs() / unit)[inside]
            found.append(
                float(error.nan_to_num(math.inf, math.inf).max()) if error.numel() else 0.0
            )
        return found[0], found[1]


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


def search(layer: Layer, seconds: float, chance: random.Random) -> dict[str, Any]:
    """The worst that was found in this time, and how often it looked."""
    worst: dict[str, Any] = {"decoded": 0.0, "dense": 0.0, "dense overflowed": 0, "tried": 0}
    end = time.perf_counter() + seconds
    k = layer.weight.shape[1]
    x, here, stale = torch.randn(1, k).to(layer.dtype), 0.0, 0
    while time.perf_counter() < end:
        new = changed(x, chance)
        decoded, dense = layer.errors(new)
        worst["tried"] += 1
        if math.isinf(dense):
            worst["dense overflowed"] += 1
        else:
            worst["dense"] = max(worst["dense"], dense)
        if decoded > here:
            x, here, stale = new, decoded, 0
            worst["decoded"] = max(worst["decoded"], decoded)
        elif (stale := stale + 1) > RESTART:
            x, here, stale = torch.randn(1, k).to(layer.dtype), 0.0, 0
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    chance, rows = random.Random(0), []
    seconds = 60 * arguments.minutes / (len(SHAPES) * len(DTYPES))
    for n, k in SHAPES:
        for dtype in DTYPES:
            found = search(Layer(n, k, dtype, seed=n), seconds, chance)
            rows.append({"layer": f"{n}x{k}", "dtype": str(dtype).removeprefix("torch."), **found})
    print(tabulate(rows, "keys", "github", floatfmt=".2f"))
    print(describe_machine())
    if arguments.json:
        report = {"machine": describe_machine(), "minutes": arguments.minutes, "worst": rows}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
