"""``from_pretrained(..., tp_plan="auto")`` under torchrun: what one rank says, two say too."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torchao.quantization import quantize_

import grinqh_ao
import models

WORKER = Path(__file__).with_name("worker.py")
HEAD = {"llama": {}, "qwen3": {"head_dim": 128}, "tied": {}}


def run(model: Path, output: Path, *how: str, ranks: int = 1) -> dict:
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {name: v for name, v in os.environ.items() if name != "RANK"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [*launcher, str(WORKER), str(model), str(output), *how],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text())


@pytest.fixture(scope="module", params=HEAD)
def saved(request, tmp_path_factory):
    """Directories of a dense model and of the same, quantized."""
    directory = tmp_path_factory.mktemp(request.param)
    tied = request.param == "tied"
    family = "llama" if tied else request.param
    sizes = models.CUTTABLE | HEAD[request.param]
    model = models.tiny_model(family, tied=tied, **sizes)
    model.save_pretrained(directory / "dense")
    quantize_(model, grinqh_ao.GrinqhConfig(bits=3))
    grinqh_ao.save(model, directory / "quantized")
    return directory


def clear_steps(leads: list[float]) -> int:
    """Before the first whose two best tokens are so close that rounding may swap them: another
    order of sums can put a channel on the other side of a threshold."""
    close = [step for step, lead in enumerate(leads) if lead < 0.005]
    steps = close[0] if close else len(leads)
    assert steps >= 8
    return steps


def test_two_ranks_say_what_one_says(saved):
    alone = run(saved / "quantized", saved / "alone.json")
    ways = [([], "quantized")]
    if "qwen3" not in saved.name:  # there it is as with Llama
        ways.append((["quantize"], "dense"))
    for how, model in ways:
        together = run(saved / model, saved / "together.json", *how, ranks=2)
        for what, tokens in alone.items():
            if what.endswith("rows"):
                steps = clear_steps(alone[f"{what}: lead"])
                assert [row[:steps] for row in together[what]] == [row[:steps] for row in tokens]
        for name, (n, k) in alone["shapes"].items():
            if name == "lm_head" and "tied" in saved.name:
                expected = [n, k]
            elif name.endswith(("o_proj", "down_proj")):
                expected = [n, k // 2]
            else:
                expected = [n // 2, k]
            assert together["shapes"][name] == expected
        for attempt in ("save", "calibrate"):
            assert "tensor parallelism" in together[attempt]
        if not how and "tied" not in saved.name:
            # Its half of the large weights; of small ones whole tiles, and pages around.
            assert together["read"] < 0.85 < alone["read"]


@pytest.mark.parametrize(
    ("family", "message"),
    [
        # Four heads of 16: 32 outputs for each rank.
        ("llama", "model.layers.0.self_attn.q_proj.weight: 64 outputs cannot be cut in 2"),
        ("qwen3_moe", "weight of ExpertLinears, quantized: cannot be cut in 2"),
    ],
)
def test_a_model_that_cannot_be_cut(tmp_path, family, message):
    config, model_class, more = models.FAMILIES[family]
    with pytest.MonkeyPatch.context() as patch:
        if family == "qwen3_moe":  # all but its experts could be
            more = more | {"hidden_size": 128, "head_dim": 64, "vocab_size": 384}
            patch.setitem(models.FAMILIES, family, (config, model_class, more))
        model = models.tiny_model(family, tied=False)
    quantize_(model, grinqh_ao.GrinqhConfig(bits=3))
    grinqh_ao.save(model, tmp_path / "model")
    found = run(tmp_path / "model", tmp_path / "report.json", ranks=2)
    assert message in found["error"]
