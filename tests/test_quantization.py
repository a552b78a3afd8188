"""``quantize_(model, GrinqhConfig(...))``: what is quantized, what is not, what is refused."""

import gc
import json
import logging
import re
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import nn
from torchao.core.config import config_to_dict
from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, quantize_

import grinqh_ao
from grinqh_ao import GrinqhConfig, GrinqhTensor, measure, set_bits, summary
from grinqh_ao.model import quantized_linears
from models import (
    assert_unchanged,
    interrupted,
    layers_of,
    snapshot,
    tiny_model,
    two_layers,
)


def quantized(model: nn.Module) -> dict[str, GrinqhTensor]:
    return {name: weight for name, _, weight in quantized_linears(model)}


# ---- what is quantized


def test_a_bare_linear_is_a_model_too():
    linear = nn.Linear(40, 96)
    quantize_(linear, GrinqhConfig(bits=3))
    assert isinstance(linear.weight, GrinqhTensor)
    assert "grinqh: levels=(0, 2, 4, 6, 8)" in repr(linear)


def test_again_changes_nothing_and_says_so(family, log):
    model = tiny_model(family, tied=True)
    quantize_(model, GrinqhConfig(bits=3))
    before, codes = snapshot(model), {n: p.bits for n, p in quantized(model).items()}
    log.clear()
    quantize_(model, GrinqhConfig(bits=5))
    assert_unchanged(model, before)
    assert {n: p.bits for n, p in quantized(model).items()} == codes
    (line,) = log.messages
    assert line.startswith("quantize_ changed nothing: 15 layers it selected are quantized already")


def test_what_is_quantized_is_calibrated_when_asked_for(log):
    model = tiny_model("llama", tied=False)
    quantize_(model, GrinqhConfig(bits=3), filter_fn=lambda _, name: name.endswith("q_proj"))
    log.clear()
    quantize_(model, GrinqhConfig(bits=4, calibration=[torch.randint(0, 320, (4, 64))]))
    curves = {name: weight.curve for name, weight in quantized(model).items()}
    assert len(curves) == 15
    assert all(curve is not None for curve in curves.values())
    assert model.model.layers[0].self_attn.q_proj.weight.bits == pytest.approx(3, abs=1e-3)
    assert "changed nothing" not in log.text
    quantize_(model, GrinqhConfig(bits=4, calibration=[torch.randint(0, 320, (4, 64))]))
    assert all(weight.curve is curves[name] for name, weight in quantized(model).items())
    assert "changed nothing" in log.text


def test_going_on_where_calibration_failed(tmp_path):
    model = tiny_model("llama", tied=False)
    few, enough = torch.randint(0, 320, (1, 10)), torch.randint(0, 320, (4, 64))
    with pytest.raises(ValueError, match="nothing to count") as caught:
        quantize_(model, GrinqhConfig(bits=3, calibration=[few]))
    assert "15 layers are quantized, but not calibrated" in caught.value.__notes__[0]
    model.save_pretrained(tmp_path)
    quantize_(model, GrinqhConfig(bits=3, calibration=[enough]))
    assert all(weight.curve is not None for weight in quantized(model).values())


def test_going_on_where_quantizing_was_interrupted(tmp_path):
    model = tiny_model("llama", tied=False)
    config = GrinqhConfig(bits=3, calibration=[torch.randint(0, 320, (4, 64))])
    with interrupted(GrinqhTensor, "from_hp", call=6):
        quantize_(model, config)
    assert len(quantized(model)) == 5
    model.save_pretrained(tmp_path)
    quantize_(model, config)
    assert len(quantized(model)) == 15
    assert all(weight.curve is not None for weight in quantized(model).values())


def test_a_layer_under_two_parents_is_calibrated():
    class Block(nn.Module):
        def __init__(self, shared: nn.Linear) -> None:
            super().__init__()
            self.own, self.shared = nn.Linear(64, 64), shared

        def forward(self, x):
            return x + self.shared(self.own(x))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, shared = nn.Embedding(320, 64), nn.Linear(64, 64)
            self.blocks = nn.ModuleList([Block(shared), Block(shared)])
            self.head = nn.Linear(64, 320)

        def forward(self, input_ids, **_):
            x = self.embedding(input_ids)
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    model = Model()
    quantize_(model, GrinqhConfig(bits=3, calibration=[torch.randint(0, 320, (4, 64))]))
    assert set(quantized(model)) == {"blocks.0.own", "blocks.0.shared", "blocks.1.own", "head"}
    assert all(weight.curve is not None for weight in quantized(model).values())


def test_device_argument(monkeypatch):
    """Weights go to the device before they are quantized: that is what it is for."""
    model, asked = two_layers(), []

    def to(tensor, *arguments):
        asked.append(arguments[0])
        return original(tensor, *arguments)

    original = torch.Tensor.to
    with monkeypatch.context() as patch:
        patch.setattr(nn.Parameter, "to", to, raising=False)
        quantize_(model, GrinqhConfig(bits=3), device="cpu")
    assert asked.count("cpu") == 2  # TorchAO's own calls say torch.device("cpu")
    assert layers_of(model) == {"0", "1"}


def test_lets_go_of_each_dense_weight_before_the_next(monkeypatch):
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)))
    dense = [weakref.ref(layer.weight) for layer in model]
    alive = []

    def from_hp(weight, *arguments):
        alive.append(sum(reference() is not None for reference in dense))
        return original(weight, *arguments)

    original = GrinqhTensor.from_hp
    monkeypatch.setattr(GrinqhTensor, "from_hp", from_hp)
    quantize_(model, GrinqhConfig(bits=3))
    assert alive == [4, 3, 2, 1]
    assert not any(reference() is not None for reference in dense)


def test_a_quantized_model_is_freed_without_the_garbage_collector():
    model = two_layers()
    quantize_(model, GrinqhConfig(bits=3))
    with measure(model) as measured:
        model(torch.randn(1, 40).requires_grad_(False))
    weight = weakref.ref(model[0].weight)
    gc.disable()
    try:
        del model
        assert weight() is None
    finally:
        gc.enable()
    del measured


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_keeps_the_dtype_of_the_model(dtype):
    model = two_layers().to(dtype)
    quantize_(model, GrinqhConfig(bits=3))
    assert model[0].weight.dtype == dtype
    for rows in (1, 3):
        assert model(torch.randn(rows, 40, dtype=dtype)).dtype == dtype


# ---- what is left dense, with one log line


def test_what_cannot_be_quantized_is_left_dense(log):
    class Projector(nn.Module):
        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.kernel = weight

    model = nn.Module()
    model.good = nn.Linear(8, 16)
    model.double = nn.Linear(8, 16, dtype=torch.float64)
    model.empty = nn.Linear(0, 16)
    model.integer = nn.Linear(8, 16)
    model.integer.weight = nn.Parameter(torch.ones(16, 8, dtype=torch.int8), requires_grad=False)
    model.int8 = nn.Linear(8, 16)
    quantize_(model.int8, Int8WeightOnlyConfig(version=2))
    model.shared = nn.Linear(8, 16)
    model.projector = Projector(model.shared.weight)
    model.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 16))
    model.hooked = nn.utils.spectral_norm(nn.Linear(8, 16))
    model.pruned = nn.Linear(8, 16)
    nn.utils.prune.l1_unstructured(model.pruned, "weight", 0.3)
    before = snapshot(model)
    quantize_(model, GrinqhConfig(bits=3))
    assert layers_of(model) == {"good"}
    for layer in (model.hooked, model.pruned):
        layer(torch.randn(1, 8))
    del before["good.weight"]
    assert all(snapshot(model)[name] is p for name, p in before.items())
    for name, reason in {
        "double": "dtype torch.float64, expected one of",
        "empty": r"empty, of shape \(16, 0\)",
        "integer": "dtype torch.int8",
        "int8": "is a Int8Tensor already",
        "shared": "shares its weight with projector, a Projector",
    }.items():
        lines = [r for r in log.messages if r.startswith(f"{name} is left dense")]
        assert len(lines) == 1
        assert re.search(reason, lines[0])
    alike = [r for r in log.messages if r.startswith("3 layers are left dense")]
    assert len(alike) == 1
    assert alike[0].endswith("not a plain parameter (normed, hooked, pruned)")


def test_many_layers_left_dense_take_one_line(log):
    model = nn.Sequential(*(nn.Linear(4, 4, dtype=torch.float64) for _ in range(9)))
    quantize_(model, GrinqhConfig(bits=3))
    lines = [line for line in log.messages if "left dense: its weight" in line]
    assert len(lines) == 1
    assert lines[0].startswith("9 layers")
    assert lines[0].endswith("(0, 1, 2, 3, ...)")


def test_matrices_outside_of_linear_layers_are_named(log):
    import transformers

    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 2}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config)
    quantize_(model, GrinqhConfig(bits=3))
    warnings = [r.message for r in log.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "left dense: 4 in Conv1D: transformer.h.0.attn.c_attn, " in warnings[0]
    stored = summary(model)
    assert stored.weights == 64 * 32
    assert stored.all_weights == sum(p.numel() for p in model.parameters() if p.dim() == 2)


# ---- bad input: a clear error, and nothing is changed


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite(value):
    model = two_layers()
    with torch.no_grad():
        model[1].weight[3, 5] = value
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^1: its weight has NaN or infinite values; nothing was"):
        quantize_(model, GrinqhConfig(bits=3))
    assert_unchanged(model, before)
    config = FqnToConfig({"re:.*": GrinqhConfig(bits=3)})
    with pytest.raises(ValueError, match=r"^1: its weight"):
        quantize_(model, config, filter_fn=None)
    assert_unchanged(model, before)
    quantize_(model, GrinqhConfig(bits=3), filter_fn=lambda module, name: name == "0")
    assert layers_of(model) == {"0"}


def test_a_weight_beyond_what_scales_express():
    model = two_layers()
    with torch.no_grad():
        model[1].weight[0, 0] = -2e30
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^1: its weight has values beyond 1\.3e\+30"):
        quantize_(model, GrinqhConfig(bits=3))
    assert_unchanged(model, before)


def test_a_failure_on_the_way_says_how_far_it_got(monkeypatch):
    model, failing = two_layers(), {"on"}

    def from_hp(weight, *arguments):
        if weight.shape[0] == 30 and failing:
            raise torch.OutOfMemoryError("no memory")
        return original(weight, *arguments)

    original = GrinqhTensor.from_hp
    monkeypatch.setattr(GrinqhTensor, "from_hp", from_hp)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        quantize_(model, GrinqhConfig(bits=3))
    assert "while quantizing 1; 1 of 2 layers are quantized" in caught.value.__notes__[0]
    assert layers_of(model) == {"0"}
    failing.clear()
    quantize_(model, GrinqhConfig(bits=3))
    assert layers_of(model) == {"0", "1"}


def test_meta_device():
    with torch.device("meta"):
        model = two_layers()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^0: its weight is on the meta device"):
        quantize_(model, GrinqhConfig(bits=3))
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 0}, "bits=0: expected a number above 0 and at most 8"),
        ({"bits": 8.1}, r"bits=8\.1"),
        ({"bits": float("nan")}, "bits=nan"),
        ({"bits": "3"}, "bits='3'"),
        ({"bits": 5, "levels": (0, 2, 4)}, r"at most 4, the average that levels \(0, 2, 4\)"),
        ({"levels": (0, 3)}, r"levels=\(0, 3\)"),
        ({"levels": 8}, "levels=8"),
        ({"head_bits": 9}, "head_bits=9"),
        ({"head_bits": -1}, "head_bits=-1"),
    ],
)
def test_config_is_checked_when_it_is_built(arguments, message):
    with pytest.raises(ValueError, match=message):
        GrinqhConfig(**arguments)


def test_torchao_can_write_a_config_as_json():
    config = GrinqhConfig(bits=2.5, levels=(0, 2, 4, 8), head_bits=None)
    as_json = json.loads(json.dumps(config_to_dict(config)))
    assert as_json["_data"] == {"bits": 2.5, "levels": [0, 2, 4, 8], "head_bits": None}
    assert GrinqhConfig(**as_json["_data"]) == config


def test_numbers_of_numpy():
    config = GrinqhConfig(bits=np.float32(2.5), head_bits=np.int64(7))
    assert json.loads(json.dumps(config_to_dict(config)))["_data"]["head_bits"] == 7
    model = two_layers()
    quantize_(model, config)
    for bits in np.arange(2, 5):
        set_bits(model, bits)
        assert summary(model).bits == pytest.approx(bits)


def test_config_is_checked_again_when_it_is_used():
    model, config = two_layers(), GrinqhConfig()
    config.levels.append(16)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"levels=\[0, 2, 4, 6, 8, 16\]"):
        quantize_(model, config)
    assert_unchanged(model, before)


def test_set_bits_needs_something_quantized():
    with pytest.raises(ValueError, match="model=Sequential: no layer is quantized"):
        set_bits(two_layers(), 3)


def test_set_bits_checks_every_layer_before_it_changes_one():
    model = two_layers()
    config = FqnToConfig({"0": GrinqhConfig(), "1": GrinqhConfig(levels=(0, 2, 4))})
    quantize_(model, config, filter_fn=None)
    with pytest.raises(ValueError, match=r"bits of 1=6: expected a number above 0 and at most 4"):
        set_bits(model, 6)
    assert [round(weight.bits) for _, _, weight in quantized_linears(model)] == [3, 3]


def test_summary_of_a_dense_model():
    text = str(summary(two_layers()))
    assert "0.0M of 0.0M weights quantized, in 0 modules" in text
    assert "left dense: 2 in Linear: 0, 1" in text
    assert "bits" not in text


def test_summary_knows_other_quantizers_and_lazy_layers(log):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.LazyLinear(8))
    quantize_(model[0], Int8WeightOnlyConfig(version=2))
    quantize_(model, GrinqhConfig(bits=3))
    assert layers_of(model) == {"1"}
    assert "2 is left dense: its weight is not initialized yet" in log.text
    found = summary(model)
    assert found.otherwise == {"0": "Int8Tensor"}
    assert found.dense == {}
    assert "quantized otherwise: 1 in Int8Tensor: 0" in str(found)
    assert 64 * 64 < found.stored_bytes < 4 * 64 * 64


def test_public_names_exist():
    assert all(hasattr(grinqh_ao, name) for name in grinqh_ao.__all__)


def test_results_are_those_of_the_layers_themselves():
    model = two_layers().requires_grad_(False)
    expected = [GrinqhTensor.from_hp(layer.weight, 3) for layer in model]
    quantize_(model, GrinqhConfig(bits=3))
    x = torch.randn(1, 40)
    y = F.linear(F.linear(x, expected[0], model[0].bias), expected[1], model[1].bias)
    assert torch.equal(model(x), y)
