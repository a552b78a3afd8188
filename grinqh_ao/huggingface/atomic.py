"""A directory is replaced as a whole, or left as it was: whatever happens while it is written."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger("grinqh_ao")

# Of transformers: files of weights, which another number of shards would leave behind.
_WEIGHTS = re.compile(r".*\.(safetensors|bin)(\.index\.json)?")
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def replaced(directory: Path) -> Iterator[Path]:
    """An empty directory beside ``directory``, which takes its place when the block ends.

    Files of the old one that were not written anew stay, but for weights. If the block raises, the
    old one is as it was. If the process or the machine stops, it is as it was, or replaced;
    ``.NAME.*.partial`` may lie beside it then, which nothing reads and which can be deleted.

    Args:
        directory: of a saved model, or where there is nothing yet.
    """
    directory = Path(os.path.realpath(directory))
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{directory}: is no directory")
    directory.parent.mkdir(parents=True, exist_ok=True)
    pattern = f".{directory.name}.*.partial"
    if left := [path.name for path in directory.parent.glob(pattern)]:
        logger.warning("%s: left by saving that was interrupted: %s", directory.parent, left)
    staging = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}.partial")
    staging.mkdir()
    try:
        yield staging
        if directory.exists():
            _keep_others(directory, staging)
        _to_disk(staging)
        _install(staging, directory)
    finally:  # holds what was not finished, or what was replaced
        shutil.rmtree(staging, ignore_errors=True)


def _keep_others(old: Path, new: Path) -> None:
    for path in old.iterdir():
        if (new / path.name).exists() or _WEIGHTS.fullmatch(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, new / path.name, symlinks=True)
        else:
            shutil.copy2(path, new / path.name, follow_symlinks=False)


def _to_disk(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file() and not path.is_symlink():
            _sync(path)
    _sync(directory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _install(new: Path, directory: Path) -> None:
    if directory.exists():
        _exchange(new, directory)
    else:
        new.rename(directory)
    _sync(directory.parent)


def _exchange(one: Path, other: Path) -> None:
    """Each takes the other's name, at once where the system can do that (Linux)."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None:
        paths = os.fsencode(one), os.fsencode(other)
        if rename(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
            return
        number = ctypes.get_errno()
        if number not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise OSError(number, os.strerror(number), str(other))
    # Between these two there is nothing of that name, but both are complete.
    old = one.with_name(f"{one.name}.old")
    other.rename(old)
    one.rename(other)
    old.rename(one)
