"""What stands around MLLA's attention, and that itself, in one node of autograd in eager mixed-precision training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flash_bla.ops import triton_depthwise_conv as conv
from flash_bla.ops import triton_linear_attention as attention
from flash_bla.ops import triton_linear_attention_dwc as attention_dwc
from flash_bla.ops.arguments import autocast_dtype, convert
from flash_bla.ops.depthwise_conv import check_convolution, check_grid, depthwise_conv
from flash_bla.ops.feature_maps import resolve_feature_map
from flash_bla.ops.linear import cast_layers, is_mixed, linear, product, unflatten, weight_gradient
from flash_bla.ops.linear_attention import linear_attention_dwc
from flash_bla.ops.triton_activations import record_gate, record_gate_gradient
from flash_bla.ops.triton_column_sums import column_sums
from flash_bla.ops.triton_support import Record, eager_function, run

SILU = (1, False, "silu", None)  # stride, residual and activations of the convolution
FEATURE_MAP = resolve_feature_map("elu1")
WIDEST = 64  # heads that the attention takes in one piece in any half precision


def mamba_like_mixer(
    x: Tensor, grid: tuple[int, int], num_heads: int, rope: Tensor, *parameters: Tensor | None,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    r"""Attention between a convolution and a gate.

    .. math:: y = W_o \left(Attn(silu(DWC(W_i x))) \odot silu(W_a x)\right)

    Args:
        x: Tokens ``(B, N, C)``.
        grid: (H, W), as in ``depthwise_conv``.
        num_heads: Heads of the attention, which is that of ``MambaLikeLinearAttention``.
        rope: As in ``linear_attention``.
        parameters: Weight and bias (or None) of W_a, W_i, DWC, the projection to q and k, LePE, and W_o.
        backend: As in ``linear_attention``; ``torch.compile`` takes the operators one by one.

    Returns:
        ``(B, N, C)``, under autocast in its type.
    """
    gate_layer, in_layer, dwc, qk, lepe, out_layer = zip(parameters[::2], parameters[1::2], strict=True)
    if x.shape[-1] <= WIDEST * num_heads and is_mixed(backend, x, gate_layer[0], in_layer[0], qk[0], out_layer[0]):
        return _Mixer.apply(x, check_grid(grid), num_heads, rope, autocast_dtype(x), *parameters)
    gate, v = linear(x, *gate_layer, backend=backend), linear(x, *in_layer, backend=backend)
    v = depthwise_conv(v, grid, *dwc, activation="silu", backend=backend)
    q = linear(v, *qk, split=(2, num_heads, -1), backend=backend)
    o = linear_attention_dwc(q, grid, *lepe, v=v, feature_map=FEATURE_MAP, rope=rope, backend=backend)
    return linear(o, *out_layer, gate=gate, backend=backend)


def record_attention(
    record: Record, gate: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any
) -> tuple[Tensor | None, ...]:
    """The attention's output times the gate, that without it, and the state; arguments are those of the attention."""
    o, _, state, _ = attention_dwc.record_forward(record, weight, bias, *arguments)
    return record_gate(record, o, gate), o, state


def record_attention_gradients(
    record: Record, dy: Tensor, d_gated: Tensor, gate: Tensor, o: Tensor, state: Tensor | None, *arguments: Any
) -> tuple[Tensor | None, ...]:
    """The layer's input, and gradients of gate, q, v, filters, their bias and the biases of q and k and of the layer.

    From the gradients of output and input of the layer that follows the gate.
    """
    *arguments, needed, grid, of_qk, of_layer = arguments
    do, d_gate, gated = record_gate_gradient(record, d_gated, o, gate, True)
    d_weight, d_bias, dq, _, dv, *_ = attention_dwc.record_backward(
        record, do, None, state, None, *arguments, needed, grid
    )
    d_bias_qk = column_sums(record, dq.flatten(2).flatten(0, 1)) if of_qk else None
    d_bias_layer = column_sums(record, dy) if of_layer else None
    return gated, d_gate, dq, dv, d_weight, d_bias, d_bias_qk, d_bias_layer


def record_conv_gradients(
    record: Record, dy: Tensor, d_gate: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None,
    grid: tuple[int, int], needed: tuple[bool, bool], of_gate: bool, of_x: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of the convolution's input, filters and bias, and of the biases of the layers before gate and input."""
    inputs = record, dy, x, weight, bias, None, None, None, None, (True, *needed, False, False)
    dx, d_weight, d_bias, *_ = conv.record_backward(*inputs, *grid, *SILU)
    d_biases = [column_sums(record, z.flatten(0, 1)) if of else None for z, of in ((d_gate, of_gate), (dx, of_x))]
    return dx, d_weight, d_bias, *d_biases


@eager_function
class _Mixer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, grid, num_heads, rope, dtype, wa, ba, wi, bi, *others):
        *dwc, wq, bq, lepe_weight, lepe_bias, wo, bo = others
        ctx.type, ctx.grid, shape = x.dtype, grid, x.shape
        x = convert(x, dtype).reshape(-1, shape[-1])
        wa, ba, wi, bi, wq, bq, wo, bo = cast_layers((wa, ba, wi, bi, wq, bq, wo, bo), dtype)
        gate, y = product(x, wa, ba).view(shape), product(x, wi, bi).view(shape)
        v = run(conv.record_forward, (y, *dwc, None, None), (*grid, *SILU), check_convolution)
        q = product(v.view(x.shape), wq, bq).view(*shape[:2], 2, num_heads, -1)
        tensors, ctx.options = attention.operator_arguments(q, None, v, FEATURE_MAP, rope=rope)
        tensors = lepe_weight, lepe_bias, *tensors
        gated, o, state = run(record_attention, (gate, *tensors), (ctx.options, True, grid))
        ctx.save_for_backward(x, wa, wi, wq, wo, v, y, *dwc, gate, o, state, *tensors)
        return unflatten(product(gated.view(x.shape), wo, bo), shape)

    @staticmethod
    def backward(ctx, dy):
        x, wa, wi, wq, wo, v, y, wc, bc, *of_attention = ctx.saved_tensors
        of_x, *_, of_ba, _, of_bi, of_wc, of_bc, _, of_bq, of_wl, of_bl, _, of_bo = ctx.needs_input_grad
        dy = dy.reshape(x.shape)
        inputs = dy, torch.mm(dy, wo), *of_attention
        options = ctx.options, (of_wl, of_bl), ctx.grid, of_bq, of_bo
        gated, d_gate, dq, dv, d_wl, d_bl, d_bq, d_bo = run(record_attention_gradients, inputs, options)
        d_wo = weight_gradient(dy, gated.view(x.shape))
        dq = dq.view(-1, wq.shape[0])
        d_wq = weight_gradient(dq, v.view(x.shape))
        dv.view(x.shape).addmm_(dq, wq)
        options = ctx.grid, (of_wc, of_bc), of_ba, of_bi
        dy, d_wc, d_bc, d_ba, d_bi = run(record_conv_gradients, (dv, d_gate, y, wc, bc), options)
        d_gate, dy = d_gate.view(x.shape), dy.view(x.shape)
        dx = convert(torch.mm(d_gate, wa).addmm_(dy, wi).view(y.shape), ctx.type) if of_x else None
        d_wa, d_wi = weight_gradient(d_gate, x), weight_gradient(dy, x)
        of_parameters = d_wa, d_ba, d_wi, d_bi, d_wc, d_bc, d_wq, d_bq, d_wl, d_bl, d_wo, d_bo
        return dx, None, None, None, None, *of_parameters
