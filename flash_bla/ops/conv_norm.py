"""A depthwise convolution added to tokens, and the layer normalisation of the sum, in one node of autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_bla.ops import triton_depthwise_conv as conv
from flash_bla.ops import triton_layer_norm as norm
from flash_bla.ops.arguments import autocast, choose_backend
from flash_bla.ops.depthwise_conv import check_convolution, check_grid, depthwise_conv
from flash_bla.ops.layer_norm import add_layer_norm, check_norm
from flash_bla.ops.triton_activations import record_sum
from flash_bla.ops.triton_support import Record, eager_function, is_eager, run

RESIDUAL = (1, True, None, None)  # stride, residual and activations of the convolution


def depthwise_conv_norm(
    x: Tensor, grid: tuple[int, int], weight: Tensor, bias: Tensor | None, norm_weight: Tensor, norm_bias: Tensor,
    eps: float, *, add: Tensor | None = None, backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    r"""``add_layer_norm`` of ``depthwise_conv`` with its residual, of x + add.

    .. math:: z = x \;[+ a], \quad s = z + w \star z + b, \quad y = LayerNorm(s)

    Args:
        x: Tokens ``(B, N, C)``.
        grid: (H, W), as in ``depthwise_conv``.
        weight: Filters ``(C, 1, k, k)``.
        bias: ``(C,)``.
        norm_weight: ``(C,)``.
        norm_bias: ``(C,)``.
        eps: ε of the norm.
        add: a, of the shape of x.
        backend: As in ``linear_attention``; ``torch.compile`` takes the two operators.

    Returns:
        y and s.

    Raises:
        ValueError, TypeError: As ``depthwise_conv`` and ``add_layer_norm``.
    """
    if is_eager(x) and choose_backend(backend, x) == "triton":
        x, add = autocast(x, add)
        return _Eager.apply(x, add, weight, bias, norm_weight, norm_bias, check_grid(grid), eps)
    x = depthwise_conv(x if add is None else x + add, grid, weight, bias, residual=True, backend=backend)
    return add_layer_norm(x, norm_weight, norm_bias, eps, backend=backend)


def check(x, add, weight, bias, norm_weight, norm_bias, grid, eps) -> None:
    check_convolution(x, weight, bias, add, None, *grid, *RESIDUAL)
    check_norm(x, add, norm_weight, norm_bias)


def record_forward(
    record: Record, x: Tensor, add: Tensor | None, weight: Tensor, bias: Tensor | None, norm_weight: Tensor,
    norm_bias: Tensor, grid: tuple[int, int], eps: float,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """y, s, and z if it is a sum."""
    z = None if add is None else record_sum(record, x, add)
    s = conv.record_forward(record, x if z is None else z, weight, bias, None, None, *grid, *RESIDUAL)
    y, _ = norm.record_forward(record, s, None, norm_weight, norm_bias, eps, 1.0, s.dtype)
    return y, s, z


def record_backward(
    record: Record, dy: Tensor | None, ds: Tensor | None, z: Tensor, s: Tensor, weight: Tensor, bias: Tensor | None,
    norm_weight: Tensor, norm_bias: Tensor, grid: tuple[int, int], eps: float, of_filters: tuple[bool, bool],
    of_norm: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of z, filters, bias, and weight and bias of the norm."""
    d_norm = None, None
    if dy is not None:
        ds, *d_norm = norm.record_backward(record, dy, ds, s, norm_weight, norm_bias, eps, 1.0, of_norm)
    needed = (True, *of_filters, False, False)
    inputs = record, ds, z, weight, bias, None, None, None, None, needed
    return *conv.record_backward(*inputs, *grid, *RESIDUAL)[:3], *d_norm


@eager_function
class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, add, weight, bias, norm_weight, norm_bias, grid, eps):
        tensors = x, add, weight, bias, norm_weight, norm_bias
        y, s, z = run(record_forward, tensors, (grid, eps), check)
        ctx.save_for_backward(x if z is None else z, s, weight, bias, norm_weight, norm_bias)
        ctx.options = grid, eps
        ctx.set_materialize_grads(False)
        return y, s

    @staticmethod
    def backward(ctx, dy, ds):
        if dy is None and ds is None:
            return (None,) * 8
        of_x, of_add, *needed, _, _ = ctx.needs_input_grad
        options = *ctx.options, (needed[0], needed[1]), needed[2] or needed[3]
        dz, *gradients = run(record_backward, (dy, ds, *ctx.saved_tensors), options)
        return dz, dz if of_add else None, *gradients, None, None
