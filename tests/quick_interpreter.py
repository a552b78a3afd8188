"""Importing this makes Triton's interpreter replace its operations once a launch.

By itself it does so again for every call of a function within a kernel, which took a third of the
kernels' tests.
"""

import triton.language as tl
from triton.runtime import interpreter

_replace_operations = interpreter._patch_lang


def _replace_operations_once(function):
    known = [value for value in function.__globals__.values() if value is tl or value is tl.core]
    if any(tl.core.is_builtin(language.load) for language in known):
        return _replace_operations(function)
    return interpreter._LangPatchScope()


interpreter._patch_lang = _replace_operations_once
