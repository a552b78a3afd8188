"""Wherever quantize_ or fuse_projections is interrupted: the model works, another call goes on."""

import copy
import sys

import pytest
import torch
from torchao.quantization import quantize_

from grinqh_ao import GrinqhConfig, fuse_projections, summary, unfuse_projections
from models import tiny_model

IDS = torch.arange(3, 9)[None]


class Interrupter:
    """Raises KeyboardInterrupt in front of the nth line of some functions, and counts lines."""

    def __init__(self, functions, at=-1):
        self.functions, self.at, self.lines = functions, at, 0

    def _trace(self, frame, event, _):
        code = frame.f_code
        if code.co_name not in self.functions or "grinqh_ao" not in code.co_filename:
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._trace

    def __enter__(self):
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_):
        sys.settrace(None)


def interrupted(change, functions, make):
    """Models in which ``change`` was interrupted, at every line once."""
    with Interrupter(functions) as counting:
        change(make())
    assert counting.lines > 10
    for at in range(1, counting.lines + 1):
        model = make()
        with pytest.raises(KeyboardInterrupt), Interrupter(functions, at):
            change(model)
        yield model


def quantize(model):
    quantize_(model, GrinqhConfig(bits=3))


@torch.no_grad()
def test_quantize():
    dense = tiny_model("qwen3_moe", tied=True, num_hidden_layers=1, num_experts=2)
    make = lambda: copy.deepcopy(dense)  # noqa: E731
    whole = make()
    quantize(whole)
    expected, logits = summary(whole), whole(IDS).logits
    functions = {"_quantize_layer", "_adopt_all", "put_experts", "adopt"}
    for model in interrupted(quantize, functions, make):
        assert model(IDS).logits.isfinite().all()
        quantize(model)
        found = summary(model)
        assert found.tied == expected.tied
        assert found.stored_bytes == expected.stored_bytes
        for module, as_wanted in zip(model.modules(), whole.modules(), strict=True):
            assert type(module) is type(as_wanted)
            for own in ("_inner", "_shares_weight"):
                assert bool(getattr(module, own, None)) == bool(getattr(as_wanted, own, None))
        assert torch.equal(model(IDS).logits, logits)


@torch.no_grad()
def test_fuse_and_unfuse():
    model = tiny_model("llama", tied=False, num_hidden_layers=1)
    quantize(model)
    expected = model(IDS).logits
    fused = copy.deepcopy(model)
    groups = fuse_projections(fused)
    functions = {"fuse_projections", "_fuse", "unfuse_projections"}
    for change, start, then, result in (
        (fuse_projections, model, fuse_projections, groups),
        (unfuse_projections, fused, fuse_projections, groups),
        (unfuse_projections, fused, unfuse_projections, None),
    ):
        for found in interrupted(change, functions, lambda start=start: copy.deepcopy(start)):
            torch.testing.assert_close(found(IDS).logits, expected)
            assert then(found) == result
            torch.testing.assert_close(found(IDS).logits, expected)
