"""Compiles the CPU kernels when they are first needed, and keeps what was compiled.

Not by ``torch.utils.cpp_extension``: that needs ninja, and takes what was compiled on another
processor, which -march=native is not for.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import tempfile
import threading
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

logger = logging.getLogger("grinqh_ao")

SOURCE = Path(__file__).parent / "source"
FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno",
    "-fno-trapping-math", "-fvisibility=hidden",
)  # fmt: skip
NATIVE = ("-march=native",)
# Compiled side by side, those first that take longest: a file with what is defined for it.
UNITS = (
    *(("tile.cpp", f"-DLINE_WORDS={w}") for w in (32, 4, 8, 16)),
    ("ops.cpp",),
    ("dequantize.cpp",),
    ("decode.cpp",),
)


_building = threading.Lock()


class BuildError(Exception):
    """There is no compiler, or it failed."""


class Kernels:
    """A compiled library, whose functions are PyTorch's for CPUs from now on.

    Raises:
        BuildError: PyTorch does not take them.
        OSError: it cannot be loaded.
    """

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.grinqh_register.restype = ctypes.c_void_p
        self._library.grinqh_unregister.argtypes = [ctypes.c_void_p]
        self._registered = self._library.grinqh_register()
        if not self._registered:
            raise BuildError(f"PyTorch {torch.__version__} does not take the kernels")

    def unregister(self) -> None:
        """As if it had not been loaded."""
        self._library.grinqh_unregister(self._registered)


def kernels() -> Kernels | None:
    """The kernels, compiled if need be; None where that cannot be done, which is said once."""
    with _building:  # threads may come at once; they are registered once
        return _kernels()


@functools.cache
def _kernels() -> Kernels | None:
    try:
        return Kernels(cached_library())
    except (BuildError, OSError) as error:
        warnings.warn(
            "grinqh_ao decodes with plain PyTorch on this CPU, which is slow, for its kernels "
            f"could not be compiled: {error}",
            stacklevel=2,
        )
        return None


def cached_library() -> Path:
    """Where the library for this processor lies; it is compiled if it is not there.

    Raises:
        BuildError: there is no compiler, or it failed.
        OSError: nothing can be written.
    """
    directory = cache_directory()
    library = directory / f"kernels-{_key()}.so"
    if not library.exists():
        started = time.perf_counter()
        logger.info("compiling kernels for this CPU, which is kept in %s", directory)
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory) as temporary:
            compile_library(Path(temporary) / library.name, NATIVE)
            os.replace(Path(temporary) / library.name, library)  # processes may do this at once
        logger.info("compiled in %.1f s", time.perf_counter() - started)
    return library


def cache_directory() -> Path:
    """``$XDG_CACHE_HOME/grinqh_ao``, by default ``~/.cache/grinqh_ao``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "grinqh_ao"


def compile_library(into: Path, machine: Sequence[str]) -> None:
    """Compiles the kernels, in a few seconds.

    Args:
        into: the library to write; objects are written beside it.
        machine: the compiler's options that choose the instructions.

    Raises:
        BuildError: with the compiler's own words.
    """
    compiler = find_compiler()
    torch_directory = Path(torch.__file__).parent
    include = f"-I{torch_directory / 'include'}"
    objects = [into.with_suffix(f".{i}.o") for i in range(len(UNITS))]

    def compile_unit(i: int) -> None:
        file, *defined = UNITS[i]
        source = ("-c", str(SOURCE / file), "-o", str(objects[i]))
        _run(compiler, *FLAGS, *machine, *defined, include, *source)

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        list(pool.map(compile_unit, range(len(UNITS))))
    # PyTorch's own OpenMP, which is loaded already, serves: both share their threads.
    linked = (f"-L{torch_directory / 'lib'}", "-ltorch_cpu", "-fopenmp")
    _run(compiler, "-shared", *map(str, objects), *linked, "-o", str(into))


def find_compiler() -> str:
    """The C++ compiler: $CXX, else g++ or clang++, as for ``torch.compile``.

    Raises:
        BuildError: there is none.
    """
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise BuildError("no C++ compiler: neither $CXX nor g++ nor clang++")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}:\n{done.stderr.strip()[:2000]}")


def _key() -> str:
    """What a compiled library depends on: sources, options, PyTorch, the processor."""
    options = (FLAGS, NATIVE, UNITS, torch.__version__, platform.machine())
    digest = hashlib.sha256(repr(options).encode())
    for file in sorted(SOURCE.iterdir()):
        digest.update(file.read_bytes())
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^(flags|Features)\s*:.*$", cpuinfo.read_text(), re.MULTILINE)
        digest.update(found[0].encode() if found else b"")
    return digest.hexdigest()[:16]
