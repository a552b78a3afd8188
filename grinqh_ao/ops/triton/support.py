"""Which GPUs there are kernels for. Without importing Triton, which takes long to load."""

from __future__ import annotations

import functools
import importlib.util
import warnings

import torch

# Turing. The CUDA tools that Triton brings do not disassemble what is compiled for older ones, so
# that no test could check it.
MIN_CAPABILITY = (7, 5)


@functools.cache
def has_kernels(device: torch.device) -> bool:
    """Whether kernels run on a CUDA device. Where not, plain PyTorch does; a warning says why."""
    reason = _why_not(device)
    if reason is not None:
        warnings.warn(
            f"grinqh_ao decodes with plain PyTorch on {device}, which is slow: {reason}",
            stacklevel=2,
        )
    return reason is None


def _why_not(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "its kernels are for NVIDIA's GPUs"
    if importlib.util.find_spec("triton") is None:
        return "its kernels need Triton, which is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        found, least = (".".join(map(str, each)) for each in (capability, MIN_CAPABILITY))
        return f"its kernels need compute capability {least}, this GPU has {found}"
    return None
