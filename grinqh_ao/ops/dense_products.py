"""Products with dense weights, in a dtype that the device multiplies fast."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _onednn_multiplies(name: str) -> bool:
    """Whether oneDNN has a product of this dtype for this processor; what PyTorch falls back to
    is slower than float32 (docs/cpu.md, "Without AVX-512")."""
    if not torch.backends.mkldnn.is_available():
        return False
    says = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
    return says is None or says()


# bfloat16 takes AVX-512, float16 takes more than that.
_ONEDNN_MULTIPLIES = {
    torch.bfloat16: _onednn_multiplies("bf16"),
    torch.float16: _onednn_multiplies("fp16"),
}


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which to multiply ``x`` with a dense weight: its own, or float32 on a CPU that
    is slow at that."""
    slow = x.device.type == "cpu" and not _ONEDNN_MULTIPLIES.get(x.dtype, True)
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
