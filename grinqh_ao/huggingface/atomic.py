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
from contextlib import contextmanager, suppress
from pathlib import Path

logger = logging.getLogger("grinqh_ao")

# As transformers calls files of weights, which another number of shards would leave behind.
_WEIGHTS = re.compile(
    r"(model|pytorch_model)(\.\w+)?(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index(\.\w+)?\.json)?"
)
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def replaced(directory: Path) -> Iterator[Path]:
    """An empty directory beside ``directory``, which takes its place when the block ends.

    Files of the old one that were not written anew stay, but for weights. If the block raises, the
    old one is as it was. If the process or the machine stops, it is as it was, or replaced;
    ``.NAME.*.partial`` may lie beside it then, which nothing reads and which can be deleted.

    Where ``directory`` cannot be replaced (a mount point, the current directory or one above it, a
    parent that cannot be written to) the empty one is inside, and at the end its files take the
    places of the old ones, one after the other. Only a process or machine that stops between these
    leaves files of both.

    Args:
        directory: of a saved model, or where there is nothing yet.
    """
    directory = Path(os.path.realpath(directory))
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{directory}: is no directory")
    whole = _can_be_replaced(directory)
    place = directory.parent if whole else directory
    place.mkdir(parents=True, exist_ok=True)
    if left := [path.name for path in place.glob(f".{directory.name}.*.partial*")]:
        logger.warning("%s: left by saving that was interrupted: %s", place, left)
    staging = place / f".{directory.name}.{secrets.token_hex(4)}.partial"
    # What is private stays so while it is written.
    staging.mkdir(mode=0o700 if directory.exists() else 0o777)
    try:
        yield staging
        if whole and directory.exists():
            _keep_others(directory, staging)
            _keep_permissions(directory, staging)
        _to_disk(staging)
        if whole:
            _install(staging, directory)
        else:
            _install_files(staging, directory)
    finally:  # holds what was not finished, or what was replaced
        shutil.rmtree(staging, ignore_errors=True)


def _can_be_replaced(directory: Path) -> bool:
    if not directory.exists():
        return True
    in_use = Path.cwd().is_relative_to(directory)
    return not in_use and not directory.is_mount() and os.access(directory.parent, os.W_OK)


def _keep_others(old: Path, new: Path) -> None:
    for path in old.iterdir():
        if (new / path.name).exists() or _WEIGHTS.fullmatch(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, new / path.name, symlinks=True, copy_function=_link)
        else:
            _link(path, new / path.name)


def _link(old: str | Path, new: str | Path) -> None:
    """The same file, which takes no room; a copy where there are no such links."""
    try:
        os.link(old, new, follow_symlinks=False)
    except OSError:
        shutil.copy2(old, new, follow_symlinks=False)


def _keep_permissions(old: Path, new: Path) -> None:
    status = old.stat()
    with suppress(PermissionError):  # of those who own neither
        os.chown(new, status.st_uid, status.st_gid)
    shutil.copystat(old, new)


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


def _install_files(new: Path, directory: Path) -> None:
    """All of them, or none."""
    old = new.with_name(f"{new.name}.old")
    names = {path.name for path in new.iterdir()}
    before = [p for p in directory.iterdir() if p.name in names or _WEIGHTS.fullmatch(p.name)]
    moves = [(path, old / path.name) for path in before]
    moves += [(new / name, directory / name) for name in sorted(names)]
    try:
        old.mkdir()
        for source, target in moves:
            source.rename(target)
        _sync(directory)
    except BaseException:
        for source, target in reversed(moves):
            if os.path.lexists(target) and not os.path.lexists(source):
                target.rename(source)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


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
