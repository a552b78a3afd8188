"""Checkpoints that are damaged, foreign or dishonest: one clear error, before any is loaded."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchao.quantization import quantize_
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM

from grinqh_ao import CheckpointError, GrinqhConfig, GrinqhTensor, calibrate
from grinqh_ao.checkpoint import SUFFIXES, Attributes, from_tensors, to_tensors
from models import tiny_model

LAYER = "model.layers.1.mlp.up_proj.weight"  # [160, 64]


@pytest.fixture(scope="module", params=["plain", "compact"])
def pristine(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    model = tiny_model("llama", tied=False)
    quantize_(model, GrinqhConfig(bits=3))
    if request.param == "compact":
        calibrate(model, torch.randint(0, 320, (1, 64)), stored_bits=5.0, importance=False)
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def checkpoint(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "checkpoint")


def edit(checkpoint, change):
    """Rewrites the tensors; ``change`` gets a dictionary of them."""
    file = checkpoint / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    change(tensors)
    save_file(tensors, file, metadata=metadata)


def edit_config(checkpoint, change):
    file = checkpoint / "config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"])
    file.write_text(json.dumps(config))


def refused(checkpoint, *words):
    """The message of the one error, which has all words in it."""
    with pytest.raises(CheckpointError) as error:
        AutoModelForCausalLM.from_pretrained(checkpoint)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_unharmed(checkpoint):
    AutoModelForCausalLM.from_pretrained(checkpoint)


@pytest.mark.parametrize("name", ["scales", "row_scale", "sensitivity", "thresholds", "gains"])
def test_missing_inner_tensor(checkpoint, name):
    edit(checkpoint, lambda tensors: tensors.pop(f"{LAYER}_{name}"))
    refused(checkpoint, "model.safetensors", LAYER, f"{name}: missing")


def test_missing_slices(checkpoint):
    edit(checkpoint, lambda tensors: tensors.pop(LAYER))
    refused(checkpoint, "model.safetensors", LAYER, "slices: missing")


def test_missing_layer(checkpoint):
    def change(tensors):
        for name in [name for name in tensors if name.startswith(LAYER)]:
            del tensors[name]

    edit(checkpoint, change)
    refused(checkpoint, LAYER, "missing")


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
def test_missing_dense_tensor(checkpoint, name):
    """transformers would leave it random, with a warning."""
    edit(checkpoint, lambda tensors: tensors.pop(name))
    refused(checkpoint, name, "missing")


def test_unknown_inner_tensor(checkpoint):
    edit(checkpoint, lambda tensors: tensors.update({f"{LAYER}_zero_point": torch.zeros(64)}))
    refused(checkpoint, "model.safetensors", LAYER, "_zero_point", "unknown")


def test_layer_that_the_config_does_not_name(checkpoint):
    edit_config(checkpoint, lambda config: config["weights"][0]["names"].remove(LAYER))
    refused(checkpoint, "model.safetensors", LAYER, "config.json does not name")


def test_layer_that_the_model_does_not_have(checkpoint):
    name = "model.layers.7.mlp.up_proj.weight"
    edit_config(checkpoint, lambda config: config["weights"][0]["names"].append(name))
    refused(checkpoint, "config.json", name, "has no such weight")


def shorter(tensor: Tensor) -> Tensor:
    return tensor[..., :-1].contiguous() if tensor.shape[-1] > 1 else tensor[..., :0].contiguous()


@pytest.mark.parametrize(
    ("pristine", "name"),
    [
        *(("plain", name) for name in SUFFIXES if name not in ("curve", "low")),
        *(("compact", name) for name in SUFFIXES),
    ],
    indirect=["pristine"],
)
@pytest.mark.parametrize("harm", ["shape", "dimension", "dtype"])
def test_wrong_shape_or_dtype(checkpoint, name, harm):
    key = LAYER + SUFFIXES[name]
    changes = {
        "shape": shorter,
        "dimension": lambda tensor: tensor[None].clone(),
        "dtype": lambda tensor: tensor.to(torch.float64),
    }

    def change(tensors):
        tensors[key] = changes[harm](tensors[key])

    edit(checkpoint, change)
    expected = "dtype" if harm == "dtype" else name
    refused(checkpoint, "model.safetensors", LAYER, f"{name}: ", expected)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("thresholds", [[0, 0, 0, 0], [1, 2, torch.nan, 4]], "not finite"),
        ("thresholds", [[0, 0, 0, 0], [1, 2, torch.inf, torch.inf]], "not finite"),
        ("thresholds", [[0, 0, 0, 0], [1, 3, 2, 4]], "ascending"),
        ("thresholds", [[0, 0, 0, 0], [-1, 3, 3, 4]], "negative"),
        ("gains", [1, 1, torch.nan, 1], "not finite"),
        ("gains", [1, 1, 0, 1], "not positive"),
    ],
)
def test_values_that_make_no_sense(checkpoint, name, values, message):
    edit(checkpoint, lambda tensors: tensors[f"{LAYER}_{name}"].copy_(torch.tensor(values)))
    refused(checkpoint, "model.safetensors", LAYER, f"{name}: ", message)


@pytest.mark.parametrize("name", ["row_scale", "sensitivity"])
def test_scales_that_are_not_finite(checkpoint, name):
    edit(checkpoint, lambda tensors: tensors[f"{LAYER}_{name}"][3:].fill_(torch.inf))
    refused(checkpoint, "model.safetensors", LAYER, f"{name}: ", "not finite")


@pytest.mark.parametrize("pristine", ["compact"], indirect=True)
class TestCompact:
    @pytest.mark.parametrize("place", [1000, -2, 0])
    def test_place_outside_of_the_slices(self, checkpoint, place):
        """A kernel would read there."""

        def change(tensors):
            low = tensors[f"{LAYER}_low"]
            low[(low == 1).nonzero()[0]] = place

        edit(checkpoint, change)
        refused(checkpoint, "model.safetensors", LAYER, "low: ")

    def test_fewer_slices_than_places(self, checkpoint):
        edit(checkpoint, lambda tensors: tensors.update({LAYER: tensors[LAYER][:, :-2].clone()}))
        refused(checkpoint, "model.safetensors", LAYER, "low: ")

    def test_curve_that_rises(self, checkpoint):
        edit(checkpoint, lambda tensors: tensors[f"{LAYER}_curve"][5:].fill_(0.5))
        edit(checkpoint, lambda tensors: tensors[f"{LAYER}_curve"][40:60].fill_(0.9))
        refused(checkpoint, "model.safetensors", LAYER, "curve: ")

    def test_levels_without_4_cannot_be_compact(self, checkpoint):
        """Where a channel is without low slices it is read at 4 bits."""

        def change(config):
            config["weights"][0]["levels"] = [0, 2, 6, 8]

        def three(tensors):
            for name in [name for name in tensors if name.endswith("_thresholds")]:
                tensors[name] = tensors[name][:, :3].clone()

        edit_config(checkpoint, change)
        edit(checkpoint, three)
        refused(checkpoint, "model.safetensors", "low: ", "levels 4 and 8")

    def test_head_cannot_be_compact(self, checkpoint):
        def change(config):
            config["weights"][0]["names"].remove(LAYER)
            config["weights"][1]["names"].append(LAYER)

        edit_config(checkpoint, change)
        refused(checkpoint, "model.safetensors", LAYER, "low: ")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(format_version=2), ["format_version=2", "reads version 1"]),
        (lambda c: c.pop("weights"), ["weights", "missing"]),
        (lambda c: c.update(weights=[]), ["weights", "names no weight"]),
        (lambda c: c["weights"][1].update(levels=[0, 2, 4, 6]), ["lm_head.weight", "slices: "]),
        (lambda c: c["weights"][0].update(levels=[0, 4, 8]), ["thresholds: ", "(0, 4, 8)"]),
        (lambda c: c["weights"][0].update(levels=[0, 3]), ["levels=[0, 3]"]),
        (lambda c: c["weights"][0].update(min_bits=9), ["min_bits=9"]),
        (lambda c: c["weights"][0].update(min_bits=None), ["min_bits=None"]),
        (lambda c: c["weights"][0].update(names="model.norm.weight"), ["names="]),
        (lambda c: c["weights"][0].pop("min_bits"), ["expected levels, min_bits and names"]),
        (lambda c: c["weights"][0]["names"].append(LAYER), [LAYER, "twice"]),
        (lambda c: c.update(group_size=64), ["group_size"]),
        (lambda c: c.update(bits=9), ["bits=9"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_config(checkpoint, change, words):
    edit_config(checkpoint, change)
    refused(checkpoint, *words)


@pytest.mark.parametrize("kept", [0, 4, 500, 0.3, 0.999])
def test_truncated_file(checkpoint, kept):
    file = checkpoint / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(kept * len(data)) if 0 < kept < 1 else kept])
    refused(checkpoint, "model.safetensors", "not a complete safetensors file")


def test_missing_shard(tmp_path):
    model = tiny_model("llama", tied=False)
    quantize_(model, GrinqhConfig(bits=3))
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    with pytest.raises(OSError, match=r"00002"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight", LAYER])
def test_what_is_missing_is_missed_by_the_model_without_a_head(checkpoint, name):
    def change(tensors):
        for key in [key for key in tensors if key.startswith(name)]:
            del tensors[key]

    edit(checkpoint, change)
    with pytest.raises(CheckpointError, match=f"{name.removeprefix('model.')}: missing"):
        AutoModel.from_pretrained(checkpoint)


def test_a_state_dict_without_a_layer(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(LAYER)}
    config = AutoConfig.from_pretrained(checkpoint)
    with pytest.raises(CheckpointError, match=f"{LAYER}: missing"):
        LlamaForCausalLM.from_pretrained(None, config=config, state_dict=rest)


def test_a_state_dict_is_checked_too(checkpoint):
    """That has no files to be checked before."""
    tensors = load_file(checkpoint / "model.safetensors")
    tensors[f"{LAYER}_thresholds"].fill_(torch.nan)
    config = AutoConfig.from_pretrained(checkpoint)
    with pytest.raises(RuntimeError, match="conversion"):
        LlamaForCausalLM.from_pretrained(None, config=config, state_dict=tensors)


def test_the_format_is_what_its_page_says(pristine):
    """A reader of docs/format.md's, in NumPy, that knows nothing of this package."""
    config = json.loads((pristine / "config.json").read_text())["quantization_config"]
    model = AutoModelForCausalLM.from_pretrained(pristine)
    tensors = load_file(pristine / "model.safetensors")
    for group in config["weights"]:
        for name in group["names"][-3:]:
            parts = {
                suffix: tensor.numpy() if tensor.dtype != torch.bfloat16 else tensor.float().numpy()
                for suffix in ("", "_scales", "_row_scale", "_gains", "_low")
                if (tensor := tensors.get(name + suffix)) is not None
            }
            weight = model.get_parameter(name)
            for level in group["levels"][1:]:
                read = read_by_the_page(parts, group["levels"][-1], level)
                expected = weight.dequantize(torch.float64, level).numpy()
                np.testing.assert_allclose(read, expected, rtol=1e-6, atol=1e-12)


def read_by_the_page(parts, top, b):
    slices, scales = parts[""].view(np.uint32), parts["_scales"]
    (n,), (_, k, groups) = parts["_row_scale"].shape, scales.shape
    w, stored, tile = slices.shape[2], top // 2, 64 * groups
    high = min(stored, 2)
    low = parts.get("_low", np.arange(k))
    result = np.zeros((n, k))
    for output in range(n):
        t, p = divmod(output, tile)
        for channel in range(k):
            bits = b if low[channel] >= 0 else min(b, 4)
            code = 0
            for s in range(bits // 2):
                line = high * channel + s
                if s >= 2:
                    line = high * k + (stored - 2) * low[channel] + s - 2
                code = 4 * code + (int(slices[t, line, p % w]) >> (2 * (p // w)) & 3)
            u = int(scales[t, channel, p // 64])
            scale = 2 ** ((u - 255) / 16) if u else 0
            value = parts["_gains"][bits // 2 - 1] * ((2 * code + 1) / 2**bits - 1)
            result[output, channel] = parts["_row_scale"][output] * scale * value
    return result


@given(
    n=st.integers(1, 700),
    k=st.integers(1, 40),
    top=st.sampled_from([2, 4, 6, 8]),
    experts=st.integers(0, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_round_trip(n, k, top, experts, dtype):
    weights = [
        GrinqhTensor.from_hp(torch.randn(n, k, dtype=dtype), top / 2, range_of(top), 0.0)
        for _ in range(max(1, experts))
    ]
    weight = GrinqhTensor.stack(weights) if experts else weights[0]
    again = from_tensors(to_tensors(weight), weight.shape, Attributes.of(weight), dtype, "here")
    assert again.shape == weight.shape
    assert again.dtype == dtype
    assert torch.equal(again.dequantize(), weight.dequantize())


def range_of(top: int) -> list[int]:
    return list(range(0, top + 1, 2))


@given(data=st.data())
def test_no_other_shape_passes(data):
    """Whatever is cut off or added: refused by name, or the very shapes of the format."""
    weight = GrinqhTensor.from_hp(torch.randn(130, 24))
    tensors = to_tensors(weight)
    suffix = data.draw(st.sampled_from(sorted(tensors)))
    shape = list(tensors[suffix].shape)
    dimension = data.draw(st.integers(0, len(shape) - 1))
    shape[dimension] = data.draw(st.integers(0, 2 * shape[dimension] + 2))
    changed = tensors | {suffix: torch.zeros(shape, dtype=tensors[suffix].dtype)}
    if changed[suffix].shape == tensors[suffix].shape:
        return
    name = suffix.removeprefix("_") or "slices"
    with pytest.raises(CheckpointError, match=re.escape("here: ")) as error:
        from_tensors(changed, (130, 24), Attributes.of(weight), torch.float32, "here")
    assert name in str(error.value) or suffix == ""
