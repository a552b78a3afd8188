"""The fuzzer: ``pip install atheris``, then

    python tests/fuzzing/run.py corpus -max_total_time=1800

(further options: https://llvm.org/docs/LibFuzzer.html#options). It starts from checkpoints it makes
itself and writes what reaches new code to the directory it is given.
"""

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["grinqh_ao", "safetensors"]):
    import mutations
    import seeds
    from loading import load


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    changed = mutations.mutate(data, seed) if seed % 4 else None
    return (changed or atheris.Mutate(data, max_size))[:max_size]


def main() -> None:
    directory = Path(next(a for a in sys.argv[1:] if not a.startswith("-")))
    directory.mkdir(exist_ok=True)
    for name, data in seeds.seeds().items():
        (directory / name).write_bytes(data)
    atheris.Setup([*sys.argv, "-max_len=65536", "-timeout=10", "-rss_limit_mb=4096"], load,
                  custom_mutator=mutate)  # fmt: skip
    atheris.Fuzz()


main()
