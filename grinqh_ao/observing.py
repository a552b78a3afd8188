"""One pass over calibration data: what each layer sees, and how much its errors would matter."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from grinqh_ao.batches import FIRST_POSITIONS, Batch, check_batch
from grinqh_ao.codec import decode_scales
from grinqh_ao.compact import ChannelUse
from grinqh_ao.eager import eagerly
from grinqh_ao.experts import ExpertLinears
from grinqh_ao.tails import Histogram
from grinqh_ao.torchao_tensor import GrinqhTensor

# As model.quantized_linears gives them.
Layers = list[tuple[str, nn.Module, GrinqhTensor]]


class Observer:
    """What one weight sees: of layers with one weight, tied ones, all of them together.

    Attributes:
        histogram: of activations times sensitivity.
        use: of single channels, where asked for.
        tokens: whose gradients were seen.
    """

    def __init__(
        self, weight: GrinqhTensor, histogram: Histogram, use: ChannelUse | None = None
    ) -> None:
        self._weight = weight
        self._sensitivity = weight.measured_sensitivity().float()
        self.histogram = histogram
        self.use = use
        self.tokens = 0
        self._gradient_energy = torch.zeros(weight.shape[0], dtype=torch.float64, device="cpu")

    def see(self, counted: Tensor, everything: Tensor) -> None:
        """Activations [tokens, K]: of positions as decoding sees them, and of all."""
        sensitivity = self._sensitivity.to(counted.device)
        if self.use:
            self.use.add(everything.float() * sensitivity)
        self.histogram.add(counted.float() * sensitivity)

    def see_gradient(self, gradient: Tensor) -> None:
        """[tokens, N], of the outputs; what is not finite, as after an overflow, does not count."""
        energy = gradient.float().square()
        energy = energy[energy.sum(1).isfinite()]
        self._gradient_energy += energy.sum(0).double().cpu()
        self.tokens += len(energy)

    @property
    def importance(self) -> float | None:
        """What the weight's errors add to the KL divergence, per weight and up to a common factor.

        With G the gradient of -log p(token) for tokens drawn from the model's own predictions, an
        error e in a layer's outputs costs E (G e)^2 / 2 (the Fisher information), for errors that
        are independent E sum_n G_n^2 e_n^2 / 2. The errors of an output are in proportion to its
        scales. A threshold should be inverse to the root of this. None if no gradient was seen.
        """
        weight = self._weight
        n = len(weight.row_scale)
        scales = decode_scales(weight.scales).square().mean(1)  # [tiles, groups]
        per_output = scales.flatten().repeat_interleave(weight.tile // scales.shape[1])[:n]
        variance = (per_output * weight.row_scale.square()).double().cpu()
        cost = float(self._gradient_energy @ variance)
        return cost / (n * self.tokens) if cost > 0 else None


def observe(
    model: nn.Module,
    batches: Iterable[Batch],
    layers: Layers,
    observers: Mapping[GrinqhTensor, Observer],
    gradients: bool,
) -> None:
    """Runs ``model`` over ``batches``, in the dense path, and lets observers see their layers.

    Args:
        gradients: also find out what errors cost, by a backward pass for each batch.

    Raises:
        TypeError: an element of ``batches`` is no batch.
        ValueError: ``gradients``, and the model returns no logits, or none with a gradient.
    """
    positions = _Positions()
    handles = []
    of_experts: dict[nn.Module, list[Observer]] = {}
    for _, module, weight in layers:
        if isinstance(module, ExpertLinears):
            of_experts.setdefault(module, []).append(observers[weight])
            continue
        before = functools.partial(positions.see, observers[weight])
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        if gradients:
            after = functools.partial(positions.follow, observers[weight])
            handles.append(module.register_forward_hook(after))
    for module, experts in of_experts.items():
        after = functools.partial(positions.see_experts, experts)
        handles.append(module.register_forward_hook(after))
    # Of a model that is offloaded as a whole accelerate moves the inputs.
    device = next((p.device for p in model.parameters() if not p.is_meta), None)
    modes = _backward_pass(model) if gradients else torch.no_grad()
    try:
        # Hooks must run: no compiled graph.
        with eagerly(), evaluating(model), modes:
            for batch in tqdm(batches, desc="calibrating", unit="batch", disable=None):
                check_batch(batch)
                inputs = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
                for key, value in inputs.items():
                    inputs[key] = value.to(device) if isinstance(value, Tensor) else value
                positions.start(inputs["input_ids"], inputs.get("attention_mask"))
                output = model(**inputs)
                if gradients and (surprise := positions.surprise(_logits_of(output))) is not None:
                    surprise.backward()
    finally:
        for handle in handles:
            handle.remove()


class _Positions:
    """The positions of a batch, and which of them count."""

    def __init__(self) -> None:
        self._counted = Tensor()
        self._padding = Tensor()
        self._generator: torch.Generator | None = None

    def start(self, input_ids: Tensor, mask: Tensor | None) -> None:
        """A new batch; of its positions no padding counts, and not the first ones."""
        real = torch.ones_like(input_ids, dtype=torch.bool)
        if mask is not None and mask.shape == real.shape:
            real = mask.bool()
        self._padding = ~real
        self._counted = real & (real.cumsum(1) > FIRST_POSITIONS)

    def rows(self, x: Tensor, which: Tensor) -> Tensor:
        """[tokens, K] of ``x`` at some positions."""
        rows = x.detach().reshape(-1, x.shape[-1])
        # Else a part of the positions, in an order of its own, as experts see them.
        if len(rows) == which.numel():
            rows = rows[which.flatten().to(x.device)]
        return rows

    def see(
        self,
        observer: Observer,
        module: nn.Module,
        args: tuple[Tensor, ...],
        kwargs: dict[str, Tensor],
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]] | None:
        x = args[0] if args else kwargs["input"]
        observer.see(self.rows(x, self._counted), self.rows(x, ~self._padding))
        if x.requires_grad or not torch.is_grad_enabled():
            return None
        # The model's first layers: here gradients begin, or there would be none.
        x = x.detach().requires_grad_()
        return ((x, *args[1:]), kwargs) if args else (args, kwargs | {"input": x})

    def surprise(self, logits: Tensor) -> Tensor | None:
        """-log p of tokens drawn from the predictions, summed over positions but padding.

        None where nothing is predicted: no position has finite logits.
        """
        if self._generator is None:  # where logits are, which nobody knows before
            self._generator = torch.Generator(logits.device).manual_seed(0)
        rows = logits.flatten(0, -2)
        if len(rows) == self._padding.numel():
            rows = rows[~self._padding.flatten().to(rows.device)]
        rows = rows[rows.detach().isfinite().all(-1)]
        if len(rows) == 0:
            return None
        log_p = rows.float().log_softmax(-1)
        with torch.no_grad():
            drawn = torch.multinomial(log_p.exp(), 1, generator=self._generator)
        return -log_p.gather(1, drawn).sum()

    def follow(self, observer: Observer, module: nn.Module, args: Any, y: Tensor) -> None:
        counted = self._counted

        def add(gradient: Tensor) -> None:
            observer.see_gradient(self.rows(gradient, counted))

        if y.requires_grad:
            y.register_hook(add)

    def see_experts(
        self,
        observers: list[Observer],
        module: nn.Module,
        args: tuple[Tensor, Tensor],
        y: Tensor,
    ) -> None:
        """Rows by expert: x [T, R or 1, K], experts [T, R], y [T, R, N]."""
        x, experts = args[0].detach(), args[1]
        x = x.expand(*experts.shape, -1)
        counted, everything = (
            (which.flatten() if which.numel() == len(x) else which.new_ones(len(x)))
            .to(x.device)[:, None]
            .expand_as(experts)
            for which in (self._counted, ~self._padding)
        )
        for expert, observer in enumerate(observers):
            here = experts == expert
            observer.see(x[here & counted], x[here & everything])

        def add(gradient: Tensor) -> None:
            for expert, observer in enumerate(observers):
                observer.see_gradient(gradient[(experts == expert) & counted])

        if y.requires_grad:
            y.register_hook(add)


def _logits_of(output: Any) -> Tensor:
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise ValueError(
            f"importance=True: the model returns {type(output).__name__}, expected logits or "
            "something with logits; importance=False needs none"
        )
    if not logits.requires_grad:
        raise ValueError(
            "importance=True: no gradient can reach the layers from the logits, the model may run "
            "under no_grad; importance=False needs none"
        )
    return logits


@contextlib.contextmanager
def _backward_pass(model: nn.Module) -> Iterator[None]:
    """Gradients of activations, but none of parameters."""
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ValueError(
            "importance=True: the model was made in inference mode, where nothing has gradients; "
            "importance=False needs none"
        )
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout; afterwards every module is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
