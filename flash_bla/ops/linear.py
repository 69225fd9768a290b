"""A linear layer under autocast, with less work around its matrix products and less memory for what precedes it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_bla.ops.arguments import autocast_dtype, choose_backend, convert, expect, is_autocast
from flash_bla.ops.silu_gate import check_gate, silu_gate
from flash_bla.ops.triton_activations import (
    record_casts,
    record_gradients,
    record_mlp_gradients,
    record_operands,
    scale_gradients,
)
from flash_bla.ops.triton_support import PLAIN, eager_function, is_eager, run
from flash_bla.tracing import recomputed


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gelu: bool = False,
    gate: Tensor | None = None,
    factor: Tensor | None = None,
    split: tuple[int, ...] = (),
    backend: str | None = None,
) -> Tensor:
    r"""A linear layer, and the activation before it.

    .. math:: y = s \odot (W f(x) + b), \quad f(x) = x, \; gelu(x) \text{ or } x \odot silu(gate)

    In eager mixed-precision training the gradients of weight and bias come in float32 at once, where PyTorch gives them
    in half precision and converts them, and f(x) is computed again in the backward pass instead of being kept.
    Everywhere else this is ``F.linear(f(x), s W, s b)`` itself, of which ``torch.compile`` also computes f(x) again.

    Args:
        x: ``(..., C)``.
        weight: ``(D, C)``.
        bias: ``(D,)``.
        gelu: Whether a GELU precedes the layer (the exact one).
        gate: The gate that precedes it, shaped as x; not together with ``gelu``.
        factor: s, of D elements.
        split: Sizes that D is split into, one of which may be -1.
        backend: As in ``linear_attention``.

    Returns:
        ``(..., D)`` or ``(..., *split)``, under autocast in its type.

    Raises:
        ValueError: A gate whose shape or device does not fit, or with ``gelu``; a factor or bias of another size.
    """
    if gate is not None:
        check_gate(x, gate)
        if gelu:
            raise ValueError("gelu and gate exclude each other")
    if factor is not None and factor.numel() != weight.shape[0]:
        raise ValueError(f"factor must have D = {weight.shape[0]} elements, got shape {tuple(factor.shape)}")
    if is_mixed(backend, x, weight):
        return _Mixed.apply(x, gate, weight, bias, factor, gelu, split, autocast_dtype(x))
    if gate is not None:
        x = silu_gate(x, gate, backend=backend)
    elif gelu:
        x = recomputed(F.gelu, x)
    if factor is not None:
        factor = factor.flatten()
        weight = (weight * factor[:, None]).to(weight.dtype)
        bias = None if bias is None else (bias * factor).to(bias.dtype)
    y = F.linear(x, weight, bias)
    return y.unflatten(-1, split) if split else y


def mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, *,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """``linear(linear(x, weight1, bias1), weight2, bias2, gelu=True)``, as one node of autograd where it can be."""
    if is_mixed(backend, x, weight1, weight2):
        return _MixedMlp.apply(x, weight1, bias1, weight2, bias2, autocast_dtype(x))
    return linear(linear(x, weight1, bias1, backend=backend), weight2, bias2, gelu=True, backend=backend)


def is_mixed(backend: str | None, x: Tensor, *weights: Tensor) -> bool:
    """Whether this is eager mixed-precision training of all these weights."""
    return (
        is_eager(x)
        and torch.is_grad_enabled()
        and is_autocast(x)
        and choose_backend(backend, x) == "triton"
        # and no quantised ones
        and all([y.dtype == torch.float32 and type(y) in PLAIN and y.requires_grad for y in weights])
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())


def _check_bias(weight: Tensor, bias: Tensor | None) -> None:
    if bias is not None:
        expect("bias", bias, (weight.shape[0],), "(D,) of weight")


def _check_layer(x, gate, weight, bias, *_) -> None:
    _check_bias(weight, bias)


def check_layers(*arguments) -> None:
    """Of up to four layers' weights and biases, one after the other, and a type."""
    *parameters, _ = arguments
    for weight, bias in zip(parameters[::2], parameters[1::2], strict=True):
        _check_bias(weight, bias)


def unflatten(y: Tensor, shape: tuple[int, ...], split: tuple[int, ...] = ()) -> Tensor:
    """Rows in the place of those of ``(..., C)``, split."""
    if -1 in split and not y.numel():  # of nothing no size can be inferred
        split = y.new_empty(y.shape[1]).unflatten(0, split).shape
    # unlike a view, it may be changed in place
    return torch.ops.aten._unsafe_view.default(y, (*shape[:-1], *(split or y.shape[1:])))


def weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    return torch.mm(dy.t(), x, out_dtype=torch.float32) if x.is_cuda else torch.mm(dy.t(), x).float()


@eager_function
class _Mixed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate, weight, bias, factor, gelu, split, dtype):
        ctx.types, ctx.shape, ctx.gelu = (x.dtype, None if gate is None else gate.dtype), x.shape, gelu
        x, gate = convert(x, dtype).reshape(-1, x.shape[-1]), convert(gate, dtype)
        gated, w, b = run(record_operands, (x, gate, weight, bias, factor), (dtype,), _check_layer)
        ctx.save_for_backward(x, gate, w, *(() if factor is None else (weight, bias, factor)))
        y = product(F.gelu(x) if gelu else x if gated is None else gated, w, b)
        return unflatten(y, ctx.shape, split)

    @staticmethod
    def backward(ctx, dy):
        x, gate, w, *scaled = ctx.saved_tensors
        of_x, of_gate, _, of_bias, *_ = ctx.needs_input_grad
        dy = dy.reshape(-1, w.shape[0])
        dx = torch.mm(dy, w) if of_x or of_gate else None
        d_gate = d_bias = d_factor = None
        if scaled:
            of_bias = scaled[1] is not None
        if of_bias or ctx.gelu or gate is not None:
            d_input, d_gate, d_bias, activated = run(record_gradients, (dy, dx, x, gate), (ctx.gelu, of_bias))
            if ctx.gelu and activated is None:
                activated = F.gelu(x)
            dx = dx if d_input is None else d_input
            x = x if activated is None else activated
        d_weight = weight_gradient(dy, x)
        if scaled:
            d_factor = run(scale_gradients, (d_weight, d_bias, *scaled))
        dx = None if dx is None else convert(dx.view(ctx.shape), ctx.types[0])
        return dx, convert(d_gate, ctx.types[1]), d_weight, d_bias, d_factor, None, None, None


@eager_function
class _MixedMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight1, bias1, weight2, bias2, dtype):
        ctx.type, ctx.shape = x.dtype, x.shape
        x = convert(x, dtype).reshape(-1, x.shape[-1])
        w1, b1, w2, b2 = run(record_casts, (weight1, bias1, weight2, bias2), (dtype,), check_layers)
        hidden = product(x, w1, b1)
        ctx.save_for_backward(x, hidden, w1, w2)
        return unflatten(product(F.gelu(hidden), w2, b2), ctx.shape)

    @staticmethod
    def backward(ctx, dy):
        x, hidden, w1, w2 = ctx.saved_tensors
        of_x, _, *of_bias, _ = ctx.needs_input_grad
        dy = dy.reshape(-1, w2.shape[0])
        d_hidden, activated, d_bias1, d_bias2 = run(  # and the gradient of what is activated is not held any more
            record_mlp_gradients, (dy, torch.mm(dy, w2), hidden), (of_bias[0], of_bias[2])
        )
        dx = convert(torch.mm(d_hidden, w1).view(ctx.shape), ctx.type) if of_x else None
        return dx, weight_gradient(d_hidden, x), d_bias1, weight_gradient(dy, activated), d_bias2, None
