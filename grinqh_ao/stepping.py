"""Threads: whole steps at one setting of ``bits``."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch import nn

from grinqh_ao.tracing import being_traced

_GATE = "_grinqh_gate"


class Gate:
    """A fair, re-entrant readers-writer lock: steps are the readers, changes of bits the writers.

    Those that wait take turns: neither starves.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._steps = 0
        self._steps_waiting = 0
        self._steps_first = 0  # of those that wait, before the next change
        self._changes_waiting = 0
        self._changing = False
        self._mine = threading.local()

    def __deepcopy__(self, memo: Any) -> Gate:
        return Gate()

    def __reduce__(self) -> tuple[type[Gate], tuple[()]]:
        return Gate, ()

    @property
    def _depth(self) -> int:
        """Steps within steps of this thread."""
        return getattr(self._mine, "depth", 0)

    def enter(self, call: FrameType) -> None:
        """Begins a step, or one within a step, which lasts as long as ``call``."""
        self._forget_interrupted()
        if self._depth == 0:
            with self._condition:
                self._steps_waiting += 1
                try:
                    self._condition.wait_for(self._may_step)
                finally:
                    self._steps_waiting -= 1
                    self._steps_first = max(0, self._steps_first - 1)
                    self._condition.notify_all()  # if interrupted: a change may be waiting for this
                self._steps += 1
            self._mine.call = call
        self._mine.depth = self._depth + 1

    def _may_step(self) -> bool:
        return not self._changing and (self._changes_waiting == 0 or self._steps_first > 0)

    def _may_change(self) -> bool:
        return not self._changing and self._steps == 0 and self._steps_first == 0

    def leave(self) -> None:
        if self._depth == 0:  # the call failed before it came to enter
            return
        self._mine.depth = self._depth - 1
        if self._depth == 0:
            self._mine.call = None
            with self._condition:
                self._steps -= 1
                self._condition.notify_all()

    def _forget_interrupted(self) -> None:
        """PyTorch calls no hook where KeyboardInterrupt ends a step, which is left now."""
        if self._depth == 0:
            return
        frame: FrameType | None = sys._getframe()
        while frame is not None and frame is not self._mine.call:
            frame = frame.f_back
        if frame is None:
            self._mine.depth = 1
            self.leave()

    @contextmanager
    def change(self) -> Iterator[None]:
        self._forget_interrupted()
        if self._depth:  # within a step of its own, for which it would wait forever
            yield
            return
        with self._condition:
            self._changes_waiting += 1
            try:
                self._condition.wait_for(self._may_change)
            finally:
                self._changes_waiting -= 1
                self._condition.notify_all()
            self._changing = True
        try:
            yield
        finally:
            with self._condition:
                self._changing = False
                self._steps_first = self._steps_waiting
                self._condition.notify_all()


def guard_steps(model: nn.Module) -> None:
    """From now on a call of ``model`` and ``set_bits(model, ...)`` wait for each other.

    For models whose bits are changed by other threads than run them: every step reads all layers at
    the same ``bits``. Any number of threads may run steps at once. A step that Ctrl-C ends is over
    for other threads when its own takes the next one, or sets bits.

    Args:
        model: what is called, step by step: the model, or what ``torch.compile(model)`` gave, since
            nothing of this is part of compiled graphs. Models that ``generate()`` or their own
            ``compile()`` compiles need not be given again. On a GPU all threads are taken to use
            the same stream, as they do by default.
    """
    inner: Any = getattr(model, "_orig_mod", model)
    gate = getattr(inner, _GATE, None) or Gate()
    setattr(inner, _GATE, gate)
    for called in (inner, model):
        if not any(isinstance(hook, _Enter) for hook in called._forward_pre_hooks.values()):
            called.register_forward_pre_hook(_Enter(gate))
            called.register_forward_hook(_Leave(gate), always_call=True)
    # Hooks are no part of what these compile.
    _guard_compiled_call(inner)
    inner.compile = _Method(_compile, inner)
    if hasattr(type(inner), "get_compiled_call"):  # transformers: what generate() calls
        inner.get_compiled_call = _Method(_get_compiled_call, inner)


class _Enter:
    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def __call__(self, *_: Any) -> None:
        if not being_traced():
            self.gate.enter(sys._getframe(1))


class _Leave(_Enter):
    def __call__(self, *_: Any) -> None:
        if not being_traced():
            self.gate.leave()


class _Step:
    """A compiled function, each call of which is a step."""

    def __init__(self, function: Callable[..., Any], gate: Gate) -> None:
        self.function, self.gate = function, gate

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if being_traced():
            return self.function(*args, **kwargs)
        self.gate.enter(sys._getframe())
        try:
            return self.function(*args, **kwargs)
        finally:
            self.gate.leave()


def _guard_compiled_call(model: Any) -> None:
    call = model._compiled_call_impl
    if call is not None and not isinstance(call, _Step):
        model._compiled_call_impl = _Step(call, getattr(model, _GATE))


def _compile(model: Any, *args: Any, **kwargs: Any) -> None:
    type(model).compile(model, *args, **kwargs)
    _guard_compiled_call(model)


def _get_compiled_call(model: Any, *args: Any, **kwargs: Any) -> _Step:
    return _Step(type(model).get_compiled_call(model, *args, **kwargs), getattr(model, _GATE))


class _Method:
    """A method of one model only. It does not keep the model alive, and is copied along with it."""

    def __init__(self, function: Callable[..., Any], model: nn.Module) -> None:
        self.__func__ = function  # with __self__ what accelerate looks for in copies that it makes
        self._model = weakref.ref(model)

    @property
    def __self__(self) -> nn.Module | None:
        return self._model()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__func__(self.__self__, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Method, (self.__func__, self.__self__)


@contextmanager
def changing(model: nn.Module) -> Iterator[None]:
    """No step of ``model`` runs meanwhile, if :func:`guard_steps` watches over it."""
    gate: Gate | None = getattr(model, _GATE, None)
    if gate is None:
        yield
    else:
        with gate.change():
            yield
