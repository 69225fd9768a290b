"""What PolaFormer's attention makes of its parameters in each call."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_bla.ops.arguments import choose_backend
from flash_bla.ops.triton_polarity import record_parameter_gradients, record_parameters
from flash_bla.ops.triton_support import eager_function, is_eager, run


def polarity_parameters(
    scale: Tensor | None, power: Tensor, encoding: Tensor, alpha: float, *, backend: str | None = None
) -> tuple[Tensor | None, Tensor, Tensor]:
    r"""The keys' factor, the exponents and the encoding of keys that have that factor.

    .. math:: s = softplus(scale)^{-2}, \quad p = 1 + α\, sigmoid(power)

    Powers of products are products of powers: that of the queries' scale is applied to the keys, too.

    Args:
        scale: ``(..., C)``, or None where all factors are one.
        power: ``(1, H, 1, C/H)``.
        encoding: Positional encoding of the keys, ``(1, N, C)``.
        alpha: α.
        backend: As in ``linear_attention``; ``torch.compile`` takes the reference, which it fuses with its neighbours.

    Returns:
        s among ones for the other outputs of a projection to q, k, v and a gate, ``(4 C,)`` or None; p ``(H, C/H)``;
        both float32 at least; and s times the encoding ``(H, N, C/H)``.
    """
    if scale is not None and is_eager(encoding) and choose_backend(backend, encoding) == "triton":
        return _Eager.apply(scale, power, encoding, alpha)
    H = power.shape[1]
    wide = torch.promote_types(power.dtype, torch.float32)
    exponent = 1 + alpha * power.to(wide).sigmoid().view(H, -1)
    encoding = encoding.reshape(-1, *exponent.shape).transpose(0, 1)
    if scale is None:
        return None, exponent, encoding
    factor = F.softplus(scale.to(wide)).flatten() ** -2
    scaled = encoding * factor.view(H, 1, -1)
    return F.pad(factor, (factor.numel(), 2 * factor.numel()), value=1.0), exponent, scaled


@eager_function
class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scale, power, encoding, alpha):
        ctx.save_for_backward(scale, power, encoding)
        ctx.alpha = alpha
        factor, exponent, scaled = run(record_parameters, (scale, power, encoding), (alpha,))
        return factor, exponent, scaled.view(scaled.shape[0], *exponent.shape).transpose(0, 1)

    @staticmethod
    def backward(ctx, *gradients):
        return *run(record_parameter_gradients, (*gradients, *ctx.saved_tensors), (ctx.alpha,)), None
