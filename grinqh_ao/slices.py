"""Codes <-> 2-bit slices in tiles: the stored layout of a nested weight.

A code of ``2 * S`` bits is cut into S slices of 2 bits, the top bits first. All slices have the
same shape, ``int32 [S, tiles, K, tile / 16]``: a tile holds ``tile`` neighbouring outputs, and one
input channel of one tile is one contiguous row, so that a decode step reads whole rows of the
channels it needs and nothing else. Output ``n`` of a tile lives in 2-bit field ``n // words`` of
word ``n % words``, with ``words = tile / 16``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

FIELDS_PER_WORD = 16
TILE_WIDTHS = (512, 256, 128, 64)
MAX_PADDING = 0.07
BLOCK_WEIGHTS = 1 << 20


def tile_width(out_features: int) -> int:
    """The widest tile that pads ``out_features`` by less than 7% of what is stored.

    Where no tile does (small or odd layers), the widest of those that pad least.
    """

    def padded(tile: int) -> int:
        return -(-out_features // tile) * tile

    for tile in TILE_WIDTHS:
        if padded(tile) - out_features < MAX_PADDING * padded(tile):
            return tile
    return min(TILE_WIDTHS, key=lambda tile: (padded(tile), -tile))


def tile_blocks(slices: Tensor) -> Iterator[slice]:
    """Runs of tiles of about a million weights, so that temporaries stay small and in cache."""
    _, tiles, k, words = slices.shape
    step = max(1, BLOCK_WEIGHTS // max(1, k * words * FIELDS_PER_WORD))
    for start in range(0, tiles, step):
        yield slice(start, min(start + step, tiles))


def pack(codes: Tensor, num_slices: int, tile: int) -> Tensor:
    """Cuts codes into slices.

    Args:
        codes: uint8 [N, K], ``2 * num_slices`` bits each.
        num_slices: S, 1 to 4.
        tile: outputs per tile, a multiple of 64. N is padded with code 0 to a multiple of it.

    Returns:
        int32 [S, ceil(N / tile), K, tile / 16].
    """
    n, k = codes.shape
    tiles, words = -(-n // tile), tile // FIELDS_PER_WORD
    codes = torch.nn.functional.pad(codes, (0, 0, 0, tiles * tile - n))
    # Fields 4j .. 4j+3 of a word are its byte j, so bytes can be built without signed shifts.
    fields = codes.view(tiles, 4, 4, words, k)
    out = torch.empty((num_slices, tiles, k, words, 4), dtype=torch.uint8, device=codes.device)
    for s in range(num_slices):
        two_bits = (fields >> (2 * (num_slices - 1 - s))) & 3
        byte = two_bits[:, :, 0]
        for i in range(1, 4):
            byte = byte | (two_bits[:, :, i] << (2 * i))
        out[s] = byte.permute(0, 3, 2, 1)
    return out.view(torch.int32).squeeze(-1)


def unpack(slices: Tensor) -> Tensor:
    """Puts slices back together: the prefix codes that the given slices express.

    Args:
        slices: int32 [S', tiles, K', tile / 16], the first S' slices of any K' channels.

    Returns:
        uint8 [tiles, K', tile], codes of ``2 * S'`` bits, outputs in their natural order.
    """
    num_slices, tiles, k, words = slices.shape
    # [S', tiles, K', byte, words]: bytes before words restores the order of the outputs.
    bytes_ = (
        slices.contiguous().view(torch.uint8).view(num_slices, tiles, k, words, 4).transpose(3, 4)
    )
    out = torch.empty((tiles, k, 4, 4, words), dtype=torch.uint8, device=slices.device)
    for i in range(4):
        code = (bytes_[0] >> (2 * i)) & 3
        for s in range(1, num_slices):
            code = (code << 2) | ((bytes_[s] >> (2 * i)) & 3)
        out[:, :, :, i] = code
    return out.view(tiles, k, FIELDS_PER_WORD * words)


def unpack_rows(slices: Tensor, rows: Tensor) -> Tensor:
    """The codes of single outputs, as :func:`unpack` gives them for all.

    Args:
        slices: int32 [S, tiles, K, words].
        rows: int64 [R], outputs.

    Returns:
        int32 [R, K], codes of ``2 * S`` bits.
    """
    num_slices, _, _, words = slices.shape
    tile, offset = rows // (words * FIELDS_PER_WORD), rows % (words * FIELDS_PER_WORD)
    column = slices[:, tile, :, offset % words]  # [R, S, K]: indexed dimensions come first
    shift = 2 * (offset // words)[:, None].int()
    codes = (column[:, 0] >> shift) & 3
    for s in range(1, num_slices):
        codes = (codes << 2) | ((column[:, s] >> shift) & 3)
    return codes
