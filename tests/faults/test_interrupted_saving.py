"""Whatever happens while a model is saved, the one that was there is there, or the new one is."""

import ctypes
import errno
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torchao.quantization import quantize_
from tqdm.auto import tqdm

import grinqh_ao
from grinqh_ao.huggingface import atomic
from grinqh_ao.model import quantized_linears
from models import tiny_model

KILLS = 40
INTERRUPTS = 60


@pytest.fixture(scope="module")
def both():
    """Two models that could be saved over each other."""
    made = []
    for bits in (2.0, 4.0):
        model = tiny_model("llama", tied=True)
        quantize_(model, grinqh_ao.GrinqhConfig(bits=bits))
        made.append(model)
    return made


def bits_in(directory: Path) -> float:
    """Of the model that is saved there: all of it, or an error."""
    model = grinqh_ao.load(directory)
    found = {round(w.bits, 3) for _, _, w in quantized_linears(model) if not w.min_bits}
    assert len(found) == 1
    return found.pop()


def leftovers(directory: Path) -> list[Path]:
    return list(directory.parent.glob(".*.partial*"))


def save(model, directory: Path) -> None:
    grinqh_ao.save(model, directory, max_shard_size="20KB")


def test_replaces_what_was_there(both, tmp_path):
    old, new = both
    target = tmp_path / "model"
    save(old, target)
    shards = {path.name for path in target.glob("*.safetensors")}
    assert len(shards) > 1
    (target / "README.md").write_text("mine")
    (target / "notes").mkdir()
    (target / "notes" / "note.txt").write_text("mine too")
    others = ["adapter_model.safetensors", "training_args.bin", "model_of_mine.safetensors"]
    for name in others:
        (target / name).write_text("mine")
    target.chmod(0o700)
    os.symlink(target, tmp_path / "link")
    grinqh_ao.save(new, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    weights = {path.name for path in target.glob("*.safetensors*")}
    assert weights == {"model.safetensors", others[0], others[2]}
    assert all((target / name).read_text() == "mine" for name in others)
    assert (target / "README.md").read_text() == "mine"
    assert (target / "notes" / "note.txt").read_text() == "mine too"
    assert (target / "config.json").stat().st_mode & 0o044 == 0o044  # as open() makes files
    assert target.stat().st_mode & 0o777 == 0o700
    assert bits_in(target) == 4
    assert not leftovers(target)
    save(old, tmp_path / "new")
    assert (tmp_path / "new").stat().st_mode & 0o055 == 0o055


def test_in_the_current_directory(both, tmp_path, monkeypatch):
    """It stays the one that processes are in, and so do its files."""
    old, new = both
    save(old, tmp_path / "model")
    (tmp_path / "model" / "notes").mkdir()
    monkeypatch.chdir(tmp_path / "model" / "notes")
    grinqh_ao.save(new, "..")
    assert bits_in(Path("..")) == 4
    found = {path.name for path in Path("..").iterdir()}
    assert "model.safetensors.index.json" not in found
    assert {"notes", "config.json", "model.safetensors", "README.md"} <= found
    assert not any(".partial" in name for name in found)


def test_where_the_parent_cannot_be_written_to(both, tmp_path, monkeypatch):
    target = tmp_path / "model"
    target.mkdir()
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != tmp_path)
    before = target.stat().st_ino
    for model, bits in zip(both, (2, 4), strict=True):
        save(model, target)
        assert bits_in(target) == bits
    assert target.stat().st_ino == before


def test_a_file_system_without_links(both, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise OSError(errno.EPERM, "injected")

    monkeypatch.setattr(os, "link", fails)
    save(both[0], tmp_path / "model")
    (tmp_path / "model" / "notes").mkdir()
    (tmp_path / "model" / "notes" / "note.txt").write_text("mine")
    save(both[1], tmp_path / "model")
    assert (tmp_path / "model" / "notes" / "note.txt").read_text() == "mine"
    assert bits_in(tmp_path / "model") == 4


def test_without_renameat2(both, tmp_path, monkeypatch):
    monkeypatch.setattr(atomic.ctypes, "CDLL", lambda *_, **__: object())
    for model, bits in zip(both, (2, 4), strict=True):
        save(model, tmp_path / "model")
        assert bits_in(tmp_path / "model") == bits
    assert not leftovers(tmp_path / "model")


def test_not_over_a_file(both, tmp_path):
    (tmp_path / "model").write_text("")
    with pytest.raises(NotADirectoryError, match="model: is no directory"):
        save(both[0], tmp_path / "model")


def in_a_child(function) -> int:
    """Its process; what it prints is lost."""
    child = os.fork()
    if child:
        return child
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        torch.set_num_threads(1)  # threads do not survive a fork
        tqdm.set_lock(threading.RLock())  # the other is shared, and held for good by one killed
        function()
        os._exit(0)
    except BaseException:
        os._exit(1)


@pytest.mark.parametrize("there", [False, True], ids=["nothing there", "a model there"])
def test_killed_at_any_time(both, tmp_path, there):
    old, new = both
    started = time.perf_counter()
    assert os.waitpid(in_a_child(lambda: save(new, tmp_path / "timed")), 0)[1] == 0
    seconds = time.perf_counter() - started
    chance, outcomes = random.Random(0), []
    for i in range(KILLS):
        target = tmp_path / f"{i}" / "model"
        if there:
            save(old, target)
        child = in_a_child(lambda target=target: save(new, target))
        time.sleep(seconds * chance.uniform(0, 1.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        outcomes.append(bits_in(target) if target.exists() else None)
        save(new, target)  # what was left beside it is in nobody's way
        assert bits_in(target) == 4
    before = 2 if there else None
    assert set(outcomes) == {before, 4}, outcomes


@pytest.mark.parametrize("inside", [False, True], ids=["whole", "file by file"])
def test_interrupted_at_any_line(both, tmp_path, monkeypatch, inside):
    """Ctrl-C, wherever Python is while a model is saved.

    In processes of their own: PyTorch's modes stay on where they were just to be left.
    """
    old, new = both
    target = tmp_path / "model"
    if inside:
        target.mkdir()
        monkeypatch.chdir(target)

    counted = tmp_path / "lines"

    def traced(stop: float) -> None:
        lines = 0

        def trace(frame, event, argument):
            nonlocal lines
            if event == "line":
                lines += 1
                if lines >= stop:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            save(new, target)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        counted.write_text(str(lines))

    save(old, target)
    assert os.waitpid(in_a_child(lambda: traced(float("inf"))), 0)[1] == 0
    whole = int(counted.read_text())
    assert bits_in(target) == 4
    chance, outcomes = random.Random(0), set()
    for i in range(INTERRUPTS):
        save(old, target)
        stop = whole - 2 * i if i < 20 else chance.randrange(1, whole)
        assert os.waitpid(in_a_child(lambda stop=stop: traced(stop)), 0)[1] == 0
        outcomes.add(bits_in(target))
    assert outcomes == {2, 4}


def test_disk_full(both, tmp_path, monkeypatch):
    """No file larger than a limit, as on a full disk, for each of many limits."""
    import resource

    old, new = both
    target = tmp_path / "model"
    grinqh_ao.save(old, target)
    largest = max(path.stat().st_size for path in target.iterdir())
    for limit in [0, 1, 100, 1000, *range(5000, largest, largest // 12), largest - 1]:

        def limited(limit=limit):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                grinqh_ao.save(new, target)
            except OSError:
                os._exit(7)

        assert os.waitstatus_to_exitcode(os.waitpid(in_a_child(limited), 0)[1]) == 7, limit
        assert bits_in(target) == 2
        assert not leftovers(target)


CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
MS_REMOUNT, MS_REC, MS_PRIVATE = 1 << 5, 1 << 14, 1 << 18
libc = ctypes.CDLL(None, use_errno=True)


def mount_small(directory: Path, size: int) -> None:
    """A file system of so many bytes, which only this process sees; OSError if that may not be."""
    flags = CLONE_NEWNS if os.geteuid() == 0 else CLONE_NEWNS | CLONE_NEWUSER
    for result in (
        libc.unshare(flags),
        libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None),
        libc.mount(b"none", bytes(directory), b"tmpfs", 0, f"size={size}".encode()),
    ):
        if result:
            raise OSError(ctypes.get_errno(), "no file system of its own for a test")


NOT_ALLOWED, AS_IT_WAS, SAVED = 3, 7, 8


def save_where_there_is_room_for(room: int, both, place: Path) -> int:
    """Over a model in a file system of its own, with so many bytes left; says what came of it."""
    old, new = both
    place.mkdir(exist_ok=True)
    try:
        mount_small(place, 1 << 30)
    except OSError:
        return NOT_ALLOWED
    save(old, place)  # a mount point
    assert bits_in(place) == 2
    save(old, place / "model")
    blocks = os.statvfs(place)
    size = (blocks.f_blocks - blocks.f_bfree) * blocks.f_bsize + room
    assert not libc.mount(b"none", bytes(place), None, MS_REMOUNT, f"size={size}".encode())
    failed = None
    try:
        save(new, place / "model")
    except OSError as error:
        failed = str(error)
    if failed is None:
        assert bits_in(place / "model") == 4
        return SAVED
    assert os.strerror(errno.ENOSPC) in failed
    assert bits_in(place / "model") == 2
    assert not leftovers(place / "model")
    return AS_IT_WAS


def test_full_file_system(both, tmp_path):
    """As above, with all of a file system's blocks taken, wherever that happens to be."""
    save(both[0], tmp_path / "model")
    size = sum(path.stat().st_size for path in (tmp_path / "model").iterdir())
    outcomes = []
    for room in range(0, size + (64 << 10), size // 10):
        child = in_a_child(
            lambda room=room: os._exit(save_where_there_is_room_for(room, both, tmp_path / "small"))
        )
        outcomes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    if NOT_ALLOWED in outcomes:
        pytest.skip("file systems cannot be mounted here")
    full = outcomes.count(AS_IT_WAS)
    assert full >= 5
    assert outcomes == [AS_IT_WAS] * full + [SAVED] * (len(outcomes) - full)
    assert outcomes[-1] == SAVED


def test_error_while_it_is_put_in_place(both, tmp_path, monkeypatch):
    old, new = both
    save(old, tmp_path / "model")

    def fails(*_):
        raise OSError(errno.EIO, "injected")

    for name in ("_exchange", "_sync", "_keep_others"):
        with monkeypatch.context() as patch:
            patch.setattr(atomic, name, fails)
            with pytest.raises(OSError, match="injected"):
                save(new, tmp_path / "model")
        assert bits_in(tmp_path / "model") == 2
        assert not leftovers(tmp_path / "model")


def test_error_while_files_are_put_in_place(both, tmp_path, monkeypatch):
    old, new = both
    target, rename = tmp_path / "model", Path.rename
    save(old, target)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    monkeypatch.chdir(target)
    for last in range(0, len(before) + 3, 2):
        moved = []

        def fails_once(path, to, last=last, moved=moved):
            moved.append(path)
            if len(moved) == last + 1:
                raise OSError(errno.EIO, "injected")
            return rename(path, to)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", fails_once)
            with pytest.raises(OSError, match="injected"):
                grinqh_ao.save(new, target)
        assert {path.name: path.read_bytes() for path in target.iterdir()} == before


@pytest.mark.parametrize("stopped_after", ["config", "one shard"])
def test_save_pretrained_over_another_is_recognised(both, tmp_path, monkeypatch, stopped_after):
    """transformers' own method writes in place; half of it is not taken for a model."""
    from transformers import modeling_utils

    old, new = both
    old.save_pretrained(tmp_path, max_shard_size="20KB")
    write, written = modeling_utils.safe_save_file, 0

    def stops(*arguments, **options):
        nonlocal written
        if written == (stopped_after == "one shard"):
            raise KeyboardInterrupt
        written += 1
        write(*arguments, **options)

    monkeypatch.setattr(modeling_utils, "safe_save_file", stops)
    with pytest.raises(KeyboardInterrupt):
        new.save_pretrained(tmp_path, max_shard_size="20KB")
    with pytest.raises(ValueError, match="was saved at another time"):
        grinqh_ao.load(tmp_path)
