"""How decode kernels are cut into programs: one table, no tuning at run time.

A program reads one tile of outputs (512 for most layers) over a chunk of input channels. More
programs keep more bytes in flight and start reading sooner; longer chunks waste less on lists,
padding and sums. What is here was measured on an H100 (docs/kernel.md); for other GPUs it is taken
over, or found by compiling.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# Compute capabilities, 10 * major + minor.
MIN_CAPABILITY_FOR_MMA = 80  # tensor cores of Turing, 75, take half as many channels at a time
MIN_CAPABILITY_FOR_EARLY_LAUNCH = 90
WARPS = 4  # of a program
# Channels per program, powers of two because a list is built from a block of such a size.
CHUNKS = (128, 256, 512)
# The longest of them, by rows of the mma form as compiled: lists must fit into shared memory.
MAX_CHUNKS = {1: 512, 4: 512, 8: 256}
# The shortest chunk is taken that makes no more programs than this, else the longest.
PROGRAMS_PER_SM = 1.5
# Nor more chunks of a tile: one program adds up the sums of all, and each may have to read all of a
# row of activations for its mean.
MAX_SPLITS = 32
# Up to here programs are few: they do not keep enough in flight.
FEW_PROGRAMS_PER_SM = 2.5
# Channels of a program whose top slices are prefetched before activations are known: about what an
# H100's memory brings until then. At 3 bits four in five of these lines will be read, at 2 two in
# three.
SPECULATIVE = 64


class Gpu(NamedTuple):
    capability: int  # 10 * major + minor
    multiprocessors: int


class Configuration(NamedTuple):
    """Of a launch: its programs, and what they do ahead of time."""

    form: str  # of the kernel: mma, on tensor cores, or fma
    chunk: int  # channels of a program
    # Of mma: there are few programs, which prefetch all along and leave words in the L2 cache.
    few: bool = False
    speculative: int = 0  # of mma, see SPECULATIVE
    registers: int | None = None  # per thread at most; None where the compiler's choice is right
    early: bool = False  # programmatic dependent launch, while the kernel in front ends


def form_of(capability: int, dtype: torch.dtype, words: int) -> str:
    """The form for activations of a dtype and tiles of ``words`` words a line."""
    halves = dtype in (torch.float16, torch.bfloat16)  # what tensor cores take
    return "mma" if capability >= MIN_CAPABILITY_FOR_MMA and halves and words >= 16 else "fma"


def compiled_rows(form: str, rows: int) -> int:
    """Kernels are compiled for 1, 2, 4 and 8 rows; mma's columns take four at least."""
    power = 1 << (rows - 1).bit_length()
    return 4 if (form, power) == ("mma", 2) else power


def longest_chunk(form: str, rows: int) -> int:
    return MAX_CHUNKS[compiled_rows(form, rows)] if form == "mma" else CHUNKS[-1]


def chunk_length(gpu: Gpu, tiles: int, k: int, form: str, rows: int) -> int:
    """Channels per program.

    Args:
        tiles: of all weights in the launch.
        k: channels.
        form: of the kernel, mma or fma.
        rows: of activations.
    """
    longest = longest_chunk(form, rows)
    for chunk in CHUNKS:
        splits = -(-k // chunk)
        if splits <= MAX_SPLITS and tiles * splits <= PROGRAMS_PER_SM * gpu.multiprocessors:
            return min(chunk, longest)
    return longest


def few(gpu: Gpu, programs: int) -> bool:
    return programs <= FEW_PROGRAMS_PER_SM * gpu.multiprocessors


def configure(gpu: Gpu, form: str, rows: int, words: int, tiles: int, k: int) -> Configuration:
    """What a launch is run with.

    Args:
        form: of the kernel, mma or fma.
        rows: of activations.
        words: of a line.
        tiles: of all weights in the launch, or of all slots of experts.
        k: channels.
    """
    chunk = chunk_length(gpu, tiles, k, form, rows)
    are_few = few(gpu, tiles * -(-k // chunk))
    return of_programs(gpu.capability, form, compiled_rows(form, rows), words, chunk, are_few)


def of_programs(
    capability: int, form: str, rows: int, words: int, chunk: int, few: bool
) -> Configuration:
    """The rest of a configuration; ``rows`` as compiled."""
    return Configuration(
        form,
        chunk,
        few,
        SPECULATIVE,
        registers(capability, form, rows, words, few and chunk == CHUNKS[-1]),
        capability >= MIN_CAPABILITY_FOR_EARLY_LAUNCH,
    )


def registers(capability: int, form: str, rows: int, words: int, long: bool) -> int | None:
    """Found by compiling; the tests hold what comes of them. Where bandwidth is high, a fourth
    program on each multiprocessor is worth some spills, hardly any of them in a loop; not in the
    ``long`` programs of a layer that has few of them."""
    if (form, rows, words) == ("mma", 1, 32) and capability in (80, 90) and not long:
        return 128
    return 168 if (form, rows, words) == ("fma", 1, 32) else None
