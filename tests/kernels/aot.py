"""Compiles kernels for GPUs that are not here, and says what came out.

    python tests/kernels/aot.py

prints one JSON object per kernel, form and compute capability. A process of its own, because in
the tests' own process kernels are interpreted.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from grinqh_ao.ops.triton import dequantize

CAPABILITIES = (80, 86, 89, 90, 100, 120)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compile_for(
    kernel: Any, signature: dict[str, str], constants: dict[str, Any], capability: int, warps: int
) -> dict[str, Any]:
    """Registers, memory that is not registers, and vector widths of one compiled kernel."""
    # As at run time: Triton specialises on pointers and sizes that 16 divides.
    divisible = [
        i for i, (name, kind) in enumerate(signature.items()) if kind[0] == "*" or name != "n"
    ]
    source = ASTSource(
        fn=kernel,
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in divisible},
    )
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        sass = _cuobjdump("-sass", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, shared, local = map(int, found.groups())
    return {
        "capability": capability,
        "registers": registers,
        "stack": stack,
        "shared": shared,
        "local": local,
        "instructions": len(re.findall(r"/\*[0-9a-f]{4,}\*/\s+\S", sass)),
        "spill_stores": len(re.findall(r"\bSTL\b", sass)),
        "loads_128_bit": len(re.findall(r"\bLDG\.E\S*\.128", sass)),
        "stores_128_bit": len(re.findall(r"\bSTG\.E\S*\.128", sass)),
    }


def _cuobjdump(option: str, file: str) -> str:
    command = [str(TOOLS / "cuobjdump"), option, file]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def reports() -> Iterator[dict[str, Any]]:
    signature = {
        "slices": "*i32",
        "scales": "*u8",
        "row_scale": "*bf16",
        "values": "*fp32",
        "out": "*bf16",
        "n": "i32",
        "k": "i32",
        "slice_stride": "i32",
    }
    for capability in CAPABILITIES:
        for slices, words in ((4, 32), (2, 4)):
            block_k = dequantize.BLOCK_WORDS // words
            constants = {"SLICES": slices, "WORDS": words, "BLOCK_K": block_k}
            form = {
                "form": f"dequantize, {slices} slices, tile {16 * words}",
                "weights_per_thread": 16 * dequantize.BLOCK_WORDS // (32 * dequantize.NUM_WARPS),
            }
            yield form | compile_for(
                dequantize.dequantize_kernel, signature, constants, capability, dequantize.NUM_WARPS
            )


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET", "0") != "1", "the interpreter compiles nothing"
    for report in reports():
        print(json.dumps(report), flush=True)
