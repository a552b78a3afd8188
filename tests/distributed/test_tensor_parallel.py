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
CANNOT_BE_CUT = {
    # Four heads of 16: 32 outputs for each rank.
    "llama": "model.layers.0.self_attn.q_proj.weight: 64 outputs cannot be cut in 2",
    "qwen3_moe": "weight of ExpertLinears, quantized: cannot be cut in 2",
}


def run(directory: Path, jobs: list[tuple[str, Path, str]], ranks: int = 1) -> dict[str, dict]:
    """Reports of jobs (name, model, how), which ranks do together."""
    directory.mkdir()
    file = directory / "jobs"
    file.write_text(json.dumps([(name, str(model), how) for name, model, how in jobs]))
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {name: v for name, v in os.environ.items() if name != "RANK"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [*launcher, str(WORKER), str(file)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: json.loads((directory / f"{name}.json").read_text()) for name, _, _ in jobs}


def save(name: str, directory: Path) -> None:
    """A dense model and the same, quantized."""
    tied = name == "tied"
    sizes = models.CUTTABLE | HEAD[name]
    model = models.tiny_model("llama" if tied else name, tied=tied, **sizes)
    model.save_pretrained(directory / name / "dense")
    quantize_(model, grinqh_ao.GrinqhConfig(bits=3))
    grinqh_ao.save(model, directory / name / "quantized")


def save_what_cannot_be_cut(family: str, directory: Path) -> None:
    config, model_class, more = models.FAMILIES[family]
    with pytest.MonkeyPatch.context() as patch:
        if family == "qwen3_moe":  # all but its experts could be
            more = more | {"hidden_size": 128, "head_dim": 64, "vocab_size": 384}
            patch.setitem(models.FAMILIES, family, (config, model_class, more))
        model = models.tiny_model(family, tied=False)
    quantize_(model, grinqh_ao.GrinqhConfig(bits=3))
    grinqh_ao.save(model, directory)


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> tuple[dict[str, dict], dict[str, dict]]:
    """Of all models: by one process alone, and by two together."""
    directory = tmp_path_factory.mktemp("models")
    for name in HEAD:
        save(name, directory)
    for family in CANNOT_BE_CUT:
        save_what_cannot_be_cut(family, directory / f"{family}-whole")
    alone = [(name, directory / name / "quantized", "load") for name in HEAD]
    together = [*((f"{name}-load", model, how) for name, model, how in alone)]
    together += [(f"{name}-quantize", directory / name / "dense", "quantize") for name in HEAD]
    together += [(f"{f}-whole", directory / f"{f}-whole", "load") for f in CANNOT_BE_CUT]
    return run(directory / "alone", alone), run(directory / "together", together, ranks=2)


def clear_steps(leads: list[float]) -> int:
    """Before the first whose two best tokens are so close that rounding may swap them: another
    order of sums can put a channel on the other side of a threshold."""
    close = [step for step, lead in enumerate(leads) if lead < 0.005]
    steps = close[0] if close else len(leads)
    assert steps >= 8
    return steps


@pytest.mark.parametrize("how", ["load", "quantize"])
@pytest.mark.parametrize("name", HEAD)
def test_two_ranks_say_what_one_says(reports, name, how):
    alone, together = reports[0][name], reports[1][f"{name}-{how}"]
    for what, tokens in alone.items():
        if what.endswith("rows"):
            steps = clear_steps(alone[f"{what}: lead"])
            assert [row[:steps] for row in together[what]] == [row[:steps] for row in tokens]
    for layer, (n, k) in alone["shapes"].items():
        if layer == "lm_head" and name == "tied":
            expected = [n, k]
        elif layer.endswith(("o_proj", "down_proj")):
            expected = [n, k // 2]
        else:
            expected = [n // 2, k]
        assert together["shapes"][layer] == expected
    for attempt in ("save", "calibrate"):
        assert "tensor parallelism" in together[attempt]
    if how == "load" and name != "tied":
        # Its half of the large weights; of small ones whole tiles, and pages around.
        assert together["read"] < 0.85 < alone["read"]


@pytest.mark.parametrize("family", CANNOT_BE_CUT)
def test_a_model_that_cannot_be_cut(reports, family):
    assert CANNOT_BE_CUT[family] in reports[1][f"{family}-whole"]["error"]
