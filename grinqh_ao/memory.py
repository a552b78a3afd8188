"""Memory of the CPU that was freed and should go back to the system."""

from __future__ import annotations

import contextlib
import ctypes


def give_back() -> None:
    """Returns freed memory to the system, where the C library would keep it for itself.

    glibc keeps it in holes between what is still in use: after quantizing a model layer by layer,
    those can be several times its size. Where there is no glibc, this does nothing.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
