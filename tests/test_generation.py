"""Unchanged ``generate()`` on tiny random models, eager and compiled."""

import copy

import pytest
import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchao.quantization import quantize_

import plain
from grinqh_ao import GrinqhConfig, measure, ops, set_bits
from grinqh_ao.model import quantized_linears
from models import tiny_model


class CountOps(TorchDispatchMode):
    """Counts the calls of every op."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func] = self.calls.get(func, 0) + 1
        return func(*args, **(kwargs or {}))


def generate(model: nn.Module, ids: torch.Tensor, **options) -> list[int]:
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0} | options
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0].tolist()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", [2, 3.5, 8])
def test_greedy_tokens_are_those_of_a_plain_model(family, tied, bits):
    model = tiny_model(family, tied=tied)
    full = generate(model, ids := torch.randint(0, 320, (1, 7)))
    quantize_(model, GrinqhConfig(bits=bits))
    tokens = generate(model, ids)
    assert tokens == generate(plain.plain_model(copy.deepcopy(model)), ids)
    if bits == 2:
        assert tokens != full  # the rule changes something here, so that equality says something


def test_decode_op_is_called_once_per_linear_and_token(family):
    model = tiny_model(family, tied=False)
    quantize_(model, GrinqhConfig(bits=3))
    layers = len(list(quantized_linears(model)))
    assert layers == 2 * 7 + 1
    with CountOps() as count:
        generate(model, torch.randint(0, 320, (1, 11)), max_new_tokens=5)
    # Eleven tokens are a prompt. It yields the first token: its head sees one row already.
    assert count.calls[ops.decode_linear] == 1 + 4 * layers
    assert count.calls[ops.dense_linear] == layers - 1


@torch.no_grad()
def test_compiles_without_breaks_and_set_bits_does_not_recompile(family):
    model = tiny_model(family, tied=True)
    quantize_(model, GrinqhConfig(bits=3))
    graphs = 0

    def backend(graph, inputs):
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    token = torch.randint(0, 320, (1, 1))
    at_3 = compiled(token, use_cache=False).logits
    torch.testing.assert_close(at_3, model(token, use_cache=False).logits)
    before = graphs
    assert before > 0
    results = {}
    for bits in (2, 4, 3):
        set_bits(model, bits)
        results[bits] = compiled(token, use_cache=False).logits
    assert graphs == before
    assert torch.equal(results[3], at_3)
    assert not torch.allclose(results[2], results[4])


@torch.no_grad()
def test_inductor_gives_the_same_logits(family):
    model = tiny_model(family, tied=False)
    quantize_(model, GrinqhConfig(bits=3))
    compiled = torch.compile(model, fullgraph=True)
    for rows in (1, 5, 11):
        ids = torch.randint(0, 320, (1, rows))
        expected = model(ids, use_cache=False).logits
        found = compiled(ids, use_cache=False).logits
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_compiled_forward_in_a_generation_loop():
    model = tiny_model("llama", tied=True)
    quantize_(model, GrinqhConfig(bits=3))
    ids = torch.randint(0, 320, (1, 7))
    expected = generate(model, ids)
    model.forward = torch.compile(model.forward, fullgraph=True, dynamic=True, backend="eager")
    assert generate(model, ids) == expected


@pytest.mark.parametrize("skipped", ["of modules", "all"])
def test_compiled_and_unchecked(skipped):
    model = tiny_model("llama", tied=True)
    quantize_(model, GrinqhConfig(bits=3))
    ids = torch.randint(0, 320, (1, 9))
    graphs = 0

    def backend(graph, inputs):
        nonlocal graphs
        graphs += 1
        return graph.forward

    options = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    config = transformers.CompileConfig(
        backend=backend,
        fullgraph=True,
        mode=None,
        options=options if skipped == "of modules" else None,
    )
    config._compile_all_devices = True
    compiled = {"cache_implementation": "static", "compile_config": config}
    for bits in (3, 2, 4):
        set_bits(model, bits)
        with measure(model) as alone:
            expected = generate(model, ids)
        with torch.compiler.set_stance(skip_guard_eval_unsafe=graphs > 0 and skipped == "all"):
            assert generate(model, ids, **compiled) == expected
            with measure(model) as measured:  # eagerly
                assert generate(model, ids, **compiled) == expected
        assert measured.total == alone.total
        assert graphs == 1
    with (
        torch.compiler.set_stance(skip_guard_eval_unsafe=True),
        pytest.raises(RuntimeError, match="skip_guard_eval_unsafe"),
    ):  # not a wrong text: another size of the cache is seen
        generate(model, ids, max_new_tokens=20, **compiled)


def test_set_bits_changes_what_is_measured_and_back_is_identical(family):
    model = tiny_model(family, tied=False)
    quantize_(model, GrinqhConfig(bits=2, head_bits=0.5))
    ids = torch.randint(0, 320, (1, 7))
    seen = []
    for bits in (2, 4, 6, 2):
        set_bits(model, bits)
        with measure(model) as measured, torch.no_grad():
            logits = model(ids[:, :1], use_cache=False).logits
            generate(model, ids)
        assert measured.total.bits == pytest.approx(bits, abs=0.35)
        seen.append((measured.total, logits))
    assert seen[0][0] == seen[3][0]
    assert torch.equal(seen[0][1], seen[3][1])
    assert not torch.allclose(seen[0][1], seen[1][1])
