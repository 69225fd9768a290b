"""GELU and the SiLU gate in Triton; the gradients give the value once more, which then need not be kept."""

from __future__ import annotations

from torch import Tensor

from flash_bla.ops.triton_depthwise_conv_kernels import ACTIVATIONS
from flash_bla.ops.triton_support import Record, cdiv, jit, tl

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
def gate_kernel(x_ptr, gate_ptr, y_ptr, length, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = _load(gate_ptr, at, length)
    _store(y_ptr, at, length, _load(x_ptr, at, length) * gate / (1.0 + tl.exp(-gate)))


@jit
def gate_gradient_kernel(dy_ptr, x_ptr, gate_ptr, dx_ptr, d_gate_ptr, y_ptr, length, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dy, x, gate = _load(dy_ptr, at, length), _load(x_ptr, at, length), _load(gate_ptr, at, length)
    s = 1.0 / (1.0 + tl.exp(-gate))
    _store(dx_ptr, at, length, dy * gate * s)
    _store(d_gate_ptr, at, length, dy * x * s * (1.0 + gate * (1.0 - s)))
    _store(y_ptr, at, length, x * gate * s)


@jit
def gelu_gradient_kernel(
    dy_ptr, x_ptr, dx_ptr, y_ptr, length, GELU: tl.constexpr, DERIVATIVE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = _load(x_ptr, at, length)
    _store(dx_ptr, at, length, _load(dy_ptr, at, length) * DERIVATIVE(x))
    _store(y_ptr, at, length, GELU(x))


def record_gate(record: Record, x: Tensor, gate: Tensor) -> Tensor:
    """x · silu(gate)."""
    y = record.new_empty(x.shape, x.dtype)
    _launch(record, gate_kernel, dict(x_ptr=x, gate_ptr=gate), y_ptr=y)
    return y


def record_gate_gradient(
    record: Record, dy: Tensor, x: Tensor, gate: Tensor, again: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x and of the gate, and with ``again`` what ``record_gate`` gave."""
    dx, d_gate = (record.new_empty(x.shape, x.dtype) for _ in range(2))
    y = record.new_empty(x.shape, x.dtype) if again else None
    inputs = dict(dy_ptr=dy, x_ptr=x, gate_ptr=gate)
    _launch(record, gate_gradient_kernel, inputs, dx_ptr=dx, d_gate_ptr=d_gate, y_ptr=y)
    return dx, d_gate, y


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
