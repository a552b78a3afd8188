"""Importing this mends two things in Triton's interpreter.

It replaces its operations again for every call of a function within a kernel, which took a third
of the kernels' tests: here it does so once a launch.

Comparisons of scalars become integers where they meet a block, and since Triton 3.9 loads refuse
a mask of integers: here they stay booleans.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_replace_operations = interpreter._patch_lang
_splat = interpreter.InterpreterBuilder.create_splat


def _replace_operations_once(function):
    known = [value for value in function.__globals__.values() if value is tl or value is tl.core]
    if any(tl.core.is_builtin(language.load) for language in known):
        return _replace_operations(function)
    return interpreter._LangPatchScope()


def _splat_booleans(self, ret_ty, arg):
    if arg.data.dtype == np.bool_:
        return interpreter.TensorHandle(np.full(ret_ty.shape, arg.data), tl.int1)
    return _splat(self, ret_ty, arg)


interpreter._patch_lang = _replace_operations_once
interpreter.InterpreterBuilder.create_splat = _splat_booleans
