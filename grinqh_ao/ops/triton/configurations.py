"""How decode kernels are cut into programs: one table, no tuning at run time.

A program reads one tile of outputs (512 for most layers) over a chunk of input channels. More
programs keep more bytes in flight; longer chunks waste less on lists and their padding.
"""

from __future__ import annotations

WARPS = 4
# Compute capability -> programs on each multiprocessor at a time, at most: what fits, or less where
# the memory's bandwidth and latency ask for fewer bytes in flight (a program has some 8 KiB). Of a
# capability that is not here, the next lower one's. From the model in docs/kernel.md; not tuned on
# a GPU yet.
PROGRAMS_PER_SM = {
    80: 4,  # A100
    86: 2,  # RTX 30
    89: 2,  # RTX 40, L4, L40S
    90: 4,  # H100, H200
    100: 4,  # B200
    120: 2,  # RTX 50
}
# Channels per program, powers of two because a list is built from a block of such a size; with
# fewer a program is not worth its lists and its partial sum.
CHUNKS = (128, 256, 512, 1024, 2048)
# For layers so small that multiprocessors would idle.
CHUNK_OF_SMALL_LAYERS = 64


def most_registers(form: str, rows: int, words: int) -> int | None:
    """Per thread; None where the compiler's own choice is right.

    Up to 128 let four programs of one row share a multiprocessor. For the rest the compiler aims at
    numbers of programs that make it spill, or does with limits that it does not need.
    """
    if rows == 1:
        return None if (form, words) == ("mma", 16) else 128
    return 192 if form == "mma" and rows <= 4 else None


def chunk_length(capability: int, multiprocessors: int, tiles: int, k: int) -> int:
    """Channels per program: as few as all programs at a time allow.

    Args:
        capability: 10 * major + minor, 80 at least.
        multiprocessors: of the GPU.
        tiles: of all weights in the launch.
        k: channels.
    """
    known = max(row for row in PROGRAMS_PER_SM if row <= capability)
    if tiles * -(-k // CHUNKS[0]) < multiprocessors:
        return CHUNK_OF_SMALL_LAYERS
    for chunk in CHUNKS:
        if tiles * -(-k // chunk) <= PROGRAMS_PER_SM[known] * multiprocessors:
            return chunk
    return CHUNKS[-1]
