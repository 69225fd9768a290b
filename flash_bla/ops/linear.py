"""A linear layer under autocast, with less work around its matrix products and less memory for what precedes it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_bla.ops.arguments import choose_backend
from flash_bla.ops.silu_gate import check_gate, silu_gate
from flash_bla.ops.triton_activations import record_gate, record_gate_gradient, record_gelu_gradient
from flash_bla.ops.triton_column_sums import column_sums
from flash_bla.ops.triton_support import is_eager, once_differentiable, run
from flash_bla.tracing import recomputed

_PLAIN = (Tensor, torch.nn.Parameter)
LARGE = 2**23  # elements of input or output from which on kernels should take longer than their launches: an estimate


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gelu: bool = False,
    gate: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""A linear layer, and the activation before it.

    .. math:: y = W f(x) + b, \quad f(x) = x, \; gelu(x) \text{ or } x \odot silu(gate)

    In eager mixed-precision training the gradients of weight and bias come in float32 at once, where PyTorch gives them
    in half precision and converts them, and f(x) is computed again in the backward pass instead of being kept. For
    small tensors and everywhere else this is ``F.linear(f(x), weight, bias)`` itself, of which ``torch.compile`` also
    computes f(x) again.

    Args:
        x: ``(..., C)``.
        weight: ``(D, C)``.
        bias: ``(D,)``.
        gelu: Whether a GELU precedes the layer (the exact one).
        gate: The gate that precedes it, shaped as x; not together with ``gelu``.
        backend: As in ``linear_attention``.

    Returns:
        ``(..., D)``, under autocast in its type.

    Raises:
        ValueError: A gate whose shape or device does not fit, or with ``gelu``.
    """
    if gate is not None:
        check_gate(x, gate)
        if gelu:
            raise ValueError("gelu and gate exclude each other")
    mixed = (
        is_eager(x)  # first: a comparison of sizes would bind a traced graph to them
        and x.numel() * max(weight.shape[0], weight.shape[1]) >= LARGE * weight.shape[1]
        and weight.dtype == torch.float32
        and type(weight) in _PLAIN  # and not a quantised one
        and weight.requires_grad
        and torch.is_grad_enabled()
        and torch.is_autocast_enabled(x.device.type)
    )
    if mixed and choose_backend(backend, x) == "triton":
        return _Mixed.apply(x, gate, weight, bias, gelu, torch.get_autocast_dtype(x.device.type))
    if gate is not None:
        x = silu_gate(x, gate, backend=backend)
    elif gelu:
        x = recomputed(F.gelu, x)
    return F.linear(x, weight, bias)


class _Mixed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate, weight, bias, gelu, dtype):
        ctx.input_dtypes = x.dtype, None if gate is None else gate.dtype
        ctx.gelu = gelu
        x, gate, weight, bias = (None if y is None else y.to(dtype) for y in (x, gate, weight, bias))
        ctx.save_for_backward(x, gate, weight)
        return F.linear(_activate(x, gate, gelu), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, gate, weight = ctx.saved_tensors
        of_x, of_gate, _, of_bias, *_ = ctx.needs_input_grad
        rows = dy.reshape(-1, dy.shape[-1])
        dx = d_gate = None
        if of_x or of_gate:
            dx = (rows @ weight).view(x.shape)
            if gate is not None:
                dx, d_gate, x = run(record_gate_gradient, (dx, x, gate), (True,))
                d_gate = d_gate.to(ctx.input_dtypes[1])
            elif ctx.gelu:
                dx, x = run(record_gelu_gradient, (dx, x))
            dx = dx.to(ctx.input_dtypes[0])
        else:
            x = _activate(x, gate, ctx.gelu)
        columns, x = rows.t(), x.reshape(-1, x.shape[-1])
        d_weight = torch.mm(columns, x, out_dtype=torch.float32) if x.is_cuda else (columns @ x).float()
        d_bias = run(column_sums, (rows,)) if of_bias else None
        return dx, d_gate, d_weight, d_bias, None, None


def _activate(x: Tensor, gate: Tensor | None, gelu: bool) -> Tensor:
    if gate is not None:
        return run(record_gate, (x, gate))
    return F.gelu(x) if gelu else x
