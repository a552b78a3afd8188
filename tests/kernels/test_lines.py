"""Which bytes kernels ask for ahead of time: the interpreter runs no prefetches, so it is asked."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from grinqh_ao import GrinqhTensor
from grinqh_ao.ops.triton import lines
from grinqh_ao.slices import drop_low

SPECULATIVE = 20


@triton.jit
def prefetch_of_a_tile(
    slices, scales, sensitivity, low, row_scale, outputs, first, last,
    LEVELS: tl.constexpr, WORDS: tl.constexpr, SPECULATIVE: tl.constexpr,
):  # fmt: skip
    lines.prefetch_speculative(
        slices, scales, sensitivity, low, row_scale, outputs, first, last, LEVELS, WORDS,
        SPECULATIVE,
    )  # fmt: skip


def cache_lines(tensor):
    """Those that hold any of a contiguous tensor."""
    start = tensor.data_ptr()
    return set(range(start // 128, (start + tensor.nbytes - 1) // 128 + 1))


@pytest.mark.parametrize(
    ("levels", "compact"),
    [
        ((0, 2, 4, 6, 8), False),
        ((0, 2, 4, 6, 8), True),
        ((0, 2), False),
        ((4,), False),
        ((0, 6), False),
    ],
)
@pytest.mark.parametrize("n", [250, 980])
def test_what_is_asked_for_before_activations_are_known(n, levels, compact, monkeypatch):
    asked = set()

    def record(address, mask):
        places = np.asarray(address.handle.data)
        asked.update((places[np.broadcast_to(mask.handle.data, places.shape)] // 128).tolist())

    monkeypatch.setattr(lines, "prefetch", record)
    k = 301
    weight = GrinqhTensor.from_hp(torch.randn(n, k), max(levels), levels)
    if compact:
        weight.slices, weight.low = drop_low(weight.slices, torch.rand(k) < 0.5)
    tiles, _, words = weight.slices.shape
    for tile, first, last in [(0, 0, 128), (tiles - 1, 128, 256), (tiles - 1, 256, k)]:
        asked.clear()
        slices, scales = weight.slices[tile], weight.scales[tile]
        rows = weight.row_scale[tile * weight.tile :]
        prefetch_of_a_tile[(1,)](
            slices, scales, weight.sensitivity, weight.low, rows, len(rows), first, last,
            LEVELS=levels, WORDS=words, SPECULATIVE=SPECULATIVE,
        )  # fmt: skip
        read = [weight.sensitivity[first:last], scales[first:last], rows[: weight.tile]]
        if first == 0:
            read += [weight.thresholds, weight.gains]
        if compact:
            read.append(weight.low[first:last])
        expected = set().union(*map(cache_lines, read))
        for channel in range(first, min(last, first + SPECULATIVE)):  # aligned, on a GPU
            expected.add(slices[min(max(levels) // 2, 2) * channel].data_ptr() // 128)
        assert asked == expected
