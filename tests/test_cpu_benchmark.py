"""``benchmarks/cpu.py`` on small sizes: that it runs, not how fast anything is."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import cpu
import selected_lines
from grinqh_ao import GrinqhTensor
from grinqh_ao.slices import split
from plain import laplace


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(cpu, "SHAPES", [(128, 64)])
    monkeypatch.setattr(cpu, "PROMPT_SHAPES", [(128, 64)])
    monkeypatch.setattr(cpu, "ROTATED", 1 << 16)
    monkeypatch.setattr(cpu, "COPIED", 1 << 16)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_layers_and_their_picture(monkeypatch, tmp_path):
    rows = cpu.report_layers([1, 2], seconds=0.05)
    assert [row["threads"] for row in rows] == [1, 2]
    for row in rows:
        assert set(row["us"]) >= {
            "bfloat16",
            "int8 (torchao, compiled)",
            "3 bits",
            "8 bits, float32",
        }
        n, k = row["shape"]
        assert row["needed_bytes"]["8 bits"] == pytest.approx(n * k * (1 + 1 / 64), rel=0.02)
        assert row["needed_bytes"]["2 bits"] < row["needed_bytes"]["4 bits"]
    plot_cpu = pytest.importorskip("plot_cpu", exc_type=ImportError)  # needs matplotlib
    monkeypatch.setattr(plot_cpu, "MIN_WEIGHTS", 0)
    plot_cpu.draw({"machine": "a CPU; versions", "layers": rows}, tmp_path / "cpu.svg")
    assert (tmp_path / "cpu.svg").stat().st_size > 10_000


def test_main_writes_what_it_measured(monkeypatch, tmp_path, capsys):
    def fails(n, k, x):
        raise RuntimeError("not on this processor")

    monkeypatch.setattr(cpu, "int8", fails)
    file = tmp_path / "cpu.json"
    arguments = ["cpu.py", "--only", "layers", "prompts", "--threads", "1", "--seconds", "0.01"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--json", str(file)])
    cpu.main()
    report = json.loads(file.read_text())
    (row,) = report["layers"]
    prompts = report["prompts"]
    assert len({(row["dtype"], row["rows"]) for row in prompts}) == len(prompts) == 9
    assert all(set(row["us"]) == {"dense", "GRINQH"} for row in prompts)
    assert "int8 (torchao, compiled)" not in row["us"]
    assert "of 128x64 does not run: not on this processor" in capsys.readouterr().err
    assert "torch" in report["machine"]


def test_the_lines_that_are_only_read():
    """Those that levels ask for, each once: by their sum, as 64-bit integers that wrap around."""
    weight = GrinqhTensor.from_hp(torch.randn(1024, 48), bits=5)
    x = laplace(1, 48)
    levels = weight.grade(x)[0]
    assert len(levels.unique()) > 2
    expected = 0
    for s, lines in enumerate(split(weight.slices, 48)):
        expected += int(lines[:, levels > 2 * s].contiguous().view(torch.int64).sum())
    assert selected_lines.reader(weight, x)() == expected % 2**64
