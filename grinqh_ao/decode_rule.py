"""Which rows of an input are decoded, and the switch that decodes every row.

In generation a few rows are tokens being decoded: one, or those of a batch, of beams, or of an
assistant's draft. They are decoded together and share what is read. More rows are a prompt, which
takes the dense path. Perplexity and KL divergence run all tokens of a text at once; to judge
decoding, they ask for the decode rule on every row by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

# From here on reading all bits once, for a dense product, is taken to be cheaper. To be replaced by
# a measured crossover per GPU: see docs/kernel.md.
MAX_DECODED_TOGETHER = 8

_dense_prefix: ContextVar[int | None] = ContextVar("grinqh_dense_prefix", default=None)


@contextmanager
def decode_every_row(dense_prefix: int = 0) -> Iterator[None]:
    """Applies the decode rule to every row by itself, in every quantized linear, in this thread.

    The results are those of token-by-token decoding after a prompt of ``dense_prefix`` tokens.
    While it is active, compiled functions run eagerly, in all threads: compiled graphs do not
    know of the switch.

    Args:
        dense_prefix: rows at the start of each sequence (dimension -2 of the inputs) that take
            the dense path, as a prompt would. 0 or more.

    Raises:
        ValueError: ``dense_prefix`` is not a whole number, 0 or more.
    """
    if not isinstance(dense_prefix, int) or dense_prefix < 0:
        raise ValueError(f"dense_prefix={dense_prefix!r}: expected a whole number, 0 or more")
    token = _dense_prefix.set(dense_prefix)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        _dense_prefix.reset(token)


def first_decoded_row(x: Tensor) -> int | None:
    """Rows of ``x`` [..., rows, K] from this index on are decoded; None when none is."""
    rows = x.numel() // x.shape[-1]
    prefix = _prefix()
    if rows == 1 or (prefix is None and 1 < rows <= MAX_DECODED_TOGETHER):
        return 0
    if prefix is None or x.dim() < 2 or rows == 0 or prefix >= x.shape[-2]:
        return None
    return prefix


def decoded_together() -> bool:
    """Whether decoded rows share the levels of their channels; they do unless the switch is on."""
    return _prefix() is None


def _prefix() -> int | None:
    # Compiled functions run eagerly under the switch, and Dynamo cannot trace a ContextVar.
    return None if torch.compiler.is_compiling() else _dense_prefix.get()
