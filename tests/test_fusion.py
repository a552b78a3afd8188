"""Projections that are decoded in one launch."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torchao.quantization import quantize_

from grinqh_ao import (
    GrinqhConfig,
    decode_every_row,
    fuse_projections,
    measure,
    ops,
    set_bits,
    unfuse_projections,
)
from grinqh_ao.layers import GrinqhLinear
from models import tiny_model
from test_generation import CountOps, generate

LAYERS = 2


@pytest.fixture
def model(family) -> nn.Module:
    model = tiny_model(family, tied=False)
    quantize_(model, GrinqhConfig(bits=3))
    return model


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 320, (1, 11))


@torch.no_grad()
def test_what_was_put_on_top_since_goes_on_after_unfusing(ids):
    """Another forward(), as accelerate's hooks put there, and a parametrization."""
    model = tiny_model("llama", tied=False, attention_bias=True)
    quantize_(model, GrinqhConfig(bits=3))
    expected = model(ids).logits
    fuse_projections(model)
    q, k = (getattr(model.model.layers[0].self_attn, name) for name in ("q_proj", "k_proj"))
    q.forward = (lambda forward: lambda *args: forward(*args))(q.forward)
    parametrize.register_parametrization(k, "bias", nn.Identity())
    unfuse_projections(model)
    with CountOps() as count:
        torch.testing.assert_close(model(ids).logits, expected)
        model(ids[:, :1])
    assert ops.decode_linears not in count.calls


def test_layers_in_place_of_fused_ones_are_fused(model, ids):
    groups = fuse_projections(model)
    attention = model.model.layers[0].self_attn
    attention.q_proj = copy.deepcopy(attention.q_proj)
    attention.k_proj = nn.Linear(*reversed(attention.k_proj.weight.shape))
    quantize_(attention.k_proj, GrinqhConfig(bits=3))
    assert fuse_projections(model) == groups
    with CountOps() as count, torch.no_grad():
        model(ids[:, :1])
    assert count.calls[ops.decode_linears] == 2 * LAYERS


@pytest.mark.parametrize(
    ("x", "error"),
    [
        (torch.zeros(1, 64).to(torch.float8_e4m3fn), TypeError),
        (torch.tensor(1.0), ValueError),
    ],
)
def test_inputs_are_refused_as_by_other_layers(x, error):
    model = tiny_model("llama", tied=False)
    quantize_(model, GrinqhConfig(bits=3))
    fuse_projections(model)
    with pytest.raises(error, match="input of"):
        model.model.layers[0].self_attn.q_proj(x)


def test_one_launch_per_group_and_the_same_tokens(model, ids):
    expected = generate(model, ids)
    names = list(model.state_dict())
    groups = fuse_projections(model)
    attention, mlp = "model.layers.1.self_attn.", "model.layers.1.mlp."
    assert groups[2:] == [
        [attention + "q_proj", attention + "k_proj", attention + "v_proj"],
        [mlp + "gate_proj", mlp + "up_proj"],
    ]
    assert fuse_projections(model) == groups
    with CountOps() as count:
        assert generate(model, ids, max_new_tokens=12) == expected
    steps = 11  # the prompt yields the first token
    assert count.calls[ops.decode_linears] == steps * LAYERS * 2
    assert count.calls[ops.decode_linear] == 1 + steps * (LAYERS * 2 + 1)  # o, down; the head
    assert list(model.state_dict()) == names
    unfuse_projections(model)
    with CountOps() as count:
        assert generate(model, ids) == expected
    assert ops.decode_linears not in count.calls
    assert all(type(m) is GrinqhLinear for m in model.modules() if isinstance(m, nn.Linear))


def test_projections_keep_their_thresholds(model, ids):
    attention = model.model.layers[0].self_attn
    attention.q_proj.weight.set_bits(2)
    attention.v_proj.weight.set_bits(6)
    expected = generate(model, ids)
    with measure(model) as before:
        generate(model, ids)
    fuse_projections(model)
    assert generate(model, ids) == expected
    with measure(model) as after:
        generate(model, ids)
    assert after.layers == before.layers
    set_bits(model, 2)
    fused = generate(model, ids)
    unfuse_projections(model)
    assert fused == generate(model, ids) != expected


def test_batches_beams_prompts_and_gradients(model, ids):
    batch = torch.randint(0, 320, (3, 11))
    expected = model.generate(batch, max_new_tokens=4, do_sample=False, pad_token_id=0)
    beams = generate(model, ids, num_beams=3)
    prompt = model(batch).logits
    fuse_projections(model)
    found = model.generate(batch, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(found, expected)
    assert generate(model, ids, num_beams=3) == beams
    assert torch.equal(model(batch).logits, prompt)
    embedded = torch.randn(1, 1, 64, requires_grad=True)
    model(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad.isfinite().all()


@torch.no_grad()
def test_compiles_without_breaks_and_set_bits_does_not_recompile(model):
    compilations = 0

    def backend(graph, inputs):
        nonlocal compilations
        compilations += 1
        return graph.forward

    token = torch.randint(0, 320, (1, 1))
    expected = [model(token, use_cache=False).logits]
    set_bits(model, 2)
    expected.append(model(token, use_cache=False).logits)
    fuse_projections(model)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for bits, logits in zip((3, 2), expected, strict=True):
        set_bits(model, bits)
        for _ in range(2):
            found = compiled(token, use_cache=False).logits
            torch.testing.assert_close(found, logits, rtol=1e-3, atol=1e-3)
    assert compilations == 1


@torch.no_grad()
def test_inductor(model):
    fuse_projections(model)
    token = torch.randint(0, 320, (1, 1))
    found = torch.compile(model, fullgraph=True)(token, use_cache=False).logits
    torch.testing.assert_close(found, model(token, use_cache=False).logits, rtol=1e-3, atol=1e-3)


def test_copies_and_pickles_are_fused_among_themselves(model, ids):
    fuse_projections(model)
    expected = generate(model, ids)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.model.layers[0].mlp.gate_proj._group.members[0] is (
            other.model.layers[0].mlp.gate_proj
        )
        set_bits(other, 2)
        assert generate(other, ids) != expected
        assert generate(model, ids) == expected


def test_plain_linear_layers_with_quantized_weights(model):
    mlp = model.model.layers[0].mlp
    for projection in (mlp.gate_proj, mlp.up_proj):
        projection.__class__ = nn.Linear
        del projection._inner
    fuse_projections(model)
    # What compiled models see.
    assert mlp.gate_proj._inner is mlp.gate_proj.weight.__dict__
    assert mlp.up_proj._inner is mlp.up_proj.weight.__dict__


def test_a_state_dict_loads_into_a_fused_model(model, ids):
    fuse_projections(model)
    state = copy.deepcopy(model.state_dict())
    expected = generate(model, ids)
    set_bits(model, 2)
    model.load_state_dict(state, assign=True)
    assert generate(model, ids) == expected


@torch.no_grad()
def test_threads_do_not_get_each_others_results(model):
    fuse_projections(model)
    inputs = [torch.randn(1, 1, 64) for _ in range(4)]
    mlp = model.model.layers[0].mlp
    expected = [mlp(x) for x in inputs]
    wrong = []

    def run(i: int) -> None:
        for _ in range(30):
            if not torch.equal(mlp(inputs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@torch.no_grad()
def test_a_projection_alone_and_twice(model):
    mlp = model.model.layers[0].mlp
    x = torch.randn(1, 1, 64)
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    fuse_projections(model)
    for _ in range(2):
        assert torch.equal(mlp.gate_proj(x), gate)
    assert torch.equal(mlp.up_proj(x), up)
    assert torch.equal(mlp.up_proj(x), up)
    assert mlp.gate_proj._group.waiting is not None
    assert torch.equal(mlp.gate_proj(x), gate)
    assert mlp.gate_proj._group.waiting is None  # nothing is kept alive after a step
    set_bits(model, 2)
    at_2_bits = mlp.gate_proj(x)
    set_bits(model, 3)
    assert torch.equal(mlp.gate_proj(x), gate)
    assert not torch.equal(at_2_bits, gate)


@torch.no_grad()
def test_activations_that_are_written_to_in_between(model):
    mlp = model.model.layers[0].mlp
    x = torch.randn(1, 1, 64)
    expected = mlp.up_proj(2 * x)
    fuse_projections(model)
    mlp.gate_proj(x)
    x.mul_(2)
    assert torch.equal(mlp.up_proj(x), expected)


@torch.no_grad()
def test_what_changes_between_projections(model):
    """Each finds results of the first waiting, and must not take them."""
    mlp = model.model.layers[0].mlp
    x = torch.randn(1, 2, 64)
    with torch.autocast("cpu"):
        low_precision = mlp.up_proj(x)
    with decode_every_row(dense_prefix=2):
        at_8_bits = mlp.up_proj(x)
    at_3_bits, state = mlp.up_proj(x), copy.deepcopy(mlp.state_dict())
    set_bits(mlp, 2)
    at_2_bits = mlp.up_proj(x)
    set_bits(mlp, 3)
    fuse_projections(model)
    mlp.gate_proj(x)
    with torch.autocast("cpu"):
        assert torch.equal(mlp.up_proj(x), low_precision)
    mlp.gate_proj(x)
    with decode_every_row(dense_prefix=2):
        assert torch.equal(mlp.up_proj(x), at_8_bits)
    mlp.gate_proj(x)
    set_bits(mlp, 2)
    assert torch.equal(mlp.up_proj(x), at_2_bits)
    mlp.gate_proj(x)
    mlp.load_state_dict(state)
    assert torch.equal(mlp.up_proj(x), at_3_bits)
    mlp.gate_proj(x)
    mlp.up_proj.bias = nn.Parameter(torch.ones(mlp.up_proj.out_features))
    torch.testing.assert_close(mlp.up_proj(x), at_3_bits + 1)
    mlp.gate_proj(x)
    mlp.up_proj.bias.add_(1)
    torch.testing.assert_close(mlp.up_proj(x), at_3_bits + 2)
    mlp.up_proj.bias = None
    mlp.gate_proj(x)
    mlp.up_proj.weight = nn.Parameter(-mlp.up_proj.weight.dequantize())
    torch.testing.assert_close(mlp.up_proj(x), -at_8_bits)


def test_gradients_wanted_after_the_first_projection(model):
    mlp = model.model.layers[0].mlp
    fuse_projections(model)
    x = torch.randn(1, 1, 64)
    with torch.no_grad():
        mlp.gate_proj(x)
    x.requires_grad_()
    mlp.up_proj(x).sum().backward()
    assert x.grad is not None


@torch.no_grad()
def test_symbolic_tracing(model):
    mlp = model.model.layers[0].mlp
    x = torch.randn(1, 1, 64)
    expected = mlp.gate_proj(x)
    fuse_projections(model)
    traced = torch.fx.symbolic_trace(mlp.gate_proj)
    assert torch.equal(traced(x), expected)


@torch.no_grad()
def test_on_the_meta_device(model):
    fuse_projections(model)
    mlp = copy.deepcopy(model.model.layers[0].mlp).to("meta")
    assert mlp(torch.empty(1, 1, 64, device="meta")).shape == (1, 1, 64)


def test_a_replaced_forward_is_not_fused(model, log):
    projection = model.model.layers[0].mlp.up_proj
    projection.forward = projection.forward
    assert len(fuse_projections(model)) == 3
    assert "has replaced their forward()" in log.text


def test_what_cannot_be_fused_is_left_and_logged(log):
    class Block(nn.Module):
        def __init__(self, gate: tuple[int, int], up: tuple[int, int]) -> None:
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(*gate), nn.Linear(*up)

    outputs = Block((64, 512), (64, 64))
    inputs = Block((64, 64), (96, 64))
    model = nn.Sequential(outputs, *(Block((64, 128), (64, 128)) for _ in range(2)), inputs)
    quantize_(
        model,
        GrinqhConfig(),
        filter_fn=lambda m, name: name.endswith("_proj") and name != "1.up_proj",
    )
    assert fuse_projections(model) == [["2.gate_proj", "2.up_proj"]]
    assert "0.gate_proj, 0.up_proj are not fused: their weights differ in" in log.text
    assert "1.gate_proj, 1.up_proj are not fused: their weights are not all quantized" in log.text
    assert "3.gate_proj, 3.up_proj are not fused: their weights differ in" in log.text
    with pytest.raises(ValueError, match="no layer is quantized"):
        fuse_projections(nn.Linear(8, 8))
