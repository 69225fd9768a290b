"""A SiLU gate in one pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_bla.ops.arguments import autocast, check_device, check_dtype, choose_backend, expect
from flash_bla.ops.triton_activations import record_gate, record_gate_gradient
from flash_bla.ops.triton_support import eager_function, is_eager, run
from flash_bla.tracing import recomputed


def silu_gate(x: Tensor, gate: Tensor, *, backend: str | None = None) -> Tensor:
    r"""x · silu(gate), elementwise.

    Args:
        x: Any shape.
        gate: The same shape; under autocast both are cast to its type, and else to the wider one of theirs.
        backend: As in ``linear_attention``; ``torch.compile`` takes the reference, which it fuses with its neighbours,
            and computes again in the backward pass rather than keep it.

    Raises:
        ValueError: A shape or device that does not fit.
        TypeError: Not tensors, or of dtypes that are not supported.
    """
    check_gate(x, gate)
    x, gate = autocast(x, gate)
    if x.dtype != gate.dtype:
        dtype = torch.promote_types(x.dtype, gate.dtype)
        x, gate = x.to(dtype), gate.to(dtype)
    if choose_backend(backend, x) == "triton" and is_eager(x):
        return _Eager.apply(x, gate)
    return recomputed(_multiply, x, gate)


def _multiply(x: Tensor, gate: Tensor) -> Tensor:
    return x * F.silu(gate)


def check_gate(x: Tensor, gate: Tensor) -> None:
    for name, y in (("x", x), ("gate", gate)):
        check_device(name, y, x)
        check_dtype(name, y)
    expect("gate", gate, tuple(x.shape), "that of x")


@eager_function
class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate):
        ctx.save_for_backward(x, gate)
        return run(record_gate, (x, gate))

    @staticmethod
    def backward(ctx, dy):
        return run(record_gate_gradient, (dy, *ctx.saved_tensors))[:2]
