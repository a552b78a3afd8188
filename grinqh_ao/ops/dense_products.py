"""Products with dense weights, in the dtype that the device multiplies fast."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Where a processor has no instructions for them, PyTorch multiplies them one number at a time.
_CPU_MULTIPLIES = {
    torch.bfloat16: torch.backends.mkldnn.is_available()
    and torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    torch.float16: torch.backends.mkldnn.is_available()
    and torch.ops.mkldnn._is_mkldnn_fp16_supported(),
}


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which to multiply ``x`` with a dense weight: its own, or float32 on a CPU that
    is slow at that."""
    slow = x.device.type == "cpu" and not _CPU_MULTIPLIES.get(x.dtype, True)
    return torch.float32 if slow else x.dtype


def dense_product(x: Tensor, dense: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times dense [N, K], in the dtype of ``dense``, plus bias [N] or None.

    Returns:
        [..., N] in the dtype of ``x``.
    """
    if dense.dtype == x.dtype:
        return F.linear(x, dense, bias)
    bias = None if bias is None else bias.to(dense.dtype)
    with torch.autocast(x.device.type, enabled=False):  # it would have them in x's again
        return F.linear(x.to(dense.dtype), dense, bias).to(x.dtype)
