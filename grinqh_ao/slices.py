"""Codes <-> 2-bit slices in tiles: the stored layout of a nested weight.

A code of ``2 * S`` bits is cut into S slices of 2 bits, the top bits first. A *line* is one slice
of one input channel for one tile of neighbouring outputs: ``words = tile / 16`` words; output ``n``
of the tile is in 2-bit field ``n // words`` of word ``n % words``. ``slices``, int32 [tiles, lines,
words], has for each tile

    slices 0 and 1 of channel 0, of channel 1, ...     the *high* ones: levels 2 and 4
    slices 2 and 3 of channel 0, of channel 1, ...     the *low* ones: levels 6 and 8

so that a decode step reads whole lines of the channels it needs and nothing else, and the two
slices of a pair lie side by side. In compact storage only some channels have low slices: ``low``,
int32 [K], says which, by their place among the low ones, and has -1 for a channel without. Where
``low`` is None all channels have what there is, in order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

FIELDS_PER_WORD = 16
TILE_WIDTHS = (512, 256, 128, 64)
MAX_PADDING = 0.07
BLOCK_WEIGHTS = 1 << 20

HIGH_SLICES = 2
"""Slices of a code that every channel has."""

HIGH_LEVEL = 2 * HIGH_SLICES
"""The level that a channel without low slices is read at where more is asked for."""


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


def tile_blocks(tiles: int, weights: int) -> Iterator[slice]:
    """Runs of tiles of about a million weights, so that temporaries stay small and in cache.

    Args:
        tiles: number of them.
        weights: in a tile.
    """
    step = max(1, BLOCK_WEIGHTS // max(1, weights))
    for start in range(0, tiles, step):
        yield slice(start, min(start + step, tiles))


def pack(codes: Tensor, num_slices: int, tile: int) -> Tensor:
    """Cuts codes into slices, all of every channel.

    Args:
        codes: uint8 [N, K], ``2 * num_slices`` bits each.
        num_slices: S, 1 to 4.
        tile: outputs per tile, a multiple of 64. N is padded with code 0 to a multiple of it.

    Returns:
        int32 [ceil(N / tile), S * K, tile / 16].
    """
    n, k = codes.shape
    tiles, words = -(-n // tile), tile // FIELDS_PER_WORD
    out = torch.empty((tiles, num_slices * k, words), dtype=torch.int32, device=codes.device)
    for block in tile_blocks(tiles, tile * k):
        here = codes[block.start * tile : block.stop * tile]
        here = torch.nn.functional.pad(
            here, (0, 0, 0, (block.stop - block.start) * tile - len(here))
        )
        # Fields 4j .. 4j+3 of a word are its byte j, so bytes can be built without signed shifts.
        fields = here.view(-1, 4, 4, words, k)
        for s, lines in enumerate(split(out[block], k)):
            two_bits = (fields >> (2 * (num_slices - 1 - s))) & 3
            byte = two_bits[:, :, 0]
            for i in range(1, 4):
                byte = byte | (two_bits[:, :, i] << (2 * i))
            lines.copy_(byte.permute(0, 3, 2, 1).contiguous().view(torch.int32).squeeze(-1))
    return out


def num_slices_of(slices: Tensor, k: int, low: Tensor | None = None) -> int:
    """How many slices the codes of [tiles, lines, tile / 16] have; all 4 in compact storage."""
    return slices.shape[1] // max(k, 1) if low is None else 4


def split(slices: Tensor, k: int, low: Tensor | None = None) -> list[Tensor]:
    """Views of each slice, int32 [tiles, K', tile / 16]: K' is K, or the channels that have it."""
    tiles, lines, words = slices.shape
    num_slices = num_slices_of(slices, k, low)
    high = min(num_slices, HIGH_SLICES)
    upper = slices[:, : high * k].view(tiles, k, high, words)
    if num_slices == high:
        return list(upper.unbind(2))
    having = (lines - high * k) // (num_slices - high)
    lower = slices[:, high * k :].view(tiles, having, num_slices - high, words)
    return [*upper.unbind(2), *lower.unbind(2)]


def channels_of(
    slices: Tensor, level: int, k: int, channels: Tensor | slice, low: Tensor | None = None
) -> list[Tensor]:
    """What a level reads of some channels that all have it: slices, as :func:`split` gives them."""
    found = []
    for s, lines in enumerate(split(slices, k, low)[: level // 2]):
        at = channels if low is None or s < HIGH_SLICES else low[channels]
        found.append(lines[:, at])
    return found


def drop_low(slices: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Compact storage: drops the low slices of channels.

    Args:
        slices: int32 [tiles, 4 * K, tile / 16].
        kept: bool [K], True for channels that keep theirs.

    Returns:
        int32 [tiles, 2 * K + 2 * P, tile / 16] for P kept channels, and ``low``, int32 [K].
    """
    tiles, lines, words = slices.shape
    k = len(kept)
    upper, lower = slices.split([HIGH_SLICES * k, lines - HIGH_SLICES * k], dim=1)
    lower = lower.reshape(tiles, k, -1, words)[:, kept].flatten(1, 2)
    place = kept.cumsum(0) - 1
    return torch.cat([upper, lower], dim=1), torch.where(kept, place, -1).int()


def unpack(slices: Sequence[Tensor]) -> Tensor:
    """Puts slices back together: the prefix codes that the given slices express.

    Args:
        slices: the first S' slices of any K' channels, int32 [tiles, K', tile / 16] each.

    Returns:
        uint8 [tiles, K', tile], codes of ``2 * S'`` bits, outputs in their natural order.
    """
    tiles, k, words = slices[0].shape
    # [tiles, K', byte, words]: bytes before words restores the order of the outputs.
    bytes_ = [
        lines.contiguous().view(torch.uint8).view(tiles, k, words, 4).transpose(2, 3)
        for lines in slices
    ]
    out = torch.empty((tiles, k, 4, 4, words), dtype=torch.uint8, device=slices[0].device)
    for i in range(4):
        code = (bytes_[0] >> (2 * i)) & 3
        for byte in bytes_[1:]:
            code = (code << 2) | ((byte >> (2 * i)) & 3)
        out[:, :, :, i] = code
    return out.view(tiles, k, FIELDS_PER_WORD * words)


def unpack_rows(slices: Sequence[Tensor], rows: Tensor) -> Tensor:
    """The codes of single outputs, as :func:`unpack` gives them for all.

    Args:
        slices: as for :func:`unpack`.
        rows: int64 [R], outputs.

    Returns:
        int32 [R, K'], codes of ``2 * S'`` bits.
    """
    words = slices[0].shape[2]
    tile, offset = rows // (words * FIELDS_PER_WORD), rows % (words * FIELDS_PER_WORD)
    shift = 2 * (offset // words)[:, None].int()
    codes = torch.zeros_like(shift)
    for lines in slices:
        codes = (codes << 2) | ((lines[tile, :, offset % words] >> shift) & 3)
    return codes
