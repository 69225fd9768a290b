"""Layer normalisation of a sum, and the sum: what stands between the branches of a pre-norm transformer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_bla.ops.arguments import autocast_dtype, check_device, check_dtype, choose_backend, expect, without_autocast
from flash_bla.ops.triton_layer_norm import record_backward, record_forward
from flash_bla.ops.triton_support import eager_function, is_eager, run


def add_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    add: Tensor | None = None,
    negative_slope: float = 1.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Layer normalisation over the last dimension, and what it normalised.

    .. math:: s = x \;[+ a], \quad y = f\left(\frac{s - mean(s)}{\sqrt{var(s) + ε}} \odot w + b\right),
              \quad f(z) = \max(z, 0) + c \min(z, 0)

    The sum s is returned too because a residual branch goes on with it: its gradient, from there and from y, is then
    one pass. Statistics are float32 (float64 for float64 inputs). Under autocast y has its type, unlike PyTorch's
    float32, which the next layer would round again; s has the type of x.

    Args:
        x: ``(..., C)``.
        weight: w, ``(C,)``.
        bias: b, ``(C,)``.
        eps: ε.
        add: a, of the shape of x.
        negative_slope: c, of a LeakyReLU; 1 for none.
        backend: As in ``linear_attention``; ``torch.compile`` takes the reference, which it fuses with its neighbours.

    Returns:
        y and s.

    Raises:
        ValueError: A shape or device that does not fit.
        TypeError: No tensors, or of dtypes that are not supported.
    """
    dtype = x.dtype if x.dtype == torch.float64 else autocast_dtype(x)
    arguments = x, add, weight, bias, eps, negative_slope, dtype
    if is_eager(x) and choose_backend(backend, x) == "triton":
        return _Eager.apply(*arguments)
    check_norm(*arguments)
    choose_backend(backend, x)
    with without_autocast(x):
        s = x if add is None else x + add.to(x.dtype)
        wide = torch.promote_types(s.dtype, torch.float32)
        y = F.layer_norm(s.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps)
        if negative_slope != 1:
            y = F.leaky_relu(y, negative_slope)
        return y.to(dtype), s


def check_norm(x: Tensor, add: Tensor | None, weight: Tensor, bias: Tensor, *_) -> None:
    check_dtype("x", x)
    for name, parameter in (("weight", weight), ("bias", bias)):
        check_device(name, parameter, x)
        check_dtype(name, parameter)
        expect(name, parameter, (x.shape[-1],), "(C,) with C of x")
    if add is not None:
        check_device("add", add, x)
        check_dtype("add", add)
        expect("add", add, tuple(x.shape), "that of x")


@eager_function
class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, add, weight, bias, eps, slope, dtype):
        y, s = run(record_forward, (x, add, weight, bias), (eps, slope, dtype), check_norm)
        s = x if add is None else s
        ctx.save_for_backward(s, weight, bias)
        ctx.eps, ctx.slope, ctx.add_dtype = eps, slope, None if add is None else add.dtype
        ctx.set_materialize_grads(False)
        return y, s

    @staticmethod
    def backward(ctx, dy, ds):
        if dy is None:
            dx, d_weight, d_bias = ds, None, None
        else:
            of_parameters = any(ctx.needs_input_grad[2:4])
            options = ctx.eps, ctx.slope, of_parameters
            dx, d_weight, d_bias = run(record_backward, (dy, ds, *ctx.saved_tensors), options)
        d_add = None if ctx.add_dtype is None or dx is None else dx.to(ctx.add_dtype)
        return dx, d_add, d_weight, d_bias, None, None, None
