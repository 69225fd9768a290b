"""Linear attention and the depthwise convolution beside it, as one operator: its gradients come into one tensor.

Forward the convolution adds the attention's output, and multiplies by the gate, in its own pass. Backward its first
pass gives the gradients of that sum and of the gate, the attention's kernels those of q, k and v, and the convolution's
second pass adds to that of v. All are written where they stand beside each other in the projection's gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from flash_bla.ops import triton_depthwise_conv as conv
from flash_bla.ops import triton_linear_attention as attention
from flash_bla.ops.arguments import merge_heads, split_heads, unpack, unpack_gate
from flash_bla.ops.feature_maps import FeatureMap
from flash_bla.ops.triton_support import Record, as_outputs, define_operator, eager_function, is_eager, run
from flash_bla.ops.triton_tuning import widest_values

NO_EXTRAS = (1, False, None, None)  # stride, residual and activations of the convolution


def _start(record: Record, q: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """q and v for the attention, and for the convolution values and gate: (B, N, H·D), with channels side by side."""
    if q.stride(4) != 1 or q.stride(3) != q.shape[4] and q.shape[3] > 1:
        q = record.contiguous(q)
    if v is None:
        return q, None, merge_heads(unpack(q, None, None)[2]), unpack_gate(q)
    v = v if v.stride(2) == 1 else record.contiguous(v)
    return q, split_heads(v, q.shape[3]), v, unpack_gate(q)


def record_forward(
    record: Record, weight: Tensor, bias: Tensor | None, q: Tensor, k: None, v: Tensor | None, *arguments: Any,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The output; for the backward pass the attention's, which only a gate needs, the keys' state and norm ratios.

    The arguments are those of the operator, its options in a tuple, whether to keep the state, and the grid.
    """
    *others, options, keep_state, grid = arguments
    q, v, values, gate = _start(record, q, v)
    o, state, ratios = attention.record_forward(record, q, None, v, *others, options, keep_state)
    y = conv.record_forward(record, values, weight, bias, merge_heads(o), gate, *grid, *NO_EXTRAS)
    return y, None if gate is None else o, state, ratios


def record_backward(
    record: Record, dy: Tensor, o: Tensor | None, state: Tensor | None, ratios: Tensor | None, weight: Tensor,
    bias: Tensor | None, q: Tensor, k: None, v: Tensor | None, *arguments: Any,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of filters and bias, as far as needed, and of the first seven inputs of the attention."""
    *others, options, needed, grid = arguments
    dy = record.contiguous(dy)
    q, v, values, gate = _start(record, q, v)
    inputs, options_of_conv = (values, weight, bias), (*grid, *NO_EXTRAS)
    packed = None
    if gate is not None:
        packed = record.new_empty(q.shape, q.dtype)
        of_gate = None, unpack_gate(packed), (False, False, False, True, True)
        *_, dy, _ = conv.record_backward(record, dy, *inputs, merge_heads(o), gate, *of_gate, *options_of_conv)
    do = dy.unflatten(2, (q.shape[3], -1)).transpose(1, 2)
    tensors = q, None, v, *others
    gradients = dq, _, dv, *_ = attention.record_gradients(record, do, packed, state, ratios, tensors, options)
    of_values = merge_heads(unpack(dq, None, dv)[2]), None, (True, *needed, False, False)
    _, d_weight, d_bias, *_ = conv.record_backward(record, dy, *inputs, None, None, *of_values, *options_of_conv)
    if dv is not None:
        gradients = dq, None, merge_heads(dv), *gradients[3:]
    return d_weight, d_bias, *gradients


SCHEMA = f"Tensor weight, Tensor? bias, SymInt height, SymInt width, {attention.SCHEMA}"


def _forward_operator(weight, bias, height, width, *arguments) -> tuple[Tensor, ...]:
    tensors = weight, bias, *attention.in_type_of_keys(arguments[:10])
    return as_outputs(run(record_forward, tensors, (arguments[10:], True, (height, width))), weight)


def _fake_forward(weight, bias, height, width, q, k, v, *others) -> tuple[Tensor, ...]:
    o, state, ratios = attention._fake_forward(q, k, None if v is None else split_heads(v, q.shape[3]), *others)
    y = merge_heads(torch.empty_like(o))
    return as_outputs((y, None if unpack_gate(q) is None else o, state, ratios), weight)


def _backward_operator(dy, o, state, ratios, needed, weight, bias, height, width, *arguments) -> tuple[Tensor, ...]:
    o = None if unpack_gate(arguments[0]) is None else o
    ratios = ratios if arguments[11] == "focusing_power" else None
    inputs = dy, o, state, ratios, weight, bias, *attention.in_type_of_keys(arguments[:10])
    return as_outputs(run(record_backward, inputs, (arguments[10:], tuple(needed), (height, width))), dy)


def _fake_backward(dy, o, state, ratios, needed, weight, bias, height, width, q, k, v, *others) -> tuple[Tensor, ...]:
    d_weight = weight.new_empty(weight.shape) if needed[0] else None
    d_bias = bias.new_empty(bias.shape) if bias is not None and needed[1] else None
    values, dv = (None, None) if v is None else (split_heads(v, q.shape[3]), v.new_empty(v.shape))
    dq, dk, _, *others = attention._fake_backward(dy, state, ratios, True, q, k, values, *others)
    return as_outputs((d_weight, d_bias, dq, dk, dv, *others), dy)


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
    de = attention.encoding_gradient(gradients[2:], tensors[7].dtype) if needed[11] else None
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


@eager_function
class _Eager(torch.autograd.Function):
    """The operators' work without their dispatcher, which takes longer than short sequences' kernels."""

    @staticmethod
    def forward(ctx, weight, bias, *inputs):
        *tensors, options, grid, check = inputs
        ctx.options, ctx.grid, ctx.encoding_type = options, grid, None if tensors[7] is None else tensors[7].dtype
        tensors = weight, bias, *attention.in_type_of_keys(tensors)
        y, *saved = run(record_forward, tensors, (options, True, grid), check)
        ctx.save_for_backward(*saved, *tensors)
        return y

    @staticmethod
    def backward(ctx, dy):
        needed = ctx.needs_input_grad
        gradients = run(record_backward, (dy, *ctx.saved_tensors), (ctx.options, needed[:2], ctx.grid))
        de = attention.encoding_gradient(gradients[2:], ctx.encoding_type) if needed[9] else None
        return *gradients, de, *[None] * 5


@register_flop_formula(torch.ops.flash_bla.linear_attention_dwc_forward)
def _forward_flops(weight_shape, bias_shape, height, width, q_shape, k_shape, v_shape, *arguments, **_) -> int:
    """Operations of the attention's matrix products and of the convolution, for ``torch.utils.flop_counter``."""
    B, _, _, H, D = q_shape
    C = H * D if v_shape is None else v_shape[2]
    of_conv = conv._forward_flops((B, height * width, C), weight_shape, None, None, None, height, width, 1)
    return of_conv + attention._forward_flops(q_shape, k_shape, (B, H, height * width, C // H), *arguments)


@register_flop_formula(torch.ops.flash_bla.linear_attention_dwc_backward)
def _backward_flops(dy_shape, o_shape, state_shape, ratios_shape, needed, *arguments, **_) -> int:
    return 2 * _forward_flops(*arguments)


def linear_attention_dwc(
    q: Tensor, v: Tensor | None, grid: tuple[int, int], weight: Tensor, bias: Tensor | None, feature_map: FeatureMap,
    check: Callable | None = None, **arguments: Any,
) -> Tensor:  # fmt: skip
    """The operator; q is packed, and holds the values if v ``(B, N, H·Dv)`` is None.

    The arguments have been checked, or q is eager and they are by ``check`` where such ones were not met before.
    """
    eager = check is not None or is_eager(q)
    signs = 2 if feature_map.signed else 1
    if (q.shape[4] if v is None else v.shape[2] // q.shape[3]) > widest_values(q, signs):  # the attention cuts them
        v = None if v is None else split_heads(v, q.shape[3])
        o = attention.linear_attention(q, None, v, feature_map, check, **arguments)
        values = merge_heads(unpack(q, None, v)[2])
        arguments = values, weight, bias, merge_heads(o), unpack_gate(q), *grid, *NO_EXTRAS
        return conv.depthwise_conv_eager(arguments, None) if eager else conv.depthwise_conv_forward(*arguments)
    tensors, options = attention.operator_arguments(q, None, v, feature_map, **arguments)
    if not eager:
        return linear_attention_dwc_forward(weight, bias, *grid, *tensors, *options)[0]
    if torch.is_grad_enabled() and any([x is not None and x.requires_grad for x in (weight, bias, *tensors)]):
        return _Eager.apply(weight, bias, *tensors, options, grid, check)
    return run(record_forward, (weight, bias, *attention.in_type_of_keys(tensors)), (options, False, grid), check)[0]
