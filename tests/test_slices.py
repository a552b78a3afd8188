"""Packing: every code comes back, prefixes are lower levels, rows are where the layout says."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grinqh_ao.slices import TILE_WIDTHS, pack, tile_blocks, tile_width, unpack, unpack_rows

shapes = st.tuples(st.integers(1, 300), st.integers(1, 40))


def codes_of(shape: tuple[int, int], bits: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=generator)


@given(shapes, st.integers(1, 4), st.sampled_from(TILE_WIDTHS), st.integers(0, 2**31))
def test_round_trip(shape, num_slices, tile, seed):
    n, k = shape
    codes = codes_of(shape, 2 * num_slices, seed)
    slices = pack(codes, num_slices, tile)
    assert slices.shape == (num_slices, -(-n // tile), k, tile // 16)
    assert slices.dtype == torch.int32
    outputs = unpack(slices).transpose(1, 2).reshape(-1, k)
    assert torch.equal(outputs[:n], codes)
    assert not outputs[n:].any()  # padding is code 0


@given(shapes, st.sampled_from(TILE_WIDTHS), st.integers(1, 4), st.integers(0, 2**31))
def test_first_slices_are_the_prefix_code(shape, tile, prefix, seed):
    codes = codes_of(shape, 8, seed)
    slices = pack(codes, 4, tile)
    assert torch.equal(unpack(slices[:prefix]), unpack(slices) >> (8 - 2 * prefix))


@given(shapes, st.sampled_from(TILE_WIDTHS), st.integers(0, 2**31))
def test_unpacks_any_channels_and_any_outputs(shape, tile, seed):
    n, k = shape
    codes = codes_of(shape, 8, seed)
    slices = pack(codes, 4, tile)
    channels = torch.randperm(k)[: max(1, k // 2)]
    assert torch.equal(unpack(slices[:, :, channels]), unpack(slices)[:, channels])
    rows = torch.randint(0, n, (5,))
    assert torch.equal(unpack_rows(slices, rows), codes[rows].int())


def test_layout_is_the_documented_one():
    codes = codes_of((1024, 7), 8, 0)
    slices = pack(codes, 4, 512)
    n, k = 512 + 3 * 32 + 5, 2  # tile 1, field 3, word 5
    word = int(slices[1, 1, k, 5]) & 0xFFFFFFFF
    assert (word >> (2 * 3)) & 3 == (int(codes[n, k]) >> 4) & 3


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


@given(st.integers(1, 40), st.integers(0, 5000), st.sampled_from(TILE_WIDTHS))
def test_tile_blocks_cover_all_tiles_once(tiles, k, tile):
    slices = torch.empty(4, tiles, k, tile // 16, dtype=torch.int32, device="meta")
    covered = [t for block in tile_blocks(slices) for t in range(block.start, block.stop)]
    assert covered == list(range(tiles))
