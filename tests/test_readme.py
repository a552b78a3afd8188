"""The README's Python runs as printed."""

import re
from pathlib import Path

import pytest
import torch

from models import tiny_model, tiny_tokenizer

README = Path(__file__).parents[1] / "README.md"


def test_snippets(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model("llama", tied=True).save_pretrained("a-model")
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert snippets
    ids = torch.randint(0, 320, (1, 5))
    names = {
        "name": "a-model",
        "model": tiny_model("llama", tied=True),
        "texts": [" ".join(f"w{i}" for i in range(300))],
        "tokenizer": tiny_tokenizer(" ".join(f"w{i}" for i in range(300))),
        "inputs": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
    }
    for snippet in snippets:
        exec(snippet, names)
    assert "bits read per weight and token: 2.50" in capsys.readouterr().out
    assert names["measured"].body.bits == pytest.approx(2.5, abs=0.25)
