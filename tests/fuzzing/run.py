"""The fuzzer: ``pip install atheris``, then

    python tests/fuzzing/run.py corpus -max_total_time=1800

(further options: https://llvm.org/docs/LibFuzzer.html#options). It starts from checkpoints it makes
itself and writes what reaches new code to the directory it is given.
"""

import json
import random
import struct
import sys
from pathlib import Path

import atheris

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
with atheris.instrument_imports(include=["grinqh_ao", "safetensors"]):
    import seeds
    from loading import joined, load, parted

VALUES = [
    None, True, 0, -1, 1, 2, 3, 4, 6, 8, 9, 64, 2**31, 2**53, 2**63, -(2**63), 0.5, 1e308, "",
    "slices", [], {}, [0], [8], [0, 2, 4, 6, 8], [2, 4, 8], [4, 8], [0, 8], [[]],
    ["lm_head.weight"], "F32", "BF16", "U8", "I32", "F16", "F64", "BOOL", "I64", "F8_E4M3",
]  # fmt: skip


def mutate_json(value, chance: random.Random):
    """Changes, adds, drops or swaps something somewhere in it."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        action = chance.random()
        if action < 0.08:
            del value[key]
        elif action < 0.16:
            other = chance.choice(list(value))
            value[key], value[other] = value[other], value[key]
        elif action < 0.24:
            value[chance.choice([key + "_low", key + "_curve", key[:-1], "x"])] = value[key]
        else:
            value[key] = mutate_json(value[key], chance)
        return value
    if isinstance(value, list) and value and chance.random() < 0.8:
        at = chance.randrange(len(value))
        action = chance.random()
        if action < 0.15:
            del value[at]
        elif action < 0.3:
            value.insert(at, value[at])
        else:
            value[at] = mutate_json(value[at], chance)
        return value
    if isinstance(value, int) and not isinstance(value, bool) and chance.random() < 0.6:
        return value + chance.choice([-8, -4, -1, 1, 2, 4, 8, 64, value])
    return chance.choice(VALUES)


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    return _mutated(data, max_size, seed)[:max_size]


def _mutated(data: bytes, max_size: int, seed: int) -> bytes:
    chance = random.Random(seed)
    config, file = parted(data)
    try:
        kind = chance.random()
        if kind < 0.3:
            changed = json.dumps(mutate_json(json.loads(config), chance)).encode()
            return joined(changed, file)
        if kind < 0.6:
            size = struct.unpack("<Q", file[:8])[0]
            header = json.dumps(mutate_json(json.loads(file[8 : 8 + size]), chance)).encode()
            return joined(config, struct.pack("<Q", len(header)) + header + file[8 + size :])
        if kind < 0.8:  # a few bytes of the tensors
            size = struct.unpack("<Q", file[:8])[0]
            body = bytearray(file)
            for _ in range(chance.choice([1, 1, 2, 8])):
                body[chance.randrange(8 + size, len(body))] = chance.choice([0, 1, 127, 128, 255])
            return joined(config, bytes(body))
    except (ValueError, struct.error, IndexError, RecursionError):
        pass
    return atheris.Mutate(data, max_size)


def main() -> None:
    directory = Path(next(a for a in sys.argv[1:] if not a.startswith("-")))
    directory.mkdir(exist_ok=True)
    for name, data in seeds.seeds().items():
        (directory / name).write_bytes(data)
    atheris.Setup([*sys.argv, "-max_len=65536", "-timeout=10", "-rss_limit_mb=4096"], load,
                  custom_mutator=mutate)  # fmt: skip
    atheris.Fuzz()


main()
