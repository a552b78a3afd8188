"""Every code block of the README and the docs runs.

Python is executed, page by page, on a tiny model, JSON parsed; commands run too, but for those that
take long or are tested elsewhere: of benchmarks and servers it is asked whether they know their
options, of ``make`` whether there is such a target, of ``pip`` whether there is such an extra. The
examples run in short form, on the demo's model where that is installed.
"""

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from unittest import mock

import pytest
import torch
from sybil import Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser
from test_cli import grinqh

import models
from grinqh_ao.errors import ModelNotFoundError
from grinqh_ao.running import SMOLLM2, load, smollm2_file

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WORDS = " ".join(f"w{i}" for i in range(300))
QUANTIZED = {"calibration", "choosing-bits", "distributed", "reliability"}  # when the page begins
SHORT = {
    "generate.py": "--new-tokens 4",
    "chat.py": "--new-tokens 4",
    "calibrate_and_evaluate.py": "--tokens 64 --calibration-tokens 64",
    "pareto.py": "--tokens 64 --bits 2 4",
}
FEW = 4
SAID = "Hello!\n/bits 2.5\n/bits 9\nWhy?\n/quit\n"
python = PythonEvaluator()


def names(page: str, dense: Path) -> dict:
    """What a reader has before a page begins; a dense model is also saved."""
    import transformers
    from torchao.quantization import quantize_

    import grinqh_ao

    sizes = models.CUTTABLE if page == "distributed" else {}
    model = models.tiny_model("llama", tied=True, **sizes)
    model.save_pretrained(dense)
    tokenizer = models.tiny_tokenizer(WORDS)
    tokenizer.save_pretrained(dense)
    if page in QUANTIZED:
        quantize_(model, grinqh_ao.GrinqhConfig(bits=3))
    ids = torch.randint(0, 300, (1, 5))
    return {
        "grinqh_ao": grinqh_ao,
        "AutoModelForCausalLM": transformers.AutoModelForCausalLM,
        "name": dense,
        "model": model,
        "quantize_": quantize_,
        "tokenizer": tokenizer,
        "texts": [WORDS],
        "input_ids": ids.repeat(1, 5),
        "inputs": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
    }


def run_python(example) -> None:
    if named := re.match(r"# (\w+\.py)\n", example.parsed):
        Path(named[1]).write_text(example.parsed)
    else:
        python(example)


def parse_json(example) -> None:
    json.loads(example.parsed)


def run_commands(example) -> None:
    lines = example.parsed.splitlines()
    if any(line.startswith("$ ") for line in lines):  # what is typed, and what is printed
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    for line in lines:
        if words := shlex.split(line, comments=True):
            run_command(words, example.namespace["name"])


def succeeds(words, **options) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [str(word) for word in words],
        capture_output=True, text=True, check=False, env=environment, timeout=500, **options,
    )  # fmt: skip
    assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def run_script(script: Path, arguments: list, said: str = "") -> str:
    """What a Python program prints, run in this process, which has imported most of it already."""
    printed = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [str(script), *map(str, arguments)]),
        mock.patch.object(sys, "path", [str(script.parent), *sys.path]),
        mock.patch.object(sys, "stdin", io.StringIO(said)),
        contextlib.redirect_stdout(printed),
    ):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as exited:
            if exited.code:
                raise
    return printed.getvalue()


def run_command(words: list[str], dense: Path) -> None:
    """In the current directory, which is none of the project's."""
    given = [str(dense) if word in ("MODEL", SMOLLM2) else word for word in words[1:]]
    match words:
        case ["make", target, *_]:
            succeeds(["make", "--dry-run", "--directory", ROOT, target])
        case ["pip", "install", what] if extra := re.fullmatch(r"\.\[(\w+)\]", what):
            project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            assert extra[1] in project["optional-dependencies"]
        case ["pip", "install", "--no-deps", what]:
            assert what in (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
        case ["apt-get", "install", *packages]:
            assert set(packages) == {"fortunes", "debian-handbook"}  # benchmarks/texts.py
        case ["grinqh", *_]:
            assert grinqh(*given) == 0
        case ["torchrun", *_]:
            succeeds([sys.executable, "-m", "torch.distributed.run", "--standalone", *given])
        case ["transformers", "serve", *_]:  # tests/test_serving.py does
            program = [Path(sys.executable).with_name("transformers"), "serve", "--help"]
            assert knows(given[1:], succeeds(program))
        case ["python", script, *_] if script.startswith("benchmarks/"):
            assert knows(given[1:], run_script(ROOT / script, ["--help"]))
        case ["python", script, *_] if script.startswith("docs/examples/"):
            shutil.copytree(ROOT / "docs", "docs", dirs_exist_ok=True)
            short = ["--model", saved_smollm2(dense.parent), *SHORT[Path(script).name].split()]
            output = run_script(Path(script), [*given[1:], *short], SAID)
            if script.endswith("chat.py"):
                assert output.count("bits read per weight") == 2
                assert "=9.0: expected a number above 0" in output
        case _:
            raise AssertionError(f"no test knows how to run {shlex.join(words)}")


def saved_smollm2(directory: Path) -> Path:
    """A few of its layers, which is quicker: what they say does not matter here."""
    directory /= "smollm2"
    if not directory.exists():
        model, tokenizer = load(SMOLLM2)
        model.model.layers = model.model.layers[:FEW]
        model.config.num_hidden_layers = FEW
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    return directory


def knows(given: list[str], described: str) -> bool:
    """Whether a program's --help describes all options."""
    options = set(re.findall(r"--[\w-]+", described))
    return {word for word in given if word.startswith("--")} <= options


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_code_block_runs(page, tmp_path, monkeypatch):
    fences = set(re.findall(r"^```([^\n]*)$", page.read_text(), re.MULTILINE))
    code = {language for language in fences if not language.startswith("{")} - {""}
    assert code <= {"python", "sh", "console", "text", "json"}
    opened = re.findall(r"^```(.*)\n(?:.*\n)*?```$", page.read_text(), re.MULTILINE)
    assert all(opened), "a block without a language"
    if page.stem == "examples":
        try:
            smollm2_file()
        except ModelNotFoundError as missing:
            if os.environ.get("CI"):
                raise
            pytest.skip(str(missing))
    parsers = [CodeBlockParser("python", run_python), CodeBlockParser("json", parse_json)]
    parsers += [CodeBlockParser(language, run_commands) for language in ("sh", "console")]
    document = Sybil(parsers).parse(page)
    examples = list(document.examples())
    assert len(examples) == sum(
        len(re.findall(rf"^```{language}$", page.read_text(), re.MULTILINE))
        for language in ("python", "json", "sh", "console")
    )
    if not examples:
        return
    document.namespace.update(names(page.stem, tmp_path / "dense"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")  # of --help
    with in_a_group() if page.stem == "distributed" else contextlib.nullcontext():
        for example in examples:
            example.evaluate()


@contextlib.contextmanager
def in_a_group():
    """Of one process, for the page that shards a model."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
