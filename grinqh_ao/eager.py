"""A time in which compiled functions run eagerly: so that hooks run, and switches are seen."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_eager = threading.Lock()
_eager_users = 0
_stance: Any = None


@contextmanager
def eagerly() -> Iterator[None]:
    """Compiled functions run eagerly, in all threads, until the last that asked for it is done."""
    global _eager_users, _stance
    with _eager:
        if _eager_users == 0:
            _stance = torch.compiler.set_stance("force_eager")  # fails in compiled functions
            _stance.__enter__()
        _eager_users += 1
    try:
        yield
    finally:
        with _eager:
            _eager_users -= 1
            if _eager_users == 0:
                _stance.__exit__(None, None, None)
