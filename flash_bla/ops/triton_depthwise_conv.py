"""Depthwise convolution on tokens in Triton: launches of the kernels, and the torch.library operators over them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from flash_bla.ops.triton_column_sums import add_shares
from flash_bla.ops.triton_depthwise_conv_kernels import ACTIVATIONS, forward_kernel, gradient_kernel
from flash_bla.ops.triton_support import (
    Record,
    as_outputs,
    cdiv,
    define_operator,
    eager_function,
    multiprocessors,
    run,
)

# --- launches ---------------------------------------------------------------------------------------------------------


class _Way(NamedTuple):
    """How a kernel works."""

    columns: int  # of a strip
    resident: int  # programs on a multiprocessor at a time
    maxnreg: int | None


# Candidates by the side of the filters and by what is computed, as the registers allow; measured on an H200. "fused" is
# the forward pass with one more operand (a sum, a gate, a gradient), "gated" with several; "sloped" are the gradients
# with an activation of the input.
_WAYS = {
    3: {
        "forward": (_Way(4, 5, None), _Way(7, 4, 128)),
        "fused": (_Way(4, 5, None),),
        "gated": (_Way(4, 5, None),),
        "input": (_Way(4, 5, 96), _Way(7, 4, 128)),
        "filters": (_Way(4, 4, 128), _Way(7, 3, 168)),
        "both": (_Way(5, 3, 168), _Way(4, 4, 128)),
        "sloped": (_Way(4, 2, None),),
    },
    5: {
        "forward": (_Way(4, 3, None), _Way(7, 2, None)),
        "fused": (_Way(4, 3, None), _Way(7, 2, None)),
        "gated": (_Way(4, 3, None),),
        "input": (_Way(4, 3, 168), _Way(7, 2, None)),
        "filters": (_Way(4, 3, 168), _Way(7, 2, None)),
        "both": (_Way(4, 2, None),),
        "sloped": (_Way(4, 2, None),),
    },
}
_STRIDED = {
    "forward": _Way(4, 3, None), "fused": _Way(4, 3, None), "gated": _Way(4, 3, None), "input": _Way(4, 3, 168),
    "filters": _Way(4, 3, 168), "both": _Way(4, 3, 168), "sloped": _Way(4, 2, None),
}  # fmt: skip


def _way(kind: str, kernel_size: int, stride: int, width: int) -> _Way:
    """Of the candidates that with the fewest loads: a strip reads K - 1 columns besides its own."""
    if kernel_size > 5:
        return _Way(2, 3 if kind in ("forward", "fused", "gated") else 2, None)
    if stride == 2:
        return _WAYS[5]["both"][0] if kernel_size == 5 and kind == "both" else _STRIDED[kind]
    ways = _WAYS[max(kernel_size, 3)][kind]
    return min(ways, key=lambda way: cdiv(width, way.columns) * (way.columns + kernel_size - 1))


class _Blocks(NamedTuple):
    """How a launch is cut."""

    depth: int  # rows that a program walks down
    block_c: int
    strips: int
    programs: int  # on a block of channels
    places: int  # for programs on a block of channels at a time


@lru_cache(maxsize=1024)
def _blocks(
    images: int, height: int, width: int, channels: int, kernel_size: int, way: _Way, device: torch.device
) -> _Blocks:
    """For a target of height x width."""
    # whole lines of 128 bytes in half precision, unless narrower blocks waste far fewer channels; a thread holds two
    block_c = min((64, 32, 16), key=lambda block: max(cdiv(channels, block) * block, 1.05 * channels))
    strips = 256 // block_c
    groups = cdiv(images * cdiv(width, way.columns), strips)
    places = way.resident * multiprocessors(device)

    def duration(segments: int) -> int:
        """In rows: each segment reads K - 1 rows of its neighbours again, and starting takes as long as some rows."""
        programs = groups * cdiv(channels, block_c) * segments
        return cdiv(programs, places) * (cdiv(height, segments) + kernel_size + 3)

    depth = cdiv(height, min(range(1, max(1, height // kernel_size) + 1), key=duration))
    places = max(1, places // cdiv(channels, block_c))
    return _Blocks(depth, block_c, strips, groups * cdiv(height, depth), places)


class _Image(NamedTuple):
    """Tokens that stand on a grid, and what they are convolved with."""

    tokens: slice | None  # which ones; None for all
    height: int
    width: int
    filters: Tensor  # (number of filters, K²)
    bias: Tensor | None

    @property
    def kernel_size(self) -> int:
        return math.isqrt(self.filters.shape[1])


def _images(record: Record, x: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int) -> list[_Image]:
    """The tokens on the grid; and the prefix tokens, a row of an image whose only tap is zero."""
    prefix = x.shape[1] - height * width
    filters = record.contiguous(weight).flatten(1)
    bias = record.contiguous(bias)
    if not prefix:
        return [_Image(None, height, width, filters, bias)]
    no_filters = record.new_zeros((filters.shape[0], 1), filters.dtype)
    return [
        _Image(slice(prefix, None), height, width, filters, bias),
        _Image(slice(prefix), 1, prefix, no_filters, None),
    ]


def _launch_on(
    record: Record, image: _Image, kernel, way: _Way, source: tuple[int, int], target: tuple[int, int],
    tensors: dict[str, Tensor | None], programs: int | None = None, **options,
) -> None:  # fmt: skip
    """Runs a kernel over an image, from a source to a target of these heights and widths."""
    if image.tokens is not None:
        tensors = {name: None if x is None else x[:, image.tokens] for name, x in tensors.items()}
    images, _, channels = next(x for x in tensors.values() if x is not None).shape
    blocks = _blocks(images, *target, channels, image.kernel_size, way, record.device)
    arguments = dict(
        images=images, height=source[0], width=source[1], out_height=target[0], out_width=target[1],
        channels=channels, filters_ptr=image.filters, filters=image.filters.shape[0], depth=blocks.depth,
        K=image.kernel_size, COLUMNS=way.columns, STRIPS=blocks.strips, BLOCK_C=blocks.block_c,
        AHEAD=1 if image.kernel_size == 7 else 2, **options,
    )  # fmt: skip
    for name, x in tensors.items():
        arguments |= {f"{name}_ptr": x, f"{name}_strides": (0, 0) if x is None else x.stride()[:2]}
    count = blocks.programs if programs is None else programs
    record.launch(kernel, (count * cdiv(channels, blocks.block_c), 1, 1), arguments, maxnreg=way.maxnreg)


def _rows(record: Record, x: Tensor | None) -> Tensor | None:
    """x with neighbouring channels side by side in memory."""
    return x if x is None or x.stride(2) == 1 else record.contiguous(x)


def _output_size(height: int, width: int, stride: int) -> tuple[int, int]:
    return cdiv(height, stride), cdiv(width, stride)


def _output_shape(x: Tensor, height: int, width: int, stride: int) -> tuple[int, int, int]:
    B, N, C = x.shape
    out_height, out_width = _output_size(height, width, stride)
    return B, N - height * width + out_height * out_width, C


# --- operators --------------------------------------------------------------------------------------------------------


def record_forward(
    record: Record, x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, gate: Tensor | None,
    height: int, width: int, stride: int, residual: bool, activation: str | None, input_activation: str | None,
) -> Tensor:  # fmt: skip
    x, add, gate = (_rows(record, tensor) for tensor in (x, add, gate))
    y = record.new_empty(_output_shape(x, height, width, stride), x.dtype)
    for image in _images(record, x, weight, bias, height, width):
        tensors = dict(x=x, y=y, add=add, gate=gate, dy=None, d_add=None, d_gate=None)
        _launch_forward(record, image, tensors, stride, residual, activation, input_activation)
    return y


def _launch_forward(
    record: Record, image: _Image, tensors: dict, stride: int, residual: bool, activation: str | None,
    input_activation: str | None,
) -> None:  # fmt: skip
    source = image.height, image.width
    target = _output_size(*source, stride)
    value, derivative = ACTIVATIONS[activation]
    others = sum(tensors[name] is not None for name in ("add", "gate", "dy"))
    kind = ("forward", "fused", "gated")[min(others, 2)]
    _launch_on(
        record, image, forward_kernel, _way(kind, image.kernel_size, stride, target[1]), source, target, tensors,
        bias_ptr=image.bias, STRIDE=stride, RESIDUAL=residual,
        INPUT=ACTIVATIONS[input_activation][0], ACTIVATION=value, DERIVATIVE=derivative,
    )  # fmt: skip


def record_backward(
    record: Record, dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, gate: Tensor | None,
    base: Tensor | None, d_gate: Tensor | None, needed: tuple[bool, ...], height: int, width: int, stride: int,
    residual: bool, activation: str | None, input_activation: str | None, add_to_base: bool = True,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of the first five inputs of the forward operator, None for what is not needed.

    So is that of ``add`` without ``gate``: it is dy. That of x is added to ``base``, or replaces it, and that of the
    gate is written to ``d_gate``, where these are given.
    """
    new = needed[0] and base is None, *needed[1:4], needed[4] and d_gate is None
    gradients = dx, d_weight, d_bias, d_add, _ = _new_gradients(record, new, dy, x, weight, bias, gate)
    dx, d_gate = (first if second is None else second for first, second in ((dx, base), (gradients[4], d_gate)))
    dy, x, add, gate = (_rows(record, tensor) for tensor in (dy, x, add, gate))
    of_filters = d_weight is not None or d_bias is not None
    dz = dy
    if activation is not None or gate is not None:
        dz = None
        if activation is None and d_add is not None:
            dz, d_add = d_add, None
        elif dx is not None or of_filters:
            dz = record.new_empty(dy.shape, dy.dtype)
    sloped = dx is not None and input_activation is not None
    of_input, of_input_derivative = ACTIVATIONS[input_activation]
    for image in _images(record, x, weight, bias, height, width):
        if dz is not dy:
            tensors = dict(x=x, y=dz, add=add, gate=gate, dy=dy, d_add=d_add, d_gate=d_gate)
            _launch_forward(record, image, tensors, stride, residual, activation, input_activation)
        k = image.kernel_size
        of_filters = of_filters and k > 1
        if dx is None and not of_filters:
            continue
        kind = "input" if not of_filters else "filters" if dx is None else "both"
        way = _way("sloped" if sloped else kind, k, stride, image.width)
        source = image.height, image.width
        partial = programs = None
        if of_filters:
            images, _, channels = x.shape
            blocks = _blocks(images, *source, channels, k, way, record.device)
            # each goes on until all is done: there are fewer shares to add
            programs = min(blocks.programs, blocks.places)
            partial = record.new_empty((programs, k * k + 1, channels), torch.float32)
        tensors = dict(dz=dz, x=x if of_filters or sloped else None, dx=dx)
        _launch_on(
            record, image, gradient_kernel, way, _output_size(*source, stride), source, tensors, programs,
            partial_ptr=partial, STRIDE=stride, RESIDUAL=residual, ADD=base is not None and add_to_base, INPUT=of_input,
            INPUT_DERIVATIVE=of_input_derivative if sloped else None,
        )  # fmt: skip
        if of_filters:
            add_shares(record, partial, weight.shape[0], d_weight, d_bias)
    return gradients


def _new_gradients(
    memory: Record | Tensor, needed: Sequence[bool], dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None,
    gate: Tensor | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    # those of add and gate are computed only where there is a gate
    like = x, weight, bias, None if gate is None else dy, None if gate is None else dy
    return tuple(
        memory.new_empty(y.shape, dtype=y.dtype) if need and y is not None else None
        for y, need in zip(like, needed, strict=True)
    )


def _forward_operator(*arguments) -> Tensor:
    return run(record_forward, arguments[:5], arguments[5:])


def _fake_forward(x, weight, bias, add, gate, height, width, stride, *_) -> Tensor:
    return x.new_empty(_output_shape(x, height, width, stride))


def _backward_operator(dy: Tensor, needed: Sequence[bool], *arguments) -> tuple[Tensor, ...]:
    return as_outputs(run(record_backward, (dy, *arguments[:5], None, None), (tuple(needed), *arguments[5:])), dy)


def _fake_backward(dy, needed, x, weight, bias, add, gate, *_) -> tuple[Tensor, ...]:
    return as_outputs(_new_gradients(dy, needed, dy, x, weight, bias, gate), dy)


def _setup_context(ctx, inputs, output):
    x, weight, bias, add, gate, *ctx.options = inputs
    ctx.save_for_backward(x, weight, bias, add if gate is not None else None, gate)


def _differentiate(ctx, dy):
    needed = list(ctx.needs_input_grad[:5])
    tensors = ctx.saved_tensors
    gradients = depthwise_conv_backward(dy, needed, *tensors, *ctx.options)
    dx, d_weight, d_bias, d_add, d_gate = (g if need else None for g, need in zip(gradients, needed, strict=True))
    if needed[3] and tensors[4] is None:
        d_add = dy
    return dx, d_weight, d_bias, d_add, d_gate, *[None] * len(ctx.options)


SCHEMA = """
    Tensor x, Tensor weight, Tensor? bias, Tensor? add, Tensor? gate, SymInt height, SymInt width, int stride,
    bool residual, str? activation, str? input_activation
"""
depthwise_conv_forward = define_operator(
    f"depthwise_conv_forward({SCHEMA}) -> Tensor", _forward_operator, _fake_forward, _differentiate, _setup_context
)
depthwise_conv_backward = define_operator(
    f"depthwise_conv_backward(Tensor dy, bool[] needed, {SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_operator, _fake_backward,
)  # fmt: skip


@eager_function
class _Eager(torch.autograd.Function):
    """The operators' work without their dispatcher, which takes longer than small maps' kernels."""

    @staticmethod
    def forward(ctx, x, weight, bias, add, gate, options, check):
        y = run(record_forward, (x, weight, bias, add, gate), options, check)
        ctx.options = options
        ctx.save_for_backward(x, weight, bias, None if gate is None else add, gate)
        return y

    @staticmethod
    def backward(ctx, dy):
        needed = ctx.needs_input_grad[:5]
        tensors = ctx.saved_tensors
        dx, d_weight, d_bias, d_add, d_gate = run(record_backward, (dy, *tensors, None, None), (needed, *ctx.options))
        if needed[3] and tensors[4] is None:
            d_add = dy
        return dx, d_weight, d_bias, d_add, d_gate, None, None


def depthwise_conv_eager(arguments: tuple, check: Callable) -> Tensor:
    """The operator on arguments that have been checked, or are by ``check`` where such ones were not met before."""
    return _Eager.apply(*arguments[:5], arguments[5:], check)


@register_flop_formula(torch.ops.flash_bla.depthwise_conv_forward)
def _forward_flops(x_shape, weight_shape, bias_shape, add_shape, gate_shape, height, width, stride, *_, **__) -> int:
    """Operations of the convolution, for ``torch.utils.flop_counter``."""
    out_height, out_width = _output_size(height, width, stride)
    return 2 * x_shape[0] * out_height * out_width * x_shape[2] * weight_shape[2] ** 2


@register_flop_formula(torch.ops.flash_bla.depthwise_conv_backward)
def _backward_flops(dy_shape, needed, *arguments, **_) -> int:
    return (needed[0] + needed[1]) * _forward_flops(*arguments)
