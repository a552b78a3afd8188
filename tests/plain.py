"""The decode rule written down once more, as plainly as it can be, in float64."""

import torch
from torch import Tensor, nn

from grinqh_ao import GrinqhTensor
from grinqh_ao.codec import SCALE_GROUP
from grinqh_ao.experts import ExpertLinears


def laplace(*shape: int) -> Tensor:
    return torch.distributions.Laplace(0.0, 1.0).sample(shape)


def absolute(weight: GrinqhTensor, *thresholds: float) -> GrinqhTensor:
    """Calibrated thresholds are absolute; here all channels weigh the same."""
    weight.sensitivity.fill_(1)
    weight.thresholds[0] = torch.tensor(thresholds)
    weight.thresholds[1] = 0
    return weight


def dense_at(weight: GrinqhTensor, level: int) -> Tensor:
    """float64 [N, K]: every stored bit by its documented place and meaning."""
    n, k = weight.shape
    if level == 0:
        return torch.zeros(n, k, dtype=torch.float64)
    words = weight.slices.shape[2]
    output, channel = torch.arange(n)[:, None], torch.arange(k)
    tile, offset = output // (16 * words), output % (16 * words)
    field, word = offset // words, offset % words
    stored = weight.levels[-1] // 2
    high = min(stored, 2)
    low = channel if weight.low is None else weight.low.long()
    levels = torch.where(low < 0, min(level, 4), level)
    code = torch.zeros(n, k, dtype=torch.int64)
    for s in range(level // 2):
        line = high * channel + s if s < 2 else high * k + low * (stored - 2) + s - 2
        two_bits = (weight.slices[tile, line, word].long() >> (2 * field)) & 3
        code = torch.where(2 * s < levels, 4 * code + two_bits, code)
    exponent = weight.scales[tile, channel, offset // SCALE_GROUP].double()
    scale = torch.where(exponent > 0, 2 ** ((exponent - 255) / 16), 0)
    gains = weight.gains.double()[levels // 2 - 1]
    value = gains * ((2 * code + 1) / 2.0**levels - 1)
    return value * scale * weight.row_scale[:, None].double()


def levels_of(x: Tensor, weight: GrinqhTensor) -> list[int]:
    """The level of every channel of one row x [K]."""
    magnitude = x.abs().float() * weight.sensitivity.float()
    absolute, relative = weight.thresholds
    thresholds = (absolute + relative * magnitude.mean()).tolist()
    levels = [weight.levels[sum(m > t for t in thresholds)] for m in magnitude.tolist()]
    if weight.low is None:
        return levels
    return [min(level, 4) if p < 0 else level for level, p in zip(levels, weight.low, strict=True)]


def decode(x: Tensor, weight: GrinqhTensor, bias: Tensor | None = None) -> Tensor:
    """float64 [N] for one row x [K]."""
    return decode_together(x[None], weight, bias)[0]


def decode_together(x: Tensor, weight: GrinqhTensor, bias: Tensor | None = None) -> Tensor:
    """float64 [R, N] for rows x [R, K] that are decoded together."""
    levels = [max(row) for row in zip(*(levels_of(row, weight) for row in x), strict=True)]
    effective = torch.zeros(weight.shape, dtype=torch.float64)
    for level in set(levels) - {0}:
        channels = torch.tensor([b == level for b in levels])
        effective[:, channels] = dense_at(weight, level)[:, channels]
    y = x.double() @ effective.t()
    return y if bias is None else y + bias.double()


class PlainLinear(nn.Module):
    """A linear layer of the same rule: up to 8 rows are decoded, more take the dense weight."""

    def __init__(self, weight: GrinqhTensor, bias: Tensor | None) -> None:
        super().__init__()
        self.nested, self.bias = weight, bias
        self.by_level = {level: dense_at(weight, level) for level in weight.levels}

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) <= 8:
            levels = torch.tensor([levels_of(row, self.nested) for row in rows]).amax(0)
            weight = sum(dense * (levels == level) for level, dense in self.by_level.items())
        else:
            weight = self.by_level[self.nested.levels[-1]]
        y = x.double() @ weight.t()
        return (y if self.bias is None else y + self.bias.double()).to(x.dtype)


class PlainExperts(ExpertLinears):
    """Experts of the same rule: up to 8 tokens are decoded, each with each expert by itself."""

    def __init__(self, weight: GrinqhTensor) -> None:
        super().__init__(torch.zeros(0))
        self.linears = [PlainLinear(one, None) for one in weight]
        self.outputs = weight.shape[1]

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        y = x.new_zeros(*experts.shape, self.outputs)
        for token in range(experts.shape[0]):
            for slot, expert in enumerate(experts[token].tolist()):
                linear = self.linears[expert]
                row = x[token, slot if x.shape[1] > 1 else 0][None]
                if len(experts) > 8:
                    highest = linear.by_level[linear.nested.levels[-1]]
                    y[token, slot] = (row.double() @ highest.t()).to(x.dtype)[0]
                else:
                    y[token, slot] = linear(row)[0]
        return y


def plain_model(model: nn.Module) -> nn.Module:
    """Replaces every quantized linear of ``model``, in place; embeddings become dense."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, ExpertLinears):
                setattr(module, name, PlainExperts(child.weight))
                continue
            weight = child._parameters.get("weight")
            if not isinstance(weight, GrinqhTensor):
                continue
            if isinstance(child, nn.Linear):
                setattr(module, name, PlainLinear(weight, child.bias))
            else:
                child.weight = nn.Parameter(dense_at(weight, weight.levels[-1]).to(weight.dtype))
    return model
