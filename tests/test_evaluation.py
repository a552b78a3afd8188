"""KL, perplexity and agreement, against the formulas on a tiny model."""

import pytest
import torch
from torchao.quantization import quantize_

from grinqh_ao import GrinqhConfig, decode_every_row, set_bits
from grinqh_ao.evaluation import evaluate, reference
from models import tiny_model


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 320, (3, 20))


def test_a_model_equals_itself(family, ids):
    model = tiny_model(family, tied=False)
    found = evaluate(model, reference(model, ids), dense_prefix=4)
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert found.agreement == 1
    assert found.positions == 3 * 16


@torch.no_grad()
@pytest.mark.parametrize("decode_rule", [True, False])
def test_formulas(family, ids, decode_rule):
    model = tiny_model(family, tied=False)
    full = reference(model, ids)
    quantize_(model, GrinqhConfig(bits=2))
    found = evaluate(model, full, decode_rule=decode_rule, dense_prefix=4)
    if decode_rule:
        with decode_every_row(4):
            logits = model(ids).logits
    else:
        logits = model(ids).logits
    p, q = torch.stack(full.log_probs)[:, 4:].double(), logits[:, 4:].double().log_softmax(-1)
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    target = torch.nn.functional.one_hot(ids[:, 5:], 320).double()
    nll = -(q[:, :-1] * target).sum(-1).mean()
    assert found.perplexity == pytest.approx(float(nll.exp()), rel=1e-4)
    assert found.agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    kl = (p.exp() * (p - q)).sum(-1).flatten()
    assert found.kl_median == pytest.approx(float(kl.median()), rel=1e-3)
    assert found.kl_p90 == pytest.approx(float(kl.quantile(0.9)), rel=1e-3)
    assert (found.read is not None) == decode_rule
    if decode_rule:
        assert found.read.body.bits == pytest.approx(2, abs=0.5)


@torch.no_grad()
def test_it_is_decoding_token_by_token_after_a_dense_prefill(family, ids):
    model = tiny_model(family, tied=False)
    full = reference(model, ids)
    quantize_(model, GrinqhConfig(bits=2.5))
    found = evaluate(model, full, dense_prefix=10)
    divergences = []
    for row, expected in zip(ids, full.log_probs, strict=True):
        prefill = model(row[None, :10], use_cache=True)
        cache = prefill.past_key_values
        for position in range(10, len(row)):
            output = model(row[None, position : position + 1], past_key_values=cache)
            q = output.logits[0, -1].double().log_softmax(-1)
            p = expected[position].double()
            divergences.append(float((p.exp() * (p - q)).sum()))
    assert found.kl == pytest.approx(sum(divergences) / len(divergences), rel=1e-3)


def test_cached_references(family, ids, tmp_path):
    model = tiny_model(family, tied=False)
    expected = reference(model, ids)
    cache = tmp_path / "a folder" / "in one"
    first = reference(model, ids, cache=cache)
    (file,) = cache.iterdir()
    written = file.stat().st_mtime_ns
    again = reference(model, ids, cache=cache)
    assert file.stat().st_mtime_ns == written
    for found in (first, again):
        assert len(found.log_probs) == 3
        rows = zip(found.log_probs, expected.log_probs, strict=True)
        assert all(torch.equal(one, other) for one, other in rows)
    with torch.no_grad():
        model.lm_head.weight[-1].mul_(1.01)
    reference(model, ids, cache=cache)
    reference(model, ids + 1 - ids.min(), cache=cache)
    reference(model, ids[:2].view(4, 10), cache=cache)
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 5.0}
    reference(model, ids, cache=cache)
    assert len(list(cache.iterdir())) == 5
    quantize_(model, GrinqhConfig(bits=2))
    with pytest.raises(ValueError, match="full precision"):
        reference(model, ids, cache=cache)


def test_references_of_adapters_and_buffers_are_kept_apart(ids, tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        tiny_model("llama", tied=False),
        peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False),
    )
    adapted = reference(model, ids, cache=tmp_path)
    with model.disable_adapter():
        plain, expected = reference(model, ids, cache=tmp_path), reference(model, ids)
    assert torch.equal(plain.log_probs[0], expected.log_probs[0])
    assert not torch.equal(plain.log_probs[0], adapted.log_probs[0])
    model.base_model.model.model.rotary_emb.inv_freq.mul_(2)
    assert not torch.equal(reference(model, ids, cache=tmp_path).log_probs[0], adapted.log_probs[0])
    assert torch.equal(adapted.log_probs[-1], adapted.log_probs[2])
    with pytest.raises(IndexError):
        adapted.log_probs[3]


def test_dropout_is_off(ids):
    model = tiny_model("phi", tied=False, resid_pdrop=0.3).train()
    assert evaluate(model, reference(model, ids), dense_prefix=4).kl == pytest.approx(0, abs=1e-6)
    assert model.training


def test_bad_ids():
    with pytest.raises(TypeError, match="input_ids is a list: expected a tensor"):
        reference(tiny_model("llama", tied=False), [torch.zeros(1, 20, dtype=torch.int64)])
    with pytest.raises(ValueError, match=r"input_ids of shape \(20,\)"):
        reference(tiny_model("llama", tied=False), torch.zeros(20, dtype=torch.int64))


def test_more_bits_are_closer(family, ids):
    model = tiny_model(family, tied=False)
    full = reference(model, ids)
    quantize_(model, GrinqhConfig(bits=8))
    divergences = []
    for bits in (8, 4, 2, 1):
        set_bits(model, bits)
        divergences.append(evaluate(model, full).kl)
    assert divergences == sorted(divergences)


@pytest.mark.parametrize("prompt", [0, 18])
def test_first_and_last_prompt_that_leave_something_to_score(ids, prompt):
    model = tiny_model("llama", tied=False)
    found = evaluate(model, reference(model, ids), dense_prefix=prompt)
    assert found.positions == len(ids) * (20 - prompt)


@pytest.mark.parametrize("prefix", [-1, 19, 20, 4.0])
def test_bad_prefix(ids, prefix):
    model = tiny_model("llama", tied=False)
    with pytest.raises(ValueError, match=f"dense_prefix={prefix}: expected 0 to 18"):
        evaluate(model, reference(model, ids), dense_prefix=prefix)


def test_default_dtypes_do_not_matter():
    model = tiny_model("llama", tied=True)
    full = reference(model, torch.randint(0, 320, (1, 40)))
    expected = evaluate(model, full)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert evaluate(model, full).perplexity == expected.perplexity
    finally:
        torch.set_default_dtype(torch.float32)


def test_what_is_no_reference():
    with pytest.raises(TypeError, match="reference is a Tensor: expected what"):
        evaluate(tiny_model("llama", tied=True), torch.zeros(1, 40, dtype=torch.long))
