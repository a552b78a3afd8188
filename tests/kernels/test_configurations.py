"""How layers are cut into programs."""

import pytest

pytest.importorskip("triton")

from grinqh_ao.ops.triton import configurations
from grinqh_ao.ops.triton.configurations import chunk_length, program


@pytest.mark.parametrize(
    ("tiles", "k", "chunk"),
    [
        (2, 4096, 128),
        (8, 4096, 128),
        (12, 4096, 128),
        (28, 4096, 1024),
        (56, 4096, 1024),
        (8, 14336, 1024),  # more programs would each read all activations for their mean
        (251, 4096, 1024),
    ],
)
def test_what_sweeps_on_an_h100_led_to(tiles, k, chunk):
    assert chunk_length(90, 132, tiles, k, "mma", 1) == chunk


@pytest.mark.parametrize("capability", [*configurations.GPUS, 87, 121])
@pytest.mark.parametrize(("form", "rows"), [("mma", 1), ("mma", 4), ("fma", 1), ("fma", 8)])
def test_programs_fit_where_a_layer_lets_them(capability, form, rows):
    for tiles in (1, 3, 8, 20):
        for k in (1, 64, 700, 4096):
            chunk = chunk_length(capability, 100, tiles, k, form, rows)
            at_a_time = configurations.gpu(capability).programs
            if program(form, rows, 32, chunk, capability).warps == configurations.LARGE_WARPS:
                at_a_time /= 2
            assert tiles * -(-k // chunk) <= 100 * at_a_time


def test_the_next_lower_capability_is_taken():
    assert configurations.gpu(87) == configurations.GPUS[86]
    assert configurations.gpu(103) == configurations.GPUS[100]
