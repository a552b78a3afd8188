"""Counters of arrived programs (see combine.py), zero before and after each launch.

They must outlive a launch and no two launches that run at a time may share them. Launches on one
stream run one after the other (one that begins early waits before it counts), so a stream has one
set. A launch that is captured into a CUDA graph may be replayed on any stream, beside any other, so
it gets a set of its own, for good.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

# 16 MiB: some 1400 graphs of an 8B model. Then captures begin to share counters, oldest first,
# which is wrong only for graphs that are replayed at the same time.
CAPTURED = 1 << 22
MAX_TILES = 1 << 14

_lock = threading.Lock()
_of_stream: dict[tuple[int, int], Tensor] = {}
_of_captures: dict[int, Tensor] = {}
_next_captured: dict[int, int] = {}


def arrivals(tiles: int, device: torch.device) -> Tensor:
    """int32 [>= tiles] on ``device``, the current one."""
    index = torch.cuda.current_device() if device.index is None else device.index
    if torch.cuda.is_current_stream_capturing():
        return _captured(tiles, index)
    key = index, torch.cuda.current_stream(index).cuda_stream
    found = _of_stream.get(key)
    if found is None:
        with _lock:
            if index not in _of_captures:  # now, as nothing can be set to zero while capturing
                _of_captures[index] = _zeros(CAPTURED, index)
                _next_captured[index] = 0
            _of_stream[key] = found = _zeros(MAX_TILES, index)
    return found


def _zeros(count: int, index: int) -> Tensor:
    """Allocated in a thread of its own: this one may be warming a graph up, in whose memory pool
    nothing may stay."""
    made = []

    def make() -> None:
        made.append(torch.zeros(count, dtype=torch.int32, device=f"cuda:{index}"))
        torch.cuda.synchronize(index)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    return made[0]


def _captured(tiles: int, index: int) -> Tensor:
    with _lock:
        if index not in _of_captures:
            raise RuntimeError(
                "the first decode step on this device is being captured into a CUDA graph; "
                "run one before capturing, as torch.cuda.graph asks for anyway"
            )
        start = _next_captured[index]
        if start + tiles > CAPTURED:
            start = 0
        _next_captured[index] = start + tiles
        return _of_captures[index][start : start + tiles]
