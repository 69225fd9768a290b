"""A linear layer under autocast, with less work around its matrix products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_bla.ops.arguments import choose_backend
from flash_bla.ops.triton_column_sums import column_sums
from flash_bla.ops.triton_support import is_eager, once_differentiable, run

_PLAIN = (Tensor, torch.nn.Parameter)
LARGE = 2**23  # elements of the output from which on kernels should take longer than their launches: an estimate


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """``F.linear``; in eager mixed-precision training the gradients of weight and bias come in float32 at once.

    PyTorch gives them in half precision and converts them. For small outputs and everywhere else, ``torch.compile``
    included, this is ``F.linear`` itself.

    Args:
        x: ``(..., C)``.
        weight: ``(D, C)``.
        bias: ``(D,)``.
        backend: As in ``linear_attention``.

    Returns:
        ``(..., D)``, under autocast in its type.
    """
    mixed = (
        is_eager(x)  # first: a comparison of sizes would bind a traced graph to them
        and x.numel() * weight.shape[0] >= LARGE * weight.shape[1]
        and weight.dtype == torch.float32
        and type(weight) in _PLAIN  # and not a quantised one
        and weight.requires_grad
        and torch.is_grad_enabled()
        and torch.is_autocast_enabled(x.device.type)
    )
    if mixed and choose_backend(backend, x) == "triton":
        return _Mixed.apply(x, weight, bias, torch.get_autocast_dtype(x.device.type))
    return F.linear(x, weight, bias)


class _Mixed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, dtype):
        half_x, half_weight = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(half_x, half_weight)
        ctx.input_dtype = x.dtype
        return F.linear(half_x, half_weight, None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias, _ = ctx.needs_input_grad
        rows = dy.reshape(-1, dy.shape[-1])
        dx = (rows @ weight).view(x.shape).to(ctx.input_dtype) if of_x else None
        d_weight = None
        if of_weight:
            columns, x = rows.t(), x.reshape(-1, x.shape[-1])
            d_weight = torch.mm(columns, x, out_dtype=torch.float32) if x.is_cuda else (columns @ x).float()
        d_bias = run(column_sums, (rows,)) if of_bias else None
        return dx, d_weight, d_bias, None
