"""Packing: every code comes back, prefixes are lower levels, lines are where the layout says."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grinqh_ao.slices import (
    TILE_WIDTHS,
    channels_of,
    drop_low,
    pack,
    split,
    tile_blocks,
    tile_width,
    unpack,
    unpack_rows,
)

shapes = st.tuples(st.integers(1, 300), st.integers(1, 40))


def codes_of(shape: tuple[int, int], bits: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=generator)


@given(shapes, st.integers(1, 4), st.sampled_from(TILE_WIDTHS), st.integers(0, 2**31))
def test_round_trip(shape, num_slices, tile, seed):
    n, k = shape
    codes = codes_of(shape, 2 * num_slices, seed)
    slices = pack(codes, num_slices, tile)
    assert slices.shape == (-(-n // tile), num_slices * k, tile // 16)
    assert slices.dtype == torch.int32
    outputs = unpack(split(slices, k)).transpose(1, 2).reshape(-1, k)
    assert torch.equal(outputs[:n], codes)
    assert not outputs[n:].any()  # padding is code 0


@given(shapes, st.sampled_from(TILE_WIDTHS), st.integers(1, 4), st.integers(0, 2**31))
def test_first_slices_are_the_prefix_code(shape, tile, prefix, seed):
    codes = codes_of(shape, 8, seed)
    slices = split(pack(codes, 4, tile), shape[1])
    assert torch.equal(unpack(slices[:prefix]), unpack(slices) >> (8 - 2 * prefix))


@given(shapes, st.sampled_from(TILE_WIDTHS), st.integers(1, 4), st.integers(0, 2**31))
def test_unpacks_any_channels_and_any_outputs(shape, tile, num_slices, seed):
    n, k = shape
    codes = codes_of(shape, 2 * num_slices, seed)
    slices = pack(codes, num_slices, tile)
    channels = torch.randperm(k)[: max(1, k // 2)]
    read = channels_of(slices, 2 * num_slices, k, channels)
    assert torch.equal(unpack(read), unpack(split(slices, k))[:, channels])
    rows = torch.randint(0, n, (5,))
    assert torch.equal(unpack_rows(split(slices, k), rows), codes[rows].int())


@given(shapes, st.sampled_from(TILE_WIDTHS), st.data())
def test_compact_storage_keeps_what_it_is_to_keep(shape, tile, data):
    k = shape[1]
    full = pack(codes_of(shape, 8, 0), 4, tile)
    kept = torch.tensor(data.draw(st.lists(st.booleans(), min_size=k, max_size=k)))
    slices, low = drop_low(full, kept)
    assert slices.shape == (full.shape[0], 2 * k + 2 * int(kept.sum()), full.shape[2])
    assert torch.equal(low >= 0, kept)
    for level in (2, 4):
        everything = unpack(channels_of(full, level, k, slice(None)))
        assert torch.equal(unpack(channels_of(slices, level, k, slice(None), low)), everything)
    channels = kept.nonzero().squeeze(1).flip(0)
    for level in (6, 8):
        expected = unpack(channels_of(full, level, k, channels))
        assert torch.equal(unpack(channels_of(slices, level, k, channels, low)), expected)


@pytest.mark.parametrize(("s", "line"), [(0, 2 * 2), (1, 2 * 2 + 1), (2, 2 * 7 + 2 * 2)])
def test_layout_is_the_documented_one(s, line):
    codes = codes_of((1024, 7), 8, 0)
    slices = pack(codes, 4, 512)
    n, k = 512 + 3 * 32 + 5, 2  # tile 1, field 3, word 5
    word = int(slices[1, line, 5]) & 0xFFFFFFFF
    assert (word >> (2 * 3)) & 3 == (int(codes[n, k]) >> (6 - 2 * s)) & 3
    # Stored compactly, channel 2 is the first of those with low slices.
    kept = torch.tensor([False, False, True, False, True, False, False])
    compact, _ = drop_low(slices, kept)
    line = line if s < 2 else 2 * 7
    assert int(compact[1, line, 5]) & 0xFFFFFFFF == word


@pytest.mark.parametrize(
    ("n", "tile"),
    [(4096, 512), (1536, 512), (576, 64), (192, 64), (128256, 512), (1, 64), (200, 256)],
)
def test_tile_width(n, tile):
    assert tile_width(n) == tile


@given(st.integers(1, 200_000))
def test_tile_padding_is_small_or_minimal(n):
    def padded(tile: int) -> int:
        return -(-n // tile) * tile

    tile = tile_width(n)
    assert padded(tile) - n < 0.07 * padded(tile) or padded(tile) == padded(64)


@given(st.integers(1, 40), st.integers(0, 3_000_000))
def test_tile_blocks_cover_all_tiles_once(tiles, weights):
    covered = [t for block in tile_blocks(tiles, weights) for t in range(block.start, block.stop)]
    assert covered == list(range(tiles))
