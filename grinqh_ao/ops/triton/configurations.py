"""How decode kernels are cut into programs: one table, no tuning at run time.

A program reads one tile of outputs (512 for most layers) over a chunk of input channels. More
programs keep more bytes in flight and start reading sooner; longer chunks waste less on lists,
padding and sums. What is here was measured on an H100 (docs/kernel.md); for other GPUs it is taken
over, or found by compiling.
"""

from __future__ import annotations

from typing import NamedTuple

WARPS = 4  # of a program
# Channels per program, powers of two because a list is built from a block of such a size.
CHUNKS = (128, 256, 512)
# The same at most, by rows of the mma form as compiled: lists must fit into shared memory.
LONGEST_CHUNKS = {1: 512, 4: 512, 8: 256}
# A chunk is shorter than the longest where this makes at most so many programs, on each
# multiprocessor and on a tile: the last one of a tile adds up the sums of all, and each one that
# needs the mean of a row of activations reads all of it.
PROGRAMS = 1.5
SPLITS = 32
# On each multiprocessor, up to which programs prefetch all along: others keep enough in flight.
FEW_PROGRAMS = 2.5
# Programmatic dependent launch: programs get ready while the kernel in front of theirs ends.
LEAST_CAPABILITY_FOR_EARLY_LAUNCH = 90


class Gpu(NamedTuple):
    capability: int  # 10 * major + minor, 80 at least
    multiprocessors: int


def compiled_rows(form: str, rows: int) -> int:
    """Kernels are compiled for 1, 2, 4 and 8 rows; mma's columns take four at least."""
    power = 1 << (rows - 1).bit_length()
    return 4 if (form, power) == ("mma", 2) else power


def longest_chunk(form: str, rows: int) -> int:
    return LONGEST_CHUNKS[compiled_rows(form, rows)] if form == "mma" else CHUNKS[-1]


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
        if splits <= SPLITS and tiles * splits <= PROGRAMS * gpu.multiprocessors:
            return min(chunk, longest)
    return longest


def few(gpu: Gpu, programs: int) -> bool:
    return programs <= FEW_PROGRAMS * gpu.multiprocessors


def registers(capability: int, form: str, rows: int, words: int, few: bool) -> int | None:
    """Per thread at most; None where the compiler's own choice is right.

    Found by compiling; the tests hold what comes of them. Where bandwidth is high, a fourth program
    on each multiprocessor is worth some spills, hardly any of them in a loop.

    Args:
        rows: as compiled.
        words: of a line.
    """
    if (form, rows, words) == ("mma", 1, 32) and capability in (80, 90) and not few:
        return 128
    return 168 if (form, rows, words) == ("fma", 1, 32) else None
