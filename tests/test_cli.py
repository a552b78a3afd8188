"""The command ``grinqh``, on tiny models."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import grinqh_ao
from grinqh_ao import cli, summary
from grinqh_ao.checkpoint import to_tensors
from models import tiny_model, tiny_tokenizer

WORDS = " ".join(f"w{i % 300}" for i in range(900))


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "tiny"
    tiny_tokenizer(WORDS).save_pretrained(directory)
    tiny_model("llama", tied=True).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def saved(dense, tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / "tiny-q"
    assert grinqh("quantize", dense, "-o", directory) == 0
    return directory


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "broken"
    tiny_tokenizer(WORDS).save_pretrained(directory)
    model = tiny_model("llama", tied=True)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    model.save_pretrained(directory)
    return directory


def grinqh(*arguments):
    """Exit code of a command, run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["grinqh", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as exit:
            return exit.code or 0
    return 0


def test_quantize_is_what_loading_with_a_config_gives(dense, saved):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    expected = AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=grinqh_ao.GrinqhHfConfig(bits=3)
    )
    found = grinqh_ao.load(saved)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(found(ids).logits, expected(ids).logits)
    assert AutoTokenizer.from_pretrained(saved)("w1 w2").input_ids
    assert "grinqh_ao.load" in (saved / "README.md").read_text()


def test_options_of_quantize(dense, tmp_path, capsys):
    text = tmp_path / "text"
    text.write_text(WORDS)
    code = grinqh(
        "quantize", dense, "-o", tmp_path / "q", "--bits", "2.5", "--head-bits", "none", "--skip",
        "down_proj", "--dtype", "bfloat16", "--calibrate", text, "--calibration-tokens", "128",
        "--stored-bits", "5", "--max-shard-size", "50KB",
    )  # fmt: skip
    assert code == 0
    assert "bits read per weight and token: 2.50" in capsys.readouterr().out
    model = grinqh_ao.load(tmp_path / "q")
    found = summary(model)
    assert not any("down_proj" in name or "lm_head" in name for name in found.quantized)
    assert model.dtype == torch.bfloat16
    assert model.model.layers[0].mlp.up_proj.weight.low is not None
    assert len(list((tmp_path / "q").glob("*.safetensors"))) > 1


def test_quantize_does_not_overwrite(dense, saved, capsys):
    before = (saved / "config.json").stat().st_mtime_ns
    assert grinqh("quantize", dense, "-o", saved) == 2
    assert "is there already" in re.sub(r"\W+", " ", capsys.readouterr().err)
    assert (saved / "config.json").stat().st_mtime_ns == before
    assert grinqh("quantize", dense, "-o", saved, "--overwrite") == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["quantize", "DENSE"], 2, "--output"),
        (["quantize", "DENSE", "-o", "NEW", "--bits", "9"], 2, "bits=9.0"),
        (["quantize", "DENSE", "-o", "NEW", "--levels", "0,3"], 2, "levels"),
        (["quantize", "DENSE", "-o", "NEW", "--levels", "a"], 2, "--levels"),
        (["quantize", "DENSE", "-o", "NEW", "--stored-bits", "5"], 2, "--calibrate"),
        (["quantize", "DENSE", "-o", "NEW", "--levels", "0,2.9,4"], 2, "2.9"),
        (["quantize", "DENSE", "-o", "NEW", "--levels", "0,inf"], 2, "--levels"),
        (["quantize", "DENSE", "-o", "NEW", "--head-bits", "6,7"], 2, "--head-bits"),
        (["quantize", "DENSE", "-o", "NEW", "--dtype", "int3"], 2, "--dtype"),
        (["quantize", "DENSE", "-o", "NEW", "--max-shard-size", "big"], 2, "--max-shard-size"),
        (["quantize", "BROKEN", "-o", "NEW"], 1, "above report"),
        (["quantize", "SAVED", "-o", "NEW"], 1, "is quantized already"),
        (["quantize", "/no/where", "-o", "NEW"], 1, "no such directory"),
        (["quantize", "no-model", "-o", "NEW"], 1, "no-model: no such directory, and the hub did"),
        (["quantize", "/no/where.gguf", "-o", "NEW"], 1, "no such file"),
        (["info", "DENSE"], 1, "not quantized by GRINQH"),
        (["info", "/no/where"], 1, "No such file"),
        (["generate", "SAVED"], 2, "--prompt"),
        (["generate", "SAVED", "-p", ""], 2, "--prompt"),
        (["generate", "SAVED", "-p", "w1", "--bits", "0"], 2, "expected a number above 0"),
        (["evaluate", "SAVED", "--bits", "2,x"], 2, "--bits"),
        (["bench", "SAVED", "--bits", "12"], 2, "12"),
        (["bench", "SAVED", "--against", "SAVED"], 2, "is quantized"),
        (["evaluate", "SAVED", "--against", "SAVED", "--tokens", "64"], 2, "is quantized"),
        (["evaluate", "SAVED", "--json", "/no/where/at/all.json"], 2, "--json"),
        (["generate", "SAVED", "-p", "w1 \udcff"], 2, "is no text"),
        (["quantize", "DENSE", "-o", "NEW", "--calibrate", "BINARY"], 2, "0xff"),
        (["quantize", "DENSE", "-o", "NEW", "--calibrate", "EMPTY"], 2, "is empty"),
        (["quantize", "DENSE", "-o", "EMPTY"], 2, "is no directory"),
        (["quantize", "NOT.gguf", "-o", "NEW"], 1, "is no GGUF file"),
        (["quantize", "./no/where", "-o", "NEW"], 1, "no such directory"),
        (["quantize", "DENSE", "-o", "READONLY/new"], 2, "cannot be written to"),
        (["fly"], 2, "fly"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_are_one_line_and_change_nothing(
    dense, saved, broken, tmp_path, capsys, monkeypatch, arguments, code, message
):
    places = {"DENSE": dense, "SAVED": saved, "BROKEN": broken, "NEW": tmp_path / "new"}
    for name, content in (("BINARY", b"\xff\xfe\x00"), ("EMPTY", b"\n"), ("NOT.gguf", b"text")):
        places[name] = tmp_path / name
        places[name].write_bytes(content)
    places["READONLY/new"] = tmp_path / "readonly" / "new"
    (tmp_path / "readonly").mkdir()  # for root everything is writable
    access = os.access
    monkeypatch.setattr(os, "access", lambda p, m: "readonly" not in str(p) and access(p, m))
    assert grinqh(*(places.get(a, a) for a in arguments)) == code
    error = capsys.readouterr().err
    assert message in error
    if "BROKEN" not in arguments:  # transformers reports that with all it knows
        assert "Traceback" not in error
    if code == 1:
        assert error.splitlines()[-1].startswith("grinqh: error: ")
    assert not (tmp_path / "new").exists()


def test_a_skip_that_matches_nothing_is_said(dense, tmp_path, capsys):
    assert grinqh("quantize", dense, "-o", tmp_path / "q", "--skip", "no_proj") == 0
    assert "warning: --skip no_proj" in capsys.readouterr().err


@pytest.mark.parametrize("config", ["[]", '{"quantization_config": {"quant_method": "grinqh", '
                                    '"format_version": 1, "weights": [3]}}'])  # fmt: skip
def test_info_of_a_config_that_is_none(tmp_path, capsys, config):
    (tmp_path / "config.json").write_text(config)
    assert grinqh("info", tmp_path) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_info(saved, capsys, tmp_path):
    report = tmp_path / "info.json"
    assert grinqh("info", saved, "--json", report) == 0
    output = capsys.readouterr().out
    assert re.search(r"model\.layers\.\*\.self_attn\.q_proj +\| +2 \| 64x64 +\| 0,2,4,6,8", output)
    assert "head, at least 6" in output
    assert "model.norm.weight" in output
    assert "weights quantized" in output
    found = json.loads(report.read_text())
    model = grinqh_ao.load(saved)
    assert len(found["quantized"]) == 2 * 7 + 1
    weight = model.model.layers[1].mlp.up_proj.weight
    row = next(r for r in found["quantized"] if r["name"] == "model.layers.1.mlp.up_proj")
    assert row["bits"] == pytest.approx(3, abs=1e-3)
    assert row["megabytes"] * 1e6 == pytest.approx(
        sum(t.nbytes for t in to_tensors(weight).values())
    )
    assert grinqh("info", saved, "--all") == 0
    assert "model.layers.1.mlp.up_proj" in capsys.readouterr().out


def test_info_of_experts_and_of_damaged_files(tmp_path, capsys):
    from torchao.quantization import quantize_

    model = tiny_model("qwen3_moe", tied=False)
    quantize_(model, grinqh_ao.GrinqhConfig(bits=3))
    model.save_pretrained(tmp_path)
    assert grinqh("info", tmp_path) == 0
    assert "6 experts" in capsys.readouterr().out
    size = sum(tensor.nbytes for tensor in load_file(tmp_path / "model.safetensors").values())
    file = tmp_path / "model.safetensors"
    assert 0 < file.stat().st_size - size < 100_000  # only the header is not counted
    save_file({"lora_A": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")
    assert grinqh("info", tmp_path) == 0  # loading reads no such file either
    assert "lora_A" not in capsys.readouterr().out
    file.write_bytes(file.read_bytes()[:-100])
    assert grinqh("info", tmp_path) == 1
    assert "not a complete safetensors file" in capsys.readouterr().err


def test_info_of_shards(saved, tmp_path, capsys):
    model = grinqh_ao.load(saved)
    grinqh_ao.save(model, tmp_path, max_shard_size="50KB")
    assert grinqh("info", tmp_path, "--all") == 0
    assert capsys.readouterr().out.count("_proj") == 14
    (tmp_path / "model-00002-of-00003.safetensors").rename(tmp_path / "other")
    for damage, message in (
        (lambda file: None, "names model-00002-of-00003.safetensors, which is missing"),
        (lambda file: file.write_text("[]"), "is no index"),
        (lambda file: file.unlink(), "No such file"),
    ):
        damage(tmp_path / "model.safetensors.index.json")
        assert grinqh("info", tmp_path) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [[], ["--bits", "2"], ["--temperature", "0.8", "--raw"], ["--compile"]]
)
def test_generate(saved, capsys, options):
    assert grinqh("generate", saved, "-p", "w1 w2 w3", "--max-new-tokens", "6", *options) == 0
    output = capsys.readouterr()
    assert output.out.strip()
    pattern = r"tokens/s[^,]*, ([\d.]+) bits read per weight, ([\d.]+) of the head"
    match = re.search(pattern, output.err)
    bits = 2 if "2" in options else 3
    assert float(match[1]) == pytest.approx(bits, abs=0.5)
    assert float(match[2]) == pytest.approx(6, abs=0.7)


def test_generate_streams_what_generate_gives(saved, capsys):
    from transformers import AutoTokenizer

    model, tokenizer = grinqh_ao.load(saved), AutoTokenizer.from_pretrained(saved)
    inputs = tokenizer("w1 w2 w3", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    expected = tokenizer.decode(output[0, 3:], skip_special_tokens=True)
    assert grinqh("generate", saved, "-p", "w1 w2 w3", "--max-new-tokens", "6") == 0
    assert capsys.readouterr().out.strip() == expected.strip()


def test_generate_with_a_model_that_is_not_quantized_yet(dense, capsys):
    assert grinqh("generate", dense, "-p", "w1 w2", "--max-new-tokens", "3", "--bits", "4") == 0
    assert "quantizing it in memory" in capsys.readouterr().err


def test_evaluate(dense, saved, tmp_path, capsys):
    text, report = tmp_path / "text", tmp_path / "report.json"
    text.write_text(WORDS)
    common = ["--text", text, "--tokens", "256", "--bits", "2,4", "--json", report]
    assert grinqh("evaluate", saved, *common, "--against", dense) == 0
    rows = json.loads(report.read_text())["rows"]
    assert [row["weights"] for row in rows] == ["full precision", "prompts", *2 * ["decoding"]]
    assert [row["bits_asked"] for row in rows] == [None, None, 2, 4]
    kl = [row["kl"] for row in rows]
    assert kl[0] < kl[1] < kl[3] < kl[2]
    assert rows[3]["bits_read"] == pytest.approx(4, abs=0.5)
    # The same, from the model that is not quantized yet.
    assert grinqh("evaluate", dense, *common) == 0
    again = [row["kl"] for row in json.loads(report.read_text())["rows"]]
    assert again == pytest.approx(kl, abs=1e-6)
    # Without it, against the model's own prompts.
    assert grinqh("evaluate", saved, *common) == 0
    rows = json.loads(report.read_text())["rows"]
    assert rows[0]["weights"] == "prompts"
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert "| decoding" in capsys.readouterr().out


def test_bench(dense, saved, tmp_path, capsys):
    report = tmp_path / "report.json"
    code = grinqh(
        "bench", saved, "--bits", "2,4", "--against", dense, "--new-tokens", "3", "--repeat", "1",
        "--prompt", "w1 w2", "--json", report,
    )  # fmt: skip
    assert code == 0
    times = json.loads(report.read_text())["milliseconds"]
    assert list(times) == ["2 bits", "4 bits", "full precision"]
    assert all(len(rounds) == 2 and min(rounds) > 0 for rounds in times.values())
    assert "times full precision" in capsys.readouterr().out


def test_as_a_program(dense, tmp_path):
    """Results on standard output, all else on standard error; each in a process of its own."""
    program = Path(sys.executable).with_name("grinqh")
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}

    def run(*arguments):
        return subprocess.run(
            [program, *map(str, arguments)], capture_output=True, text=True, env=environment,
            check=False,
        )  # fmt: skip

    directory = tmp_path / "tiny-q"
    done = run("quantize", dense, "-o", directory)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("GRINQH: ")
    done = run("generate", directory, "-p", "w1 w2 w3", "--max-new-tokens", "4")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"(w\d+|\[UNK\]| )+\n", done.stdout)
    done = run("info", dense)
    assert done.returncode == 1
    assert done.stdout == ""
