"""``generate()`` that need not wait for the GPU after every token.

At every token it asks the device whether to stop, and until it knows, the device has nothing to do:
the next step is prepared when this one is over. transformers can ask one token late, which takes
what the host does out of the time of a token, but does so only on the device that it was measured
on ("mps").
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

_theirs: Callable[..., bool] | None = None  # while ours is in its place


def defer_stop_checks(deferred: bool = True) -> None:
    """Has ``generate()`` look one token late whether to stop, on all accelerators, in all threads.

    Tokens stay the same: the step that may be one too many is undone. It takes effect where
    transformers supports it: in greedy search and sampling, not in an assistant's draft; and where
    a cache is your own or returned, only if it can be cut, as a ``StaticCache`` cannot. Worth it
    where steps are compiled into CUDA graphs, and so take the GPU longer than the host.

    Args:
        deferred: False has ``generate()`` wait again.

    Raises:
        TypeError: ``deferred`` is no bool.
    """
    global _theirs
    if not isinstance(deferred, bool):
        raise TypeError(f"deferred={deferred!r}: expected True or False")
    from transformers.generation.utils import DeferredStopCheck

    if deferred and _theirs is None:
        _theirs = DeferredStopCheck.is_supported
        DeferredStopCheck.is_supported = staticmethod(_wherever_it_can_be(_theirs))
    elif not deferred and _theirs is not None:
        DeferredStopCheck.is_supported = staticmethod(_theirs)
        _theirs = None


def _wherever_it_can_be(theirs: Callable[..., bool]) -> Callable[..., bool]:
    @functools.wraps(theirs)
    def is_supported(device: torch.device, *args: Any, **kwargs: Any) -> bool:
        return theirs(torch.device("mps") if _has_events(device) else device, *args, **kwargs)

    return is_supported


def _has_events(device: torch.device) -> bool:
    return device.type != "cpu"
