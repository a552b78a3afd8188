"""The pass over calibration data: gradients that say how much a layer's errors matter."""

import copy

import pytest
import torch
from test_calibration import batches, curves, quantized
from torchao.quantization import quantize_

from grinqh_ao import GrinqhConfig, calibrate, decode_every_row, measure, set_bits
from grinqh_ao.compact import ChannelUse
from grinqh_ao.model import quantized_linears
from grinqh_ao.observing import Observer, observe
from grinqh_ao.tails import Histogram
from models import tiny_model


class Branches(torch.nn.Module):
    """Two layers whose outputs count differently in the logits."""

    def __init__(self, quiet: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(320, 128)
        self.loud, self.soft = (torch.nn.Linear(128, 320, bias=False) for _ in range(2))
        self.quiet = quiet

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)
        return self.loud(x) + self.quiet * self.soft(x)


def observed(model, rows, gradients=True, use=False):
    layers = list(quantized_linears(model))
    observers = {
        weight: Observer(weight, Histogram(0.25), ChannelUse(weight.shape[1], 3) if use else None)
        for _, _, weight in layers
    }
    observe(model, rows, layers, observers, gradients)
    return {name: observers[weight] for name, _, weight in layers}


def test_importance_is_the_mean_gradient_energy_in_units_of_the_scales():
    """Against autograd on the logits themselves, where they are a layer's output."""
    model = Branches(quiet=0.5)
    quantize_(model, GrinqhConfig(bits=3))
    found = observed(model, batches(count=8, length=256))
    assert found["soft"].importance == pytest.approx(0.25 * found["loud"].importance, rel=0.1)
    weight = model.loud.weight
    ids = torch.cat(batches(count=8, length=256))[:, 16:]
    with torch.no_grad():
        p = model(ids).softmax(-1).flatten(0, 1)
    expected = p * (1 - p)  # of a token drawn from p: E (p - one-hot)^2
    steps = torch.exp2((weight.scales.double() - 255) / 16).square().mean(1).flatten()
    variance = steps.repeat_interleave(64)[:320] * weight.row_scale.double() ** 2
    energy = float((expected.double() @ variance).mean()) / 320
    assert found["loud"].importance == pytest.approx(energy, rel=0.05)


def test_layers_whose_errors_matter_less_read_less():
    model = Branches(quiet=0.5)
    quantize_(model, GrinqhConfig(bits=3))
    calibrate(model, batches(count=8, length=256))
    loud, soft = (curves(model)[name] for name in ("loud", "soft"))
    assert torch.equal(loud[2:], soft[2:])
    assert float(soft[0] / loud[0]) == pytest.approx(2, rel=0.1)
    with torch.no_grad(), measure(model) as read, decode_every_row(16):
        model(torch.cat(batches(seed=1, length=256)))
    assert read.layers["soft"].bits < read.layers["loud"].bits - 0.8
    assert read.total.bits == pytest.approx(3, abs=0.05)


def test_no_layer_is_starved():
    model = Branches(quiet=1e-6)
    quantize_(model, GrinqhConfig(bits=3))
    calibrate(model, batches())
    loud, soft = (curves(model)[name] for name in ("loud", "soft"))
    assert float(soft[0] / loud[0]) <= 16.1
    silent = Branches(quiet=0.0)
    quantize_(silent, GrinqhConfig(bits=3))
    calibrate(silent, batches())  # no gradient at all: nothing is known of that layer


def test_padding_costs_nothing():
    model = quantized()
    ids = batches(count=1)[0]
    expected = observed(model, [ids], use=True)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 40))
    padded = torch.nn.functional.pad(ids, (0, 40), value=7)
    found = observed(model, [{"input_ids": padded, "attention_mask": mask}], use=True)
    for name, observer in found.items():
        assert observer.tokens == expected[name].tokens
        kept = expected[name].use.kept(5)
        assert torch.equal(observer.use.kept(5), kept)
        assert observer.importance == pytest.approx(expected[name].importance, rel=1e-3)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_parameters_are_left_alone(mode):
    model = tiny_model("llama", tied=False)
    quantize_(model, GrinqhConfig())
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    assert any(wanted.values())
    with mode():
        calibrate(model, batches(count=2))
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == wanted[name]
        assert parameter.grad is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_equal_data_gives_equal_curves():
    model = quantized()
    other = copy.deepcopy(model)
    calibrate(model, batches())
    torch.rand(5)  # moves the global generator on
    calibrate(other, batches())
    expected = curves(other)
    assert all(torch.equal(curve, expected[name]) for name, curve in curves(model).items())


def test_a_model_without_logits_is_told_what_to_do():
    model = quantized().model
    with pytest.raises(ValueError, match=r"importance=True: .*importance=False"):
        calibrate(model, batches())
    assert all(curve is None for curve in curves(model).values())
    calibrate(model, batches(), importance=False)
    set_bits(model, 2)


def test_a_model_without_gradients_is_told_what_to_do():
    class Detached(Branches):
        @torch.no_grad()
        def forward(self, input_ids):
            return super().forward(input_ids)

    model = Detached(quiet=0.5)
    quantize_(model, GrinqhConfig(bits=3))
    with torch.inference_mode():
        made_there = Branches(quiet=0.5)
        quantize_(made_there, GrinqhConfig(bits=3))
    for refused in (model, made_there):
        wanted = [p.requires_grad for p in refused.parameters()]
        with pytest.raises(ValueError, match=r"importance=True: .*importance=False"):
            calibrate(refused, batches())
        assert [p.requires_grad for p in refused.parameters()] == wanted
        calibrate(refused, batches(), importance=False)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_does_not_count(value):
    model = Branches(quiet=0.5)
    quantize_(model, GrinqhConfig(bits=3))
    token = 7
    rows = [ids.masked_fill(ids == token, 8) for ids in batches(count=4, length=256)]
    expected = observed(model, rows)["loud"]
    with torch.no_grad():
        model.embedding.weight[token] = value
    spoiled = [torch.cat([ids, torch.full((1, 9), token)], dim=1) for ids in rows]
    found = observed(model, spoiled)["loud"]
    assert torch.equal(found.histogram.counts, expected.histogram.counts)
    assert found.importance == pytest.approx(expected.importance, rel=0.1)
    with pytest.raises(ValueError, match="nothing to count"):
        calibrate(model, [torch.full((1, 40), token)])


def test_gradients_that_overflow_do_not_count():
    model = Branches(quiet=0.5)
    quantize_(model, GrinqhConfig(bits=3))
    weight = model.loud.weight
    observer = Observer(weight, Histogram(0.25))
    observer.see_gradient(torch.ones(3, 320))
    before = observer.importance
    observer.see_gradient(torch.tensor([[torch.inf], [torch.nan]]).expand(2, 320))
    assert observer.importance == before
    assert observer.tokens == 3


def test_experts_that_see_some_positions_are_counted():
    class Routed(Branches):
        def forward(self, input_ids):
            x = self.embedding(input_ids)
            odd = (input_ids % 2 == 1).flatten()
            rows = x.flatten(0, 1)
            out = torch.zeros(len(rows), 320)
            out = out.index_put((odd.nonzero()[:, 0],), self.loud(rows[odd]))
            return out.index_put(((~odd).nonzero()[:, 0],), self.soft(rows[~odd])).view(
                *x.shape[:2], -1
            )

    model = Routed(quiet=1.0)
    quantize_(model, GrinqhConfig(bits=3))
    found = observed(model, batches(count=1))
    assert found["loud"].tokens + found["soft"].tokens == 128
    assert found["loud"].importance > 0
