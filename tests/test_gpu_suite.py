"""The Python of the GPU suite, on a CPU and small sizes: GPU time is too scarce to find typos."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from gpu_suite import checks, experts, kernels, sweep, timing
from gpu_suite import models as whole_models


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    def compare(candidates):
        for calls in candidates.values():
            calls[0]()
        return dict.fromkeys(candidates, 2.0)

    monkeypatch.setattr(timing, "DEVICE", "cpu")
    monkeypatch.setattr(timing, "compare", compare)
    monkeypatch.setattr(timing, "ROTATION_BYTES", 1)
    monkeypatch.setattr(kernels, "COPY_BYTES", 1024)
    kernels.bandwidth()
    yield
    assert torch.is_grad_enabled()  # other tests need them


def test_correctness(monkeypatch):
    monkeypatch.setattr(checks, "SHAPES", [(70, 9), (5, 1)])
    monkeypatch.setattr(checks, "LARGE", [(70, 9, 4)])
    monkeypatch.setattr(checks, "FUSED", [((40, 9), 1), ((5, 1), 3)])
    report = checks.correctness()
    assert report["cases"] == 2 * (1 + 5) * 3 + 3 + 6 + 6 + 6
    monkeypatch.setattr(checks, "TOLERANCE", dict.fromkeys(checks.TOLERANCE, -1.0))
    with pytest.raises(AssertionError, match="51 of 57 cases are wrong"):
        checks.correctness()


def test_compiled_generation():
    report = checks.compiled_generation()
    assert report["fused"]["difference to eager"] < 0.1


def test_kernels(monkeypatch):
    small = {(64, 128): 2, (128, 128): 1}
    for name in ("QWEN3_8B", "QWEN3_8B_FUSED"):
        monkeypatch.setattr(kernels, name, small)
    monkeypatch.setattr(kernels, "SHAPES", list(small))
    monkeypatch.setattr(kernels, "COMPARED", [(128, 128)])
    report = kernels.speed()
    assert set(report["rows"][1]["us"]) >= {"bf16", "fp16", "grinqh 2", "grinqh 8"}
    assert report["qwen3_8b_token_us"]["fused"]["grinqh 3"] == 36 * 3 * 2
    # 128 x 128 weights at 8 bits with a scale for 64: what reading them takes at the copy's speed.
    expected = 128 * 128 * 8.125 / 8 / 1024
    assert report["rows"][1]["share_of_bandwidth"]["8"] == pytest.approx(expected / 2)


def test_sweep(monkeypatch):
    monkeypatch.setattr(sweep, "SHAPES", [(512, 1024)])
    monkeypatch.setattr(sweep.decode, "gpu_of", lambda index: sweep.configurations.Gpu(90, 132))
    monkeypatch.setattr(sweep, "launches", lambda ws, x, configuration: kernels.linears(ws, x))
    assert len(sweep.jobs()) == len(sweep.VARIANTS)
    for job in sweep.jobs():
        sweep.compile_one(job)
    (row,) = sweep.sweep()
    # Few programs of 128 channels are what is chosen here.
    assert set(sweep.VARIANTS) - set(row["us"]) == {"chunk 128", "few", "registers 128"}
    assert all(len(times) == 4 for times in row["us"].values())


def test_rows_and_fused_projections(monkeypatch):
    monkeypatch.setattr(kernels, "ROWS_SHAPE", (64, 32))
    assert [row["rows"] for row in kernels.rows()] == list(range(1, 9))
    assert len(kernels.fused_projections(hidden=32, scale=64)) == 2


def test_experts(monkeypatch):
    monkeypatch.setattr(experts, "SHAPES", [(16, 64, 32)])
    assert all(error < 0.01 for error in experts.correctness()["largest_errors"].values())
    ways = {f"bf16, {how}" for how in ("gathered", "one by one", "grouped")}
    assert ways | {"grinqh 3"} <= set(experts.speed()[0])


def test_models(monkeypatch):
    import transformers

    from models import SMALL

    monkeypatch.setattr(whole_models, "NEW_TOKENS", 4)
    config = transformers.LlamaConfig(**SMALL)
    report = whole_models.measure(transformers.LlamaForCausalLM, config)
    speeds = report["tokens_per_second"]
    assert {"bf16", "grinqh 2, fused", "grinqh 3, fused, deferred, unchecked"} <= set(speeds)
    assert all(speed > 0 for speed in speeds.values())
    at_once = set(report["kernels_us_per_token"])
    assert set(speeds) == {name + way for name in at_once for way in whole_models.WAYS}
    assert all(report["same_tokens"].values())
    for times in report["kernels_us_per_token"].values():
        assert len(times) == 1 + whole_models.MAX_KERNELS
        assert 0 < max(us for name, us in times.items() if name != "all") <= times["all"]
    assert report["grinqh"]["quantize_seconds"] > 0
    assert not isinstance(report["bf16"], str)
    assert torch.get_default_dtype() == torch.float32


class Parrot:
    """A model whose tokens are others when stop checks are deferred, if it is told so."""

    def __init__(self, differs):
        self.differs = differs

    def facts(self):
        return {}

    def ask(self, method, bits, way=""):
        if method == "kernels":
            return {"all": 1.0}
        return [1.0, 2.0], 3.0, [int("deferred" in way and self.differs)]


def test_other_tokens_are_seen():
    report = {"tokens_per_second": {}, "new_tokens_per_second": {}, "kernels_us_per_token": {}}
    report |= {"same_tokens": {}}
    models = {"bf16": Parrot(differs=False), "torchao int4": Parrot(differs=True)}
    whole_models.measure_in_turn(models, report)
    others = {"torchao int4, deferred", "torchao int4, deferred, unchecked"}
    assert {name for name, same in report["same_tokens"].items() if not same} == others
    assert {"bf16, deferred", "bf16, unchecked"} < set(report["same_tokens"])
    assert set(whole_models.problems_of(report)) == {f"{name}: other tokens" for name in others}


class Broken(Parrot):
    def facts(self):
        raise RuntimeError("an illegal memory access")


def test_failures_of_our_own_models_are_failures(monkeypatch, tmp_path, capsys):
    import gpu

    def measure():
        report = {"tokens_per_second": {}, "new_tokens_per_second": {}, "kernels_us_per_token": {}}
        report |= {"same_tokens": {}}
        models = {"grinqh": Broken(False), "torchao int4": Broken(False), "bf16": Parrot(False)}
        whole_models.measure_in_turn(models, report)
        return report | {"problems": whole_models.problems_of(report)}

    report = tmp_path / "report.json"
    monkeypatch.setattr(gpu, "SECTIONS", [("llama_8b", measure, 0), ("sweep", measure, 1 << 20)])
    monkeypatch.setattr(gpu, "describe", dict)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--json", str(report)])
    assert gpu.main() == 1
    assert "failed: llama_8b\n" in capsys.readouterr().out
    found = json.loads(report.read_text())
    assert found["llama_8b"]["problems"] == ["grinqh: RuntimeError: an illegal memory access"]
    speeds = found["llama_8b"]["tokens_per_second"]
    assert speeds.keys() == {f"bf16{way}" for way in whole_models.WAYS}
    assert "were left" in found["sweep"]["skipped"]


def test_models_in_processes_of_their_own():
    import transformers

    from models import SMALL

    config = transformers.LlamaConfig(**SMALL)
    llama = transformers.LlamaForCausalLM
    models = {
        "grinqh": whole_models.Elsewhere("grinqh", llama, config),
        "bf16": whole_models.Elsewhere("bf16", llama, None),
    }
    report = {"tokens_per_second": {}, "new_tokens_per_second": {}, "kernels_us_per_token": {}}
    report |= {"same_tokens": {}}
    whole_models.measure_in_turn(models, report)
    assert set(report["kernels_us_per_token"]) == {f"grinqh {bits}, fused" for bits in (2, 3, 4)}
    assert len(report["same_tokens"]) == 3 * (len(whole_models.WAYS) - 1)
    assert report["bf16"].startswith("RuntimeError")
    for model in models.values():
        model.close()
        assert not model.process.is_alive()
