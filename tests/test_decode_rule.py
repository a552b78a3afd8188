"""The switch that decodes every row."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torchao.quantization import quantize_

import plain
from grinqh_ao import GrinqhConfig, GrinqhTensor, decode_every_row, decode_rule, measure
from models import tiny_model


def test_every_row_is_decoded_as_if_alone():
    weight = GrinqhTensor.from_hp(torch.randn(96, 40))
    x, bias = torch.distributions.Laplace(0.0, 1.0).sample((2, 5, 40)), torch.randn(96)
    with decode_every_row(dense_prefix=2):
        found = F.linear(x, weight, bias)
    for b in range(2):
        torch.testing.assert_close(found[b, :2], F.linear(x[b, :2], weight.dequantize(), bias))
        for s in range(2, 5):
            expected = plain.decode(x[b, s], weight, bias).float()
            torch.testing.assert_close(found[b, s], expected, rtol=1e-4, atol=1e-5)


def test_a_prefix_as_long_as_the_input_is_dense():
    weight = GrinqhTensor.from_hp(torch.randn(96, 40))
    x = torch.randn(9, 40)
    dense = F.linear(x, weight)
    for prefix in (9, 100):
        with decode_every_row(prefix):
            assert torch.equal(F.linear(x, weight), dense)


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_agrees_with_decoding_token_by_token(family, tied):
    """Logit by logit, with a real KV cache after a real dense prefill."""
    model = tiny_model(family, tied=tied)
    quantize_(model, GrinqhConfig(bits=3))
    # One in a hundred such texts has a channel so near a threshold that rounding decides its level.
    torch.manual_seed(1)
    ids = torch.randint(0, 320, (1, 24))
    prompt = 9
    with decode_every_row(dense_prefix=prompt):
        at_once = model(ids, use_cache=False).logits
    output = model(ids[:, :prompt], use_cache=True)
    steps = [output.logits]
    for position in range(prompt, ids.shape[1]):
        token = ids[:, position : position + 1]
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
        steps.append(output.logits)
    torch.testing.assert_close(at_once, torch.cat(steps, dim=1), rtol=1e-3, atol=1e-3)
    assert (at_once - model(ids, use_cache=False).logits)[:, prompt:].abs().max() > 0.05


def test_by_itself_and_together():
    """A few rows share the highest level of a channel; under the switch each has its own."""
    weight = GrinqhTensor.from_hp(torch.randn(96, 40), bits=2)
    x = torch.distributions.Laplace(0.0, 1.0).sample((4, 40))
    together = F.linear(x, weight)
    torch.testing.assert_close(
        together.double(), plain.decode_together(x, weight), rtol=0, atol=1e-4
    )
    with decode_every_row():
        alone = F.linear(x, weight)
    expected = torch.stack([plain.decode(row, weight) for row in x])
    torch.testing.assert_close(alone.double(), expected, rtol=0, atol=1e-4)
    assert (together - alone).abs().max() > 0.1


def test_experts_know_where_sequences_begin_whatever_a_router_sees():
    """Routers may be given all tokens of a batch in one row, as experts are."""
    with decode_every_row(dense_prefix=2):
        decode_rule.note_sequence(torch.empty(2, 6, 40))
        decode_rule.note_sequence(torch.empty(12, 40))
        assert decode_rule.decoded_tokens(12).tolist() == [False, False, *[True] * 4] * 2


class Flattens(torch.nn.Module):
    """A layer that sees sequences, and one that sees all tokens of a batch in one dimension."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(40, 64), torch.nn.Linear(64, 96)

    def forward(self, x):
        y = self.first(x)
        return self.second(y.flatten(0, 1)).view(*y.shape[:2], -1)


@torch.no_grad()
def test_tokens_in_one_dimension_belong_to_sequences():
    """As OPT and mixtures with shared experts put them; a text's results are those of its own."""
    model = Flattens()
    quantize_(model, GrinqhConfig(bits=2))
    x = torch.distributions.Laplace(0.0, 1.0).sample((3, 12, 40))
    with decode_every_row(dense_prefix=5), measure(model) as measured:
        together = model(x)
    assert measured._counters["second"].tokens == 3 * 7
    with decode_every_row(dense_prefix=5):
        for text, expected in zip(x, together, strict=True):
            torch.testing.assert_close(model(text[None])[0], expected)


@torch.no_grad()
def test_a_row_of_each_sequence_is_decoded_whatever_the_prefix():
    """Next tokens of a batch, or where a model computes logits of last tokens only."""
    model = Flattens()
    quantize_(model, GrinqhConfig(bits=2))
    x = torch.distributions.Laplace(0.0, 1.0).sample((12, 1, 40))
    with decode_every_row(dense_prefix=5):
        assert decode_rule.first_row_by_shape(x) == 0
        together = model(x)
        assert decode_rule.decoded_tokens(12) is True
        for row, expected in zip(x, together, strict=True):
            torch.testing.assert_close(model(row[None])[0], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_rounds_activations_and_results_only(dtype):
    """Not the product of each level."""
    weight = GrinqhTensor.from_hp(torch.randn(96, 40))
    x = torch.distributions.Laplace(0.0, 1.0).sample((12, 40))
    with decode_every_row():
        expected = F.linear(x.to(dtype), weight)
        with torch.autocast("cpu", dtype):
            found = F.linear(x, weight)
    assert found.dtype == dtype
    assert torch.equal(found, expected)


def test_is_off_again_afterwards_and_in_other_threads():
    weight = GrinqhTensor.from_hp(torch.randn(96, 40))
    x = torch.randn(9, 40)
    dense = F.linear(x, weight)
    elsewhere = []
    with pytest.raises(RuntimeError, match="stop"), decode_every_row():
        assert not torch.equal(F.linear(x, weight), dense)
        thread = threading.Thread(target=lambda: elsewhere.append(F.linear(x, weight)))
        thread.start()
        thread.join()
        raise RuntimeError("stop")
    assert torch.equal(elsewhere[0], dense)
    assert torch.equal(F.linear(x, weight), dense)


@pytest.mark.parametrize("inside_first", [True, False])
@torch.no_grad()
def test_compiled_functions_follow_the_switch(inside_first):
    """With the real inductor, whose graphs (and whose cache on disk) know nothing of it."""
    linear = torch.nn.Linear(40, 96)
    quantize_(linear, GrinqhConfig(bits=2))
    x = torch.distributions.Laplace(0.0, 1.0).sample((9, 40))
    dense = linear(x)
    with decode_every_row():
        decoded = linear(x)
    compiled = torch.compile(linear)
    if not inside_first:
        torch.testing.assert_close(compiled(x), dense)
    with decode_every_row():
        torch.testing.assert_close(compiled(x), decoded)
    torch.testing.assert_close(compiled(x), dense)
    assert (dense - decoded).abs().max() > 0.1


@pytest.mark.parametrize("prefix", [-1, 1.5, "1", None])
def test_bad_prefix(prefix):
    with pytest.raises(ValueError, match="dense_prefix="), decode_every_row(prefix):
        pass
