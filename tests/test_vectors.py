"""A weight's small tensors in one: what goes in comes out, as views that can be written to."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from grinqh_ao import vectors

sizes = st.integers(1, 40)


@given(sizes, sizes, st.integers(1, 5), st.sampled_from([(), (1,), (3,)]))
def test_round_trip(n, k, levels, stack):
    parts = {
        "thresholds": torch.rand(*stack, 2, levels - 1),
        "gains": torch.rand(*stack, 4),
        "sensitivity": torch.rand(*stack, k).bfloat16(),
        "row_scale": torch.rand(*stack, n).bfloat16(),
    }
    joined = vectors.join(**parts)
    assert joined.dtype == torch.float32
    assert vectors.outputs_of(joined, k) == n
    found = {
        "thresholds": vectors.thresholds_of(joined, levels),
        "gains": vectors.gains_of(joined),
        "sensitivity": vectors.sensitivity_of(joined, k),
        "row_scale": vectors.row_scale_of(joined, k),
    }
    for name, part in parts.items():
        assert found[name].shape == part.shape
        assert torch.equal(found[name], part.float())
        assert found[name].storage_offset() % 4 == 0  # kernels load 16 bytes at once
    for name, part in found.items():
        part.fill_(2)
        assert (found[name] == 2).all()
    assert (joined == 2).sum() == sum(part.numel() for part in parts.values())
