"""Everything that only a GPU can say, in one command and under 8 minutes.

    python benchmarks/gpu.py --json benchmarks/results/gpu.json

Needs an NVIDIA GPU of compute capability 7.5 or newer; ``pip install -e ".[bench]"``. Checks the
kernels first, then times them against others' in one run, then whole models of 8B shape with
random weights. A section that fails is reported and the others go on; one that would start too
late is skipped and says so. ``python benchmarks/plot_gpu.py`` draws the result.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gpu_suite import checks, experts, kernels, models, sweep, timing
from grinqh_ao.running import describe_machine


def compilation() -> dict[str, Any]:
    """So that others find their kernels in Triton's cache: each takes seconds."""
    jobs = [(kernels.compile_one, job) for job in kernels.jobs()] if "kernels" in _chosen else []
    jobs += [(sweep.compile_one, job) for job in sweep.jobs()] if "sweep" in _chosen else []
    timing.spread(call, jobs)
    return {"kernels": len(jobs)}


def call(job: tuple[Callable[[Any], None], Any]) -> None:
    job[0](job[1])


_chosen: set[str] = set()  # sections


# In processes of their own, before this one has begun CUDA.
FORKING = ("correctness", "compilation")
# Name, function, seconds that must be left for it to start.
SECTIONS: list[tuple[str, Callable[[], object], int]] = [
    ("correctness", checks.correctness, 0),
    ("compilation", compilation, 0),
    ("bandwidth", kernels.bandwidth, 0),
    ("cuda_graphs", checks.cuda_graphs, 0),
    ("experts_correctness", experts.correctness, 0),
    ("experts_cuda_graphs", experts.cuda_graphs, 0),
    ("kernels", kernels.speed, 60),
    ("fused_projections", kernels.fused_projections, 30),
    ("rows", kernels.rows, 30),
    ("experts", experts.speed, 30),
    ("llama_8b", models.llama, 90),
    ("sweep", sweep.sweep, 60),
    ("compiled_generation", checks.compiled_generation, 60),
    ("qwen3_8b", models.qwen3, 90),
]


def describe() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "machine": describe_machine(),
        "command": "python " + " ".join(sys.argv),
        "cuda": torch.version.cuda,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
    }


def write(report: dict[str, Any], file: Path) -> None:
    """After each section: what is done is done."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, default=Path("gpu.json"))
    parser.add_argument("--minutes", type=float, default=8.0, help="do not begin what ends later")
    parser.add_argument("--only", nargs="*", choices=[name for name, _, _ in SECTIONS])
    arguments = parser.parse_args()
    _chosen.update(arguments.only or [name for name, _, _ in SECTIONS])
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asks without beginning CUDA
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py needs an NVIDIA GPU, and torch sees none")

    report: dict[str, Any] = {}
    started, failed = time.perf_counter(), []
    for name, section, needed in SECTIONS:
        if name not in _chosen:
            continue
        left = 60 * arguments.minutes - (time.perf_counter() - started)
        if left < needed:
            report[name] = {"skipped": f"{left:.0f} of {60 * arguments.minutes:.0f} s were left"}
            print(f"== {name}: skipped", flush=True)
            write(report, arguments.json)
            continue
        if name not in FORKING and "machine" not in report:
            report |= describe()
            print(json.dumps(report, indent=1), flush=True)
        begin = time.perf_counter()
        print(f"== {name}", flush=True)
        try:
            report[name] = section()
            if isinstance(report[name], dict) and report[name].get("problems"):
                failed.append(name)
                print("\n".join(report[name]["problems"]))
        except Exception:
            failed.append(name)
            report[name] = {"failed": traceback.format_exc()}
            traceback.print_exc()
        report[f"{name}_seconds"] = time.perf_counter() - begin
        torch.cuda.empty_cache()
        write(report, arguments.json)
    print(f"{time.perf_counter() - started:.0f} s; failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
