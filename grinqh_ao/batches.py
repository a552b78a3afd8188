"""What calibration takes: batches of token ids, made from texts or given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# The first positions of a text attract massive activations, and take the dense path as a prompt.
FIRST_POSITIONS = 16
SEQUENCE = 512  # tokens, of texts that are cut here
# Of a token, on average: a longer text is not tokenized to its end.
_MAX_CHARACTERS = 32

Batch = Tensor | Mapping[str, Any]


def token_batches(
    texts: str | Sequence[str], tokenizer: Callable[..., Any], tokens: int = 4096
) -> list[Tensor]:
    """Texts as batches of token ids for :func:`calibrate`, int64 [1, 512] each.

    Texts are put one after the other, up to ``tokens`` tokens; the last batch may be shorter, and
    is left out if it has no more than 16 tokens, of which none would be counted.

    Raises:
        ValueError: ``tokens`` is not a whole number above 16.
    """
    if not isinstance(tokens, int) or tokens <= FIRST_POSITIONS:
        raise ValueError(f"tokens={tokens!r}: expected a whole number above {FIRST_POSITIONS}")
    texts = [texts] if isinstance(texts, str) else texts
    ids: list[int] = []
    for text in texts:
        if len(ids) >= tokens:
            break
        ids += tokenizer(text[: tokens * _MAX_CHARACTERS])["input_ids"]
    found = torch.tensor(ids[:tokens], dtype=torch.int64, device="cpu")
    return [batch[None] for batch in found.split(SEQUENCE) if len(batch) > FIRST_POSITIONS]


def check_batch(batch: object, name: str = "data") -> None:
    """Raises TypeError unless ``batch`` is token ids [B, S], or a mapping with such input_ids."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        if isinstance(ids, Tensor):
            what = f"shape {tuple(ids.shape)}"
        elif isinstance(batch, Mapping) and ids is not None:
            what = f"input_ids in a {type(ids).__name__} (of a tokenizer: return_tensors='pt')"
        else:
            what = type(batch).__name__
        raise TypeError(
            f"{name} has a batch of {what}: expected token ids [B, S], or a mapping with input_ids"
        )


def check_batches(data: object, name: str = "data") -> None:
    """Raises TypeError or ValueError unless ``data`` may be batches."""
    if isinstance(data, str | bytes | Tensor | Mapping) or not isinstance(data, Iterable):
        raise TypeError(
            f"{name} is a {type(data).__name__}: expected batches of token ids [B, S], or of "
            "mappings with input_ids"
        )
    if isinstance(data, Sequence):
        if not data:
            raise ValueError(f"{name} is empty: expected batches of token ids [B, S]")
        for batch in data:
            check_batch(batch, name)
