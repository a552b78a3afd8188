"""``quantize_(model, GrinqhConfig(...))``: what is quantized, what is not, and what is refused."""

import dataclasses
import gc
import itertools
import json
import logging
import re
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchao.core.config import AOBaseConfig, config_to_dict
from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, quantize_, transform_module

import grinqh_ao
from conftest import tiny_model
from grinqh_ao import GrinqhConfig, GrinqhTensor, all_but_head, measure, set_bits, summary
from grinqh_ao.model import quantized_linears
from grinqh_ao.selection import _config_for


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="grinqh_ao")
    return caplog


def layers_of(model: nn.Module) -> set[str]:
    return {name for name, _, _ in quantized_linears(model)}


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters(remove_duplicate=False))


def assert_unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = snapshot(model)
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(40, 96), nn.Linear(96, 30))


# ---- what is quantized


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


def test_fqn_to_config(family):
    model = tiny_model(family, tied=False)
    config = FqnToConfig(
        {
            r"re:.*\.mlp\..*_proj": GrinqhConfig(bits=2),
            "model.layers.0.self_attn.q_proj": GrinqhConfig(bits=4),
            r"re:.*k_proj\.weight": GrinqhConfig(bits=5),
            "lm_head": None,
        }
    )
    quantize_(model, config, filter_fn=None)
    bits = {name: weight.bits for name, _, weight in quantized_linears(model)}
    expected = {"model.layers.0.self_attn.q_proj": 4}
    for i in range(2):
        expected[f"model.layers.{i}.self_attn.k_proj"] = 5
        for part in ("gate", "up", "down"):
            expected[f"model.layers.{i}.mlp.{part}_proj"] = 2
    assert bits == pytest.approx(expected)


def test_fqn_to_config_beside_another_config():
    model = nn.ModuleDict(
        {"a": nn.Linear(64, 64), "b": nn.Linear(64, 64), "norm": nn.LayerNorm(64)}
    )
    config = FqnToConfig({"b": Int8WeightOnlyConfig(version=2), "_default": GrinqhConfig(bits=3)})
    quantize_(model, config, filter_fn=None)
    assert isinstance(model["a"].weight, GrinqhTensor)
    assert type(model["b"].weight).__name__ == "Int8Tensor"
    assert type(model["norm"].weight) is nn.Parameter


def test_a_pattern_as_wide_as_can_be_quantizes_linear_layers_only(family):
    model = tiny_model(family, tied=False)
    quantize_(model, FqnToConfig({"re:.*": GrinqhConfig(bits=3)}), filter_fn=None)
    assert len(layers_of(model)) == 2 * 7 + 1
    model.generate(torch.zeros(1, 3, dtype=torch.int64), max_new_tokens=2, pad_token_id=0)


def test_a_bare_linear_is_a_model_too():
    linear = nn.Linear(40, 96)
    quantize_(linear, GrinqhConfig(bits=3))
    assert isinstance(linear.weight, GrinqhTensor)
    assert "grinqh: levels=(0, 2, 4, 6, 8)" in repr(linear)


def test_again_changes_nothing(family):
    model = tiny_model(family, tied=True)
    quantize_(model, GrinqhConfig(bits=3))
    before = snapshot(model)
    quantize_(model, GrinqhConfig(bits=5))
    assert_unchanged(model, before)


def test_does_the_work_for_each_call_anew():
    model = two_layers()
    quantize_(model, GrinqhConfig(bits=3), filter_fn=lambda module, name: name == "1")
    assert layers_of(model) == {"1"}
    quantize_(model, GrinqhConfig(bits=4))
    assert layers_of(model) == {"0", "1"}
    assert [round(weight.bits) for _, _, weight in quantized_linears(model)] == [4, 3]


def test_a_filter_with_a_memory():
    model = two_layers()
    seen: set[str] = set()

    def only_once(module: nn.Module, name: str) -> bool:
        new = isinstance(module, nn.Linear) and name not in seen
        seen.add(name)
        return new

    quantize_(model, GrinqhConfig(bits=3), filter_fn=only_once)
    assert layers_of(model) == {"0", "1"}


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
    before = snapshot(model)
    quantize_(model, GrinqhConfig(bits=3))
    assert layers_of(model) == {"good"}
    del before["good.weight"]
    assert all(snapshot(model)[name] is p for name, p in before.items())
    for name, reason in {
        "double": "dtype torch.float64",
        "empty": r"empty, of shape \(16, 0\)",
        "integer": "dtype torch.int8",
        "int8": "is a Int8Tensor already",
        "shared": "shares its weight with projector, a Projector",
        "normed": "not a plain parameter",
    }.items():
        lines = [r for r in log.messages if r.startswith(f"{name} is left dense")]
        assert len(lines) == 1
        assert re.search(reason, lines[0])


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


def test_a_name_that_is_no_linear_weight_is_reported(log):
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "e": nn.Embedding(8, 8)})
    names = {"e": GrinqhConfig(), "a.bias": GrinqhConfig(), r"re:a\.weight": GrinqhConfig()}
    quantize_(model, FqnToConfig(names), filter_fn=None)
    lines = [r.message for r in log.records if r.levelno == logging.WARNING]
    assert [line.split()[0] for line in lines] == ["a.bias", "e.weight"]
    assert layers_of(model) == {"a"}


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


def test_asks_the_filter_about_each_layer_a_bounded_number_of_times():
    model = nn.Sequential(*(nn.Linear(2, 2, dtype=torch.float64) for _ in range(50)))
    calls = 0

    def linear(module: nn.Module, name: str) -> bool:
        nonlocal calls
        calls += 1
        return isinstance(module, nn.Linear)

    quantize_(model, GrinqhConfig(bits=3), filter_fn=linear)
    assert calls == 2 * 51


def test_another_config_may_call_our_handler():
    @dataclasses.dataclass
    class Wrap(AOBaseConfig):
        base_config: AOBaseConfig

    handlers = transform_module._QUANTIZE_CONFIG_HANDLER

    @transform_module.register_quantize_module_handler(Wrap)
    def _(module: nn.Module, config: Wrap) -> nn.Module:
        return handlers[GrinqhConfig](module, config.base_config)

    try:
        model = two_layers()
        quantize_(model, Wrap(GrinqhConfig(bits=3)))
    finally:
        del handlers[Wrap]
    assert layers_of(model) == {"0", "1"}


def test_precedence_is_that_of_torchao():
    """Wherever TorchAO applies a config to a weight, we do; a recording config asks it."""

    @dataclasses.dataclass
    class Record(AOBaseConfig):
        name: str

    handlers = transform_module._QUANTIZE_CONFIG_HANDLER
    applied = {}

    @transform_module.register_quantize_module_handler(Record)
    def _(module: nn.Module, config: Record, *, parameter_name: str = "weight") -> nn.Module:
        if parameter_name == "weight":
            applied.setdefault(module, config.name)
        return module

    keys = ["a", "a.weight", "a.bias", "re:a", r"re:a\.bias", r"re:a\.w.*", "_default"]
    try:
        for used in itertools.chain.from_iterable(
            itertools.combinations(keys, size) for size in (1, 2, 3)
        ):
            for none in (None, *used):
                model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
                table = {key: None if key == none else Record(key) for key in used}
                applied.clear()
                quantize_(model, FqnToConfig(dict(table)), filter_fn=None)
                for name, module in model.items():
                    found = _config_for(module, name, FqnToConfig(dict(table)).fqn_to_config)
                    assert (found and found.name) == applied.get(module), (name, table)
    finally:
        del handlers[Record]


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


def test_a_filter_that_selects_no_linear_layer():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    before = snapshot(model)
    with pytest.raises(TypeError, match="the model: filter_fn selected a Sequential"):
        quantize_(model, GrinqhConfig(bits=3), filter_fn=lambda module, name: True)
    with pytest.raises(TypeError, match="1: filter_fn selected a LayerNorm"):
        quantize_(model, GrinqhConfig(bits=3), filter_fn=lambda module, name: name in ("0", "1"))
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


def test_public_names_exist():
    assert all(hasattr(grinqh_ao, name) for name in grinqh_ao.__all__)


def test_results_are_those_of_the_layers_themselves():
    model = two_layers().requires_grad_(False)
    expected = [GrinqhTensor.from_hp(layer.weight, 3) for layer in model]
    quantize_(model, GrinqhConfig(bits=3))
    x = torch.randn(1, 40)
    y = F.linear(F.linear(x, expected[0], model[0].bias), expected[1], model[1].bias)
    assert torch.equal(model(x), y)
