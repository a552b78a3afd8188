"""How layers are cut into programs."""

import pytest
import torch

pytest.importorskip("triton")

from grinqh_ao.ops.triton.configurations import (
    CHUNKS,
    MAX_CHUNKS,
    PROGRAMS_PER_SM,
    Gpu,
    chunk_length,
    compiled_rows,
    configure,
    form_of,
    longest_chunk,
)
from grinqh_ao.ops.triton.decode_mma import memory_bytes

H100 = Gpu(90, 132)


@pytest.mark.parametrize(
    ("tiles", "k", "chunk", "few"),
    [
        (2, 4096, 128, True),
        (8, 4096, 256, True),
        (12, 4096, 256, True),
        (28, 4096, 512, True),
        (56, 4096, 512, False),
        (8, 14336, 512, True),
        (251, 4096, 512, False),
    ],
)
def test_what_sweeps_on_an_h100_led_to(tiles, k, chunk, few):
    chosen = configure(H100, "mma", 1, 32, tiles, k)
    assert chosen[:3] == ("mma", chunk, few)
    assert chosen.early
    assert chosen.registers == (None if few and chunk == 512 else 128)
    assert 0 < chosen.speculative <= chunk


@pytest.mark.parametrize(("form", "rows"), [("mma", 1), ("mma", 3), ("mma", 8), ("fma", 8)])
def test_short_chunks_are_for_layers_that_leave_a_gpu_room(form, rows):
    for tiles in (1, 3, 8, 20, 400):
        for k in (1, 64, 700, 4096, 100_000):
            chunk = chunk_length(H100, tiles, k, form, rows)
            assert chunk in CHUNKS
            if chunk < longest_chunk(form, rows):
                assert tiles * -(-k // chunk) <= PROGRAMS_PER_SM * 132


@pytest.mark.parametrize(
    ("capability", "dtype", "words", "form"),
    [
        (80, torch.bfloat16, 16, "mma"),
        (90, torch.float16, 32, "mma"),
        (90, torch.float16, 8, "fma"),
        (90, torch.float32, 32, "fma"),
        (75, torch.float16, 32, "fma"),
    ],
)
def test_tensor_cores_are_for_halves_and_wide_tiles_since_ampere(capability, dtype, words, form):
    assert form_of(capability, dtype, words) == form


def test_lists_fit_into_shared_memory():
    """48 KiB are there without asking, and Triton takes some for itself."""
    for rows, block in MAX_CHUNKS.items():
        assert memory_bytes((0, 2, 4, 6, 8), block, rows, 32) + block // 4 <= 44 << 10


def test_numbers_of_rows_that_are_compiled():
    assert [compiled_rows("mma", rows) for rows in range(1, 9)] == [1, 4, 4, 4, 8, 8, 8, 8]
    assert [compiled_rows("fma", rows) for rows in range(1, 9)] == [1, 2, 4, 4, 8, 8, 8, 8]
