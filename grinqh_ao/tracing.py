"""Whether a call is traced, and not run."""

from __future__ import annotations

import torch

_MODES = (
    torch._C._TorchDispatchModeKey.FUNCTIONAL,
    torch._C._TorchDispatchModeKey.PROXY,
    torch._C._TorchDispatchModeKey.FAKE,
)


def being_traced() -> bool:
    """Whether a compiler, or torch.export, is tracing this very call.

    ``torch.compiler.is_compiling()`` alone also says so to threads that run something meanwhile.
    """
    if not torch.compiler.is_compiling():
        return False
    # The first is a constant to Dynamo; all else that traces has modes of this thread.
    return torch.compiler.is_dynamo_compiling() or any(
        torch._C._get_dispatch_mode(key) is not None for key in _MODES
    )
