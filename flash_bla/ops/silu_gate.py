"""A SiLU gate in one pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_bla.ops.arguments import autocast, check_device, choose_backend, expect
from flash_bla.ops.triton_support import Record, cdiv, is_eager, jit, once_differentiable, run, tl

BLOCK = 2048


def silu_gate(x: Tensor, gate: Tensor, *, backend: str | None = None) -> Tensor:
    r"""x · silu(gate), elementwise.

    Args:
        x: Any shape.
        gate: The same shape; under autocast both are cast to its type.
        backend: As in ``linear_attention``; ``torch.compile`` takes the reference, which it fuses with its neighbours.

    Raises:
        ValueError: A shape or device that does not fit.
    """
    expect("gate", gate, tuple(x.shape), "that of x")
    check_device("gate", gate, x)
    x, gate = autocast(x, gate)
    if choose_backend(backend, x) == "triton" and is_eager(x):
        return _Eager.apply(x, gate)
    return x * F.silu(gate)


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate):
        ctx.save_for_backward(x, gate)
        return run(record_forward, (x, gate))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return run(record_backward, (dy, *ctx.saved_tensors))


def record_forward(record: Record, x: Tensor, gate: Tensor) -> Tensor:
    y = record.new_empty(x.shape, x.dtype)
    _launch(record, gate_kernel, dict(x_ptr=x, gate_ptr=gate), y_ptr=y)
    return y


def record_backward(record: Record, dy: Tensor, x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    dx, d_gate = (record.new_empty(x.shape, x.dtype) for _ in range(2))
    _launch(record, gate_gradient_kernel, dict(dy_ptr=dy, x_ptr=x, gate_ptr=gate), dx_ptr=dx, d_gate_ptr=d_gate)
    return dx, d_gate


def _launch(record: Record, kernel, inputs: dict[str, Tensor], **outputs: Tensor) -> None:
    length = inputs["x_ptr"].numel()
    inputs = {name: record.contiguous(x) for name, x in inputs.items()}
    record.launch(kernel, (cdiv(length, BLOCK), 1, 1), inputs | outputs | dict(length=length, BLOCK=BLOCK))


@jit
def gate_kernel(x_ptr, gate_ptr, y_ptr, length, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < length, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + at, mask=at < length, other=0.0).to(tl.float32)
    y = x * gate / (1.0 + tl.exp(-gate))
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=at < length)


@jit
def gate_gradient_kernel(dy_ptr, x_ptr, gate_ptr, dx_ptr, d_gate_ptr, length, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dy = tl.load(dy_ptr + at, mask=at < length, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + at, mask=at < length, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + at, mask=at < length, other=0.0).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-gate))
    tl.store(dx_ptr + at, (dy * gate * s).to(dx_ptr.dtype.element_ty), mask=at < length)
    d_gate = dy * x * s * (1.0 + gate * (1.0 - s))
    tl.store(d_gate_ptr + at, d_gate.to(d_gate_ptr.dtype.element_ty), mask=at < length)
