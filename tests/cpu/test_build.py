"""Compiling the CPU kernels on first use."""

import warnings

import pytest
import torch
import torch.nn.functional as F

import plain
from grinqh_ao import GrinqhTensor
from grinqh_ao.ops.cpu import build


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As in a process that has not decoded yet, on a machine that has compiled nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "NATIVE", (*build.NATIVE, "-O0"))  # compiles faster
    forget()
    yield tmp_path
    forget()


def forget():
    """The kernels are not registered any more, and will be looked for again."""
    found = build.kernels() if build._kernels.cache_info().currsize else None
    if found:
        found.unregister()
    build._kernels.cache_clear()


def assert_decodes():
    weight = GrinqhTensor.from_hp(torch.randn(70, 40))
    x = torch.randn(1, 40)
    expected = plain.decode_together(x, weight).float()
    torch.testing.assert_close(F.linear(x, weight), expected, rtol=1e-4, atol=1e-5)


def test_compiled_once_and_kept(fresh, log):
    assert_decodes()
    assert len(list((fresh / "grinqh_ao").iterdir())) == 1  # no objects are left beside it
    assert "compiling kernels for this CPU" in log.text
    log.clear()
    forget()
    assert_decodes()
    assert not log.records


def test_without_a_compiler(fresh, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(fresh))
    with pytest.warns(UserWarning, match=r"plain PyTorch .* no C\+\+ compiler"):
        assert_decodes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_decodes()  # it was said
        weight = GrinqhTensor.from_hp(torch.randn(70, 40))
        prompt = torch.randn(9, 40)
        torch.testing.assert_close(F.linear(prompt, weight), prompt @ weight.dequantize().t())


def test_with_a_compiler_that_fails(fresh, monkeypatch):
    monkeypatch.setenv("CXX", "false")
    with pytest.warns(UserWarning, match="could not be compiled"):
        assert_decodes()
    assert not list((fresh / "grinqh_ao").iterdir())


def test_where_nothing_can_be_written(fresh, monkeypatch):
    (fresh / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(fresh / "file"))
    with pytest.warns(UserWarning, match="could not be compiled"):
        assert_decodes()
