"""Guarded models that are compiled, by whomever, are guarded still."""

import copy
import gc
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate.utils import compile_regions
from torch import nn
from torchao.quantization import quantize_
from transformers import CompileConfig

from grinqh_ao import GrinqhConfig, guard_steps
from models import tiny_model


@pytest.fixture
def model():
    layers = nn.Sequential(*(nn.Linear(64, 64) for _ in range(2)))
    quantize_(layers, GrinqhConfig(bits=3))
    return layers


@pytest.mark.parametrize("compiled_first", [True, False])
def test_guarded_models_compile(model, compiled_first, monkeypatch):
    expected = copy.deepcopy(model)
    if compiled_first:
        called = torch.compile(model, fullgraph=True)
        guard_steps(called)
    else:
        guard_steps(model)
        called = torch.compile(model, fullgraph=True)
    x = torch.randn(1, 64)
    with torch.no_grad():
        torch.testing.assert_close(called(x), expected(x))
        if compiled_first:
            entered = []
            monkeypatch.setattr(called._grinqh_gate, "enter", lambda _: entered.append(1))
            monkeypatch.setattr(called._grinqh_gate, "leave", lambda: entered.append(2))
            called(x)
            assert entered == [1, 2]


def waits_for_changes(step, gate):
    with ThreadPoolExecutor(1) as pool:
        with gate.change():
            running = pool.submit(step)
            deadline = time.monotonic() + 60
            while not (gate._steps_waiting or running.done()) and time.monotonic() < deadline:
                time.sleep(0.001)
            assert gate._steps_waiting or running.done()
            waited = not running.done()
        running.result(60)
    return waited


@pytest.mark.parametrize("compiled_first", [True, False])
def test_models_that_compile_themselves_are_guarded(model, compiled_first):
    x = torch.randn(1, 64)
    for make in [guard_steps, lambda m: m.compile(backend="eager")][:: -1 if compiled_first else 1]:
        make(model)
    model(x)  # compiled
    assert waits_for_changes(lambda: model(x), model._grinqh_gate)
    other = copy.deepcopy(model)
    other.compile(backend="eager")
    assert waits_for_changes(lambda: other(x), other._grinqh_gate)


def test_guarded_models_are_freed_as_others(model):
    other = copy.deepcopy(model)
    guard_steps(other)
    gone = weakref.ref(other)
    gc.disable()
    try:
        del other
        assert gone() is None
    finally:
        gc.enable()


def test_regions_of_a_guarded_model_are_compiled_in_a_copy():
    """By accelerate, whose copies share modules."""
    model = tiny_model("llama", tied=False)
    quantize_(model, GrinqhConfig(bits=3))
    guard_steps(model)
    regions = compile_regions(model, backend="eager")
    regions.compile(backend="eager")
    assert regions._compiled_call_impl is not None
    assert model._compiled_call_impl is None


def test_what_generate_compiles_is_guarded():
    model = tiny_model("llama", tied=False)
    quantize_(model, GrinqhConfig(bits=3))
    guard_steps(model)
    call = model.get_compiled_call(CompileConfig(backend="eager", mode=None))
    call(input_ids=torch.ones(1, 1, dtype=torch.long))  # compiled
    step = lambda: call(input_ids=torch.ones(1, 1, dtype=torch.long))  # noqa: E731
    assert waits_for_changes(step, model._grinqh_gate)


def test_both_a_model_and_what_it_was_compiled_to_can_be_guarded(model):
    x = torch.randn(1, 64)
    guard_steps(model)
    compiled = torch.compile(model, backend="eager")
    guard_steps(compiled)
    compiled(x)
    for called in (compiled, model):
        assert waits_for_changes(lambda called=called: called(x), model._grinqh_gate)
