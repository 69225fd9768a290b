"""What stands around MLLA's attention, and that itself, in one node of autograd in eager mixed-precision training."""

from __future__ import annotations

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


def record_convolution(
    record: Record, x: Tensor, weight: Tensor, bias: Tensor | None, size: tuple[int, int], grid: tuple[int, int]
) -> Tensor:
    """The convolution of tokens ``(B·N, C)``, as they are in all of these functions; size is (B, N)."""
    x = x.unflatten(0, size)
    return conv.record_forward(record, x, weight, bias, None, None, *grid, *SILU).flatten(0, 1)


def _attention_inputs(
    qk: Tensor, v: Tensor, rope: Tensor, size: tuple[int, int], num_heads: int
) -> tuple[Tensor | None, ...]:
    """q and v, the rotary encoding and what the attention does without."""
    q = qk.view(*size, 2, num_heads, qk.shape[1] // (2 * num_heads))
    tensors, options = attention.operator_arguments(q, None, v.unflatten(0, size), FEATURE_MAP, rope=rope)
    return *tensors, options


def record_attention(
    record: Record, gate: Tensor, weight: Tensor, bias: Tensor | None, qk: Tensor, v: Tensor, rope: Tensor,
    size: tuple[int, int], num_heads: int, grid: tuple[int, int],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The attention's output times the gate, that without it, and the state."""
    inputs = _attention_inputs(qk, v, rope, size, num_heads)
    o, _, state, _ = attention_dwc.record_forward(record, weight, bias, *inputs, True, grid)
    o = o.flatten(0, 1)
    return record_gate(record, o, gate), o, state


def record_attention_gradients(
    record: Record, dy: Tensor, d_gated: Tensor, o: Tensor, state: Tensor | None, gate: Tensor, weight: Tensor,
    bias: Tensor | None, qk: Tensor, v: Tensor, rope: Tensor, size: tuple[int, int], num_heads: int,
    grid: tuple[int, int], needed: tuple[bool, bool], of_qk: bool, of_layer: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The layer's input, and gradients of gate, q, v, filters, their bias and the biases of q and k and of the layer.

    From the gradients of output and input of the layer that follows the gate.
    """
    do, d_gate, gated = record_gate_gradient(record, d_gated, o, gate, True)
    inputs = _attention_inputs(qk, v, rope, size, num_heads)
    d_weight, d_bias, dq, _, dv, *_ = attention_dwc.record_backward(
        record, do.unflatten(0, size), None, state, None, weight, bias, *inputs, needed, grid
    )
    dq = dq.view(qk.shape)
    d_biases = [column_sums(record, z) if of else None for z, of in ((dq, of_qk), (dy, of_layer))]
    return gated, d_gate, dq, dv.flatten(0, 1), d_weight, d_bias, *d_biases


def record_conv_gradients(
    record: Record, dy: Tensor, d_gate: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, size: tuple[int, int],
    grid: tuple[int, int], needed: tuple[bool, bool], of_gate: bool, of_x: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of the convolution's input, filters and bias, and of the biases of the layers before gate and input."""
    inputs = *(z.unflatten(0, size) for z in (dy, x)), weight, bias, None, None, None, None
    dx, d_weight, d_bias, *_ = conv.record_backward(record, *inputs, (True, *needed, False, False), *grid, *SILU)
    dx = dx.flatten(0, 1)
    d_biases = [column_sums(record, z) if of else None for z, of in ((d_gate, of_gate), (dx, of_x))]
    return dx, d_weight, d_bias, *d_biases


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, size: tuple[int, int], grid: tuple[int, int]) -> None:
    check_convolution(x.unflatten(0, size), weight, bias, None, None, *grid, *SILU)


@eager_function
class _Mixer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, grid, num_heads, rope, dtype, wa, ba, wi, bi, wc, bc, wq, bq, wl, bl, wo, bo):
        ctx.type, ctx.shape = x.dtype, x.shape
        ctx.options = tuple(x.shape[:2]), num_heads, grid
        x = convert(x, dtype).reshape(-1, x.shape[-1])
        wa, ba, wi, bi, wq, bq, wo, bo = cast_layers((wa, ba, wi, bi, wq, bq, wo, bo), dtype)
        gate, y = product(x, wa, ba), product(x, wi, bi)
        v = run(record_convolution, (y, wc, bc), (ctx.options[0], grid), _check)
        qk = product(v, wq, bq)
        gated, *outputs = run(record_attention, (gate, wl, bl, qk, v, rope), ctx.options)
        ctx.save_for_backward(x, y, wc, bc, wa, wi, wq, wo, *outputs, gate, wl, bl, qk, v, rope)
        return unflatten(product(gated, wo, bo), ctx.shape)

    @staticmethod
    def backward(ctx, dy):
        x, y, wc, bc, wa, wi, wq, wo, *of_attention = ctx.saved_tensors
        of_x, _, _, _, _, _, of_ba, _, of_bi, of_wc, of_bc, _, of_bq, of_wl, of_bl, _, of_bo = ctx.needs_input_grad
        size, _, grid = ctx.options
        dy = dy.reshape(x.shape)
        inputs, options = (dy, torch.mm(dy, wo), *of_attention), (*ctx.options, (of_wl, of_bl), of_bq, of_bo)
        gated, d_gate, dqk, dv, d_wl, d_bl, d_bq, d_bo = run(record_attention_gradients, inputs, options)
        d_wo, d_wq = weight_gradient(dy, gated), weight_gradient(dqk, of_attention[-2])
        dv.addmm_(dqk, wq)
        options = size, grid, (of_wc, of_bc), of_ba, of_bi
        dy, d_wc, d_bc, d_ba, d_bi = run(record_conv_gradients, (dv, d_gate, y, wc, bc), options)
        dx = convert(torch.mm(d_gate, wa).addmm_(dy, wi).view(ctx.shape), ctx.type) if of_x else None
        d_wa, d_wi = weight_gradient(d_gate, x), weight_gradient(dy, x)
        of_parameters = d_wa, d_ba, d_wi, d_bi, d_wc, d_bc, d_wq, d_bq, d_wl, d_bl, d_wo, d_bo
        return dx, None, None, None, None, *of_parameters
