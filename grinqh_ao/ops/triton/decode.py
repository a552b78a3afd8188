"""``grinqh::decode_linears`` and ``decode_experts`` on CUDA: a form of the kernel, one launch.

    mma   tensor cores since Ampere; float16 and bfloat16, tiles of 256 and 512 outputs
    fma   float32 arithmetic; everything else

Nothing here waits for the device or looks at data: a launch can be captured into a CUDA graph and
replayed with other activations and thresholds.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from grinqh_ao.ops.triton.arrivals import MAX_TILES, arrivals
from grinqh_ao.ops.triton.configurations import (
    WARPS,
    Configuration,
    Gpu,
    compiled_rows,
    configure,
    form_of,
)
from grinqh_ao.ops.triton.decode_fma import decode_fma_kernel, entries_at_once
from grinqh_ao.ops.triton.decode_mma import decode_mma_kernel, memory_bytes
from grinqh_ao.ops.triton.lists import entry_bytes
from grinqh_ao.slices import FIELDS_PER_WORD
from grinqh_ao.vectors import outputs_of

MAX_MEAN_BLOCK = 8192
SPLITS_AT_ONCE = 16
MAX_ROWS = 8


@functools.cache
def gpu_of(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    capability = 10 * properties.major + properties.minor
    return Gpu(capability, properties.multi_processor_count)


class Weight(NamedTuple):
    """What a weight and its layer hand over; shapes as in ``ops/oracle.py``."""

    slices: Tensor
    scales: Tensor
    vectors: Tensor
    bias: Tensor | None
    low: Tensor | None


def supports(x: Tensor, slices: Sequence[Tensor], lows: Sequence[Tensor | None]) -> bool:
    """Whether there is a kernel for these arguments, on a GPU for which there are any."""
    return (
        x.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and all(s.numel() > 0 for s in slices)
        and all(s[0].numel() < 2**30 for s in slices)  # offsets in bytes have 32 bits
        and len({s.shape[2] for s in slices}) == 1
        and len({low is None for low in lows}) == 1
        and sum(s.shape[0] for s in slices) <= MAX_TILES
        and 1 <= x.numel() // x.shape[-1] <= MAX_ROWS
        and all(s.device == x.device for s in slices)
    )


def decode_linears(
    x: Tensor, weights: Sequence[Weight], levels: Sequence[int], mean: Tensor | None = None
) -> list[Tensor]:
    """See :func:`grinqh_ao.ops.oracle.decode_linears`. One launch."""
    gpu = gpu_of(x.device.index)
    tiles = sum(weight.slices.shape[0] for weight in weights)
    k, words = x.shape[-1], weights[0].slices.shape[2]
    form = form_of(gpu.capability, x.dtype, words)
    chosen = configure(gpu, form, x.numel() // k, words, tiles, k)
    return launch(x, weights, levels, chosen, arrivals(tiles, x.device), mean=mean)


def supports_experts(x: Tensor, weights: Weight) -> bool:
    """Whether there is a kernel for rows of ``x``, each with one of a stack of weights."""
    slices = weights.slices
    return (
        len(x) > 0
        and supports(x[:1], [slices[0]], [None])
        and len(x) * slices.shape[1] <= MAX_TILES
    )


def decode_experts(x: Tensor, experts: Tensor, weights: Weight, levels: Sequence[int]) -> Tensor:
    """See :func:`grinqh_ao.ops.oracle.decode_experts`. One launch."""
    gpu = gpu_of(x.device.index)
    slots, k = x.shape
    tiles, words = slots * weights.slices.shape[1], weights.slices.shape[3]
    chosen = configure(gpu, form_of(gpu.capability, x.dtype, words), 1, words, tiles, k)
    return launch(x, [weights], levels, chosen, arrivals(tiles, x.device), experts)[0]


def check_shapes(
    x: Tensor, weight: Weight, levels: Sequence[int], experts: Tensor | None = None
) -> None:
    """Raises ValueError for what would be read past its end: only addresses go further.

    At every call, so by what is quick to ask.
    """
    slices, scales, _, bias, low = weight
    k, n = x.shape[-1], outputs_of(weight.vectors, x.shape[-1])
    if not (
        scales.shape[-2] == k
        and (low is not None or slices.numel() == 2 * levels[-1] * scales.numel())
        and 0 < n <= slices.shape[-3] * slices.shape[-1] * FIELDS_PER_WORD
        and (low is None or low.numel() == k)
        and (bias is None or bias.numel() == n)
        and (experts is None or experts.numel() * k == x.numel())
    ):
        raise ValueError(
            f"x of shape {tuple(x.shape)} does not fit a weight of slices {tuple(slices.shape)}, "
            f"scales {tuple(scales.shape)} and {n} outputs, or its bias, low or experts do not"
        )


def launch(
    x: Tensor,
    weights: Sequence[Weight],
    levels: Sequence[int],
    configuration: Configuration,
    counters: Tensor,
    experts: Tensor | None = None,
    mean: Tensor | None = None,
    interpret: bool = False,
) -> list[Tensor]:
    """Runs the kernel, on a device or in the interpreter.

    Args:
        counters: see ``arrivals.py``.
        experts: int64 [S]; then there is one weight, a stack, and row s of ``x`` [S, K] is
            multiplied with the one at experts[s].
        mean: float32 [rows] or None, as in the oracle.
    """
    for weight in weights:
        check_shapes(x, weight, levels, experts)
    k, words = x.shape[-1], weights[0].slices.shape[-1]
    rows = x.numel() // k if experts is None else 1
    slots = 1 if experts is None else len(experts)
    mma = configuration.form == "mma"
    rows_compiled = compiled_rows(configuration.form, rows)
    tiles = tuple(weight.slices.shape[-3] for weight in weights)
    all_tiles, tile = sum(tiles), 16 * words
    chunk = configuration.chunk
    splits = -(-k // chunk)
    programs = slots * splits * all_tiles
    block = triton.next_power_of_2(chunk)

    def of_each(name: str) -> tuple[Tensor, ...]:
        return tuple(getattr(weight, name).contiguous() for weight in weights)

    slices, vectors = of_each("slices"), of_each("vectors")
    n = tuple(outputs_of(each, k) for each in vectors)
    biases = None
    if any(weight.bias is not None for weight in weights):
        biases = tuple(
            x.new_zeros(size) if weight.bias is None else weight.bias.contiguous()
            for weight, size in zip(weights, n, strict=True)
        )
    out = tuple(x.new_empty(*x.shape[:-1], size) for size in n)
    floats = functools.partial(torch.empty, dtype=torch.float32, device=x.device)
    own: dict[str, bool | int]  # what only this form takes
    if mma:
        scratch = [None]  # on chip
        if interpret:
            size = memory_bytes(levels, block, rows_compiled, words)
            scratch = [torch.empty(programs * size, dtype=torch.int8)]
        own = {"FEW": configuration.few, "SPECULATIVE": configuration.speculative}
    else:
        capacity = 3 * chunk + 2 * entries_at_once(words)  # entries of a program, with padding
        entries = programs * capacity * entry_bytes(rows_compiled)
        scratch = [torch.empty(entries, dtype=torch.int8, device=x.device)]
        scratch.append(floats(programs * rows_compiled * (capacity + 1) * (words // 4)))
        own = {"capacity": capacity}
    kernel = decode_mma_kernel if mma else decode_fma_kernel
    kernel[(all_tiles, splits, slots)](
        x.contiguous(),
        slices,
        of_each("scales"),
        vectors,
        biases,
        None if weights[0].low is None else of_each("low"),
        None if experts is None else experts.contiguous(),
        None if mean is None else mean.contiguous(),
        out,
        n,
        tiles,
        tuple(s.shape[-2] for s in slices),
        *scratch,
        floats(programs * rows_compiled * tile),
        counters,
        rows,
        k,
        chunk,
        LEVELS=tuple(levels),
        ROWS=rows_compiled,
        WORDS=words,
        BLOCK=block,
        MEAN_BLOCK=min(triton.next_power_of_2(k), MAX_MEAN_BLOCK),
        SPLITS_AT_ONCE=min(triton.next_power_of_2(splits), SPLITS_AT_ONCE),
        EARLY=configuration.early,
        INTERPRET=interpret,
        **own,
        num_warps=WARPS,
        enable_fp_fusion=True,  # Triton 3.10 will not by itself
        maxnreg=configuration.registers,
        launch_pdl=configuration.early,
    )
    return list(out)
