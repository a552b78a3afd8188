"""Saved models in processes of their own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import grinqh_ao
from saved import IDS, logits, quantized


def python(code, *arguments):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    model = quantized()
    grinqh_ao.save(model, directory / "model")
    torch.save((IDS, logits(model)), directory / "logits.pt")
    return directory


CHECK = """
import sys, torch
model_path, logits_path = sys.argv[1:]
ids, expected = torch.load(logits_path)
{load}
with torch.no_grad():
    found = torch.cat([model(ids).logits, model(ids[:, :1]).logits], dim=1)
assert torch.equal(found, expected)
import grinqh_ao
grinqh_ao.set_bits(model, 2)
print("identical")
"""


@pytest.mark.parametrize(
    "load",
    [
        "import grinqh_ao; model = grinqh_ao.load(model_path)",
        "import grinqh_ao; from transformers import AutoModelForCausalLM; "
        "model = AutoModelForCausalLM.from_pretrained(model_path)",
        "from transformers import AutoModelForCausalLM; "
        "model = AutoModelForCausalLM.from_pretrained(model_path, trust_remote_code=True)",
    ],
    ids=["load", "from_pretrained", "trust_remote_code"],
)
def test_identical_in_a_fresh_process(saved, load, tmp_path):
    done = python(CHECK.format(load=load), saved / "model", saved / "logits.pt")
    assert done.stdout.strip().endswith("identical"), done.stderr


def test_without_the_import_loading_fails(saved, tmp_path):
    """Also of what plain save_pretrained has written."""
    plain = tmp_path / "plain"
    shutil.copytree(saved / "model", plain)
    (plain / "modeling_grinqh.py").unlink()
    code = """
import sys
from transformers import AutoModelForCausalLM
for directory in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(directory)
    except RuntimeError:
        print("failed")
"""
    done = python(code, saved / "model", plain)
    assert done.stdout.split() == ["failed", "failed"]
    assert done.stderr.count("Unknown quantization type, got grinqh") == 2


def test_a_pickled_mixture_runs_in_a_fresh_process(tmp_path):
    model = quantized("mixtral", tied=False)
    torch.save(model, tmp_path / "model.pt")
    torch.save((IDS, logits(model)), tmp_path / "logits.pt")
    load = "import grinqh_ao; model = torch.load(model_path, weights_only=False)"
    done = python(CHECK.format(load=load), tmp_path / "model.pt", tmp_path / "logits.pt")
    assert done.stdout.strip().endswith("identical"), done.stderr


def test_without_transformers_the_package_still_works():
    code = """
import sys
sys.modules["transformers"] = None
import torch, grinqh_ao
from torchao.quantization import quantize_
model = torch.nn.Sequential(torch.nn.Linear(64, 64))
quantize_(model, grinqh_ao.GrinqhConfig(bits=3))
assert type(model[0].weight).__name__ == "GrinqhTensor"
try:
    from grinqh_ao import GrinqhHfConfig
except ImportError as error:
    print(error)
try:
    grinqh_ao.load("x")
except ImportError as error:
    print(error)
assert not hasattr(grinqh_ao, "nothing")
from grinqh_ao import *
"""
    done = python(code)
    for name in ("GrinqhHfConfig", "load"):
        assert f"grinqh_ao.{name} needs transformers" in done.stdout, done.stderr
