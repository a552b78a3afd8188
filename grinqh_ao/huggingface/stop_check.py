"""``generate()`` that need not wait for the GPU after every token.

At every token it asks the device whether to stop, and until it knows, the device has nothing to do:
the next step is prepared when this one is over. transformers can ask one token late, which takes
what the host does out of the time of a token, but does so only on the device that it was measured
on ("mps").
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch

_changing = threading.Lock()
_theirs: Callable[..., bool] | None = None  # while ours is in its place


def defer_stop_checks(deferred: bool = True) -> None:
    """Has ``generate()`` look one token late whether to stop, on GPUs too, in all threads.

    The step that may be one too many is undone, so that the tokens of a call stay the same. But it
    was made: where sampling stops early, one more random number has been drawn, and logits
    processors and stopping criteria have seen one more token. Streamers get tokens one step late.

    It takes effect where transformers supports it: in greedy search and sampling, not in beam
    search or assisted decoding; and where a cache is your own or returned, only if it can be cut,
    as a ``StaticCache`` cannot. And on the current GPU only. Worth it where steps are compiled into
    CUDA graphs, and so take the GPU longer than the host.

    Args:
        deferred: False has ``generate()`` wait again.

    Raises:
        TypeError: ``deferred`` is no bool.
    """
    global _theirs
    if not isinstance(deferred, bool):
        raise TypeError(f"deferred={deferred!r}: expected True or False")
    from transformers.generation.utils import DeferredStopCheck

    with _changing:
        if deferred and _theirs is None:
            _theirs = DeferredStopCheck.is_supported
            DeferredStopCheck.is_supported = staticmethod(_on_gpus_too(_theirs))
        elif not deferred and _theirs is not None:
            DeferredStopCheck.is_supported = staticmethod(_theirs)
            _theirs = None


def _on_gpus_too(theirs: Callable[..., bool]) -> Callable[..., bool]:
    from transformers import EncoderDecoderCache

    @functools.wraps(theirs)
    def is_supported(
        device: torch.device, cache: Any, cache_is_returned: bool, **options: Any
    ) -> bool:
        if isinstance(cache, EncoderDecoderCache) and cache_is_returned:
            return False  # they look for layers in it, when all is done
        if _is_current(device):
            device = torch.device("mps")
        return theirs(device, cache, cache_is_returned, **options)

    return is_supported


def _is_current(device: torch.device) -> bool:
    """What is awaited are events, which are recorded on the accelerator that is current."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or device.type != accelerator.type:
        return False
    return device.index in (None, torch.accelerator.current_device_index())
