"""The two halves of MLLA's block, each as one node of autograd in eager mixed-precision training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_bla.ops import conv_norm
from flash_bla.ops import triton_depthwise_conv as conv
from flash_bla.ops import triton_linear_attention as attention
from flash_bla.ops import triton_linear_attention_dwc as attention_dwc
from flash_bla.ops.arguments import autocast_dtype, convert
from flash_bla.ops.depthwise_conv import check_convolution, check_grid, depthwise_conv
from flash_bla.ops.feature_maps import resolve_feature_map
from flash_bla.ops.linear import check_layers, is_mixed, linear, mlp, product, unflatten, weight_gradient
from flash_bla.ops.linear_attention import check_rope, linear_attention_dwc
from flash_bla.ops.triton_activations import record_casts, record_gate, record_gate_gradient, record_mlp_gradients
from flash_bla.ops.triton_column_sums import column_sums
from flash_bla.ops.triton_support import Record, eager_function, run

SILU = (1, False, "silu", None)  # stride, residual and activations of the convolution
FEATURE_MAP = resolve_feature_map("elu1")
WIDEST = 64  # heads that the attention takes in one piece in any half precision


def mamba_like_mixer(
    x: Tensor, grid: tuple[int, int], eps: float, num_heads: int, rope: Tensor, *parameters: Tensor | None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    r"""Attention between a convolution and a gate, after a convolution and a norm.

    .. math::
        s = x + CPE(x), \quad y = Norm(s), \quad z = W_o \left(Attn(silu(DWC(W_i y))) \odot silu(W_a y)\right)

    Args:
        x: Tokens ``(B, N, C)``.
        grid: (H, W), as in ``depthwise_conv``.
        eps: ε of the norm.
        num_heads: Heads of the attention, which is that of ``MambaLikeLinearAttention``.
        rope: As in ``linear_attention``.
        parameters: Weight and bias of CPE, of the norm, W_a, W_i, DWC, the projection to q and k, LePE, and W_o. Only
            the norm must have a bias; it is None elsewhere.
        backend: As in ``linear_attention``; ``torch.compile`` takes the operators one by one.

    Returns:
        z and s ``(B, N, C)``, under autocast in its type.

    Raises:
        ValueError: Shapes that do not fit, a grid of more places than tokens, or a rotary encoding of other heads.

    Reference:
        Han et al., "Demystify Mamba in Vision: A Linear Attention Perspective", NeurIPS 2024.
    """
    cpe, norm, gate_layer, in_layer, dwc, qk, lepe, out_layer = _pairs(parameters)
    layers = gate_layer, in_layer, qk, out_layer
    if _are_square(x.shape[-1], num_heads, *layers) and is_mixed(backend, x, *[weight for weight, _ in layers]):
        return _Mixer.apply(x, *parameters, check_grid(grid), eps, num_heads, rope, autocast_dtype(x))
    y, s = conv_norm.depthwise_conv_norm(x, grid, *cpe, *norm, eps, backend=backend)
    gate, v = linear(y, *gate_layer, backend=backend), linear(y, *in_layer, backend=backend)
    v = depthwise_conv(v, grid, *dwc, activation="silu", backend=backend)
    q = linear(v, *qk, split=(2, num_heads, -1), backend=backend)
    o = linear_attention_dwc(q, grid, *lepe, v=v, feature_map=FEATURE_MAP, rope=rope, backend=backend)
    return linear(o, *out_layer, gate=gate, backend=backend), s


def mamba_like_mlp(
    x: Tensor, add: Tensor, grid: tuple[int, int], eps: float, *parameters: Tensor | None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    r"""An MLP after a convolution and a norm.

    .. math:: x' = x + a, \quad s = x' + CPE(x'), \quad z = W_2 \, gelu(W_1 Norm(s))

    Args:
        x: Tokens ``(B, N, C)``.
        add: a, of the shape of x.
        grid: (H, W), as in ``depthwise_conv``.
        eps: ε of the norm.
        parameters: Weight and bias of CPE, of the norm, W_1 and W_2; as in ``mamba_like_mixer``.
        backend: As there.

    Returns:
        z and s ``(B, N, C)``, under autocast in its type.

    Raises:
        ValueError: As there.
    """
    cpe, norm, layer1, layer2 = _pairs(parameters)
    if is_mixed(backend, x, layer1[0], layer2[0]):
        return _Mlp.apply(x, add, *parameters, check_grid(grid), eps, autocast_dtype(x))
    y, s = conv_norm.depthwise_conv_norm(x, grid, *cpe, *norm, eps, add=add, backend=backend)
    return mlp(y, *layer1, *layer2, backend=backend), s


def _are_square(C: int, num_heads: int, gate_layer: tuple, in_layer: tuple, qk: tuple, out_layer: tuple) -> bool:
    """Whether layers of C channels have as many outputs, twice as many for q and k; all others go one by one."""
    return (
        C <= WIDEST * num_heads
        and gate_layer[0].shape == in_layer[0].shape == out_layer[0].shape == (C, C)
        and qk[0].shape == (2 * C, C)
        and (gate_layer[1] is None) == (in_layer[1] is None)
    )


def _pairs(parameters: Sequence[Tensor | None]) -> list[tuple[Tensor | None, Tensor | None]]:
    return list(zip(parameters[::2], parameters[1::2], strict=True))


def record_start(
    record: Record, x: Tensor, add: Tensor | None, weight: Tensor, bias: Tensor | None, norm_weight: Tensor,
    norm_bias: Tensor, *arguments: Any,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The norm's output ``(B·N, C)``, s and x + add; then the parameters of layers in the type of x.

    With ``join`` the first two layers, of C outputs each, are one.
    """
    *layers, grid, eps, join = arguments
    y, s, z = conv_norm.record_forward(record, x, add, weight, bias, norm_weight, norm_bias, grid, eps)
    joined = copies = ()
    if join:
        C = x.shape[-1]
        w, b = (None if p is None else record.new_empty((2 * C, *p.shape[1:]), x.dtype) for p in layers[:2])
        joined = w, b
        copies = w[:C], None if b is None else b[:C], w[C:], None if b is None else b[C:]
    return y.flatten(0, 1), s, z, *joined, *record_casts(record, *layers, x.dtype, copies=copies)[len(copies) :]


def _check_start(x, add, weight, bias, norm_weight, norm_bias, *arguments) -> None:
    *layers, grid, eps, _ = arguments
    conv_norm.check(x, add, weight, bias, norm_weight, norm_bias, grid, eps)
    check_layers(*layers, x.dtype)


def _start(ctx, x, add, of_conv_norm, layers, grid, eps, dtype, join=False) -> tuple[Tensor, Tensor, tuple, list]:
    """The norm's output in rows, s, what is kept, and the layers' parameters in a type."""
    ctx.type, ctx.conv_norm_options = x.dtype, (grid, eps)
    x, add = convert(x, dtype), convert(add, dtype)
    y, s, z, *layers = run(record_start, (x, add, *of_conv_norm, *layers), (grid, eps, join), _check_start)
    return y, s, (x if z is None else z, s, *of_conv_norm), layers


def _end(ctx, dy, ds, kept, needed) -> tuple[Tensor | None, ...]:
    """Gradients of x + add, and of the convolution's and the norm's parameters, which may be needed."""
    of_weight, of_bias, *of_norm = needed
    options = *ctx.conv_norm_options, (of_weight, of_bias), any(of_norm)
    return run(conv_norm.record_backward, (dy, ds, *kept), options)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Those of the columns."""
    return x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]


def record_convolution(
    record: Record, gate_and_x: Tensor, weight: Tensor, bias: Tensor | None, size: tuple[int, int],
    grid: tuple[int, int],
) -> Tensor:  # fmt: skip
    """The convolution of tokens ``(B·N, C)``, as they are in all of these functions; size is (B, N)."""
    x = _halves(gate_and_x)[1].unflatten(0, size)
    return conv.record_forward(record, x, weight, bias, None, None, *grid, *SILU).flatten(0, 1)


def _attention_inputs(
    qk: Tensor, v: Tensor, rope: Tensor, size: tuple[int, int], num_heads: int
) -> tuple[Tensor | None, ...]:
    """q and v, the rotary encoding and what the attention does without."""
    q = qk.view(*size, 2, num_heads, qk.shape[1] // (2 * num_heads))
    tensors, options = attention.operator_arguments(q, None, v.unflatten(0, size), FEATURE_MAP, rope=rope)
    return *tensors, options


def record_attention(
    record: Record, gate_and_x: Tensor, weight: Tensor, bias: Tensor | None, qk: Tensor, v: Tensor, rope: Tensor,
    size: tuple[int, int], num_heads: int, grid: tuple[int, int],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The attention's output times the gate, that without it, and the state."""
    inputs = _attention_inputs(qk, v, rope, size, num_heads)
    o, _, state, _ = attention_dwc.record_forward(record, weight, bias, *inputs, True, grid)
    o = o.flatten(0, 1)
    return record_gate(record, o, _halves(gate_and_x)[0]), o, state


def record_attention_gradients(
    record: Record, dy: Tensor, d_gated: Tensor, o: Tensor, state: Tensor | None, gate_and_x: Tensor,
    weight: Tensor, bias: Tensor | None, qk: Tensor, v: Tensor, rope: Tensor, size: tuple[int, int], num_heads: int,
    grid: tuple[int, int], needed: tuple[bool, bool], of_qk: bool, of_layer: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The layer's input, and gradients of gate, q, v, filters, their bias and the biases of q and k and of the layer.

    From the gradients of output and input of the layer that follows the gate. Beside that of the gate is room for x's.
    """
    d_both = record.new_empty(gate_and_x.shape, gate_and_x.dtype)
    gate, d_gate = (_halves(both)[0] for both in (gate_and_x, d_both))
    do, _, gated = record_gate_gradient(record, d_gated, o, gate, True, d_gate)
    inputs = _attention_inputs(qk, v, rope, size, num_heads)
    d_weight, d_bias, dq, _, dv, *_ = attention_dwc.record_backward(
        record, do.unflatten(0, size), None, state, None, weight, bias, *inputs, needed, grid
    )
    dq = dq.view(qk.shape)
    d_biases = [column_sums(record, z) if of else None for z, of in ((dq, of_qk), (dy, of_layer))]
    return gated, d_both, dq, dv.flatten(0, 1), d_weight, d_bias, *d_biases


def record_conv_gradients(
    record: Record, dy: Tensor, d_both: Tensor, gate_and_x: Tensor, weight: Tensor, bias: Tensor | None,
    size: tuple[int, int], grid: tuple[int, int], needed: tuple[bool, bool], of_gate: bool, of_x: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of filters, their bias and the biases of the layers before gate and x; that of x joins the gate's."""
    d_gate, dx = _halves(d_both)
    dy, x, base = (z.unflatten(0, size) for z in (dy, _halves(gate_and_x)[1], dx))
    inputs = record, dy, x, weight, bias, None, None, base, None, (True, *needed, False, False)
    _, d_weight, d_bias, *_ = conv.record_backward(*inputs, *grid, *SILU, add_to_base=False)
    return d_weight, d_bias, *(column_sums(record, z) if of else None for z, of in ((d_gate, of_gate), (dx, of_x)))


def _check_convolution(
    gate_and_x: Tensor, weight: Tensor, bias: Tensor | None, size: tuple[int, int], grid: tuple[int, int]
) -> None:
    check_convolution(_halves(gate_and_x)[1].unflatten(0, size), weight, bias, None, None, *grid, *SILU)


def _check_attention(
    gate_and_x: Tensor, weight: Tensor, bias: Tensor | None, qk: Tensor, v: Tensor, rope: Tensor,
    size: tuple[int, int], num_heads: int, grid: tuple[int, int],
) -> None:  # fmt: skip
    check_convolution(v.unflatten(0, size), weight, bias, None, None, *grid, *attention_dwc.NO_EXTRAS)
    check_rope(rope, v, num_heads, size[1], size[1], v.shape[1] // num_heads)


@eager_function
class _Mixer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, cw, cb, nw, nb, wa, ba, wi, bi, wc, bc, wq, bq, wl, bl, wo, bo, grid, eps, num_heads, rope, dtype
    ):
        ctx.options = size, _, _ = tuple(x.shape[:2]), num_heads, grid
        rope = convert(rope, torch.float16 if dtype == torch.bfloat16 else torch.float32)  # as for the attention alone
        layers = wa, ba, wi, bi, wq, bq, wo, bo
        y, s, kept, layers = _start(ctx, x, None, (cw, cb, nw, nb), layers, grid, eps, dtype, True)
        w, b, wq, bq, wo, bo = layers
        both = product(y, w, b)
        v = run(record_convolution, (both, wc, bc), (size, grid), _check_convolution)
        qk = product(v, wq, bq)
        gated, *outputs = run(record_attention, (both, wl, bl, qk, v, rope), ctx.options, _check_attention)
        ctx.save_for_backward(*kept, y, wc, bc, w, wq, wo, *outputs, both, wl, bl, qk, v, rope)
        return unflatten(product(gated, wo, bo), s.shape), s

    @staticmethod
    def backward(ctx, dz, ds):
        *kept, y, wc, bc, w, wq, wo, o, state, both, wl, bl, qk, v, rope = ctx.saved_tensors
        _, *of_start, _, of_ba, _, of_bi, of_wc, of_bc, _, of_bq, of_wl, of_bl, _, of_bo = ctx.needs_input_grad[:17]
        size, _, grid = ctx.options
        dz = dz.reshape(y.shape)
        # what is not needed any more is not held
        gated, d_both, dqk, dv, d_wl, d_bl, d_bq, d_bo = run(
            record_attention_gradients,
            (dz, torch.mm(dz, wo), o, state, both, wl, bl, qk, v, rope),
            (*ctx.options, (of_wl, of_bl), of_bq, of_bo),
        )
        d_wo, d_wq = weight_gradient(dz, gated), weight_gradient(dqk, v)
        dv.addmm_(dqk, wq)
        del gated, dqk
        d_wc, d_bc, d_ba, d_bi = run(
            record_conv_gradients, (dv, d_both, both, wc, bc), (size, grid, (of_wc, of_bc), of_ba, of_bi)
        )
        d_wa, d_wi = (weight_gradient(dz, y) for dz in _halves(d_both))
        dy = torch.mm(d_both, w)
        del dv, d_both
        dx, *of_start = _end(ctx, dy, ds, kept, of_start)
        of_layers = d_wa, d_ba, d_wi, d_bi, d_wc, d_bc, d_wq, d_bq, d_wl, d_bl, d_wo, d_bo
        return convert(dx, ctx.type), *of_start, *of_layers, None, None, None, None, None


@eager_function
class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, add, cw, cb, nw, nb, w1, b1, w2, b2, grid, eps, dtype):
        ctx.type_of_add = add.dtype
        y, s, kept, (w1, b1, w2, b2) = _start(ctx, x, add, (cw, cb, nw, nb), (w1, b1, w2, b2), grid, eps, dtype)
        hidden = product(y, w1, b1)
        ctx.save_for_backward(*kept, y, hidden, w1, w2)
        return unflatten(product(F.gelu(hidden), w2, b2), s.shape), s

    @staticmethod
    def backward(ctx, dz, ds):
        *kept, y, hidden, w1, w2 = ctx.saved_tensors
        _, _, *of_start, _, of_bias1, _, of_bias2 = ctx.needs_input_grad[:10]
        dz = dz.reshape(y.shape)
        d_hidden, activated, d_bias1, d_bias2 = run(
            record_mlp_gradients, (dz, torch.mm(dz, w2), hidden), (of_bias1, of_bias2)
        )
        of_layers = weight_gradient(d_hidden, y), d_bias1, weight_gradient(dz, activated), d_bias2
        dy = torch.mm(d_hidden, w1)
        del d_hidden, activated
        dx, *of_start = _end(ctx, dy, ds, kept, of_start)
        return convert(dx, ctx.type), convert(dx, ctx.type_of_add), *of_start, *of_layers, None, None, None
