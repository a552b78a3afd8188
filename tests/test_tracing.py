"""Layers while they are traced, and while another thread traces something else."""

import gc
import threading
import weakref
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchao.quantization import quantize_

import plain
from grinqh_ao import (
    GrinqhConfig,
    decode_every_row,
    fuse_projections,
    guard_steps,
    set_bits,
)
from models import tiny_model


@contextmanager
def another_thread_compiles():
    """As long as this lasts; something that has nothing to do with quantized layers.

    torch.compiler.is_compiling() is True in this thread too then, since PyTorch 2.13 or so.
    """
    inside, ends = threading.Event(), threading.Event()

    def backend(graph, inputs):
        inside.set()
        ends.wait(60)
        return graph.forward

    compiled = torch.compile(nn.Linear(4, 4), backend=backend)
    thread = threading.Thread(target=compiled, args=(torch.randn(2, 4),))
    thread.start()
    assert inside.wait(60)
    try:
        yield
    finally:
        ends.set()
        thread.join()


def attention() -> nn.Module:
    module = nn.Module()
    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(module, name, nn.Linear(64, 96))
    quantize_(module, GrinqhConfig(bits=3))
    return module


@torch.no_grad()
def test_the_decode_rule_while_another_thread_compiles():
    layer = attention().q_proj
    x = torch.randn(12, 64)
    with decode_every_row():
        expected = layer(x)
    with another_thread_compiles(), decode_every_row():
        assert torch.equal(layer(x), expected)
    assert not torch.equal(layer(x), expected)


@torch.no_grad()
def test_other_modes_are_no_tracing():
    layer = attention().q_proj
    x = torch.randn(12, 64)
    with decode_every_row():
        expected = layer(x)
    with another_thread_compiles(), decode_every_row(), FlopCounterMode(display=False):
        assert torch.equal(layer(x), expected)


@torch.no_grad()
def test_weights_of_a_call_while_another_thread_compiles():
    one, other = attention(), attention()
    x = torch.randn(1, 64)
    given = dict(other.q_proj.named_parameters())
    with another_thread_compiles():
        assert torch.equal(torch.func.functional_call(one.q_proj, given, x), other.q_proj(x))


@torch.no_grad()
def test_fused_layers_notice_what_is_written_while_another_thread_compiles():
    module = attention()
    fuse_projections(module)
    x = torch.randn(1, 64)
    with another_thread_compiles():
        module.q_proj(x)
        x.mul_(2)
        torch.testing.assert_close(
            module.k_proj(x), F.linear(x, module.k_proj.weight, module.k_proj.bias)
        )


def test_gradients_while_another_thread_compiles():
    layer = attention().q_proj
    x, tangent = torch.randn(2, 64), torch.randn(2, 64)
    _, expected = torch.func.jvp(layer, (x,), (tangent,))
    with another_thread_compiles():
        _, found = torch.func.jvp(layer, (x,), (tangent,))
    assert torch.equal(found, expected)
    assert found.abs().max() > 0


@torch.no_grad()
def test_a_guarded_step_ends_while_another_thread_compiles():
    layer = attention().q_proj
    compiling = another_thread_compiles()
    handle = layer.register_forward_hook(lambda *_: compiling.__enter__() and None)
    guard_steps(layer)  # whose hook comes after that one
    try:
        layer(torch.randn(1, 64))
    finally:
        compiling.__exit__(None, None, None)
        handle.remove()
    changing = threading.Thread(target=set_bits, args=(layer, 2), daemon=True)
    changing.start()
    changing.join(60)
    assert not changing.is_alive()


@torch.no_grad()
def test_one_graph_for_few_rows_and_many():
    layer = attention().q_proj
    ops = []

    def backend(graph, inputs):
        ops.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    for rows in (12, 5, 9, 2, 8, 300):
        x = torch.randn(rows, 64)
        torch.testing.assert_close(compiled(x), layer(x))
    assert ops == [["grinqh.linear.default"]]
    compiled(torch.randn(1, 64))
    assert ops[1:] == [["grinqh.decode_linear.default"]]  # a step of one token is as direct as ever
    set_bits(layer, 2)
    x = torch.randn(4, 64)
    expected = plain.decode_together(x, layer.weight, layer.bias)
    torch.testing.assert_close(compiled(x).double(), expected, rtol=1e-4, atol=1e-4)
    assert len(ops) == 2


@torch.no_grad()
def test_fixed_numbers_of_rows_are_decided_when_compiling():
    layer = attention().q_proj
    for rows, op in ((8, "grinqh.decode_linear.default"), (9, "grinqh.dense_linear.default")):
        ops = []

        def backend(graph, inputs, ops=ops):
            ops += [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
            return graph.forward

        torch.compile(layer, backend=backend, dynamic=False)(torch.randn(rows, 64))
        assert ops == [op]


@torch.no_grad()
def test_as_many_rows_as_data_say():
    layer = attention().q_proj

    def some(x, wanted):
        return layer(x[wanted])

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(some, fullgraph=True, backend="eager")
        for number in (0, 1, 3, 30):
            x, wanted = torch.randn(40, 64), torch.arange(40) < number
            torch.testing.assert_close(compiled(x, wanted), some(x, wanted))


@torch.no_grad()
def test_exported_for_few_rows_and_many():
    layer = attention().q_proj
    rows = torch.export.Dim("rows", min=2, max=64)
    exported = torch.export.export(layer, (torch.randn(12, 64),), dynamic_shapes=({0: rows},))
    for number in (2, 8, 9, 40):
        x = torch.randn(number, 64)
        torch.testing.assert_close(exported.module()(x), layer(x))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_traced_by_jit_when_fused():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = attention()

        def forward(self, x):
            return sum(layer(x) for layer in self.attention.children())

    module = Sum()
    fuse_projections(module)
    traced = torch.jit.trace(module, torch.randn(1, 64))
    x = torch.randn(1, 64)
    torch.testing.assert_close(traced(x), module(x))


def test_a_fused_model_is_freed_at_once():
    model = tiny_model("llama", tied=True)
    quantize_(model, GrinqhConfig(bits=3))
    fuse_projections(model)
    with torch.no_grad():
        model(torch.tensor([[3]]))
    slices = weakref.ref(model.model.layers[0].mlp.up_proj.weight.slices)
    gc.collect()
    gc.disable()
    try:
        del model
        assert slices() is None
    finally:
        gc.enable()


@torch.no_grad()
def test_a_replaced_layer_is_freed_and_the_others_go_on():
    module = attention()
    fuse_projections(module)
    x = torch.randn(1, 64)
    expected = module.q_proj(x)
    replaced = weakref.ref(module.k_proj)
    module.k_proj = nn.Linear(64, 96)
    module.v_proj(x)  # what still waits for it is let go
    module.q_proj(x)
    assert replaced() is None
    torch.testing.assert_close(module.q_proj(x), expected)


def test_cross_attention_is_not_fused():
    model = nn.ModuleDict({"self_attn": attention(), "encoder_attn": attention()})
    assert fuse_projections(model) == [[f"self_attn.{name}_proj" for name in "qkv"]]
