"""What is elementwise around a linear layer in Triton: GELU, the SiLU gate, and its parameters in half precision.

The activations' gradients give their value once more, which then need not be kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flash_bla.ops.triton_column_sums import column_sums
from flash_bla.ops.triton_depthwise_conv_kernels import ACTIVATIONS
from flash_bla.ops.triton_support import Record, cdiv, jit, tl, wait_for_inputs

BLOCK = 2048

_gelu, _gelu_derivative = ACTIVATIONS["gelu"]


@jit
def _load(base, at, length):
    return tl.load(base + at, mask=at < length, other=0.0).to(tl.float32)


@jit
def _store(base, at, length, value):
    if base is not None:
        tl.store(base + at, value.to(base.dtype.element_ty), mask=at < length)


@jit
def _cast(weight_ptr, w_ptr, bias_ptr, b_ptr, rows, columns, factor_ptr, at):
    weight = _load(weight_ptr, at, rows * columns)
    if factor_ptr is not None:
        weight *= _load(factor_ptr, at // columns, rows)
    _store(w_ptr, at, rows * columns, weight)
    if b_ptr is not None:
        bias = _load(bias_ptr, at, rows)
        if factor_ptr is not None:
            bias *= _load(factor_ptr, at, rows)
        _store(b_ptr, at, rows, bias)


@jit
def cast_kernel(
    weight_ptr, w_ptr, bias_ptr, b_ptr, rows, columns, weight_ptr2, w_ptr2, bias_ptr2, b_ptr2, rows2, columns2,
    weight_ptr3, w_ptr3, bias_ptr3, b_ptr3, rows3, columns3, weight_ptr4, w_ptr4, bias_ptr4, b_ptr4, rows4, columns4,
    factor_ptr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copies of layers' weights (rows, columns) and biases in another type; of the first, each row times its factor."""
    wait_for_inputs()
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    _cast(weight_ptr, w_ptr, bias_ptr, b_ptr, rows, columns, factor_ptr, at)
    if w_ptr2 is not None:
        _cast(weight_ptr2, w_ptr2, bias_ptr2, b_ptr2, rows2, columns2, None, at)
    if w_ptr3 is not None:
        _cast(weight_ptr3, w_ptr3, bias_ptr3, b_ptr3, rows3, columns3, None, at)
    if w_ptr4 is not None:
        _cast(weight_ptr4, w_ptr4, bias_ptr4, b_ptr4, rows4, columns4, None, at)


@jit
def scale_gradient_kernel(
    d_weight_ptr, d_bias_ptr, weight_ptr, bias_ptr, factor_ptr, d_factor_ptr, columns, BLOCK: tl.constexpr
):  # fmt: skip
    """The gradient of a row's factor, and the gradients of what it multiplies, in the place of the products'."""
    wait_for_inputs()
    row = tl.program_id(0)
    factor = tl.load(factor_ptr + row).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        gradient = _load(d_weight_ptr + row * columns, at, columns)
        total += gradient * _load(weight_ptr + row * columns, at, columns)
        _store(d_weight_ptr + row * columns, at, columns, gradient * factor)
    total = tl.sum(total, 0)
    if d_bias_ptr is not None:
        gradient = tl.load(d_bias_ptr + row)
        total += gradient * tl.load(bias_ptr + row).to(tl.float32)
        tl.store(d_bias_ptr + row, gradient * factor)
    tl.store(d_factor_ptr + row, total.to(d_factor_ptr.dtype.element_ty))


@jit
def sum_kernel(x_ptr, add_ptr, y_ptr, length, BLOCK: tl.constexpr):
    wait_for_inputs()
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    _store(y_ptr, at, length, _load(x_ptr, at, length) + _load(add_ptr, at, length))


@jit
def _in_rows(at, stride, WIDTH: tl.constexpr):
    """Places of elements in rows of so many, a stride apart; None stands for rows side by side."""
    if WIDTH is None:
        return at
    else:
        return at // WIDTH * stride + at % WIDTH


@jit
def gate_kernel(x_ptr, gate_ptr, y_ptr, length, gate_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    wait_for_inputs()
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + _in_rows(at, gate_stride, WIDTH), mask=at < length, other=0.0).to(tl.float32)
    _store(y_ptr, at, length, _load(x_ptr, at, length) * gate / (1.0 + tl.exp(-gate)))


@jit
def gate_gradient_kernel(
    dy_ptr, x_ptr, gate_ptr, dx_ptr, d_gate_ptr, y_ptr, length, gate_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    wait_for_inputs()
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_rows = _in_rows(at, gate_stride, WIDTH)
    gate = tl.load(gate_ptr + in_rows, mask=at < length, other=0.0).to(tl.float32)
    dy, x = _load(dy_ptr, at, length), _load(x_ptr, at, length)
    s = 1.0 / (1.0 + tl.exp(-gate))
    _store(dx_ptr, at, length, dy * gate * s)
    d_gate = dy * x * s * (1.0 + gate * (1.0 - s))
    tl.store(d_gate_ptr + in_rows, d_gate.to(d_gate_ptr.dtype.element_ty), mask=at < length)
    _store(y_ptr, at, length, x * gate * s)


@jit
def gelu_gradient_kernel(
    dy_ptr, x_ptr, dx_ptr, y_ptr, length, GELU: tl.constexpr, DERIVATIVE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    wait_for_inputs()
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = _load(x_ptr, at, length)
    _store(dx_ptr, at, length, _load(dy_ptr, at, length) * DERIVATIVE(x))
    _store(y_ptr, at, length, GELU(x))


def record_casts(
    record: Record, *arguments: Any, factor: Tensor | None = None, copies: Sequence[Tensor | None] = ()
) -> tuple[Tensor | None, ...]:
    """Up to four layers' weights and biases in a type, the last argument; the first's rows times factors.

    The first of them are written to ``copies``.
    """
    *parameters, dtype = arguments
    new = [None if x is None else record.new_empty(x.shape, dtype) for x in parameters[len(copies) :]]
    copies = *copies, *new
    launch = dict.fromkeys(cast_kernel.arg_names) | dict(factor_ptr=record.contiguous(factor), BLOCK=BLOCK)
    for i in range(0, len(parameters), 2):
        weight, bias = parameters[i : i + 2]
        rows, columns = weight.shape
        layer = dict(
            weight_ptr=record.contiguous(weight), w_ptr=copies[i], bias_ptr=record.contiguous(bias),
            b_ptr=copies[i + 1], rows=rows, columns=columns,
        )  # fmt: skip
        launch |= {f"{name}{i // 2 + 1 if i else ''}": value for name, value in layer.items()}
    length = max(x.numel() for x in parameters if x is not None)
    record.launch(cast_kernel, (cdiv(length, BLOCK), 1, 1), launch)
    return copies


def record_operands(
    record: Record, x: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor | None, factor: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """x · silu(gate), if there is a gate; weight and bias in another type, times a factor for each row."""
    w, b = record_casts(record, weight, bias, dtype, factor=factor)
    return None if gate is None else record_gate(record, x, gate), w, b


def record_mlp_gradients(
    record: Record, dy: Tensor, d_activated: Tensor, hidden: Tensor, of_bias1: bool, of_bias2: bool
) -> tuple[Tensor | None, ...]:
    """Of an MLP the gradient of what is hidden, its GELU, and the gradients of the biases, from the outputs' ones."""
    d_hidden, activated = record_gelu_gradient(record, d_activated, hidden)
    d_bias1 = column_sums(record, d_hidden) if of_bias1 else None
    return d_hidden, activated, d_bias1, column_sums(record, dy) if of_bias2 else None


def scale_gradients(
    record: Record, d_weight: Tensor, d_bias: Tensor | None, weight: Tensor, bias: Tensor | None, factor: Tensor
) -> Tensor:
    """The gradient of the rows' factors; the products' gradients become those of what the factors multiply."""
    d_factor = record.new_empty(factor.shape, factor.dtype)
    rows, columns = weight.shape
    arguments = dict(
        d_weight_ptr=d_weight, d_bias_ptr=d_bias, weight_ptr=record.contiguous(weight),
        bias_ptr=record.contiguous(bias), factor_ptr=record.contiguous(factor), d_factor_ptr=d_factor, columns=columns,
        BLOCK=512,
    )  # fmt: skip
    record.launch(scale_gradient_kernel, (rows, 1, 1), arguments)
    return d_factor


def record_sum(record: Record, x: Tensor, add: Tensor) -> Tensor:
    y = record.new_empty(x.shape, x.dtype)
    _launch(record, sum_kernel, dict(x_ptr=x, add_ptr=add), y_ptr=y)
    return y


def record_gradients(
    record: Record, rows: Tensor, dx: Tensor | None, x: Tensor, gate: Tensor | None, gelu: bool, of_bias: bool
) -> tuple[Tensor | None, ...]:
    """Gradients of x, gate and bias, and what the linear layer has read, from those of its output and its input.

    None for what is not there, for the gradient and the value of what is not activated, and if dx is None for the
    gradients of x and gate and for the GELU.
    """
    d_gate = d_bias = None
    if gate is not None and dx is None:
        x = record_gate(record, x, gate)
    elif gate is not None:
        dx, d_gate, x = record_gate_gradient(record, dx, x, gate, True)
    elif gelu and dx is not None:
        dx, x = record_gelu_gradient(record, dx, x)
    else:
        dx = x = None
    if of_bias:
        d_bias = column_sums(record, rows)
    return dx, d_gate, d_bias, x


def record_gate(record: Record, x: Tensor, gate: Tensor) -> Tensor:
    """x · silu(gate); see ``_layout``."""
    y = record.new_empty(x.shape, x.dtype)
    gate, layout = _layout(record, gate)
    _launch(record, gate_kernel, dict(x_ptr=x), gate_ptr=gate, y_ptr=y, **layout)
    return y


def record_gate_gradient(
    record: Record, dy: Tensor, x: Tensor, gate: Tensor, again: bool = False, d_gate: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x and of the gate, and with ``again`` what ``record_gate`` gave.

    That of the gate is written to ``d_gate``, where it is given, of the gate's strides.
    """
    dx = record.new_empty(x.shape, x.dtype)
    y = record.new_empty(x.shape, x.dtype) if again else None
    if d_gate is None:
        gate = record.contiguous(gate)
        d_gate = record.new_empty(gate.shape, x.dtype)
    gate, layout = _layout(record, gate)
    inputs, outputs = dict(dy_ptr=dy, x_ptr=x), dict(dx_ptr=dx, d_gate_ptr=d_gate, y_ptr=y)
    _launch(record, gate_gradient_kernel, inputs, gate_ptr=gate, **outputs, **layout)
    return dx, d_gate, y


def _layout(record: Record, gate: Tensor) -> tuple[Tensor, dict]:
    """A gate, which may be columns of a matrix, and how it lies."""
    if gate.is_contiguous() or gate.ndim != 2 or gate.stride(1) != 1:
        return record.contiguous(gate), dict(gate_stride=0, WIDTH=None)
    return gate, dict(gate_stride=gate.stride(0), WIDTH=gate.shape[1])


def record_gelu_gradient(record: Record, dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of x, and gelu(x) (the exact one, within 1e-7)."""
    dx, y = (record.new_empty(x.shape, x.dtype) for _ in range(2))
    options = dict(GELU=_gelu, DERIVATIVE=_gelu_derivative)
    _launch(record, gelu_gradient_kernel, dict(dy_ptr=dy, x_ptr=x), dx_ptr=dx, y_ptr=y, **options)
    return dx, y


def _launch(record: Record, kernel, inputs: dict[str, Tensor], **others) -> None:
    length = inputs["x_ptr"].numel()
    inputs = {name: record.contiguous(x) for name, x in inputs.items()}
    record.launch(kernel, (cdiv(length, BLOCK), 1, 1), inputs | others | dict(length=length, BLOCK=BLOCK))
