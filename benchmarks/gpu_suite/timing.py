"""Fair timing of small kernels: captured, rotating through memory, in turn."""

from __future__ import annotations

import multiprocessing
import os
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

import torch

Job = TypeVar("Job")
Result = TypeVar("Result")

DEVICE = "cuda"  # the tests run all of this on a CPU, for its Python
# Weights that are read between two reads of the same one: far beyond any cache.
ROTATION_BYTES = 400 << 20
REPETITIONS = 15
MAX_WORKERS = 14  # each with a CUDA context of its own


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def spread(function: Callable[[Job], Result], jobs: list[Job]) -> list[Result]:
    """[function(job) for job in jobs], several at a time: most of it is compiling kernels."""
    if DEVICE != "cuda":
        return [function(job) for job in jobs]
    workers = max(1, min(MAX_WORKERS, (os.cpu_count() or 1) - 1, len(jobs)))
    # A fork has all imports done already, but CUDA must not have been begun before it.
    context = multiprocessing.get_context("spawn" if torch.cuda.is_initialized() else "fork")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        return list(pool.map(function, jobs))


def copies_for(bytes_read: float) -> int:
    """How many copies of a weight it takes so that none is still in a cache."""
    return max(2, min(128, int(ROTATION_BYTES // max(1, bytes_read)) + 1))


def captured(calls: list[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """One graph of all calls, so that only the GPU's own time counts."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def compare(candidates: dict[str, list[Callable[[], object]]]) -> dict[str, float]:
    """Median microseconds per call of each candidate, replayed in turn."""
    graphs = {name: captured(calls) for name, calls in candidates.items()}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for repetition in range(REPETITIONS + 2):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if repetition >= 2:
                times[name].append(1e3 * start.elapsed_time(end) / len(candidates[name]))
    return {name: statistics.median(of) for name, of in times.items()}
