"""GrinqhLinear computes what F.linear does, and never with a weight that is no longer its own."""

import copy
import io
import weakref

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from torch import nn
from torchao.quantization import quantize_

from grinqh_ao import GrinqhConfig, GrinqhTensor, fuse_projections
from grinqh_ao.decode_rule import decode_every_row
from grinqh_ao.layers import GrinqhLinear
from grinqh_ao.slices import drop_low

K, N = 192, 128


def layer(seed: int = 0, bias: bool = False) -> nn.Linear:
    torch.manual_seed(seed)
    linear = nn.Linear(K, N, bias=bias)
    quantize_(linear, GrinqhConfig(bits=3))
    return linear


def x_of(rows: int = 1) -> torch.Tensor:
    return torch.distributions.Laplace(0.0, 1.0).sample((rows, K))


def same(linear: nn.Module, weight: torch.Tensor) -> bool:
    x = x_of()
    return torch.equal(linear(x), F.linear(x, weight))


def test_quantize_makes_plain_layers_only_into_grinqh_linears() -> None:
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(K, N), Own(N, N))
    quantize_(model, GrinqhConfig(bits=3))
    assert [type(module) for module in model] == [GrinqhLinear, Own]
    assert all(isinstance(module.weight, GrinqhTensor) for module in model)


@pytest.mark.parametrize("rows", [1, 3, 8, 9])
@pytest.mark.parametrize("bias", [False, True])
def test_the_same_as_linear_of_the_weight(rows: int, bias: bool) -> None:
    linear, x = layer(bias=bias), x_of(rows)
    assert torch.equal(linear(x), F.linear(x, linear.weight, linear.bias))
    with decode_every_row():
        assert torch.equal(linear(x), F.linear(x, linear.weight, linear.bias))


def test_another_weight_by_any_way_is_what_counts() -> None:
    new = layer(1).weight
    assigned, loaded, swapped, moved, behind, dense = (layer() for _ in range(6))
    assigned.weight = new
    loaded.load_state_dict({"weight": new}, assign=True)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        swapped.load_state_dict({"weight": layer(1).weight})
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    moved.to(torch.float64)  # new tensors inside
    for linear in (assigned, loaded, swapped, moved):  # what compiled models see
        assert linear._inner is linear.weight.__dict__
    behind._parameters["weight"] = new
    dense.weight = nn.Parameter(torch.randn(N, K))
    assert all(same(linear, new) for linear in (assigned, loaded, swapped, behind))
    assert same(moved, layer().weight)
    assert same(dense, dense.weight)
    assert "grinqh" not in repr(dense)


def test_a_weight_that_is_deleted() -> None:
    linear = layer()
    del linear.weight
    assert linear._inner is None
    with pytest.raises(AttributeError, match="weight"):
        linear(x_of())


def test_copies_have_weights_of_their_own() -> None:
    linear = layer()
    file = io.BytesIO()
    torch.save(linear, file)
    file.seek(0)
    copies = [copy.deepcopy(linear), torch.load(file, weights_only=False)]
    assert all(same(one, linear.weight) for one in copies)
    linear.weight.set_bits(8)
    for one in copies:
        assert same(one, one.weight)
        assert not same(one, linear.weight)


def inputs_of_graphs(graphs: list[list[object]]):
    def backend(graph: torch.fx.GraphModule, examples: list[object]):
        graphs.append(examples)
        return graph.forward

    return backend


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self, name, nn.Linear(K, N, bias=name == "q_proj"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q_proj(x) + self.k_proj(x) * self.v_proj(x)


def attention(fused: bool) -> Attention:
    torch._dynamo.reset()
    model = Attention()
    quantize_(model, GrinqhConfig(bits=3))
    if fused:
        assert fuse_projections(model)
    return model


@pytest.mark.parametrize("fused", [False, True])
def test_compiled_models_see_plain_tensors_only(fused: bool) -> None:
    model, x = attention(fused), x_of()
    graphs: list[list[object]] = []
    compiled = torch.compile(model, fullgraph=True, backend=inputs_of_graphs(graphs))
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
    assert len(graphs) == 1
    assert len(graphs[0]) == 1 + 3 * 3 + 1
    assert not any(isinstance(example, GrinqhTensor) for example in graphs[0])


@pytest.mark.parametrize("fused", [False, True])
def test_weights_are_static_in_compiled_models(fused: bool) -> None:
    """Symbols for their shapes take long to compile; what may move is copied into CUDA graphs."""
    model, x = attention(fused), x_of(rows=3)
    graphs: list[list[object]] = []
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=inputs_of_graphs(graphs))
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
    symbols = [example for example in graphs[0] if isinstance(example, torch.SymInt)]
    assert len(symbols) == 1  # rows
    tensors = [example for example in graphs[0] if isinstance(example, torch.Tensor)]
    stored = [tensor for tensor in tensors if tensor.dim() != 2]  # all but x
    assert len(stored) == 3 * 3 + 1
    for tensor in stored:
        assert all(isinstance(size, int) for size in tensor.shape)
        assert tensor._dynamo_static_input_type


@pytest.mark.parametrize("fused", [False, True])
def test_weights_are_not_checked_where_checks_are_skipped(fused: bool) -> None:
    """As those of dense layers are not: what would be a recompilation goes unnoticed."""
    model, x = attention(fused), x_of()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected = compiled(x)
        for name in ("slices", "scales"):
            inner = getattr(model.k_proj.weight, name)
            setattr(model.k_proj.weight, name, inner.mT.contiguous().mT)  # other strides
            with torch.compiler.set_stance(skip_guard_eval_unsafe=True):
                assert torch.equal(compiled(x), expected)
            with torch.compiler.set_stance("fail_on_recompile"), pytest.raises(RuntimeError):
                compiled(x)
            setattr(model.k_proj.weight, name, inner)


def test_compiled_models_see_what_changes() -> None:
    torch._dynamo.reset()
    model, x = nn.Sequential(layer()), x_of()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        before = compiled(x)
        model[0].weight = layer(1).weight
        assert torch.equal(compiled(x), model(x))
        assert not torch.equal(before, model(x))
        weight = model[0].weight
        weight.slices, weight.low = drop_low(
            weight.slices, torch.rand(K) < 0.5
        )  # as calibrate does
        assert torch.equal(compiled(x), model(x))


def test_nothing_is_kept_of_what_accelerate_takes_away() -> None:
    model, x = nn.Sequential(layer()), x_of()
    with torch.no_grad():
        expected = model(x)
        slices = weakref.ref(model[0].weight.slices)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        cpu_offload(model, torch.device("cpu"), state_dict=state)
        assert model[0].weight.is_meta
        assert slices() is None
        assert torch.equal(model(x), expected)
        assert model[0]._inner is None


def test_a_weight_for_one_call_is_not_kept() -> None:
    torch._dynamo.reset()
    linear, other, x = layer(), layer(1), x_of()
    compiled = torch.compile(linear, backend="eager")
    with torch.no_grad():
        own = compiled(x)
        found = torch.func.functional_call(linear, {"weight": other.weight}, x)
        assert torch.equal(found, other(x))
        assert torch.equal(compiled(x), own)
        assert torch.equal(linear(x), own)


def test_a_shared_weight_may_be_moved_by_another_module() -> None:
    torch._dynamo.reset()
    model, x = nn.ModuleDict({"embed": nn.Embedding(N, K), "lm_head": nn.Linear(K, N)}), x_of()
    model["lm_head"].weight = model["embed"].weight
    quantize_(model, GrinqhConfig(bits=3))
    assert model["embed"].weight is model["lm_head"].weight
    compiled = torch.compile(model["lm_head"], backend="eager")
    with torch.no_grad():
        compiled(x)
        model["embed"].to(torch.float64)
        model["embed"].weight.set_bits(8)
        assert torch.equal(compiled(x), F.linear(x, model["lm_head"].weight, model["lm_head"].bias))


@pytest.mark.parametrize("strict", [False, True])
def test_exported_models_have_their_parameters(strict: bool) -> None:
    model, x = nn.Sequential(layer(bias=True)), x_of()
    exported = torch.export.export(model, (x,), strict=strict)
    assert not exported.constants
    assert list(exported.graph_signature.parameters) == ["0.weight", "0.bias"]
    assert torch.equal(exported.module()(x), model(x))


def test_symbolic_traces() -> None:
    model, x = nn.Sequential(layer()), x_of()
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))
