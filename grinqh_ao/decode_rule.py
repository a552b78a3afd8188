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
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from grinqh_ao.eager import eagerly
from grinqh_ao.tracing import being_traced

# With more, reading all bits once, for a dense product, is taken to be cheaper (docs/kernel.md has
# times). Kernels are made for as many: MAX_ROWS in ops.
MAX_DECODED_TOGETHER = 8


@dataclass
class _Switch:
    """The decode rule on every row.

    Attributes:
        prefix: rows at the start of each sequence that take the dense path.
        rows: of all sequences, as linear layers last saw them.
        sequence: length of each. Experts, and layers within models that put all tokens of a batch
            into one dimension, learn from these where sequences begin.
    """

    prefix: int
    rows: int = 0
    sequence: int = 0

    def sequences_in(self, rows: int) -> int:
        """How many sequences so many rows of one dimension are: those seen last, or else one."""
        return rows // self.sequence if rows == self.rows > 0 else 1


_switch: ContextVar[_Switch | None] = ContextVar("grinqh_decode_every_row", default=None)


@contextmanager
def decode_every_row(dense_prefix: int = 0) -> Iterator[None]:
    """Applies the decode rule to every row by itself, in every quantized linear, in this thread.

    The results are those of token-by-token decoding after a prompt of ``dense_prefix`` tokens.
    Inputs with one dimension for all tokens of a batch are cut into the sequences that layers
    before have seen. Where sequences have a single row, a next token, it is decoded in any case.
    Inputs that want gradients take the dense path even so: use it under ``torch.no_grad()``. While
    it is active, compiled functions run eagerly, in all threads: compiled graphs do not know of the
    switch.

    Args:
        dense_prefix: rows at the start of each sequence (dimension -2 of the inputs) that take
            the dense path, as a prompt would. 0 or more.

    Raises:
        ValueError: ``dense_prefix`` is not a whole number, 0 or more.
    """
    if not isinstance(dense_prefix, int) or dense_prefix < 0:
        raise ValueError(f"dense_prefix={dense_prefix!r}: expected a whole number, 0 or more")
    token = _switch.set(_Switch(dense_prefix))
    try:
        with eagerly():
            yield
    finally:
        _switch.reset(token)


def note_sequence(x: Tensor) -> None:
    """Tells later layers how long sequences are, by the input [B, S, K] of a linear layer."""
    switch = _active()
    if switch is not None and x.dim() > 2:
        switch.rows, switch.sequence = x.shape[:-1].numel(), x.shape[-2]


def in_sequences(x: Tensor) -> Tensor:
    """With the switch on, ``x`` [B * S, K] as [B, S, K], where B sequences of S rows came before.

    Else, and any other ``x``, as it is.
    """
    switch = _active()
    if switch is None or x.dim() != 2 or (sequences := switch.sequences_in(len(x))) == 1:
        return x
    return x.reshape(sequences, -1, x.shape[-1])


def first_row_by_shape(x: Tensor) -> int | None:
    """Rows of ``x`` [..., rows, K] from this index on are decoded, or none where it is None, if
    nothing wants gradients (see :func:`grinqh_ao.linear.first_decoded_row`)."""
    rows = x.numel() // x.shape[-1]
    switch = _active()
    if rows == 1 or (switch is None and 1 < rows <= MAX_DECODED_TOGETHER):
        return 0
    if switch is None or x.dim() < 2 or rows == 0:
        return None
    if x.shape[-2] == 1:  # the next token of each text, or only the last one of each, for logits
        return 0
    return switch.prefix if switch.prefix < x.shape[-2] else None


def rows_are_open(x: Tensor) -> bool:
    """Whether this is traced for any number of rows, few and many."""
    if not being_traced():
        return False
    rows, few = x.numel() // x.shape[-1], MAX_DECODED_TOGETHER
    return not (statically_known_true(rows <= few) or statically_known_true(rows > few))


def decoded_tokens(tokens: int) -> bool | Tensor:
    """Which of a batch's tokens experts decode: all, none, or with the switch on bool [tokens].

    With the switch on, sequences are as long as the linear layers before have seen them; where none
    of those is quantized, all tokens are taken for one sequence.
    """
    switch = _active()
    if switch is None or tokens <= 1:
        return 1 <= tokens <= MAX_DECODED_TOGETHER
    length = tokens // switch.sequences_in(tokens)
    return length == 1 or torch.arange(tokens, device="cpu") % length >= switch.prefix


def decoded_together() -> bool:
    """Whether decoded rows share the levels of their channels; they do unless the switch is on."""
    return _active() is None


def _active() -> _Switch | None:
    # Compiled functions run eagerly under the switch, and Dynamo cannot trace a ContextVar.
    return None if being_traced() else _switch.get()
