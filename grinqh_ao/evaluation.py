"""How far a quantized model is from its full-precision self, under the decode rule."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from grinqh_ao.decode_rule import decode_every_row


@dataclass(frozen=True)
class Reference:
    """A full-precision model's predictions on a text.

    Attributes:
        input_ids: int64 [B, S].
        log_probs: [B, S, V], of the token that follows each position.
    """

    input_ids: Tensor
    log_probs: Tensor


@dataclass(frozen=True)
class Quality:
    """Means over the scored positions.

    Attributes:
        kl: KL(reference || model) in nats per token.
        perplexity: exp of the mean negative log-likelihood of the true next token.
        agreement: share of positions where both put the same token first.
        positions: how many positions the KL is over.
    """

    kl: float
    perplexity: float
    agreement: float
    positions: int


@torch.no_grad()
def reference(model: nn.Module, input_ids: Tensor) -> Reference:
    """Runs ``model``, a causal language model of transformers, on ``input_ids`` [B, S]."""
    logits = model(input_ids, use_cache=False).logits
    return Reference(input_ids, logits.log_softmax(dim=-1, dtype=torch.float32))


@torch.no_grad()
def quality(
    model: nn.Module, reference: Reference, *, decode_rule: bool = True, dense_prefix: int = 16
) -> Quality:
    """Compares ``model`` with a reference on the same text.

    Args:
        model: a causal language model of transformers.
        reference: from :func:`reference`, of the model before it was quantized.
        decode_rule: read every token as decoding does; False takes the dense path of prefill.
        dense_prefix: positions at the start of each sequence that are not scored, and that take
            the dense path: a prompt.

    Raises:
        ValueError: ``dense_prefix`` leaves no position with a next token to score.
    """
    ids = reference.input_ids
    if not 0 <= dense_prefix < ids.shape[1] - 1:
        raise ValueError(
            f"dense_prefix={dense_prefix!r}: expected 0 to {ids.shape[1] - 2} "
            f"for sequences of {ids.shape[1]} tokens"
        )
    with decode_every_row(dense_prefix) if decode_rule else nullcontext():
        logits = model(ids, use_cache=False).logits
    kl = nll = agree = 0.0
    for row, expected, found in zip(ids, reference.log_probs, logits, strict=True):
        expected = expected[dense_prefix:]
        found = found[dense_prefix:].log_softmax(dim=-1, dtype=torch.float32)
        kl += (expected.exp() * (expected - found)).sum().item()
        agree += (expected.argmax(dim=-1) == found.argmax(dim=-1)).sum().item()
        nll -= found[:-1].gather(1, row[dense_prefix + 1 :, None]).sum().item()
    positions = ids.shape[0] * (ids.shape[1] - dense_prefix)
    scored = positions - ids.shape[0]  # the last position of a sequence has no next token
    return Quality(
        kl=kl / positions,
        perplexity=float(torch.tensor(nll / scored).exp()),
        agreement=agree / positions,
        positions=positions,
    )
