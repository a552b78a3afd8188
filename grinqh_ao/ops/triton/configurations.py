"""How decode kernels are cut into programs: one table, no tuning at run time.

A program reads one tile of outputs (512 for most layers) over a chunk of input channels. More
programs keep more bytes in flight; longer chunks waste less on lists and their padding.
"""

from __future__ import annotations

WARPS = 4
# Registers per thread that let four programs share a multiprocessor; more rows take what they need.
REGISTERS_OF_ONE_ROW = 128

# Compute capability -> programs wanted on each multiprocessor at a time, for the bytes in flight
# that the memory's bandwidth and latency ask for. Of a capability that is not here, the next lower
# one's. From the model in docs/kernel.md; not tuned on a GPU yet.
PROGRAMS_PER_SM = {
    80: 4,  # A100
    86: 3,  # RTX 30
    89: 3,  # RTX 40, L4, L40S
    90: 4,  # H100, H200
    100: 4,  # B200
    120: 3,  # RTX 50
}
# Channels per program that are worth its lists and its partial sum.
SHORTEST_CHUNK = 128
# The same for layers so small that multiprocessors would idle.
SHORTEST_CHUNK_OF_SMALL_LAYERS = 64
LONGEST_CHUNK = 1024


def chunk_length(capability: int, multiprocessors: int, tiles: int, k: int) -> int:
    """Channels per program; ``capability`` is 10 * major + minor, 80 at least."""
    known = max(row for row in PROGRAMS_PER_SM if row <= capability)
    splits = max(1, PROGRAMS_PER_SM[known] * multiprocessors // tiles)
    shortest = SHORTEST_CHUNK
    if tiles * -(-k // shortest) < multiprocessors:
        shortest = SHORTEST_CHUNK_OF_SMALL_LAYERS
    return min(max(-(-k // splits), shortest), LONGEST_CHUNK)
