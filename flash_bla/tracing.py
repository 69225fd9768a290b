"""What PyTorch is tracing for, and what it is told then; it stands under all floors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


@torch.compiler.assume_constant_result  # called while tracing, and not traced: Dynamo would take it to be True
def is_exporting() -> bool:
    """Whether ``torch.export`` is tracing, and not ``torch.compile``."""
    return torch.compiler.is_exporting()


def is_traced(x: Tensor) -> bool:
    """Whether what is made beside x belongs to a trace, or is fake as x is, and must not be kept for other calls."""
    return torch.compiler.is_compiling() or type(x) is not Tensor or torch.jit.is_tracing()


def recomputed(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """function(*tensors), of which ``torch.compile`` keeps the tensors for the backward pass, and not the result.

    For elementwise functions before a matrix product: they are computed again in one pass with their own gradient.
    Left to itself, the compiler keeps both. Elsewhere this is the function itself.
    """
    if torch.compiler.is_dynamo_compiling() and any(x.requires_grad for x in tensors) and _can_checkpoint():
        return checkpoint(function, *tensors, use_reentrant=False)
    return function(*tensors)


@torch.compiler.assume_constant_result
def _can_checkpoint() -> bool:
    """Whether what is traced may have a checkpoint in it, as an exported program and ``torch.func`` may not."""
    return not (torch.compiler.is_exporting() or torch._C._are_functorch_transforms_active())
