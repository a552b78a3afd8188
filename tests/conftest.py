"""Fixtures for all tests. Nothing reaches a network, and examples are the same on every run."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Kernels run in Triton's interpreter, which must be asked for before anything imports Triton.
os.environ["TRITON_INTERPRET"] = "1"
# Processes of pytest-xdist share the cores: waiting threads of one would keep the others from them.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    threads = len(os.sched_getaffinity(0)) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads)))

import pytest
import torch
from hypothesis import settings

# Files that take long, begun first: none of them is to be what one process does while others wait.
LONGEST = (
    "test_documentation", "test_tensor_parallel", "test_decode", "test_smollm2", "test_dtensor",
    "test_decode_on_cpu", "test_worst_case", "test_processes", "test_interrupted_saving",
    "test_generation", "test_gpu_suite", "test_compiled", "test_soak", "test_cli",
)  # fmt: skip

if importlib.util.find_spec("triton"):
    import mended_interpreter  # noqa: F401

settings.register_profile("default", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests() -> None:
    """Dynamo would count them against its limit of recompilations."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(params=["llama", "qwen3"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="grinqh_ao")
    return caplog
