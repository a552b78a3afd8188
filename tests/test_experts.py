"""Mixtures of experts: stacks of nested weights, of which tokens read what they are routed to."""

import copy

import pytest
import torch
import transformers
from torch import nn
from torchao.quantization import FqnToConfig, quantize_

import grinqh_ao
import plain
from grinqh_ao import (
    GrinqhConfig,
    GrinqhTensor,
    all_but_head,
    calibrate,
    decode_every_row,
    measure,
    ops,
    set_bits,
    summary,
)
from grinqh_ao.experts import ExpertLinears
from grinqh_ao.model import quantized_linears, quantized_modules
from models import SMALL, interrupted, layers_of, tiny_model
from test_generation import CountOps, generate

FAMILIES = ["qwen3_moe", "mixtral", "gpt_oss"]
EXPERTS = {"qwen3_moe": 6, "mixtral": 4, "gpt_oss": 4}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def linears():
    weight = GrinqhTensor.stack([GrinqhTensor.from_hp(torch.randn(96, 64)) for _ in range(5)])
    return ExpertLinears(weight)


# ---- the layer


@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 20])
@pytest.mark.parametrize("shared", [True, False])
@torch.no_grad()
def test_rows_go_through_their_experts(linears, tokens, shared):
    x = torch.randn(tokens, 1 if shared else 2, 64)
    experts = torch.randint(0, 5, (tokens, 2))
    expected = plain.PlainExperts(linears.weight)(x, experts)
    found = linears(x, experts)
    assert found.shape == (tokens, 2, 96)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_switch_decodes_every_token_after_the_prompt(linears):
    x, experts = torch.randn(20, 2, 64), torch.randint(0, 5, (20, 2))
    dense, one_by_one = linears(x, experts), [linears(x[i : i + 1], experts[i : i + 1])
                                              for i in range(20)]  # fmt: skip
    with decode_every_row(7):
        found = linears(x, experts.int())
    torch.testing.assert_close(found[:7], dense[:7])
    torch.testing.assert_close(found[7:], torch.cat(one_by_one[7:]))
    assert not torch.allclose(found[7:], dense[7:])


def test_gradients_take_the_dense_path(linears):
    experts = torch.randint(0, 5, (3, 2))
    x = torch.randn(3, 2, 64, requires_grad=True)
    y = linears(x, experts)
    y.square().sum().backward()
    dense = linears.weight.dequantize()[experts]
    again = x.detach().clone().requires_grad_()
    expected = torch.einsum("trnk,trk->trn", dense, again)
    expected.square().sum().backward()
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_no_tokens(linears):
    assert linears(torch.randn(0, 1, 64), torch.zeros(0, 2, dtype=torch.int64)).shape == (0, 2, 96)


@pytest.mark.parametrize("op", ["decode_experts", "dense_experts"])
def test_ops_are_registered_right(linears, op):
    w = linears.weight
    x, experts = torch.randn(4, 64), torch.tensor([3, 0, 3, 1])
    arguments = {
        "decode_experts": (w.slices, w.scales, w.vectors,
                           list(w.levels)),
        "dense_experts": (w.slices, w.scales, w.vectors, 8),
    }  # fmt: skip
    torch.library.opcheck(getattr(ops, op), (x, experts, *arguments[op]))


# ---- the tensor


def test_a_stack_is_its_weights():
    weights = [GrinqhTensor.from_hp(torch.randn(96, 64)) for _ in range(3)]
    stack = GrinqhTensor.stack(weights)
    assert stack.shape == (3, 96, 64)
    for one, weight in zip(stack, weights, strict=True):
        assert torch.equal(one.dequantize(), weight.dequantize())
    assert torch.equal(stack.dequantize(), torch.stack([w.dequantize() for w in weights]))
    assert stack.to(torch.bfloat16)[1].dtype == torch.bfloat16
    assert torch.equal(copy.deepcopy(stack)[2].dequantize(), weights[2].dequantize())
    stack[1].set_bits(5.0)  # on the same memory
    assert stack[1].bits == pytest.approx(5.0)
    assert stack.bits == pytest.approx((3 + 5 + 3) / 3)
    with pytest.raises(TypeError, match="single experts"):
        stack[:, 3]
    with pytest.raises(ValueError, match="one expert"):
        nn.functional.linear(torch.randn(1, 64), stack)


# ---- models


@pytest.mark.parametrize("bits", [2, 3.5, 8])
def test_greedy_tokens_are_those_of_a_plain_model(family, bits):
    model = tiny_model(family, tied=False)
    ids = torch.randint(0, 320, (1, 11))
    quantize_(model, GrinqhConfig(bits=bits))
    tokens = generate(model, ids, max_new_tokens=6)
    assert tokens == generate(plain.plain_model(copy.deepcopy(model)), ids, max_new_tokens=6)


def test_all_experts_are_quantized_and_said(family):
    model = tiny_model(family, tied=False)
    dense = sum(p.numel() for n, p in model.named_parameters() if "experts" in n and p.dim() == 3)
    quantize_(model, GrinqhConfig(bits=3))
    found = summary(model)
    assert "model.layers.1.mlp.experts.down_proj" in found.quantized
    assert not any("experts" in name for name in found.dense)
    stacks = [w for _, m, w in quantized_modules(model) if isinstance(m, ExpertLinears)]
    assert sum(w.numel() for w in stacks) == dense
    assert len(layers_of(model)) == 2 * (4 + 2 * EXPERTS[family]) + 1
    assert "experts=" in repr(model)


def test_only_biases_of_experts_are_no_weights():
    model = nn.ModuleDict({"relative_attention_bias": nn.Embedding(4, 64), "fc": nn.Linear(64, 8)})
    quantize_(model, GrinqhConfig(bits=3))
    found = summary(model)
    assert list(found.dense) == ["relative_attention_bias"]
    assert found.all_weights == 12 * 64


def test_only_routed_experts_are_read(family):
    model = tiny_model(family, tied=False)
    quantize_(model, GrinqhConfig(bits=3))
    with CountOps() as count:
        generate(model, torch.randint(0, 320, (1, 11)), max_new_tokens=4)
    assert count.calls[ops.decode_experts] == 3 * 2 * 2  # steps, layers, projections
    assert count.calls[ops.dense_experts] == 2 * 2
    with measure(model) as measured:
        generate(model, torch.randint(0, 320, (1, 11)), max_new_tokens=4)
    layer = measured.layers["model.layers.0.mlp.experts.down_proj"]
    stack = model.model.layers[0].mlp.experts.down_proj.weight
    assert layer.weights == stack[0].numel() * 2  # two experts a token
    assert sum(layer.shares.values()) == pytest.approx(1)
    assert 0 < layer.bits < 8
    assert layer.bytes_per_token < layer.stored_bytes
    assert layer.stored_weights == stack.numel()
    assert 8 < layer.stored_bits < 12


def test_set_bits_reaches_every_expert(family):
    model = tiny_model(family, tied=False)
    quantize_(model, GrinqhConfig(bits=3))
    ids = torch.randint(0, 320, (1, 1))
    seen = []
    for bits in (2.0, 6.0, 2.0):
        set_bits(model, bits)
        assert summary(model).bits == pytest.approx(bits, abs=1e-3)
        with measure(model) as measured, torch.no_grad():
            seen.append((model(ids).logits, measured.body))
    assert torch.equal(seen[0][0], seen[2][0])
    assert seen[0][1].bits < 3 < seen[1][1].bits
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj\.0|q_proj"):
        set_bits(model, 9)


@torch.no_grad()
def test_the_switch_knows_the_sequences_of_a_batch(family):
    model = tiny_model(family, tied=False)
    quantize_(model, GrinqhConfig(bits=2))
    ids = torch.randint(0, 320, (2, 24))
    with decode_every_row(12), measure(model) as together:
        found = model(ids, use_cache=False).logits
    with decode_every_row(12), measure(model) as alone:
        expected = torch.cat([model(row[None], use_cache=False).logits for row in ids])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert together.body.bits == pytest.approx(alone.body.bits, abs=0.01)


def test_autocast(family):
    """As Trainer uses it with bf16=True."""
    model = tiny_model(family, tied=False)
    quantize_(model, GrinqhConfig(bits=3))
    ids = torch.randint(0, 320, (1, 20))
    with torch.autocast("cpu", torch.bfloat16):
        x = model.model.embed_tokens(ids).detach().requires_grad_()
        model(inputs_embeds=x).logits.float().sum().backward()
        with torch.no_grad():
            for rows in (20, 3):
                assert model(ids[:, :rows]).logits.isfinite().all()
    assert x.grad.abs().max() > 0


def test_calibration_meets_bits_over_experts(family):
    model = tiny_model(family, tied=False)
    quantize_(model, GrinqhConfig(bits=3))
    data = torch.randint(0, 320, (4, 128))
    calibrate(model, data, bits=3)
    assert summary(model).bits == pytest.approx(3, abs=1e-3)
    with measure(model) as measured, torch.no_grad(), decode_every_row(16):
        for row in data:
            model(row[None])
    assert measured.body.bits == pytest.approx(3, abs=0.15)
    stack = model.model.layers[0].mlp.experts.down_proj.weight
    assert stack.curve.shape == (EXPERTS[family], 387)
    assert not torch.equal(stack.thresholds[0], stack.thresholds[1])
    set_bits(model, 2.5)
    assert summary(model).bits == pytest.approx(2.5, abs=1e-3)


def test_calibration_of_experts_no_token_went_to(family, log):
    model = tiny_model(family, tied=False)
    quantize_(model, GrinqhConfig(bits=3))
    for layer in model.model.layers:  # all go to the same
        router = layer.mlp.router if family == "gpt_oss" else layer.mlp.gate
        router.weight.data.zero_()
    calibrate(model, torch.randint(0, 320, (1, 64)), bits=3, importance=False)
    assert "saw no token and keep the formula" in log.text
    stack = model.model.layers[0].mlp.experts.down_proj.weight
    assert [one.bits for one in stack][-1] == pytest.approx(3, abs=1e-3)
    set_bits(model, 2.0)
    assert [one.bits for one in stack][-1] == pytest.approx(2, abs=1e-2)


@pytest.mark.parametrize("before", [False, True])
def test_experts_without_a_token_beside_compact_layers(family, before, log, tmp_path):
    """Curves of compact layers are longer; a stack has those of one length."""
    model = tiny_model(family, tied=False)
    quantize_(model, GrinqhConfig(bits=3))
    if before:
        calibrate(model, torch.randint(0, 320, (4, 128)))
    calibrate(model, torch.randint(0, 320, (1, 18)), bits=2.8, stored_bits=4.4)
    assert "saw no token" in log.text
    assert summary(model).bits == pytest.approx(2.8, abs=1e-2)
    stack = model.model.layers[0].mlp.experts.down_proj.weight
    assert stack.curve.shape == (EXPERTS[family], 772)
    set_bits(model, 2.2)
    for one in stack:
        assert one.bits == pytest.approx(2.2, abs=1e-2)
    grinqh_ao.save(model, tmp_path)
    ids = torch.randint(0, 320, (1, 5))
    assert torch.equal(grinqh_ao.load(tmp_path)(ids).logits, model(ids).logits)


def test_bits_of_a_stack(family):
    model = tiny_model(family, tied=False)
    quantize_(model, GrinqhConfig(bits=3))
    calibrate(model, torch.randint(0, 320, (4, 128)))
    stack = model.model.layers[0].mlp.experts.down_proj.weight
    stack.set_bits(4)
    assert stack.bits == pytest.approx(4, abs=1e-3)
    assert [one.bits for one in stack] == pytest.approx([4] * EXPERTS[family], abs=1e-3)
    with pytest.raises(ValueError, match=r"bits of expert 0=9: expected a number above 0"):
        stack.set_bits(9)
    with pytest.raises(ValueError, match="calibrates each by what it sees"):
        stack.calibrate(stack.curve[0])


def test_going_on_after_an_interruption(family):
    """Between the projections of one layer's experts, which are calibrated all the same."""
    model = tiny_model(family, tied=False)
    config = GrinqhConfig(bits=3, calibration=[torch.randint(0, 320, (4, 128))])
    with interrupted(GrinqhTensor, "stack", call=2):
        quantize_(model, config)
    held = model.model.layers[0].mlp.experts
    assert isinstance(held.gate_up_proj, ExpertLinears)
    assert isinstance(held.down_proj, nn.Parameter)
    quantize_(model, config)
    assert isinstance(held.down_proj, ExpertLinears)
    assert all(weight.curve is not None for _, _, weight in quantized_modules(model))


def test_filters_are_asked_about_a_linear_layer(family):
    model = tiny_model(family, tied=False)
    asked = {}

    def filter_fn(module, name):
        asked[name] = module
        return all_but_head(module, name) and "down_proj" not in name

    quantize_(model, GrinqhConfig(bits=3), filter_fn)
    linear = asked["model.layers.0.mlp.experts.down_proj"]
    assert isinstance(linear, nn.Linear)
    held = model.model.layers[0].mlp.experts
    of_one = held.down_proj[0].mT if family == "gpt_oss" else held.down_proj[0]
    assert (linear.out_features, linear.in_features) == of_one.shape
    assert isinstance(held.down_proj, nn.Parameter)
    assert isinstance(held.gate_up_proj, ExpertLinears)
    same = plain.plain_model(copy.deepcopy(model))
    ids = torch.randint(0, 320, (1, 11))
    assert generate(model, ids, max_new_tokens=4) == generate(same, ids, max_new_tokens=4)


@pytest.mark.parametrize("last", [False, True])
def test_by_name(family, last):
    model = tiny_model(family, tied=False)
    q = GrinqhConfig(bits=3)
    named = {"re:.*experts.gate_up_proj": q, "model.layers.0.mlp.experts.down_proj": q}
    linear = {"re:.*q_proj": GrinqhConfig(bits=2)}
    configs = linear | named if last else named | linear
    quantize_(model, FqnToConfig(configs), filter_fn=None)
    modules = {name for name, _, _ in quantized_modules(model)}
    assert modules == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.down_proj",
    }


def test_again_changes_nothing(family):
    model = tiny_model(family, tied=False)
    quantize_(model, GrinqhConfig(bits=3))
    before = dict(model.named_parameters())
    quantize_(model, GrinqhConfig(bits=5))
    assert all(before[name] is p for name, p in model.named_parameters())


def test_bad_values_are_refused_before_anything_changes(family):
    model = tiny_model(family, tied=False)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2, 3, 4] = torch.inf
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.down_proj"):
        quantize_(model, GrinqhConfig(bits=3))
    assert summary(model).quantized == []


def test_experts_of_another_form_are_reported(log):
    """Those that do not go through transformers' interface."""
    config = transformers.Llama4TextConfig(
        **SMALL, num_local_experts=4, num_experts_per_tok=1, interleave_moe_layer_step=1
    )
    model = transformers.Llama4ForCausalLM(config).eval()
    quantize_(model, GrinqhConfig(bits=3))
    assert "in Llama4TextExperts: model.layers.0.feed_forward.experts" in log.text
    assert any("experts" in name for name in summary(model).dense)
    model(torch.randint(0, 320, (1, 3)))


@torch.no_grad()
def test_compiles_without_breaks():
    model = tiny_model("qwen3_moe", tied=False)
    quantize_(model, GrinqhConfig(bits=3))
    compiled = torch.compile(model, fullgraph=True)
    for rows in (1, 11):
        ids = torch.randint(0, 320, (1, rows))
        expected = model(ids, use_cache=False).logits
        torch.testing.assert_close(
            compiled(ids, use_cache=False).logits, expected, rtol=1e-3, atol=1e-3
        )
    token = torch.randint(0, 320, (1, 1))
    set_bits(model, 2.0)
    expected = model(token, use_cache=False).logits
    found = compiled(token, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_offloaded_experts(family):
    import accelerate

    model = tiny_model(family, tied=False)
    quantize_(model, GrinqhConfig(bits=3))
    offloaded = copy.deepcopy(model)
    accelerate.cpu_offload(offloaded, execution_device=torch.device("cpu"))
    ids = torch.randint(0, 320, (1, 11))
    for bits in (3.0, 2.0):
        set_bits(model, bits)
        set_bits(offloaded, bits)
        assert generate(offloaded, ids, max_new_tokens=4) == generate(model, ids, max_new_tokens=4)
    assert len(list(quantized_linears(offloaded))) == len(list(quantized_linears(model)))
    with pytest.raises(ValueError, match="offloaded"):
        calibrate(offloaded, torch.randint(0, 320, (1, 64)))
