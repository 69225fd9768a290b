"""A SiLU gate in one pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from flash_bla.ops.arguments import autocast, check_device, choose_backend, expect
from flash_bla.ops.triton_support import cdiv, is_eager, jit, launch, tl

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
        x, gate = x.contiguous(), gate.contiguous()
        ctx.save_for_backward(x, gate)
        y = torch.empty_like(x)
        _launch(gate_kernel, dict(x_ptr=x, gate_ptr=gate, y_ptr=y))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, gate = ctx.saved_tensors
        dx, d_gate = torch.empty_like(x), torch.empty_like(gate)
        _launch(
            gate_gradient_kernel, dict(dy_ptr=dy.contiguous(), x_ptr=x, gate_ptr=gate, dx_ptr=dx, d_gate_ptr=d_gate)
        )
        return dx, d_gate


def _launch(kernel, pointers: dict[str, Tensor]) -> None:
    length = pointers["x_ptr"].numel()
    launch(kernel, pointers, (), lambda: ((cdiv(length, BLOCK), 1, 1), None, dict(length=length, BLOCK=BLOCK)))


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
