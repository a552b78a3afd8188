"""``defer_stop_checks``: the same tokens, and only where transformers can undo a step."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchao.quantization import quantize_
from transformers import DynamicCache, EncoderDecoderCache
from transformers.generation.utils import DeferredStopCheck

from grinqh_ao import GrinqhConfig, defer_stop_checks
from grinqh_ao.huggingface import stop_check
from models import tiny_model

CUDA = torch.device("cuda")


@pytest.fixture
def two_gpus(monkeypatch):
    """The second is current."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: CUDA)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 1)


@pytest.fixture(autouse=True)
def _as_it_was():
    defer_stop_checks(False)
    yield
    defer_stop_checks(False)


class Event:
    """Of a device that is never behind."""

    def __init__(self, device, blocking):
        pass

    def record(self):
        pass

    def synchronize(self):
        pass


class Streamer:
    def __init__(self):
        self.tokens = []

    def put(self, tokens):
        self.tokens += tokens.flatten().tolist()

    def end(self):
        self.tokens.append("end")


class CountWaits(TorchDispatchMode):
    """Whenever Python wants to know a number on the device."""

    def __init__(self):
        super().__init__()
        self.waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.waits += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def supported(device, cache=None, returned=False, is_assistant=False):
    return DeferredStopCheck.is_supported(device, cache, returned, is_assistant=is_assistant)


@pytest.mark.usefixtures("two_gpus")
def test_deferred_where_transformers_can_undo_a_step():
    assert not supported(CUDA)
    for _ in range(2):
        defer_stop_checks()
        assert supported(CUDA)
        assert supported(CUDA, DynamicCache())
        assert not supported(CUDA, is_assistant=True)
    uncuttable = DynamicCache()
    uncuttable.layers.append(type("Layer", (), {"is_croppable": False})())
    assert supported(CUDA, uncuttable)
    assert not supported(CUDA, uncuttable, returned=True)
    in_two = EncoderDecoderCache(DynamicCache(), DynamicCache())
    assert supported(CUDA, in_two)
    assert not supported(CUDA, in_two, returned=True)
    for _ in range(2):
        defer_stop_checks(False)
        assert not supported(CUDA)


@pytest.mark.usefixtures("two_gpus")
def test_deferred_on_the_current_gpu():
    defer_stop_checks()
    assert supported(torch.device("cuda", 1))
    assert not supported(torch.device("cuda", 0))
    assert not supported(torch.device("cpu"))
    assert not supported(torch.device("meta"))


def test_not_deferred_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)
    defer_stop_checks()
    assert not supported(CUDA)


def test_anything_but_a_bool_is_refused():
    theirs = DeferredStopCheck.is_supported
    with pytest.raises(TypeError, match="deferred=None: expected True or False"):
        defer_stop_checks(None)
    assert DeferredStopCheck.is_supported is theirs


def test_it_is_the_only_wait_of_a_token():
    model = tiny_model("llama", tied=True)
    quantize_(model, GrinqhConfig(bits=3))
    ids = torch.randint(0, 320, (1, 9))
    waits = []
    for tokens in (4, 14):
        with CountWaits() as count:
            model.generate(
                ids, attention_mask=torch.ones_like(ids), min_new_tokens=tokens, eos_token_id=5,
                max_new_tokens=tokens, do_sample=False, cache_implementation="static",
            )  # fmt: skip
        waits.append(count.waits)
    assert waits[1] - waits[0] == 14 - 4


@pytest.mark.parametrize("stops_early", [True, False])
@pytest.mark.parametrize("cache", ["static", "dynamic"])
@pytest.mark.parametrize("sample", [True, False])
def test_the_same_tokens(stops_early, cache, sample, monkeypatch):
    model = tiny_model("llama", tied=True)
    quantize_(model, GrinqhConfig(bits=3))
    ids = torch.randint(0, 320, (1, 9))
    steps = 0

    def count(module, inputs):
        nonlocal steps
        steps += 1

    model.lm_head.register_forward_pre_hook(count)

    def generate(**options):
        nonlocal steps
        steps, streamer = 0, Streamer()
        torch.manual_seed(1)
        tokens = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=sample,
            pad_token_id=0, cache_implementation=cache, streamer=streamer, **options,
        )  # fmt: skip
        return tokens[0].tolist(), streamer.tokens, steps

    options = {}
    if stops_early:
        options["eos_token_id"] = generate()[0][15]
    *expected, necessary = generate(**options)
    assert (len(expected[0]) < 9 + 12) == stops_early
    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(stop_check, "_is_current", lambda device: True)
    defer_stop_checks()
    *found, steps = generate(**options)
    assert found == expected
    assert steps == necessary + stops_early  # one too many, and undone
