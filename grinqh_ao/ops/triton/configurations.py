"""How decode kernels are cut into programs: one table, no tuning at run time.

A program reads one tile of outputs (512 for most layers) over a chunk of input channels. More
programs keep more bytes in flight; longer chunks waste less on lists and their padding.
"""

from __future__ import annotations

from typing import NamedTuple


class Program(NamedTuple):
    """How a decode kernel is compiled."""

    warps: int
    depth: int  # of a step of the mma form
    prefetch: bool
    steps_ahead: int  # that are prefetched
    discard: bool
    stages: int
    registers: int | None  # per thread at most; None where the compiler's own choice is right


# Compute capability -> programs on each multiprocessor at a time, at most, with deep steps and with
# shallow ones: what fits, or less where the memory's bandwidth and latency ask for fewer bytes in
# flight (a program has 16 KiB or 8). Of a capability that is not here, the next lower one's. From
# the model in docs/kernel.md; not tuned on a GPU yet.
PROGRAMS_PER_SM = {
    80: (3, 4),  # A100
    86: (2, 2),  # RTX 30
    89: (2, 2),  # RTX 40, L4, L40S
    90: (2, 4),  # H100, H200
    100: (2, 4),  # B200
    120: (2, 2),  # RTX 50
}
# Channels per program, powers of two because a list is built from a block of such a size; with
# fewer a program is not worth its lists and its partial sum.
CHUNKS = (128, 256, 512, 1024, 2048)
# For layers so small that multiprocessors would idle.
CHUNK_OF_SMALL_LAYERS = 64


def program(
    form: str, rows: int, words: int, block: int, capability: int, experts: bool = False
) -> Program:
    if form == "mma" and rows == 1:
        return Program(8, 1, False, 2, False, 0, 128)
    registers = most_registers(form, rows, words, block, capability, experts)
    return Program(4, 1, False, 2, False, 0, registers)


def depth(rows: int, block: int) -> int:
    """Of a step of the mma form: 2 is deep, eight rows of words per warp instead of four.

    More than one row of activations leaves no registers for that, and short chunks would only pad
    their lists with it.
    """
    return 2 if rows == 1 and block >= 512 else 1


def most_registers(
    form: str, rows: int, words: int, block: int, capability: int, experts: bool = False
) -> int | None:
    """Per thread; None where the compiler's own choice is right.

    It aims at numbers of programs on a multiprocessor that may make it spill, or does with limits
    that it does not need. These were found by compiling; the tests hold what comes of them.
    """
    if rows > 1:
        return 192 if form == "mma" and rows <= 4 else None
    if form == "fma":
        return 128 if words == 32 else 144
    if words == 16:
        return 168
    deep = depth(rows, block) == 2
    if experts and not deep:
        return 128
    if experts and capability < 86:
        return 160
    return 224 if deep and 86 <= capability <= 90 else None


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
    known = max(row for row in PROGRAMS_PER_SM if row <= capability)
    deep, shallow = PROGRAMS_PER_SM[known]
    programs = multiprocessors * (deep if (form, rows) == ("mma", 1) else shallow)
    if tiles * -(-k // CHUNKS[0]) < multiprocessors:
        return CHUNK_OF_SMALL_LAYERS
    for chunk in CHUNKS:
        if tiles * -(-k // chunk) <= programs:
            return chunk
    return CHUNKS[-1]
