"""Several threads on one model."""

import copy
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torchao.quantization import quantize_

import grinqh_ao
from grinqh_ao import GrinqhConfig, GrinqhTensor, guard_steps, measure, set_bits
from grinqh_ao.eager import eagerly
from grinqh_ao.model import quantized_linears
from grinqh_ao.ops.cpu import build
from models import tiny_model


@pytest.fixture
def model():
    layers = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
    quantize_(layers, GrinqhConfig(bits=3))
    return layers


def in_threads(functions):
    with ThreadPoolExecutor(len(functions)) as pool:
        return [done.result() for done in [pool.submit(f) for f in functions]]


def test_generation(family):
    model = tiny_model(family, tied=False)
    quantize_(model, GrinqhConfig(bits=3))
    grinqh_ao.fuse_projections(model)  # results that wait for each other, too
    prompts = [torch.arange(i, i + 6)[None] for i in range(0, 240, 40)]

    def generate(prompt):
        return model.generate(
            prompt, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0
        )

    alone = [generate(prompt) for prompt in prompts]
    together = in_threads([lambda p=prompt: generate(p) for prompt in prompts])
    assert all(torch.equal(a, t) for a, t in zip(alone, together, strict=True))


def steps_while_bits_change(called, layers, monkeypatch, steps=60):
    """What each step of two threads read its layers at, while a third changes bits."""
    now = threading.local()
    read, done = [], threading.Event()
    set_bits_of_layer = GrinqhTensor.set_bits

    def slowly(weight, bits):
        set_bits_of_layer(weight, bits)
        time.sleep(0.0005)

    monkeypatch.setattr(GrinqhTensor, "set_bits", slowly)
    for layer in layers:
        layer.register_forward_pre_hook(lambda m, _: now.bits.add(round(m.weight.bits, 2)))

    def run():
        for _ in range(steps):
            now.bits = set()
            called(torch.randn(1, 64))
            read.append(now.bits)

    def change():
        bits = 0
        while not done.is_set():
            bits = (bits + 1) % 3
            set_bits(called, 2.0 + bits)

    changing = threading.Thread(target=change)
    changing.start()
    try:
        with torch.no_grad():
            in_threads([run, run])
    finally:
        done.set()
        changing.join()
    return read


@pytest.mark.parametrize("guarded", [True, False])
def test_a_step_reads_all_layers_at_the_same_bits(model, monkeypatch, guarded):
    if guarded:
        guard_steps(model)
        guard_steps(model)  # once is enough
    read = steps_while_bits_change(model, model, monkeypatch)
    assert any(len(bits) > 1 for bits in read) is not guarded  # otherwise this test sees nothing
    assert len(set().union(*read)) > 1


def test_a_change_waits_for_the_step_that_runs_and_goes_before_the_next(model):
    guard_steps(model)
    arrived, go, bits_of_steps = threading.Event(), threading.Event(), []

    def stop(*_):
        arrived.set()
        go.wait(60)
        bits_of_steps.append(round(model[3].weight.bits, 2))

    model[3].register_forward_pre_hook(stop)
    step, later = (threading.Thread(target=model, args=(torch.randn(1, 64),)) for _ in range(2))
    change = threading.Thread(target=set_bits, args=(model, 2))
    step.start()
    assert arrived.wait(60)
    change.start()
    change.join(0.2)
    assert change.is_alive()
    arrived.clear()
    later.start()
    assert not arrived.wait(0.2)
    assert {round(layer.weight.bits, 2) for layer in model} == {3}
    go.set()
    step.join(), change.join(), later.join()
    assert bits_of_steps == [3, 2]
    assert {round(layer.weight.bits, 2) for layer in model} == {2}


def test_a_step_waits_for_the_change_that_runs(model):
    guard_steps(model)
    step = threading.Thread(target=model, args=(torch.randn(1, 64),))
    with model._grinqh_gate.change():
        step.start()
        step.join(0.2)
        assert step.is_alive()
    step.join(60)
    assert not step.is_alive()


def test_a_step_that_fails_or_calls_itself_ends(model):
    guard_steps(model)
    with pytest.raises(ValueError, match="input of shape"):
        model(torch.randn(1, 63))
    change = threading.Thread(target=set_bits, args=(model, 4), daemon=True)
    change.start()  # not by this thread, which would not wait for a step of its own
    change.join(60)
    assert model[0].weight.bits == pytest.approx(4)
    nested = nn.Sequential(model)
    guard_steps(nested)
    nested._grinqh_gate = model._grinqh_gate
    set_bits(model, 2)
    assert model[0].weight.bits == pytest.approx(2)
    # From within a step, which need not wait for itself.
    handle = model[3].register_forward_pre_hook(lambda *_: set_bits(model, 4))
    model(torch.randn(1, 64))
    handle.remove()
    assert model[0].weight.bits == pytest.approx(4)
    set_bits(model, 3)


@pytest.mark.parametrize("then", ["a step", "set_bits"])
def test_a_step_that_is_interrupted_is_over_with_the_next_of_its_thread(model, then):
    guard_steps(model)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model[3].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(torch.randn(1, 64))
    handle.remove()
    if then == "a step":
        model(torch.randn(1, 64))
    else:
        set_bits(model, 2)
    change = threading.Thread(target=set_bits, args=(model, 4), daemon=True)
    change.start()
    change.join(60)
    assert model[0].weight.bits == pytest.approx(4)


def test_a_call_that_fails_before_it_is_a_step(model):
    """A hook registered before the guard's fails: what follows is guarded all the same."""

    def fail(*_):
        raise ValueError("injected")

    handle = model.register_forward_pre_hook(fail)
    guard_steps(model)
    with pytest.raises(ValueError, match="injected"):
        model(torch.randn(1, 64))
    handle.remove()
    in_step, changes = [], []

    def look(*_):
        change = threading.Thread(target=set_bits, args=(model, 4), daemon=True)
        change.start()
        change.join(0.2)
        changes.append(change)
        in_step.append(change.is_alive())

    model[3].register_forward_pre_hook(look)
    model(torch.randn(1, 64))
    changes[0].join(60)
    assert in_step == [True]
    assert model[0].weight.bits == pytest.approx(4)


def test_a_guarded_model_can_be_copied(model):
    guard_steps(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with model._grinqh_gate.change():  # nothing of it is shared
            in_threads([lambda other=other: other(torch.randn(1, 64))])


def test_measuring_counts_its_own_thread(model):
    inside, counted = threading.Barrier(3), []

    def run(rows):
        with torch.no_grad(), measure(model) as measured:
            inside.wait()
            for _ in range(rows):
                model(torch.randn(1, 64))
            inside.wait()
        counted.append((rows, measured._counters["0"].tokens))

    in_threads([lambda r=rows: run(r) for rows in (1, 5, 9)])
    assert sorted(counted) == [(1, 1), (5, 5), (9, 9)]
    assert not any(layer._forward_pre_hooks for layer in model)


@pytest.fixture
def compiled_graphs():
    """A compiled function, and a list of its graphs."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    return torch.compile(lambda x: x + 1, backend=backend), graphs


def test_the_last_to_leave_lets_compiled_functions_run_again(compiled_graphs):
    function, graphs = compiled_graphs
    first, second = eagerly(), eagerly()
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    function(torch.ones(3))
    assert not graphs
    second.__exit__(None, None, None)
    function(torch.ones(3))
    assert len(graphs) == 1


def test_where_measuring_fails_it_works_afterwards(model, compiled_graphs):
    """Within a compiled function it cannot be."""

    @torch.compile(backend="eager")
    def measured_within(x):
        with measure(model):
            return model(x)

    with pytest.raises(RuntimeError, match="set_stance"):
        measured_within(torch.randn(1, 64))
    function, graphs = compiled_graphs
    with measure(model):
        function(torch.ones(3))
    assert not graphs
    function(torch.ones(3))
    assert len(graphs) == 1


def test_kernels_are_registered_once(monkeypatch):
    made = []

    class Slow:
        def __init__(self, library):
            time.sleep(0.05)
            made.append(library)

    monkeypatch.setattr(build, "Kernels", Slow)
    known = build.kernels()
    build._kernels.cache_clear()
    try:
        found = in_threads([build.kernels] * 8)
        assert len(made) == 1
        assert len(set(map(id, found))) == 1
    finally:
        build._kernels.cache_clear()
        monkeypatch.setattr(build, "Kernels", lambda library: known)
        assert build.kernels() is known


def test_bits_of_all_layers_change_together_while_text_is_generated():
    model = tiny_model("llama", tied=False)
    quantize_(model, GrinqhConfig(bits=3))
    guard_steps(model)
    done = threading.Event()

    def change():
        while not done.is_set():
            for bits in (2, 3, 4):
                set_bits(model, bits)

    changing = threading.Thread(target=change)
    changing.start()
    try:
        found = model.generate(
            torch.arange(5, 12)[None], max_new_tokens=40, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
    finally:
        done.set()
        changing.join()
    assert found.shape == (1, 47)
    bits = {round(w.bits, 3) for _, _, w in quantized_linears(model) if not w.min_bits}
    assert bits == {4}
