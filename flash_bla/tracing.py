"""What PyTorch is tracing for, and what it is told then; it stands under all floors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def is_exporting() -> bool:
    """Whether ``torch.export`` is tracing, and not ``torch.compile``.

    ``torch.compiler.is_exporting`` alone does not tell: under ``torch.compile``, PyTorch 2.11 lets it be True.
    """
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def recomputed(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """function(*tensors), of which ``torch.compile`` keeps the tensors for the backward pass, and not the result.

    For elementwise functions before a matrix product: they are computed again in one pass with their own gradient.
    Left to itself, the compiler keeps both. Elsewhere this is the function itself.
    """
    if torch.compiler.is_dynamo_compiling() and torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return checkpoint(function, *tensors, use_reentrant=False)
    return function(*tensors)
