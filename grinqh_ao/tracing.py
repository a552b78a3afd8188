"""Whether a call is traced, and not run."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


def being_traced() -> bool:
    """Whether a compiler, or torch.export, is tracing this very call.

    ``torch.compiler.is_compiling()`` alone also says so to threads that run something meanwhile.
    """
    if not torch.compiler.is_compiling():
        return False
    # The first is a constant to Dynamo; all else that traces does so with modes of this thread.
    return torch.compiler.is_dynamo_compiling() or bool(_get_current_dispatch_mode_stack())
