"""Output heads, and weights that several modules share."""

import gc
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchao.quantization import FqnToConfig, quantize_

from grinqh_ao import GrinqhConfig, GrinqhTensor, all_but_head, set_bits, summary
from models import assert_unchanged, layers_of, snapshot, tiny_model


def test_untied_head_is_quantized_at_its_floor(family, log):
    model = tiny_model(family, tied=False)
    embedding = model.get_input_embeddings().weight
    quantize_(model, GrinqhConfig(bits=3))
    assert len(layers_of(model)) == 2 * 7 + 1
    assert model.get_input_embeddings().weight is embedding
    assert model.lm_head.weight.bits == pytest.approx(6)
    assert model.model.layers[0].mlp.up_proj.weight.bits == pytest.approx(3)
    assert "quantized, in 15 modules" in log.text
    assert "output head lm_head: 6.00 bits" in log.text
    assert "left dense: 1 in Embedding: model.embed_tokens" in log.text


def test_tied_head_and_embedding_stay_one_weight(family, log):
    model = tiny_model(family, tied=True)
    dense = model.lm_head.weight.detach()
    quantize_(model, GrinqhConfig(bits=3))
    embedding = model.get_input_embeddings()
    assert isinstance(embedding.weight, GrinqhTensor)
    assert embedding.weight is model.lm_head.weight
    assert "tied, one quantized weight: model.embed_tokens = lm_head" in log.text
    model.tie_weights()
    assert embedding.weight is model.lm_head.weight
    assert isinstance(model.lm_head.weight, GrinqhTensor)
    found = embedding(torch.arange(320))
    assert (found - dense).norm() / dense.norm() < 0.01  # embeddings read level 8
    stored = summary(model)
    assert stored.stored_bytes < 0.4 * stored.dense_bytes  # float32 before


@pytest.mark.parametrize("tied", [True, False])
def test_head_bits_none_leaves_the_head_and_its_tie_alone(family, tied, log):
    model = tiny_model(family, tied=tied)
    head, embedding = model.lm_head.weight, model.get_input_embeddings().weight
    quantize_(model, GrinqhConfig(bits=3, head_bits=None))
    assert model.lm_head.weight is head
    assert model.get_input_embeddings().weight is embedding
    assert len(layers_of(model)) == 2 * 7
    assert log.text.count("lm_head is left dense: it is the output head") == 1
    assert "left dense: 1 in Linear: lm_head" in str(summary(model)) or tied


def test_ready_filter_leaves_the_head_alone(family):
    model = tiny_model(family, tied=True)
    head = model.lm_head.weight
    quantize_(model, GrinqhConfig(bits=3), filter_fn=all_but_head)
    assert model.lm_head.weight is head
    assert len(layers_of(model)) == 2 * 7


def test_head_floor_follows_bits_above_it_and_levels_below_it(family):
    model = tiny_model(family, tied=False)
    quantize_(model, GrinqhConfig(bits=7))
    assert model.lm_head.weight.bits == pytest.approx(7)
    set_bits(model, 2)
    assert model.lm_head.weight.bits == pytest.approx(6)
    model = tiny_model(family, tied=False)
    quantize_(model, GrinqhConfig(bits=3, levels=(0, 2, 4)))
    assert model.lm_head.weight.bits == pytest.approx(4)


@pytest.mark.parametrize("through", ["module", "parent"])
def test_a_weight_tied_to_a_module_outside_is_left_alone(log, through):
    model = tiny_model("llama", tied=True)
    before = snapshot(model)
    part = model.lm_head if through == "module" else nn.Sequential(model.lm_head)
    quantize_(part, GrinqhConfig(bits=3))
    assert_unchanged(model, before)
    assert "shares its weight with a module outside of what is being quantized" in log.text


def test_the_garbage_collector_is_not_asked_without_need(monkeypatch):
    monkeypatch.setattr("gc.get_referrers", lambda *objects: pytest.fail("asked"))
    model = tiny_model("llama", tied=True)
    quantize_(model, GrinqhConfig(bits=3))
    assert len(layers_of(model)) == 2 * 7 + 1


def test_a_tied_embedding_needs_a_fine_enough_level(log):
    model = tiny_model("llama", tied=True)
    head = model.lm_head.weight
    quantize_(model, GrinqhConfig(bits=3, levels=(0, 2, 4)))
    assert model.lm_head.weight is head
    assert "lm_head is left dense: it shares its weight with model.embed_tokens" in log.text


def tied_linears() -> nn.ModuleDict:
    model = nn.ModuleDict({"a": nn.Linear(32, 32), "lm_head": nn.Linear(32, 32)})
    model["lm_head"].weight = model["a"].weight
    return model


def test_a_layer_tied_to_the_head_is_read_as_the_head_is():
    model = tied_linears()
    quantize_(model, GrinqhConfig(bits=3))
    assert model["a"].weight is model["lm_head"].weight
    assert model["a"].weight.bits == pytest.approx(6)


def test_what_is_tied_to_an_embedding_is_a_head_whatever_its_name():
    model = nn.ModuleDict({"tokens": nn.Embedding(320, 32), "last": nn.Linear(32, 320)})
    model["last"].weight = model["tokens"].weight
    quantize_(model, GrinqhConfig(bits=3))
    assert summary(model).heads == {"last": pytest.approx(6)}


@pytest.mark.parametrize(
    "arguments",
    [
        {"config": GrinqhConfig(bits=3, head_bits=None)},
        {"config": GrinqhConfig(bits=3), "filter_fn": lambda module, name: name == "a"},
        {
            "config": FqnToConfig({"a": GrinqhConfig(bits=2), "lm_head": GrinqhConfig(bits=6)}),
            "filter_fn": None,
        },
        {"config": FqnToConfig({"a": GrinqhConfig(), "lm_head": None}), "filter_fn": None},
    ],
    ids=["head_bits", "filter", "other bits", "none"],
)
def test_tied_layers_are_quantized_alike_or_not_at_all(log, arguments):
    model = tied_linears()
    before = snapshot(model)
    quantize_(model, **arguments)
    assert_unchanged(model, before)
    assert re.search(r"\ba is left dense|left dense: .*\(a, lm_head\)", log.text)


def test_an_embedding_reads_what_dequantize_gives():
    """The largest values of float16 too, which scales round up."""
    dense = torch.randn(96, 40, dtype=torch.float16)
    dense[7] = torch.finfo(torch.float16).max
    weight = GrinqhTensor.from_hp(dense)
    expected = weight.dequantize()
    assert expected.isfinite().all()
    assert torch.equal(F.embedding(torch.arange(96), weight), expected)


def test_what_the_collector_cannot_see_is_left_alone(log):
    model = tiny_model("llama", tied=True)
    before = snapshot(model)
    gc.freeze()
    try:
        quantize_(model.lm_head, GrinqhConfig(bits=3))
    finally:
        gc.unfreeze()
    assert_unchanged(model, before)
    assert "lm_head" not in log.text  # the layer is the model here
    assert "is left dense: after gc.freeze() it cannot be known" in log.text


def test_a_state_dict_round_trip_of_a_tied_model(tmp_path):
    """The README's recipe."""
    model, ids = tiny_model("llama", tied=True), torch.randint(0, 320, (1, 5))
    quantize_(model, GrinqhConfig(bits=3))
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = tiny_model("llama", tied=True)
    other.load_state_dict(torch.load(tmp_path / "state.pt"), assign=True)
    other.tie_weights()
    assert other.lm_head.weight is other.model.embed_tokens.weight
    assert summary(other) == summary(model)
    with torch.no_grad():
        assert torch.equal(other(ids).logits, model(ids).logits)
