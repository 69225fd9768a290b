"""Settings of the whole test suite."""

import os
from functools import cache

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, so before any test imports flash_bla


def speed_up_interpreter() -> None:
    """Lets Triton's interpreter replace the functions of its language once a launch.

    It does so again in each call of a function by a kernel, which takes half of its time.
    """
    try:
        from triton import language
        from triton.language.core import is_builtin
        from triton.runtime import interpreter
        from triton.runtime.interpreter import _LangPatchScope, _patch_lang
    except ImportError:  # no Triton, or another one
        return

    @cache
    def languages(fn):
        return [value for value in fn.__globals__.values() if value is language or value is language.core]

    def patch_once(fn):
        replaced = not any(is_builtin(place.load) for place in languages(fn))
        return _LangPatchScope() if replaced else _patch_lang(fn)

    interpreter._patch_lang = patch_once


if "TRITON_INTERPRET" in os.environ:
    speed_up_interpreter()
