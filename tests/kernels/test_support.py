"""Which GPUs take the kernels, and what the others are told."""

import importlib.util
import warnings

import pytest
import torch

from grinqh_ao.ops.triton.support import has_kernels

DEVICE = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def t4(monkeypatch):
    """A GPU of the oldest generation that has kernels, and Triton."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    has_kernels.cache_clear()
    yield
    has_kernels.cache_clear()


def test_turing_and_newer_take_them_without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert has_kernels(DEVICE)


def refused(reason):
    with pytest.warns(UserWarning, match=f"plain PyTorch on cuda:0, which is slow: {reason}"):
        assert not has_kernels(DEVICE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert not has_kernels(DEVICE)


def test_older_ones_do_not(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    refused("its kernels need compute capability 7.5, this GPU has 7.0")


def test_without_triton(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused("its kernels need Triton")


def test_of_another_maker(monkeypatch):
    """They count capabilities otherwise."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    refused("its kernels are for NVIDIA's GPUs")
