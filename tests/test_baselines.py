"""The other quantizers of benchmarks/quality.py run, on a tiny model, and are what they say."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from baselines import k_quants, methods
from baselines.layers import decoder, linears
from baselines.scramble import scramble
from models import SMALL, tiny_tokenizer


def model() -> torch.nn.Module:
    import transformers

    torch.manual_seed(0)
    sizes = SMALL | {"hidden_size": 128, "intermediate_size": 192}
    config = transformers.LlamaConfig(**sizes, initializer_range=0.1)
    return transformers.LlamaForCausalLM(config).eval()


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: layer.weight.detach() for name, layer in linears(decoder(model)).items()}


@pytest.fixture(scope="module")
def results() -> dict[str, tuple[float, float, float]]:
    """Name -> bits, error of the weights and error of the logits, both relative."""
    dense, found = model(), {}
    ids = torch.randint(0, 320, (2, 64))
    with torch.no_grad():
        logits = dense(ids).logits
    for method in methods():
        changed = copy.deepcopy(dense)
        method.run(changed, [ids])
        before, after = weights(dense), weights(changed)
        assert all(type(w) is torch.Tensor and w.dtype == torch.float32 for w in after.values())
        assert torch.equal(changed.lm_head.weight, dense.lm_head.weight)
        error = sum(float((after[n] - before[n]).square().sum()) for n in before)
        error /= sum(float(w.square().sum()) for w in before.values())
        with torch.no_grad():
            difference = changed(ids).logits - logits
        found[method.name] = (
            method.bits_with_scales, error**0.5, float(difference.norm() / logits.norm())
        )  # fmt: skip
    return found


@pytest.mark.filterwarnings("ignore")
def test_errors_are_those_of_their_bits(results):
    allowed = {8: 0.02, 4: 0.2, 3: 0.45, 2: 1.0}
    assert len(results) >= 21
    for name, (bits, weight_error, logit_error) in results.items():
        assert 0.001 < weight_error < allowed[int(bits)], name
        assert 0.001 < logit_error < 1.5, name


def test_calibrated_ones_make_logits_better_than_rounding(results):
    assert results["GPTQ 4"][2] < results["RTN intx 4"][2]
    assert results["GPTQ 3, act-order"][2] < results["RTN intx 3"][2]


def test_the_same_rounding_by_two_ways(results):
    assert results["HQQ int4"][1] == pytest.approx(results["HQQ 4"][1], rel=0.02)


@pytest.mark.skipif(not k_quants.available(), reason="llama-cpp-python is not installed")
def test_k_quants(results):
    assert results["Q4_K"][0] == 4.5
    assert results["Q4_K"][1] < results["Q3_K"][1] < results["Q2_K"][1]


def test_scrambling_changes_nothing_but_the_order():
    dense = model()
    ids = torch.randint(0, 320, (2, 30))
    before = weights(dense)
    before = {name: weight.clone() for name, weight in before.items()}
    with torch.no_grad():
        expected = dense(ids).logits
        scramble(dense)
        assert torch.allclose(dense(ids).logits, expected, atol=1e-4)
    for name, weight in weights(dense).items():
        assert not torch.equal(weight, before[name])
        assert torch.equal(weight.flatten().sort().values, before[name].flatten().sort().values)


@pytest.mark.filterwarnings("ignore")
def test_the_benchmark_and_its_picture(tmp_path, capsys):
    import quality

    words = " ".join(f"w{i}" for i in range(300))
    tiny_tokenizer(words).save_pretrained(tmp_path)
    model().save_pretrained(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text(words)
    report = tmp_path / "report.json"
    options = f"--model {tmp_path} --text {text} --calibration {text} --tokens 100 --bits 4 2 "
    options += f"--cache {tmp_path / 'cache'} --json {report} --others --only"
    quality.main([*options.split(), "RTN intx 4", "HQQ 3"])
    rows = {row["what"]: row for row in json.loads(report.read_text())["rows"]}
    assert rows["full precision"]["kl"] == pytest.approx(0, abs=1e-6)
    assert rows["GRINQH, 4"]["kl"] < rows["GRINQH, calibrated, 2"]["kl"]
    assert rows["GRINQH, calibrated, 2"]["bits"] == pytest.approx(2, abs=0.1)
    assert rows["HQQ 3"]["with_scales"] == 3.5
    assert "RTN intx 3" not in rows
    assert "| GRINQH, calibrated, 4 " in capsys.readouterr().out

    import frontier

    options = f"--model {tmp_path} --text {text} --calibration {text} --tokens 100 --json {report}2"
    for experiment, name in (("codes", "as built"), ("storage", "most often")):
        frontier.main([experiment, *options.split()])
        assert name in capsys.readouterr().out

    pytest.importorskip("matplotlib")
    import plot_quality

    plot_quality.main([str(report)], to=tmp_path)
    assert (tmp_path / "report.svg").stat().st_size > 1000
