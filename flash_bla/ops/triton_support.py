"""Triton where it is installed; names that let the kernels' modules be imported where it is not."""

from __future__ import annotations

import os

try:
    import triton
    import triton.language as tl

    jit = triton.jit
    HAS_TRITON = True
except ImportError:
    from types import SimpleNamespace

    triton = None
    tl = SimpleNamespace(constexpr=None)
    HAS_TRITON = False

    def jit(function=None, **options):
        """Stands in for ``triton.jit``: the function stays, and nothing calls it."""
        return function if function is not None else jit


# Whether Triton's interpreter runs the kernels, on any device; Triton reads the variable when it is imported, too.
INTERPRETING = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
