"""Changes to a checkpoint that random bytes would not find: in its JSON, and in its tensors."""

import json
import random
import struct
from typing import Any

from loading import joined, parted

VALUES = [
    None, True, 0, -1, 1, 2, 3, 4, 6, 8, 9, 64, 2**31, 2**53, 2**63, -(2**63), 0.5, 1e308, "",
    "slices", [], {}, [0], [8], [0, 2, 4, 6, 8], [2, 4, 8], [4, 8], [0, 8], [[]],
    ["lm_head.weight"], "F32", "BF16", "U8", "I32", "F16", "F64", "BOOL", "I64", "F8_E4M3",
]  # fmt: skip


def mutate_json(value: Any, chance: random.Random) -> Any:
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


def mutate(data: bytes, seed: int) -> bytes | None:
    """One change; None where there is nothing left to change in this way."""
    chance = random.Random(seed)
    config, file = parted(data)
    try:
        size = struct.unpack("<Q", file[:8])[0]
        kind = chance.random()
        if kind < 0.4:
            return joined(json.dumps(mutate_json(json.loads(config), chance)).encode(), file)
        if kind < 0.8:
            header = json.dumps(mutate_json(json.loads(file[8 : 8 + size]), chance)).encode()
            return joined(config, struct.pack("<Q", len(header)) + header + file[8 + size :])
        body = bytearray(file)
        for _ in range(chance.choice([1, 1, 2, 8])):
            body[chance.randrange(8 + size, len(body))] = chance.choice([0, 1, 127, 128, 255])
        return joined(config, bytes(body))
    except (ValueError, struct.error, RecursionError):
        return None
