"""Linear attention and the depthwise convolution beside it, as one operator: its gradients come into one tensor.

Forward the convolution adds the attention's output, and multiplies by the gate, in its own pass. Backward its first
pass gives the gradients of that sum and of the gate, the attention's kernels those of q, k and v, and the convolution's
second pass adds to that of v. All are written where they stand beside each other in the projection's gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from flash_bla.ops import triton_depthwise_conv as conv
from flash_bla.ops import triton_linear_attention as attention
from flash_bla.ops.arguments import merge_heads, unpack, unpack_gate
from flash_bla.ops.feature_maps import FeatureMap
from flash_bla.ops.triton_support import as_outputs, define_operator, is_eager, once_differentiable, run
from flash_bla.ops.triton_tuning import widest_values

NO_EXTRAS = (1, False, None, None)  # stride, residual and activations of the convolution


def _forward(
    tensors: Sequence[Tensor | None], weight: Tensor, bias: Tensor | None, options: tuple, grid: tuple[int, int],
    keep_state: bool = True,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The output; for the backward pass the attention's, which only a gate needs, the keys' state and norm ratios."""
    v, gate = unpack(*tensors[:3])[2], unpack_gate(tensors[0])
    o, state, ratios = attention._forward(tensors, options, keep_state)
    y = run(conv.record_forward, (merge_heads(v), weight, bias, merge_heads(o), gate), (*grid, *NO_EXTRAS))
    return y, None if gate is None else o, state, ratios


def _backward(
    dy: Tensor, o: Tensor | None, state: Tensor | None, ratios: Tensor | None, needed: Sequence[bool], weight: Tensor,
    bias: Tensor | None, tensors: Sequence[Tensor | None], options: tuple, grid: tuple[int, int],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of the filters and the bias, as far as needed, and what the attention's backward pass gives."""
    q, _, v = unpack(*tensors[:3])
    v, gate, options_of_conv = merge_heads(v), unpack_gate(tensors[0]), (*grid, *NO_EXTRAS)
    packed = None
    if gate is not None:
        packed = torch.empty_like(tensors[0], memory_format=torch.contiguous_format)
        inputs = dy, v, weight, bias, merge_heads(o), gate, None, unpack_gate(packed)
        *_, dy, _ = run(conv.record_backward, inputs, ((False, False, False, True, True), *options_of_conv))
    do = dy.unflatten(2, (q.shape[1], -1)).transpose(1, 2)
    gradients = attention._backward(do, state, ratios, True, tensors, options, packed)
    dv = merge_heads(unpack(*gradients[:3])[2])
    inputs = dy, v, weight, bias, None, None, dv, None
    needed = (True, *needed, False, False)
    _, d_weight, d_bias, *_ = run(conv.record_backward, inputs, (needed, *options_of_conv))
    return d_weight, d_bias, *gradients


SCHEMA = f"Tensor weight, Tensor? bias, SymInt height, SymInt width, {attention.SCHEMA}"


def _forward_operator(weight, bias, height, width, *arguments) -> tuple[Tensor, ...]:
    return as_outputs(_forward(arguments[:10], weight, bias, arguments[10:], (height, width)), weight)


def _fake_forward(weight, bias, height, width, q, *others) -> tuple[Tensor, ...]:
    o, state, ratios = attention._fake_forward(q, *others)
    y = merge_heads(torch.empty_like(o))
    return as_outputs((y, None if unpack_gate(q) is None else o, state, ratios), weight)


def _backward_operator(dy, o, state, ratios, needed, weight, bias, height, width, *arguments) -> tuple[Tensor, ...]:
    ratios = ratios if arguments[11] == "focusing_power" else None
    gradients = _backward(dy, o, state, ratios, needed, weight, bias, arguments[:10], arguments[10:], (height, width))
    return as_outputs(gradients, dy)


def _fake_backward(dy, o, state, ratios, needed, weight, bias, height, width, *arguments) -> tuple[Tensor, ...]:
    d_weight = weight.new_empty(weight.shape) if needed[0] else None
    d_bias = bias.new_empty(bias.shape) if bias is not None and needed[1] else None
    return as_outputs((d_weight, d_bias, *attention._fake_backward(dy, state, ratios, True, *arguments)), dy)


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    weight, bias, *ctx.grid = inputs[:4]
    ctx.options = inputs[14:]
    ctx.save_for_backward(weight, bias, *inputs[4:14], *output[1:])


def _differentiate(ctx, dy, *_):
    weight, bias, *tensors, o, state, ratios = ctx.saved_tensors
    needed = ctx.needs_input_grad
    gradients = linear_attention_dwc_backward(
        dy, o, state, ratios, list(needed[:2]), weight, bias, *ctx.grid, *tensors, *ctx.options
    )
    de = attention.encoding_gradient(tensors[7], gradients[2:5]) if needed[11] else None
    gradients = [g if need else None for g, need in zip(gradients, (*needed[:2], *needed[4:]), strict=False)]
    return *gradients[:2], None, None, *gradients[2:], de, *[None] * (2 + len(ctx.options))


linear_attention_dwc_forward = define_operator(
    f"linear_attention_dwc_forward({SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)", _forward_operator, _fake_forward,
    _differentiate, _setup_context,
)  # fmt: skip
linear_attention_dwc_backward = define_operator(
    f"linear_attention_dwc_backward(Tensor dy, Tensor o, Tensor state, Tensor ratios, bool[] needed, {SCHEMA})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)", _backward_operator, _fake_backward,
)  # fmt: skip


class _Eager(torch.autograd.Function):
    """The operators' work without their dispatcher, which takes longer than short sequences' kernels."""

    @staticmethod
    def forward(ctx, weight, bias, grid, options, *tensors):
        y, *saved = _forward(tensors, weight, bias, options, grid)
        ctx.grid, ctx.options = grid, options
        ctx.save_for_backward(weight, bias, *tensors, *saved)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        weight, bias, *tensors, o, state, ratios = ctx.saved_tensors
        needed = ctx.needs_input_grad
        gradients = _backward(dy, o, state, ratios, needed[:2], weight, bias, tensors, ctx.options, ctx.grid)
        de = attention.encoding_gradient(tensors[7], gradients[2:5]) if needed[11] else None
        return *gradients[:2], None, None, *gradients[2:], de, None, None


@register_flop_formula(torch.ops.flash_bla.linear_attention_dwc_forward)
def _forward_flops(weight_shape, bias_shape, height, width, q_shape, k_shape, v_shape, *arguments, **_) -> int:
    """Operations of the attention's matrix products and of the convolution, for ``torch.utils.flop_counter``."""
    B, _, _, H, D = q_shape
    x_shape = (B, height * width, H * (D if v_shape is None else v_shape[3]))
    of_conv = conv._forward_flops(x_shape, weight_shape, None, None, None, height, width, 1)
    return of_conv + attention._forward_flops(q_shape, k_shape, v_shape, *arguments)


@register_flop_formula(torch.ops.flash_bla.linear_attention_dwc_backward)
def _backward_flops(dy_shape, o_shape, state_shape, ratios_shape, needed, *arguments, **_) -> int:
    return 2 * _forward_flops(*arguments)


def linear_attention_dwc(
    q: Tensor, v: Tensor | None, grid: tuple[int, int], weight: Tensor, bias: Tensor | None, feature_map: FeatureMap,
    **arguments,
) -> Tensor:  # fmt: skip
    """The operator on checked arguments; q is packed, and holds the values if v is None."""
    values, signs = unpack(q, None, v)[2], 2 if feature_map.signed else 1
    if values.shape[3] > widest_values(q, signs):  # the attention cuts them
        o = attention.linear_attention(q, None, v, feature_map, **arguments)
        arguments = merge_heads(values), weight, bias, merge_heads(o), unpack_gate(q), *grid, *NO_EXTRAS
        return conv.depthwise_conv_eager(arguments, None) if is_eager(q) else conv.depthwise_conv_forward(*arguments)
    tensors, options = attention.operator_arguments(q, None, v, feature_map, **arguments)
    if not is_eager(q):
        return linear_attention_dwc_forward(weight, bias, *grid, *tensors, *options)[0]
    if torch.is_grad_enabled() and any([x is not None and x.requires_grad for x in (weight, bias, *tensors)]):
        return _Eager.apply(weight, bias, grid, options, *tensors)
    return _forward(tensors, weight, bias, options, grid, keep_state=False)[0]
