"""Compiles kernels for GPUs that are not here, and says what came out.

    python tests/kernels/aot.py

prints one JSON object per kernel, form and compute capability. A process of its own, because in
the tests' own process kernels are interpreted.
"""

from __future__ import annotations

import collections
import json
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from grinqh_ao.ops.triton import configurations, decode, decode_fma, decode_mma, dequantize

CAPABILITIES = (75, 80, 86, 89, 90, 100, 120)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Instructions of the pipe that runs integer and logic operations, half as wide as issue.
ALU = re.compile(
    "LOP3|SHF|IADD3?|LEA|ISETP|PRMT|SEL|VIADD|VIADDMNMX|VIMNMX|IMNMX|SGXT|FSETP|FSEL|FMNMX3?|"
    "P2R|R2P|PLOP3|POPC|BMSK"
)

DECODE = {
    # One weight; see members.py.
    "slices": ("*i32",),
    "scales": ("*u8",),
    "vectors": ("*fp32",),
    "low": ("*i32",),
    "experts": "*i64",
    "mean": "*fp32",
    "n": ("i32",),
    "tiles": ("i32",),
    "lines": ("i32",),
    "memory": "*i8",
    "entries": "*i8",
    "multipliers": "*fp32",
    "partial": "*fp32",
    "arrivals": "*i32",
    "rows": "i32",
    "k": "i32",
    "chunk": "i32",
    "capacity": "i32",
}
DEQUANTIZE = {
    "slices": "*i32",
    "scales": "*u8",
    "vectors": "*fp32",
    "low": "*i32",
    "out": "*bf16",
    "n": "i32",
    "k": "i32",
    "lines": "i32",
}
# By 16; of the rest Triton knows at run time that it can be divided.
INDIVISIBLE = {"n", "tiles", "lines", "rows", "chunk", "capacity"}


class Job(NamedTuple):
    form: str
    kernel: Any
    signature: dict[str, str | tuple[str, ...]]
    constants: dict[str, Any]
    capability: int
    warps: int
    registers: int | None
    # Weights and slices per thread, of the whole kernel or of a step of its two loops.
    work: dict[str, float]


def decode_job(
    form: str,
    rows: int,
    words: int,
    capability: int,
    block: int | None = None,  # the longest
    few: bool = False,
    mean_block: int = 4096,
    splits_at_once: int = decode.SPLITS_AT_ONCE,
    compact: bool = False,
    experts: bool = False,
    dtype: str | None = None,  # of activations: by default what a form is mostly for
) -> Job:
    block = block or configurations.longest_chunk(form, rows)
    chosen = configurations.of_programs(capability, form, rows, words, block, few)
    kernel = decode_mma.decode_mma_kernel if form == "mma" else decode_fma.decode_fma_kernel
    pointer = "*" + (dtype or {"mma": "bf16", "fma": "fp32"}[form])
    types = DECODE | {"x": pointer, "bias": (pointer,), "out": (pointer,)}
    constants = {
        "LEVELS": (0, 2, 4, 6, 8),
        "ROWS": rows,
        "WORDS": words,
        "BLOCK": block,
        "MEAN_BLOCK": mean_block,
        "SPLITS_AT_ONCE": splits_at_once,
        "EARLY": chosen.early,
        "INTERPRET": False,
        "mean": None,
    } | ({} if compact else {"low": None})
    if experts:
        constants["bias"] = None
    else:
        constants["experts"] = None
    if form == "mma":
        constants |= {"FEW": chosen.few, "SPECULATIVE": chosen.speculative, "memory": None}
        lines = decode_mma.LINES.value
        entries = (2 * lines, 4 * lines)
    else:
        channels = decode_fma.channels_per_step(words, rows) / configurations.WARPS
        entries = (channels, 2 * channels)
    # A warp's entries; a pair is two slices of 16 * words weights, a single one.
    work = {
        "pairs": 2 * entries[0] * 16 * words / 32,
        "singles": entries[1] * 16 * words / 32,
    }
    return Job(
        f"decode, {form}, rows {rows}, tile {16 * words}, chunks of {block}"
        + (", compact" if compact else "")
        + (", few programs" if few else "")
        + (", experts" if experts else "")
        + (f", {dtype}" if dtype else ""),
        kernel,
        {name: types[name] for name in kernel.arg_names if name in types},
        constants,
        capability,
        configurations.WARPS,
        chosen.registers,
        work,
    )


def dequantize_job(slices: int, words: int, capability: int, compact: bool = False) -> Job:
    constants: dict[str, Any] = {
        "STORED": slices,
        "SLICES": slices,
        "WORDS": words,
        "BLOCK_K": dequantize.BLOCK_WORDS // words,
    } | ({} if compact else {"low": None})
    work = {"all": 16 * dequantize.BLOCK_WORDS / (32 * dequantize.NUM_WARPS)}
    return Job(
        f"dequantize, {slices} slices, tile {16 * words}" + (", compact" if compact else ""),
        dequantize.dequantize_kernel,
        DEQUANTIZE,
        constants,
        capability,
        dequantize.NUM_WARPS,
        None,
        work,
    )


def jobs() -> list[Job]:
    every = [
        job
        for capability in CAPABILITIES
        for job in (
            decode_job("fma", 1, 32, capability),
            dequantize_job(4, 32, capability),
            *of_tensor_cores(capability),
        )
    ]
    some = [
        job
        for capability in (80, 90)
        for job in (
            decode_job("mma", 1, 16, capability),
            decode_job("mma", 4, 32, capability),
            decode_job("mma", 8, 32, capability),
            *(decode_job("fma", rows, 32, capability) for rows in (2, 4, 8)),
            decode_job("fma", 1, 4, capability),
            decode_job("mma", 1, 32, capability, compact=True),
            decode_job("fma", 1, 32, capability, compact=True),
            decode_job("mma", 1, 32, capability, block=256, experts=True),
            decode_job("mma", 1, 32, capability, experts=True),
            decode_job("fma", 1, 32, capability, block=256, experts=True),
            dequantize_job(4, 32, capability, compact=True),
            dequantize_job(2, 4, capability),
        )
    ]
    turing = [
        decode_job("fma", rows, words, 75, dtype=dtype)
        for dtype in ("fp16", "bf16")
        for rows, words in ((1, 32), (8, 32), (1, 4))
    ]
    return every + some + turing


def of_tensor_cores(capability: int) -> list[Job]:
    if capability < configurations.MIN_CAPABILITY_FOR_MMA:
        return []
    return [
        decode_job("mma", 1, 32, capability),
        decode_job("mma", 1, 32, capability, block=256, few=True),
    ]


def report(job: Job) -> dict[str, Any]:
    """Registers, memory that is not registers, instructions and layouts of one compiled kernel."""
    divisible = [
        (i,) if isinstance(kind, str) else (i, 0)
        for i, (name, kind) in enumerate(job.signature.items())
        if name not in INDIVISIBLE
    ]
    source = ASTSource(
        fn=job.kernel,
        signature=job.signature | dict.fromkeys(job.constants, "constexpr"),
        constexprs=job.constants,
        attrs={place: [["tt.divisibility", 16]] for place in divisible},
    )
    target = GPUTarget("cuda", job.capability, 32)
    options = {"num_warps": job.warps, "enable_fp_fusion": True} | (
        {"maxnreg": job.registers} if job.registers else {}
    )
    compiled = triton.compile(source, target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        sass = _cuobjdump("-sass", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, shared, local = map(int, found.groups())
    instructions = _instructions(sass)
    result: dict[str, Any] = {
        "form": job.form,
        "capability": job.capability,
        "work": job.work,
        "registers": registers,
        "warps": job.warps,
        "stack": stack,
        "shared": shared + compiled.metadata.shared,  # declared by the kernel, and Triton's own
        "local": local,
        "all": _count(instructions),
        "before_waiting": _count(_before_waiting(instructions)),
        "loops": [
            _count([i for i in instructions if start <= i[0] <= end])
            for start, end in _loops(instructions)
        ],
        "mma_layouts": _layouts(compiled.asm["ttgir"], "mma.sync"),
        "vote_layouts": _layouts(compiled.asm["ttgir"], "vote.sync"),
    }
    if job.form.startswith("decode"):
        result["pairs"], result["singles"] = slice_loops(result)
    return result


def slice_loops(report: dict[str, Any]) -> list[dict[str, int]]:
    """Of a decode kernel the loops that read pairs and singles: where the multiplications are."""
    loops = [loop for loop in report["loops"] if loop["mma"] > 8]
    if not loops:  # the mean of magnitudes, which comes before, multiplies and adds too
        loops = [loop for loop in report["loops"] if loop["fma"] >= 64][-2:]
    assert len(loops) == 2, report
    return loops


def numbered_report(number: int) -> dict[str, Any]:
    return report(jobs()[number])  # a kernel cannot be sent to another process, a number can


def _cuobjdump(option: str, file: str) -> str:
    command = [str(TOOLS / "cuobjdump"), option, file]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _instructions(sass: str) -> list[tuple[int, str, str]]:
    """(address, operation, operands)"""
    pattern = r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);"
    return [(int(a, 16), op, rest) for a, op, rest in re.findall(pattern, sass)]


def _loops(instructions: list[tuple[int, str, str]]) -> list[tuple[int, int]]:
    """First and last address of every loop that is in no other: a branch backwards ends it."""
    loops = []
    for address, op, rest in instructions:
        target = re.search(r"0x([0-9a-f]+)", rest) if op.startswith("BRA") else None
        if target and int(target[1], 16) < address:
            loops.append((int(target[1], 16), address))
    return sorted(
        (start, end)
        for start, end in loops
        if not any(s <= start and end <= e and (s, e) != (start, end) for s, e in loops)
    )


def _before_waiting(instructions: list[tuple[int, str, str]]) -> list[tuple[int, str, str]]:
    """Those that run while the kernel in front may still be running."""
    waits = [address for address, op, _ in instructions if op == "ACQBULK"]
    return [i for i in instructions if i[0] < min(waits, default=0)]


def _count(instructions: list[tuple[int, str, str]]) -> dict[str, int]:
    names = collections.Counter(op.split(".")[0] for _, op, _ in instructions)
    full = [op for _, op, _ in instructions]
    return {
        "instructions": len(instructions),
        "alu": sum(count for name, count in names.items() if ALU.fullmatch(name)),
        "mma": names["HMMA"],
        "fma": names["FFMA"] + 2 * names["FFMA2"],
        "shared_loads": names["LDS"],
        "exchanges": names["STS"] + names["SHFL"] + names["BAR"],
        "spills": names["STL"] + names["LDL"],
        "flushing": sum(op.startswith("FFMA") and ".FTZ" in op for op in full),
        "loads": names["LDG"],
        "prefetches": names["CCTL"],
        "loads_128_bit": sum(op.startswith("LDG") and ".128" in op for op in full),
        "stores_128_bit": sum(op.startswith("STG") and ".128" in op for op in full),
        "loads_of_others": sum(op.startswith("LDG") and ".STRONG.GPU" in op for op in full),
    }


def _layouts(ttgir: str, instruction: str) -> list[str]:
    """The layouts, written out, of all operands of lines with an instruction."""
    names = set()
    for line in ttgir.splitlines():
        if instruction in line:
            names |= set(re.findall(r"tensor<[^>]*, (#\w+)>", line))
    return sorted(re.search(rf"^{name} = (.*)$", ttgir, re.M)[1] for name in names)


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET", "0") != "1", "the interpreter compiles nothing"
    with ProcessPoolExecutor() as pool:
        for line in pool.map(numbered_report, range(len(jobs()))):
            print(json.dumps(line), flush=True)
