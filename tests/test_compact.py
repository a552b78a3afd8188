"""Compact storage: low slices for some channels only, everything else as before."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from test_calibration import batches, quantized
from torchao.quantization import quantize_

import plain
from grinqh_ao import (
    GrinqhConfig,
    GrinqhTensor,
    calibrate,
    decode_every_row,
    fuse_projections,
    measure,
    set_bits,
    summary,
)
from grinqh_ao.compact import ChannelUse
from grinqh_ao.model import quantized_linears
from grinqh_ao.slices import drop_low
from models import assert_unchanged, snapshot, tiny_model


def compact_model(stored_bits=5.0, bits=3.0, **config):
    model = quantized(bits=bits, **config)
    calibrate(model, batches(), stored_bits=stored_bits)
    return model


def compact_weight(n=96, k=40, share=0.3) -> GrinqhTensor:
    weight = GrinqhTensor.from_hp(torch.randn(n, k), bits=5)
    weight.slices, weight.low = drop_low(weight.slices, torch.rand(k) < share)
    return weight


@given(st.integers(1, 200), st.integers(1, 40), st.floats(0, 1), st.integers(1, 12))
def test_linear_is_the_plain_rule(n, k, share, rows):
    weight = compact_weight(n, k, share)
    x = torch.distributions.Laplace(0.0, 1.0).sample((rows, k))
    if rows <= 8:
        expected = plain.decode_together(x, weight)
    else:
        expected = x.double() @ plain.dense_at(weight, 8).t()
    error = (F.linear(x, weight).double() - expected).abs().max()
    assert error <= 1e-5 * (expected.abs().max() + 1e-6)
    with decode_every_row():
        found = F.linear(x, weight).double()
    expected = torch.stack([plain.decode(row, weight) for row in x])
    assert (found - expected).abs().max() <= 1e-5 * (expected.abs().max() + 1e-6)


def test_channels_without_low_slices_are_the_four_bit_weight():
    full = GrinqhTensor.from_hp(torch.randn(96, 40))
    weight = copy.deepcopy(full)
    kept = torch.rand(40) < 0.3
    weight.slices, weight.low = drop_low(weight.slices, kept)
    expected = torch.where(kept, full.dequantize(), full.dequantize(level=4))
    assert torch.equal(weight.dequantize(), expected)
    assert torch.equal(weight.dequantize(level=4), full.dequantize(level=4))
    indices = torch.randint(0, 96, (7,))
    assert torch.equal(F.embedding(indices, weight), expected[indices])


def test_stored_size_and_bits_read(family):
    full = quantized(family, head_bits=None)
    model = copy.deepcopy(full)
    calibrate(model, batches(), bits=3, stored_bits=5)
    unseen = torch.cat(batches(seed=1, count=4))
    for bits in (2.0, 3.0, 3.5):
        set_bits(model, bits)
        with torch.no_grad(), measure(model) as read, decode_every_row(16):
            model(unseen)
        assert read.total.bits == pytest.approx(bits, abs=0.05)
        assert summary(model).bits == pytest.approx(bits, abs=1e-3)
    codes = sum(weight.slices.nbytes for _, _, weight in quantized_linears(model))
    codes_before = sum(weight.slices.nbytes for _, _, weight in quantized_linears(full))
    assert codes == pytest.approx(codes_before * 5 / 8, rel=0.02)


def test_heads_and_their_embeddings_keep_everything():
    model = quantized(tied=True, head_bits=5)
    before = model.lm_head.weight.slices.clone()
    calibrate(model, batches(), bits=3, stored_bits=4.5)
    assert model.lm_head.weight.low is None
    assert torch.equal(model.lm_head.weight.slices, before)
    assert all(w.low is not None for n, _, w in quantized_linears(model) if n != "lm_head")


def test_kept_are_the_channels_whose_errors_would_cost_most():
    use = ChannelUse(200, bits=3)
    x = torch.full((64, 200), 0.1)
    x[:, 5] = 0.15  # louder on average, but never read above 4 bits
    x[:30, 7] = 5.0
    x[:20, 11] = 5.0
    x[:10, 13] = 5.0
    x[0, 150] = 3000  # a massive activation
    x[1, 151] = torch.inf
    for rows in x.split(20):
        use.add(rows)
    assert use.kept(4 + 4 * 3 / 200).nonzero().flatten().tolist() == [7, 11, 150]
    assert int(use.kept(4.0001).sum()) == 1
    assert int(use.kept(7.999).sum()) == 200


def test_calibrating_again_keeps_the_storage():
    model = compact_model()
    low = [weight.low.clone() for _, _, weight in quantized_linears(model) if not weight.min_bits]
    calibrate(model, batches(seed=2), bits=2.5)
    assert summary(model).bits == pytest.approx(2.5, abs=1e-3)
    after = [weight.low for _, _, weight in quantized_linears(model) if not weight.min_bits]
    assert all(torch.equal(a, b) for a, b in zip(low, after, strict=True))
    with pytest.raises(ValueError, match=r"stored_bits=4\.5: no layer can be stored compactly"):
        calibrate(model, batches(), stored_bits=4.5)


def test_more_bits_than_are_stored_cannot_be_read():
    model = compact_model(stored_bits=4.4)
    expected = summary(model).bits
    with pytest.raises(ValueError, match=r"bits of .*q_proj=5: .* at most 4\.\d+, .* compactly"):
        set_bits(model, 5)
    assert summary(model).bits == expected
    full = quantized(bits=6)
    before = {name: weight.slices for name, _, weight in quantized_linears(full)}
    for bits, message in (
        (None, "bits=6: .*less than stored_bits=4.4"),
        (4.4, "bits=4.4: .*less than stored_bits=4.4"),
        (4.39, "at most 4.38"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate(full, batches(), bits=bits, stored_bits=4.4)
    assert all(weight.slices is before[name] for name, _, weight in quantized_linears(full))


@pytest.mark.parametrize("stored_bits", [4, 8, 3.0, float("nan"), "5", True])
def test_sizes_that_cannot_be(stored_bits):
    with pytest.raises(ValueError, match="stored_bits="):
        calibrate(quantized(), batches(), stored_bits=stored_bits)
    with pytest.raises(ValueError, match="stored_bits="):
        GrinqhConfig(calibration=batches(), stored_bits=stored_bits)


def test_levels_that_cannot_be():
    model = quantized(levels=[0, 2, 4, 6])
    before = snapshot(model)
    with pytest.raises(ValueError, match="no layer can be stored compactly"):
        calibrate(model, batches(), stored_bits=5)
    assert_unchanged(model, before)


def test_through_the_config():
    with pytest.raises(ValueError, match="without calibration"):
        GrinqhConfig(stored_bits=4.4)
    with pytest.raises(ValueError, match="expected 4 and 8 among them"):
        GrinqhConfig(levels=[0, 2, 4, 6], stored_bits=4.4, calibration=batches())
    with pytest.raises(ValueError, match="less than stored_bits"):
        GrinqhConfig(bits=5, stored_bits=4.4, calibration=batches())
    model = tiny_model("llama", tied=False)
    quantize_(model, GrinqhConfig(bits=3, calibration=batches(), stored_bits=5))
    same = compact_model()
    for (_, _, one), (_, _, other) in zip(
        quantized_linears(model), quantized_linears(same), strict=True
    ):
        assert torch.equal(one.slices, other.slices)
        assert torch.equal(one.thresholds, other.thresholds)


def test_generation_eager_compiled_fused_moved_and_loaded(tmp_path):
    model = compact_model(bits=2.5)
    ids = batches(count=1)[0][:, :20]

    def generate(some):
        return some.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)

    expected = generate(model)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = tiny_model("llama", tied=False)
    other.load_state_dict(torch.load(tmp_path / "model.pt"), assign=True)
    assert torch.equal(generate(other), expected)
    assert torch.equal(generate(copy.deepcopy(model).to(torch.float64).float()), expected)
    fuse_projections(other)
    assert torch.equal(generate(other), expected)
    model.compile(fullgraph=True)
    assert torch.equal(generate(model), expected)
    set_bits(model, 2.0)
    set_bits(other, 2.0)
    assert torch.equal(generate(model), generate(other))


def test_graphs_of_other_storage_are_not_taken_from_the_cache():
    """Weights that differ in how many low lines they have are compiled apart."""
    x = torch.randn(1, 40)
    for share in (0.0, 0.3, 0.6, 1.0):
        linear = torch.nn.Linear(40, 96)
        linear.weight = torch.nn.Parameter(compact_weight(share=share), requires_grad=False)
        linear.requires_grad_(False)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(linear)(x), linear(x))


def test_projections_stored_differently_are_not_fused(caplog):
    model = compact_model()
    attention = model.model.layers[0].self_attn
    attention.q_proj.weight = torch.nn.Parameter(
        GrinqhTensor.from_hp(attention.q_proj.weight.dequantize()), requires_grad=False
    )
    fused = fuse_projections(model)
    assert not any("layers.0.self_attn" in name for group in fused for name in group)
    assert "storage" in caplog.text


def test_it_says_so():
    model = compact_model()
    assert "compact" in repr(model.model.layers[0].mlp.up_proj.weight)
    assert "compact" not in repr(model.lm_head.weight)
