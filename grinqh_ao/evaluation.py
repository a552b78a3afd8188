"""How far a quantized model is from its full-precision self, under the decode rule."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from grinqh_ao.batches import FIRST_POSITIONS
from grinqh_ao.decode_rule import decode_every_row
from grinqh_ao.metering import Measurement, measure
from grinqh_ao.model import is_quantized
from grinqh_ao.observing import evaluating


@dataclass(frozen=True)
class Reference:
    """A full-precision model's predictions on a text.

    Attributes:
        input_ids: int64 [B, S].
        log_probs: B tensors, float32 [S, V], of the token that follows each position.
    """

    input_ids: Tensor
    log_probs: Sequence[Tensor]


@dataclass(frozen=True)
class Quality:
    """What :func:`evaluate` finds, over the scored positions.

    Attributes:
        kl: mean KL(reference || model), nats per token.
        kl_median: its median over positions.
        kl_p90: its 90th percentile.
        perplexity: exp of the mean negative log-likelihood of the true next token.
        agreement: share of positions where both put the same token first.
        positions: how many positions the KL is over.
        read: what decoding read; None for a model that decoded nothing.
    """

    kl: float
    kl_median: float
    kl_p90: float
    perplexity: float
    agreement: float
    positions: int
    read: Measurement | None


@torch.no_grad()
def reference(
    model: nn.Module, input_ids: Tensor, cache: str | PathLike[str] | None = None
) -> Reference:
    """What a model predicts, to compare others with; to be made before it is quantized.

    Like :func:`evaluate` without dropout, in whatever mode the model is.

    Args:
        model: a causal language model of transformers.
        input_ids: int64 [B, S].
        cache: a directory to keep the predictions in, 4 * V bytes a token. They are found again for
            equal ``input_ids`` and an equal model (by its config, by names, shapes and samples of
            its parameters and buffers, and by which of PEFT's adapters are active).

    Raises:
        TypeError: ``input_ids`` is no tensor.
        ValueError: ``input_ids`` has another shape, or ``model`` is quantized and cannot be cached.
    """
    if not isinstance(input_ids, Tensor):
        raise TypeError(f"input_ids is a {type(input_ids).__name__}: expected a tensor [B, S]")
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise ValueError(f"input_ids of shape {tuple(input_ids.shape)}: expected [B, S]")
    with evaluating(model):
        if cache is None:
            return Reference(input_ids, [_log_probs(model, row) for row in _progress(input_ids)])
        return Reference(input_ids, _cached(model, input_ids, Path(cache).expanduser()))


def _cached(model: nn.Module, input_ids: Tensor, directory: Path) -> Sequence[Tensor]:
    if is_quantized(model):
        raise ValueError("cache: only the predictions of models in full precision are kept")
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    file = directory / f"reference-{_fingerprint(model, input_ids)}.safetensors"
    if not file.exists():
        sequences = enumerate(_progress(input_ids))
        rows = {str(i): _log_probs(model, row).cpu() for i, row in sequences}
        unfinished = file.with_suffix(f".{os.getpid()}")
        save_file(rows, unfinished)
        unfinished.rename(file)
    return _OnDisk(file, len(input_ids))


@torch.no_grad()
def evaluate(
    model: nn.Module,
    reference: Reference,
    *,
    decode_rule: bool = True,
    dense_prefix: int = FIRST_POSITIONS,
) -> Quality:
    """Compares ``model`` with a reference on the same text, one sequence at a time.

    With the decode rule, results are those of decoding token by token after a dense prefill of
    ``dense_prefix`` tokens: one pass, with every token graded by itself.

    Args:
        model: a causal language model of transformers, quantized or not.
        reference: from :func:`reference`, of the model before it was quantized.
        decode_rule: read every token after the prefix as decoding does; False takes the dense path
            of prefill for all.
        dense_prefix: positions at the start of each sequence that take the dense path and are not
            scored. At least some 16 are needed for figures that say something about generation:
            the first positions of a text draw massive activations, and are never decoded.

    Raises:
        TypeError: ``reference`` is none.
        ValueError: ``dense_prefix`` leaves no position with a next token to score.
    """
    if not isinstance(reference, Reference):
        raise TypeError(
            f"reference is a {type(reference).__name__}: expected what grinqh_ao.reference(model, "
            "input_ids) gives of the full-precision model"
        )
    ids = reference.input_ids
    if not isinstance(dense_prefix, int) or not 0 <= dense_prefix < ids.shape[1] - 1:
        raise ValueError(
            f"dense_prefix={dense_prefix!r}: expected 0 to {ids.shape[1] - 2} "
            f"for sequences of {ids.shape[1]} tokens"
        )
    divergences, nll, agree = [], 0.0, 0.0
    measurement = None
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        if decode_rule:
            stack.enter_context(decode_every_row(dense_prefix))
            if is_quantized(model):
                measurement = stack.enter_context(measure(model))
        for row, expected in zip(_progress(ids), reference.log_probs, strict=True):
            found = _log_probs(model, row)[dense_prefix:]
            expected = expected[dense_prefix:].to(found.device)
            terms = expected.exp() * (expected - found)
            # A token that the reference rules out adds nothing.
            divergences.append(terms.masked_fill(expected == -torch.inf, 0).sum(dim=-1))
            agree += (expected.argmax(dim=-1) == found.argmax(dim=-1)).sum().item()
            nll -= found[:-1].gather(1, row[dense_prefix + 1 :, None]).sum().item()
    kl = torch.cat(divergences).double()
    scored = len(kl) - len(ids)  # the last position of a sequence has no next token
    return Quality(
        kl=kl.mean().item(),
        kl_median=kl.median().item(),
        kl_p90=kl.quantile(0.9).item(),
        perplexity=torch.tensor(nll / scored, dtype=torch.float64).exp().item(),
        agreement=agree / len(kl),
        positions=len(kl),
        read=measurement if measurement and measurement.layers else None,
    )


def _progress(ids: Tensor) -> Iterable[Tensor]:
    bar: Iterable[Tensor] = tqdm(ids, desc="evaluating", unit="sequence", disable=None, leave=False)
    return bar


def _log_probs(model: Any, row: Tensor) -> Tensor:
    """float32 [S, V]"""
    logits: Tensor = model(row[None], use_cache=False).logits[0]
    return logits.log_softmax(dim=-1, dtype=torch.float32)


def _fingerprint(model: nn.Module, input_ids: Tensor) -> str:
    digest = hashlib.sha256(f"{tuple(input_ids.shape)} {input_ids.dtype}".encode())
    digest.update(input_ids.cpu().numpy().tobytes())
    config = getattr(model, "config", None)
    digest.update(config.to_json_string().encode() if config is not None else b"")
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sample = tensor.detach().flatten()[:: max(1, tensor.numel() // 997)]
        digest.update(sample.cpu().float().numpy().tobytes())
    for module in model.modules():
        disabled = getattr(module, "disable_adapters", None)
        if isinstance(disabled, bool):  # a layer of PEFT's; models have a method of that name
            digest.update(f"{module.active_adapters} {disabled}".encode())
    return digest.hexdigest()[:16]


class _OnDisk(Sequence[Tensor]):
    """Rows in a safetensors file, read one at a time."""

    def __init__(self, file: Path, rows: int) -> None:
        self._file, self._rows = file, rows

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: Any) -> Any:
        from safetensors import safe_open

        index = range(self._rows)[index]
        with safe_open(self._file, "pt") as stored:
            return stored.get_tensor(str(index))
