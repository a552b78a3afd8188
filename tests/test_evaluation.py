"""KL, perplexity and agreement, against the formulas on a tiny model."""

import pytest
import torch
from torchao.quantization import quantize_

from grinqh_ao import GrinqhConfig, decode_every_row, set_bits
from grinqh_ao.evaluation import quality, reference
from models import tiny_model


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 320, (3, 20))


def test_a_model_equals_itself(family, ids):
    model = tiny_model(family, tied=False)
    found = quality(model, reference(model, ids), dense_prefix=4)
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert found.agreement == 1
    assert found.positions == 3 * 16


@torch.no_grad()
@pytest.mark.parametrize("decode_rule", [True, False])
def test_formulas(family, ids, decode_rule):
    model = tiny_model(family, tied=False)
    full = reference(model, ids)
    quantize_(model, GrinqhConfig(bits=2))
    found = quality(model, full, decode_rule=decode_rule, dense_prefix=4)
    if decode_rule:
        with decode_every_row(4):
            logits = model(ids).logits
    else:
        logits = model(ids).logits
    p, q = full.log_probs[:, 4:].double(), logits[:, 4:].double().log_softmax(-1)
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    target = torch.nn.functional.one_hot(ids[:, 5:], 320).double()
    nll = -(q[:, :-1] * target).sum(-1).mean()
    assert found.perplexity == pytest.approx(float(nll.exp()), rel=1e-4)
    assert found.agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))


def test_more_bits_are_closer(family, ids):
    model = tiny_model(family, tied=False)
    full = reference(model, ids)
    quantize_(model, GrinqhConfig(bits=8))
    divergences = []
    for bits in (8, 4, 2, 1):
        set_bits(model, bits)
        divergences.append(quality(model, full).kl)
    assert divergences == sorted(divergences)


@pytest.mark.parametrize("prefix", [-1, 19, 20])
def test_bad_prefix(ids, prefix):
    model = tiny_model("llama", tied=False)
    with pytest.raises(ValueError, match=f"dense_prefix={prefix}: expected 0 to 18"):
        quality(model, reference(model, ids), dense_prefix=prefix)
