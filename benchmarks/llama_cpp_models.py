"""SmolLM2 through llama.cpp, in its own formats: a peer of ``benchmarks/cpu.py``.

Only where llama-cpp-python is installed, which is no dependency of ours.
"""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
import time
from pathlib import Path

from grinqh_ao.demo import PROMPT
from grinqh_ao.running import smollm2_file

# Names in llama.cpp's enumeration of files.
FORMATS = {"BF16": "BF16", "Q4_0": "Q4_0", "Q4_K": "Q4_K_M", "Q3_K": "Q3_K_M", "Q2_K": "Q2_K"}


def available() -> bool:
    return importlib.util.find_spec("llama_cpp") is not None


def speeds(threads: int, rounds: int, new_tokens: int) -> dict[str, float]:
    """Median tokens per second of decoding, by format; all formats in turn."""
    if not available():
        print("llama.cpp: not installed")
        return {}
    import llama_cpp

    found: dict[str, list[float]] = {name: [] for name in FORMATS}
    with tempfile.TemporaryDirectory() as folder:
        models = {}
        for name, kind in FORMATS.items():
            options = llama_cpp.llama_model_quantize_default_params()
            options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
            options.allow_requantize = True
            file = Path(folder) / f"{name}.gguf"
            failed = llama_cpp.llama_model_quantize(
                str(smollm2_file()).encode(), str(file).encode(), options
            )
            if failed:
                raise RuntimeError(f"llama.cpp could not quantize to {name}")
            models[name] = llama_cpp.Llama(str(file), n_threads=threads, n_ctx=512, verbose=False)
        for turn in range(rounds + 1):
            for name, model in models.items():
                times = []
                model.reset()
                for _ in model.generate(model.tokenize(PROMPT.encode()), temp=0.0):
                    times.append(time.perf_counter())
                    if len(times) == new_tokens:
                        break
                if turn:
                    found[name].append((len(times) - 1) / (times[-1] - times[0]))
    medians = {name: statistics.median(values) for name, values in found.items()}
    print("llama.cpp", {name: round(speed, 1) for name, speed in medians.items()})
    return medians
