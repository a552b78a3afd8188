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
    return GrinqhLM(pretrained=model, tokenizer=tokenizer, device="cpu", **options)


@pytest.mark.filterwarnings("ignore")
def test_both_kinds_of_tasks_decode(tasks):
    model = adapter(tiny_model("llama", tied=False), bits=2.5, batch_size=16)
    for task, metric in (("sounds_choice", "acc,none"), ("sounds_generate", "exact_match,none")):
        with measure(model.model) as measured:
            results = lm_eval.simple_evaluate(
                model=model, tasks=[task], task_manager=tasks, log_samples=True, bootstrap_iters=0
            )
        assert measured.body.bits == pytest.approx(2.5, abs=0.4), task
        assert 0 <= results["results"][task][metric] <= 1
        assert results["config"]["grinqh_bits"] == pytest.approx(2.5, abs=1e-3)
        assert len(results["samples"][task]) == 8


def test_a_batch_generates_what_its_texts_do_alone():
    model = adapter(tiny_model("llama", tied=False), bits=2)
    rows = [torch.randint(0, 300, (1, length)) for length in (12, 20)]
    context = torch.cat([torch.nn.functional.pad(row, (20 - row.shape[1], 0)) for row in rows])
    mask = torch.tensor([[0] * 8 + [1] * 12, [1] * 20])
    found = model._model_generate(context, 26, ["[END]"], attention_mask=mask)
    for row, text in zip(rows, found, strict=True):
        alone = model.model.generate(
            row, max_length=row.shape[1] + 6, do_sample=False, pad_token_id=319
        )
        new = alone[0, row.shape[1] :]
        assert torch.equal(text[20 : 20 + len(new)], new)


def test_likelihoods_are_those_of_the_decode_rule():
    dense = tiny_model("llama", tied=False)
    model = adapter(dense, bits=2, dense_prefix=4)
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
    assert adapter(model).model.model.layers[0].mlp.up_proj.weight is weight
    assert weight.bits == pytest.approx(4, abs=1e-3)
    adapter(model, bits=3)
    assert weight.bits == pytest.approx(3, abs=1e-3)


@pytest.mark.parametrize("bad", [{"bits": 9}, {"dense_prefix": -1}, {"head_bits": 0}])
def test_bad_arguments(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}="):
        adapter(tiny_model("llama", tied=False), **bad)
