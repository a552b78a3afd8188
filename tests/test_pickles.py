"""Weights in pickles: ``torch.load(weights_only=True)`` is said to be for those of strangers."""

import io
import pickle

import pytest
import torch
from torch import nn

from grinqh_ao import CheckpointError, GrinqhTensor
from grinqh_ao.slices import drop_low


def compact() -> GrinqhTensor:
    weight = GrinqhTensor.from_hp(torch.randn(96, 40))
    weight.slices, weight.low = drop_low(weight.slices, torch.arange(40) % 3 == 0)
    return weight


def saved(what: object) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(what, file)
    file.seek(0)
    return file


def stack() -> GrinqhTensor:
    weights = [GrinqhTensor.from_hp(torch.randn(96, 40), 2, (0, 2, 4)) for _ in range(2)]
    return GrinqhTensor.stack(weights).to(torch.bfloat16)


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("is_parameter", [True, False])
@pytest.mark.parametrize("make", [compact, stack])
def test_round_trip(make, is_parameter, weights_only):
    weight = make()
    if is_parameter:
        weight = nn.Parameter(weight, requires_grad=False)
    found = torch.load(saved(weight), weights_only=weights_only)
    assert torch.equal(found, weight)
    assert torch.equal(found.thresholds, weight.thresholds)
    assert isinstance(found, nn.Parameter) == is_parameter
    assert repr(found) == repr(weight)


def test_onto_the_meta_device():
    found = torch.load(saved(compact()), map_location="meta", weights_only=True)
    assert found.is_meta
    assert found.shape == (96, 40)


def set_low(weight, place):
    weight.low[0] = place


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda w: set_low(w, 1 << 27), "low: expected -1, or each place"),
        (lambda w: set_low(w, -2), "low: expected -1"),
        (lambda w: setattr(w, "low", w.low[:-1].clone()), r"low: has shape \(39,\)"),
        (lambda w: setattr(w, "low", w.low.long()), "low: has dtype torch.int64"),
        (lambda w: setattr(w, "low", None), "slices: has shape"),
        (lambda w: setattr(w, "low", [0] * 40), "low: expected a contiguous tensor"),
        (lambda w: setattr(w, "slices", w.slices[:, :8].clone()), "slices: has shape"),
        (lambda w: setattr(w, "slices", w.slices.mT.contiguous().mT), "slices: expected a contig"),
        (lambda w: setattr(w, "slices", w.slices.to("meta")), "scales: expected a contiguous"),
        (lambda w: setattr(w, "scales", w.scales[:, :-8].clone()), "low: has shape"),
        (lambda w: setattr(w, "scales", w.scales.flatten()), "vectors: has shape"),
        (lambda w: setattr(w, "vectors", w.vectors[:30].clone()), "vectors: .* too short"),
        (lambda w: setattr(w, "vectors", w.vectors.half()), "vectors: .* expected float32"),
        (lambda w: w.vectors[9].fill_(torch.nan), "gains: has values that are not finite"),
        (lambda w: w._attributes.update(levels=(0, 2, 99)), r"levels=\(0, 2, 99\)"),
        (lambda w: w._attributes.update(levels=(0, 2, 4, 6)), "low: only weights with levels 4"),
        (lambda w: w._attributes.update(min_bits="6"), "min_bits='6'"),
        (lambda w: w._attributes.update(dtype="float32"), "has attributes"),
        (lambda w: w._attributes.update(size=(5, 5)), "has attributes"),
    ],
)
def test_what_kernels_could_not_read_is_refused(harm, message):
    weight = compact()
    weight.vectors = weight.vectors.clone()
    harm(weight)
    with pytest.raises(CheckpointError, match=f"pickled weight: .*{message}"):
        torch.load(saved(weight), weights_only=True)


def test_the_tensor_cannot_be_made_without_being_checked():
    class Stranger:
        def __reduce__(self):
            weight = compact()
            names = ("slices", "scales", "vectors", "levels", "min_bits", "dtype", "curve")
            return GrinqhTensor, (
                *(getattr(weight, name) for name in names),
                weight.low + (1 << 27),
            )

    with pytest.raises(pickle.UnpicklingError, match="GrinqhTensor"):
        torch.load(saved(Stranger()), weights_only=True)
