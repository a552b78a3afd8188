"""Filters and names: which layers a ``quantize_`` call selects."""

import dataclasses
import itertools
import logging

import pytest
import torch
from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, quantize_, transform_module

from grinqh_ao import GrinqhConfig, GrinqhTensor
from grinqh_ao.model import quantized_linears
from grinqh_ao.selection import _config_for
from models import assert_unchanged, layers_of, snapshot, tiny_model, two_layers


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


def test_does_the_work_for_each_call_anew():
    model = two_layers()
    quantize_(model, GrinqhConfig(bits=3), filter_fn=lambda module, name: name == "1")
    assert layers_of(model) == {"1"}
    quantize_(model, GrinqhConfig(bits=4))
    assert layers_of(model) == {"0", "1"}
    assert [round(weight.bits) for _, _, weight in quantized_linears(model)] == [4, 3]


def test_a_filter_is_told_the_names_that_torchao_tells_it(family):
    def told_by(config: AOBaseConfig) -> set[str]:
        names = set()

        def last(module: nn.Module, name: str) -> bool:
            names.add(name)
            return name == "model.layers.1.mlp.down_proj"

        quantize_(tiny_model(family, tied=False), config, filter_fn=last)
        return names

    names = told_by(GrinqhConfig(bits=3))
    assert names == told_by(Int8WeightOnlyConfig())
    assert names > {"", "model.layers.0.mlp", "model.layers.1.mlp.down_proj", "lm_head"}


def test_layers_deep_in_a_model_are_named_in_errors():
    model = nn.ModuleDict({"block": nn.ModuleDict({"inner": nn.Linear(8, 8)})})
    with torch.no_grad():
        model["block"]["inner"].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"^block\.inner: its weight has NaN"):
        quantize_(model, GrinqhConfig(bits=3))


def test_a_filter_with_a_memory():
    model = two_layers()
    seen: set[str] = set()

    def only_once(module: nn.Module, name: str) -> bool:
        new = isinstance(module, nn.Linear) and name not in seen
        seen.add(name)
        return new

    quantize_(model, GrinqhConfig(bits=3), filter_fn=only_once)
    assert layers_of(model) == {"0", "1"}


def test_a_name_that_is_no_linear_weight_is_reported(log):
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "e": nn.Embedding(8, 8)})
    names = {"e": GrinqhConfig(), "a.bias": GrinqhConfig(), r"re:a\.weight": GrinqhConfig()}
    quantize_(model, FqnToConfig(names), filter_fn=None)
    lines = [r.message for r in log.records if r.levelno == logging.WARNING]
    assert [line.split()[0] for line in lines] == ["a.bias", "e.weight"]
    assert layers_of(model) == {"a"}


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


def test_a_filter_that_selects_no_linear_layer():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    before = snapshot(model)
    with pytest.raises(TypeError, match="the model: filter_fn selected a Sequential"):
        quantize_(model, GrinqhConfig(bits=3), filter_fn=lambda module, name: True)
    with pytest.raises(TypeError, match="1: filter_fn selected a LayerNorm"):
        quantize_(model, GrinqhConfig(bits=3), filter_fn=lambda module, name: name in ("0", "1"))
    assert_unchanged(model, before)
