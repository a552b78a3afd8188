"""The adapter for lm-evaluation-harness, offline, on tasks whose data is here."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.tasks import TaskManager
from torchao.quantization import quantize_

from grinqh_ao import GrinqhConfig, decode_every_row, measure
from grinqh_ao.harness import GrinqhLM
from models import tiny_model, tiny_tokenizer

TASKS = Path(__file__).with_name("harness_tasks")


@pytest.fixture
def tasks(tmp_path, monkeypatch) -> TaskManager:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    for file in TASKS.glob("*.yaml"):
        text = file.read_text().replace("SOUNDS", str(TASKS / "sounds.jsonl"))
        (tmp_path / file.name).write_text(text)
    return TaskManager(include_path=str(tmp_path), include_defaults=False)


def adapter(model, **options) -> GrinqhLM:
    words = (TASKS / "sounds.jsonl").read_text() + " ".join(f.read_text() for f in TASKS.glob("*"))
    tokenizer = tiny_tokenizer(words)
    return GrinqhLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=4, **options)


@pytest.mark.filterwarnings("ignore")
def test_both_kinds_of_tasks_decode(tasks):
    model = adapter(tiny_model("llama", tied=False), bits=2.5)
    with measure(model.model) as measured:
        results = lm_eval.simple_evaluate(
            model=model, tasks=["sounds_choice", "sounds_generate"], task_manager=tasks,
            log_samples=True, bootstrap_iters=0,
        )  # fmt: skip
    assert measured.body.bits == pytest.approx(2.5, abs=0.5)
    assert 0 <= results["results"]["sounds_choice"]["acc,none"] <= 1
    assert "exact_match,none" in results["results"]["sounds_generate"]
    assert results["config"]["grinqh_bits"] == 2.5
    assert len(results["samples"]["sounds_generate"]) == 8


def test_likelihoods_are_those_of_the_decode_rule():
    dense = tiny_model("llama", tied=False)
    model = adapter(dense, bits=2, prompt=4)
    ids = torch.randint(0, 320, (2, 30))
    found = model._model_call(ids)
    with torch.no_grad():
        with decode_every_row(4):
            assert torch.equal(found, model.model(ids).logits)
        assert not torch.equal(found, model.model(ids).logits)


def test_a_quantized_model_is_taken_as_it_is():
    model = tiny_model("llama", tied=False)
    quantize_(model, GrinqhConfig(bits=4, levels=[0, 2, 4]))
    weight = model.model.layers[0].mlp.up_proj.weight
    assert adapter(model, bits=3).model.model.layers[0].mlp.up_proj.weight is weight
    assert weight.bits == pytest.approx(3, abs=1e-3)
