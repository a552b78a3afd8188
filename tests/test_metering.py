"""Measured bits, bytes and shares, against counts by hand."""

import copy

import pytest
import torch
from torch import nn
from torchao.quantization import quantize_

import plain
from grinqh_ao import GrinqhConfig, decode_every_row, measure, set_bits
from models import tiny_model


@pytest.fixture
def model() -> nn.Module:
    layers = nn.Sequential(nn.Linear(40, 96), nn.ReLU(), nn.Linear(96, 200))
    quantize_(layers.requires_grad_(False), GrinqhConfig(bits=3))
    return layers


def test_counts_by_hand(model):
    rows = torch.distributions.Laplace(0.0, 1.0).sample((6, 40))
    with measure(model) as measured:
        for row in rows:
            model(row[None])
    levels = [level for row in rows for level in plain.levels_of(row, model[0].weight)]
    first = measured.layers["0"]
    assert first.bits == pytest.approx(sum(levels) / len(levels))
    for level, share in first.shares.items():
        assert share == pytest.approx(levels.count(level) / len(levels))
    assert sum(first.shares.values()) == pytest.approx(1)
    # 96 outputs are one tile of 128: what pads it is read too, but counts for no bits.
    assert first.bytes_per_token == pytest.approx(first.bits * 40 * 128 / 8)
    active = sum(level > 0 for level in levels) / len(rows)
    scales = active * 2 + 4 * (8 + 4 + 40 + 96)
    assert first.bytes_per_token_with_scales == pytest.approx(first.bytes_per_token + scales)
    assert first.bits_with_scales == pytest.approx(first.bits + 8 * scales / (96 * 40))
    assert first.stored_bytes == model[0].weight.stored_bytes


def test_total_weighs_layers_by_size(model):
    with measure(model) as measured:
        model(torch.randn(1, 40))
    first, second = measured.layers["0"], measured.layers["2"]
    sizes = (96 * 40, 200 * 96)
    expected = (first.bits * sizes[0] + second.bits * sizes[1]) / sum(sizes)
    assert measured.total.bits == pytest.approx(expected)
    assert measured.total.weights == sum(sizes)
    assert measured.total.bytes_per_token == pytest.approx(
        first.bytes_per_token + second.bytes_per_token
    )
    assert measured.total.stored_bytes == sum(model[i].weight.stored_bytes for i in (0, 2))
    assert sum(measured.total.shares.values()) == pytest.approx(1)


def test_heads_count_in_the_total_only():
    model = nn.ModuleDict({"body": nn.Linear(64, 64), "lm_head": nn.Linear(64, 64)})
    quantize_(model.requires_grad_(False), GrinqhConfig(bits=2, head_bits=8))
    x = torch.randn(1, 64)
    with measure(model) as measured:
        model["lm_head"](model["body"](x))
    assert measured.body.bits == pytest.approx(measured.layers["body"].bits)
    assert measured.layers["lm_head"].bits == 8
    assert measured.head == measured.layers["lm_head"]
    assert measured.total.bits == pytest.approx((measured.body.bits + 8) / 2)
    with measure(model) as measured:
        model["body"](x)
    assert measured.head is None


def test_prompts_do_not_count_unless_every_row_is_decoded(model):
    x = torch.randn(2, 5, 40)  # ten rows are a prompt
    with measure(model) as measured:
        model(x)
        with pytest.raises(ValueError, match="no quantized layer was given rows to decode"):
            _ = measured.total
        with decode_every_row(dense_prefix=3):
            model(x)
    assert measured._counters["0"].tokens == 2 * 2
    with measure(model) as again, decode_every_row():
        model(x[:, 3:])
    assert again.layers["0"] == measured.layers["0"]


def test_rows_decoded_together_are_read_once(model):
    rows = torch.distributions.Laplace(0.0, 1.0).sample((3, 40))
    with measure(model) as measured:
        model(rows[:, None])
    each = [plain.levels_of(row, model[0].weight) for row in rows]
    levels = [max(of) for of in zip(*each, strict=True)]
    assert measured._counters["0"].tokens == 1
    assert measured.layers["0"].bits == pytest.approx(sum(levels) / 40)


def test_gradient_passes_do_not_count(model):
    with measure(model) as measured:
        model(torch.randn(1, 40, requires_grad=True))
    assert not measured.layers
    with pytest.raises(ValueError, match=r"rows that want gradients .* use torch\.no_grad\(\)"):
        _ = measured.total


def test_a_single_vector(model):
    x = torch.randn(40)
    with measure(model) as measured:
        model(x)
    assert measured.layers["0"].code_bits == 96 * sum(plain.levels_of(x, model[0].weight))


def test_inputs_by_keyword(model):
    with measure(model) as measured:
        model[0](input=torch.randn(1, 40))
    assert list(measured.layers) == ["0"]


def test_bits_follow_set_bits(model):
    x = torch.distributions.Laplace(0.0, 1.0).sample((200, 1, 40))
    for bits in (1, 3, 5.5, 8):
        set_bits(model, bits)
        with measure(model) as measured:
            for row in x:
                model(row)
        assert measured.layers["0"].bits == pytest.approx(bits, abs=0.15)


def test_costs_nothing_when_unused(model):
    with pytest.raises(RuntimeError, match="stop"), measure(model):
        raise RuntimeError("stop")
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_measures_compiled_models(model):
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(1, 40)
    expected = compiled(x)
    with measure(model) as measured:
        assert torch.equal(compiled(x), expected)
    assert measured.layers.keys() == {"0", "2"}
    with measure(compiled) as through_the_wrapper:
        compiled(x)
    assert through_the_wrapper.total == measured.total


@torch.no_grad()
def test_weights_that_were_replaced_meanwhile(model):
    other = copy.deepcopy(model)
    set_bits(other, 8)
    with measure(model) as measured:
        model.load_state_dict(other.state_dict(), assign=True)
        model(torch.randn(1, 40))
    assert measured.layers["0"].bits == 8
    assert measured.layers["0"].shares == {0: 0, 2: 0, 4: 0, 6: 0, 8: 1}


@torch.no_grad()
def test_weights_with_other_levels_meanwhile():
    first, second = nn.Linear(40, 96), nn.Linear(40, 96)
    quantize_(first, GrinqhConfig(bits=3, levels=[0, 4, 8]))
    quantize_(second, GrinqhConfig(bits=6))
    set_bits(second, 6)
    x = torch.distributions.Laplace(0.0, 1.0).sample((1, 40))
    with measure(first) as measured:
        first.weight = second.weight
        first(x)
    levels = plain.levels_of(x[0], second.weight)
    assert 6 in levels
    assert measured.total.bits == pytest.approx(sum(levels) / 40)
    assert sum(measured.total.shares.values()) == pytest.approx(1)


@torch.no_grad()
def test_a_dense_weight_in_place_of_one(model):
    with measure(model) as measured:
        model[0].weight = nn.Parameter(torch.randn(96, 40))
        model(torch.randn(1, 40))
    assert list(measured.layers) == ["2"]


@torch.no_grad()
def test_experts_that_were_replaced_meanwhile():
    model = tiny_model("qwen3_moe", tied=False)
    quantize_(model, GrinqhConfig(bits=2))
    other = copy.deepcopy(model)
    set_bits(other, 8)
    with measure(model) as measured:
        model.load_state_dict(other.state_dict(), assign=True)
        model(torch.ones(1, 1, dtype=torch.long))
    assert {reading.bits for reading in measured.layers.values()} == {8}


def test_tied_weights_are_stored_once():
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40)).requires_grad_(False)
    model[1].weight = model[0].weight
    quantize_(model, GrinqhConfig(bits=3))
    with measure(model) as measured:
        model(torch.randn(1, 40))
    assert measured.total.stored_bytes == model[0].weight.stored_bytes


def test_prints_a_table(model):
    with measure(model) as measured:
        model(torch.randn(1, 40))
    lines = str(measured).splitlines()
    assert lines[0].split()[:2] == ["layer", "bits"]
    assert [line.split()[0] for line in lines[1:]] == ["0", "2", "total"]


def test_is_short_where_it_is_part_of_something(model):
    with measure(model) as measured:
        assert repr(measured) == "Measurement(layers=0)"
        model(torch.randn(1, 40))
    assert repr(measured) == f"Measurement(layers=2, bits={measured.total.bits:.2f})"


def test_says_if_nothing_was_decoded(model, log):
    with measure(model) as measured:
        model(torch.randn(9, 40))  # a prompt
    assert "nothing was decoded" in log.text
    assert measured.body is None
    log.clear()
    with measure(model):
        model(torch.randn(1, 40))
    assert not log.text


def test_needs_something_quantized():
    with pytest.raises(ValueError, match="no layer is quantized"), measure(nn.Linear(4, 4)):
        pass
