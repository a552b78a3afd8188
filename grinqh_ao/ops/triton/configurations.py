"""How decode kernels are cut into programs: one table, no tuning at run time.

A program reads one tile of outputs (512 for most layers) over a chunk of input channels. More
programs keep more bytes in flight and start reading sooner; longer chunks waste less on lists,
padding and sums.
"""

from __future__ import annotations

from typing import NamedTuple

SMALL_WARPS = 4
LARGE_WARPS = 8


class Gpu(NamedTuple):
    programs: int  # small ones on each multiprocessor at a time, at most
    large_registers: int | None  # see Program


# By compute capability; of one that is not here, the next lower one's. Programs are what fits, or
# less where the memory's bandwidth and latency ask for fewer bytes in flight; of other forms and of
# several rows two fit. 90 was looked at on a GPU (docs/kernel.md), the rest is modelled.
GPUS = {
    80: Gpu(3, 128),  # A100
    86: Gpu(2, 168),  # RTX 30
    89: Gpu(2, 168),  # RTX 40, L4, L40S
    90: Gpu(3, 128),  # H100, H200
    100: Gpu(3, 128),  # B200
    120: Gpu(2, None),  # RTX 50
}
# Channels per program, powers of two because a list is built from a block of such a size; with
# fewer a program is not worth its lists and its partial sum.
SMALL_CHUNKS = (128, 256)
LARGE_CHUNKS = (512, 1024)
# The last program of a tile adds up the sums of all, and each program that needs the mean of a row
# of activations reads all of it.
MOST_SMALL_SPLITS = 32
MOST_LARGE_SPLITS = 16


class Program(NamedTuple):
    """How a kernel is compiled."""

    warps: int
    registers: int | None  # per thread at most; None where the compiler's own choice is right


def is_large(form: str, rows: int, block: int) -> bool:
    """Whether a program has eight warps: of the mma form, with one row and long chunks."""
    return (form, rows) == ("mma", 1) and block >= LARGE_CHUNKS[0]


def gpu(capability: int) -> Gpu:
    return GPUS[max(known for known in GPUS if known <= capability)]


def program(form: str, rows: int, words: int, block: int, capability: int) -> Program:
    """Limits of registers were found by compiling; the tests hold what comes of them.

    Args:
        form: of the kernel, mma or fma.
        rows: of activations, as compiled.
        words: of a line.
        block: channels that a list is built from, a power of two.
        capability: 10 * major + minor, 80 at least.
    """
    if is_large(form, rows, block):
        return Program(LARGE_WARPS, gpu(capability).large_registers)
    return Program(SMALL_WARPS, 168 if (form, rows, words) == ("fma", 1, 32) else None)


def chunk_length(
    capability: int, multiprocessors: int, tiles: int, k: int, form: str, rows: int
) -> int:
    """Channels per program: as few as all programs at a time allow.

    Args:
        capability: 10 * major + minor, 80 at least.
        multiprocessors: of the GPU.
        tiles: of all weights in the launch.
        k: channels.
        form: of the kernel, mma or fma.
        rows: of activations.
    """
    at_a_time = gpu(capability).programs
    slots = multiprocessors * (at_a_time if (form, rows) == ("mma", 1) else min(at_a_time, 2))
    for chunk in SMALL_CHUNKS + LARGE_CHUNKS:
        splits = -(-k // chunk)
        large = is_large(form, rows, chunk)
        most_splits = MOST_LARGE_SPLITS if large else MOST_SMALL_SPLITS
        size = LARGE_WARPS // SMALL_WARPS if large else 1
        if splits <= most_splits and tiles * splits * size <= slots:
            return chunk
    return LARGE_CHUNKS[-1]
