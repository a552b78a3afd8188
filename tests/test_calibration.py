"""calibrate(): bits met layer by layer, on text that it has not seen."""

import copy
import itertools

import pytest
import torch
from torchao.quantization import quantize_

import grinqh_ao
from grinqh_ao import GrinqhConfig, calibrate, decode_every_row, measure, set_bits, summary
from grinqh_ao.batches import token_batches
from grinqh_ao.model import quantized_linears
from models import tiny_model, tiny_tokenizer


def quantized(family="llama", tied=False, **config):
    model = tiny_model(family, tied=tied)
    quantize_(model, GrinqhConfig(**config))
    return model


def batches(seed=0, count=8, length=128):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 320, (1, length), generator=generator) for _ in range(count)]


def curves(model):
    return {name: weight.curve for name, _, weight in quantized_linears(model)}


@torch.no_grad()
def read(model, ids):
    with measure(model) as measured, decode_every_row(16):
        model(ids)
    return measured


@pytest.mark.parametrize("relative", [0.0, 0.25, 1.0])
def test_layers_read_what_was_asked_for(family, relative):
    model = quantized(family, head_bits=None)
    calibrate(model, batches(), relative=relative)
    unseen = torch.cat(batches(seed=1, count=4))
    for bits in (2, 3, 4.5, 6):
        set_bits(model, bits)
        measured = read(model, unseen)
        assert measured.body.bits == pytest.approx(bits, abs=0.05)
        assert summary(model).bits == pytest.approx(bits, abs=1e-3)


def test_thresholds_are_static_unless_asked():
    model = quantized()
    for options, static in (({}, True), ({"relative": 0.5}, False)):
        calibrate(model, batches(), **options)
        for _, _, weight in quantized_linears(model):
            assert bool((weight.thresholds[1] == 0).all()) == static


def test_it_is_closer_than_the_formula(family):
    model = quantized(family, bits=2, head_bits=None)
    unseen = torch.cat(batches(seed=1, count=4))
    before = abs(read(model, unseen).body.bits - 2)
    calibrate(model, batches())
    assert abs(read(model, unseen).body.bits - 2) < before


def test_heads_have_bits_of_their_own():
    model = quantized(head_bits=5)
    calibrate(model, batches(), bits=3)
    measured = read(model, torch.cat(batches(seed=1, count=4)))
    assert measured.body.bits == pytest.approx(3, abs=0.05)
    assert measured.head.bits == pytest.approx(5, abs=0.05)


def test_layers_share_a_curve_in_units_of_their_own(family):
    model = quantized(family)
    calibrate(model, batches(), importance=False)
    found = curves(model)
    q, k, down = (
        found[f"model.layers.0.{n}"]
        for n in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
    )
    assert torch.equal(q[1:], k[1:])
    assert torch.equal(q[1:], down[1:])
    assert float(q[0]) == pytest.approx(float(k[0]), rel=0.05)  # the same activations
    assert float(q[0]) != pytest.approx(float(down[0]), rel=0.05)


def test_channels_weigh_what_their_scales_do():
    model = quantized()
    weight = model.model.layers[0].mlp.up_proj.weight
    assert (weight.sensitivity == 1).all()
    calibrate(model, batches())
    rounding = weight.dequantize(level=2) - weight.dequantize(level=8)
    expected = rounding.square().mean(0).sqrt()
    expected = expected / expected.square().mean().sqrt()
    assert torch.corrcoef(torch.stack([weight.sensitivity.float(), expected]))[0, 1] > 0.6
    assert float(weight.sensitivity.float().square().mean()) == pytest.approx(1, rel=0.01)
    groups = weight.scales.float().transpose(0, 1).flatten(1)  # [K, groups]
    scale = torch.exp2((groups - 255) / 16).repeat_interleave(64, 1)[:, :160]
    by_hand = (scale * weight.row_scale.float()).square().mean(1).sqrt()
    by_hand = by_hand / by_hand.square().mean().sqrt()
    torch.testing.assert_close(weight.sensitivity.float(), by_hand, rtol=0.01, atol=0)


def test_bits_are_kept_or_set():
    model = quantized(bits=2.5)
    calibrate(model, batches())
    assert summary(model).bits == pytest.approx(2.5, abs=1e-3)
    calibrate(model, batches(), bits=4)
    assert summary(model).bits == pytest.approx(4, abs=1e-3)
    assert next(iter(summary(model).heads.values())) == pytest.approx(6, abs=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_first_positions_do_not_count(side):
    model = quantized()
    ids = batches(count=1)[0]
    calibrate(model, ids)
    expected = curves(model)
    amount = (40, 0) if side == "left" else (0, 40)
    mask = torch.nn.functional.pad(torch.ones_like(ids), amount)
    padded = torch.nn.functional.pad(ids, amount, value=7)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    batch = {"input_ids": padded, "attention_mask": mask, "position_ids": positions}
    calibrate(model, batch)
    for name, curve in curves(model).items():
        assert torch.allclose(curve, expected[name], atol=1e-3), name


def test_flattened_inputs_count_alike():
    class Flat(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(320, 64)
            self.one, self.other = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)
            self.other.load_state_dict(self.one.state_dict())

        def forward(self, input_ids, **options):
            x = self.embedding(input_ids)
            x[:, 0] *= 5000  # as massive activations of first positions
            return self.one(x) + self.other(x.flatten(0, 1)).view(x.shape)

    model = Flat()
    quantize_(model, GrinqhConfig(bits=3))
    with torch.no_grad():
        calibrate(model, batches())
    assert torch.equal(model.one.weight.curve, model.other.weight.curve)


def test_layers_with_one_weight_are_counted_together():
    model = quantized()
    first, second = (model.model.layers[i].mlp.down_proj for i in (0, 1))
    second.weight = first.weight
    calibrate(model, batches())
    both = first.weight.curve[0]
    model.model.layers[1].mlp.down_proj.weight = copy.deepcopy(first.weight)
    calibrate(model, batches())
    averages = [layer.mlp.down_proj.weight.curve[0] for layer in model.model.layers]
    assert min(averages) <= both <= max(averages)


def test_batches_add_up():
    model = quantized()
    rows = batches(count=3)
    calibrate(model, rows, relative=1, importance=False)
    expected = curves(model)
    again = (row for row in [torch.cat(rows)])
    calibrate(model, again, relative=1, importance=False)
    for name, curve in curves(model).items():
        assert torch.allclose(curve, expected[name], atol=1e-3), name


class Tokenizer:
    def __call__(self, text):
        return {"input_ids": [ord(c) % 320 for c in text]}


def test_texts():
    text = "".join(chr(97 + i * i % 26) for i in range(900))
    found = token_batches([text[:300], text[300:]], Tokenizer(), tokens=700)
    assert [batch.shape for batch in found] == [(1, 512), (1, 188)]
    model = quantized()
    calibrate(model, [text[:300], text[300:]], tokenizer=Tokenizer(), tokens=700)
    expected = curves(model)
    calibrate(model, found)
    assert all(torch.equal(curve, expected[name]) for name, curve in curves(model).items())
    calibrate(model, text, tokenizer=Tokenizer())


def test_through_the_config(family):
    model, same = tiny_model(family, tied=False), tiny_model(family, tied=False)
    quantize_(model, GrinqhConfig(bits=2.5, calibration=batches()))
    quantize_(same, GrinqhConfig(bits=2.5))
    calibrate(same, batches())
    for (_, _, one), (_, _, other) in zip(
        quantized_linears(model), quantized_linears(same), strict=True
    ):
        assert torch.equal(one.thresholds, other.thresholds)
        assert torch.equal(one.curve, other.curve)


@pytest.mark.parametrize("bad", ["some text", 5, [], torch.zeros(1, 40).long(), [[1, 2]]])
def test_bad_data_in_the_config_is_refused_at_once(bad):
    with pytest.raises((ValueError, TypeError), match="calibration"):
        GrinqhConfig(calibration=bad)


def test_a_single_layer_cannot_be_calibrated():
    layer = torch.nn.Linear(64, 64)
    with pytest.raises(ValueError, match="call calibrate"):
        quantize_(layer, GrinqhConfig(calibration=batches()))
    assert type(layer.weight) is torch.nn.Parameter


def test_the_config_is_still_a_torchao_config():
    from torchao.core.config import config_to_dict

    config = GrinqhConfig(bits=2.5, calibration=batches())
    assert config == GrinqhConfig(bits=2.5)
    assert config_to_dict(config) == config_to_dict(GrinqhConfig(bits=2.5))


def test_tied_weights_and_state_dicts(tmp_path):
    model = quantized(tied=True)
    calibrate(model, batches(), bits=3)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = tiny_model("llama", tied=True)
    other.load_state_dict(torch.load(tmp_path / "model.pt"), assign=True)
    other.tie_weights()
    ids = batches(seed=1, count=1)[0]
    set_bits(model, 2.2)
    set_bits(other, 2.2)
    with torch.no_grad(), decode_every_row(4):
        assert torch.equal(model(ids).logits, other(ids).logits)


def test_moves_and_copies_keep_the_curve():
    model = quantized()
    calibrate(model, batches())
    moved = copy.deepcopy(model).to(torch.bfloat16)
    expected = curves(model)
    assert all(torch.equal(curve, expected[name]) for name, curve in curves(moved).items())
    assert all(curve.dtype == torch.float32 for curve in curves(moved).values())


def test_generation_and_compilation():
    model = quantized()
    calibrate(model, batches(), bits=2)
    ids = batches(count=1)[0][:, :20]
    eager = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    model.compile(fullgraph=True, backend="eager")  # what Inductor makes of it: test_generation.py
    found = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(found, eager)


def test_the_model_is_left_as_it_was():
    model = quantized()
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    calibrate(model, batches())
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": batches(), "bits": 9}, "bits of model.layers.0.self_attn.q_proj=9"),
        ({"data": batches(), "relative": 1.5}, "relative=1.5"),
        ({"data": batches(), "relative": "half"}, "relative='half'"),
        ({"data": batches(), "relative": True}, "relative=True"),
        ({"data": "some text"}, "tokenizer=None"),
        ({"data": ["some", "text"]}, "tokenizer=None"),
        ({"data": []}, "data is empty"),
        ({"data": batches(length=16)}, "nothing to count"),
        ({"data": "too short", "tokenizer": Tokenizer()}, "nothing to count"),
        ({"data": "text", "tokenizer": Tokenizer(), "tokens": 16}, "tokens=16"),
        ({"data": None}, "data is a NoneType"),
        ({"data": torch.arange(40)}, r"data has a batch of shape \(40,\)"),
        ({"data": {"ids": torch.zeros(1, 40)}}, "data has a batch of dict"),
        ({"data": (text for text in ["some", "text"])}, "data has a batch of str"),
    ],
)
def test_errors_leave_everything(arguments, message):
    model = quantized()
    before = {n: w.thresholds.clone() for n, _, w in quantized_linears(model)}
    with pytest.raises((ValueError, TypeError), match=message):
        calibrate(model, **arguments)
    assert all(curve is None for curve in curves(model).values())
    assert all(torch.equal(w.thresholds, before[n]) for n, _, w in quantized_linears(model))


def test_weights_without_data():
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj: is on the meta device"):
        calibrate(quantized().to("meta"), batches())


def test_a_failing_batch_leaves_everything():
    model = quantized()
    with pytest.raises(IndexError):
        calibrate(model, itertools.chain(batches(), [torch.full((1, 40), 10_000)]))
    assert all(curve is None for curve in curves(model).values())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_dense_models_are_refused():
    with pytest.raises(ValueError, match="no layer is quantized"):
        calibrate(tiny_model("llama", tied=False), batches())


def test_layers_that_saw_nothing_are_named(caplog):
    model = quantized()
    model.extra = copy.deepcopy(model.lm_head)
    calibrate(model, batches())
    assert "extra" in caplog.text
    assert model.extra.weight.curve is None


def test_it_is_public():
    assert grinqh_ao.calibrate is calibrate


WORDS = " ".join(f"w{i}" for i in range(300))


@pytest.mark.parametrize("stored_bits", [None, 5.0])
def test_default_devices_and_dtypes_do_not_matter(stored_bits):
    expected, model, other = (quantized("llama") for _ in range(3))
    calibrate(expected, batches(seed=0), stored_bits=stored_bits)
    data, tokenizer = batches(seed=0), tiny_tokenizer(WORDS)
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("meta"):
            calibrate(model, data, stored_bits=stored_bits)
            calibrate(other, WORDS, tokenizer=tokenizer)
    finally:
        torch.set_default_dtype(torch.float32)
    found, wanted = curves(model), curves(expected)
    assert all(torch.equal(curve, wanted[name]) for name, curve in found.items())


def test_tokens_in_lists_are_named():
    with pytest.raises(TypeError, match=r"input_ids in a list .*return_tensors='pt'"):
        calibrate(quantized("llama"), {"input_ids": [[1, 2, 3]]})


@pytest.mark.parametrize("tokens", [0, -5, 16, "x"])
def test_too_few_tokens(tokens):
    with pytest.raises(ValueError, match=f"tokens={tokens!r}: expected a whole number above 16"):
        token_batches(["w1 w2"], tiny_tokenizer("w1 w2"), tokens)
