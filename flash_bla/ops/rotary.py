"""Rotation of queries and keys that stand in one tensor with values and gate, as is then their gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_bla.ops.arguments import choose_backend
from flash_bla.ops.reference import rotate
from flash_bla.ops.triton_rotary import record_rotation, record_rotation_gradient
from flash_bla.ops.triton_support import eager_function, is_eager, run


def rotate_packed(qkvg: Tensor, rope: Tensor, *, backend: str | None = None) -> tuple[Tensor, ...]:
    """Turns queries and keys for an attention with a convolution of the values and a gate beside it.

    Args:
        qkvg: ``(B, N, 4, H, D)``.
        rope: ``(1 or H, N, D/2, 2)``, as in ``linear_attention``.
        backend: As there; ``torch.compile`` takes the reference, which it fuses with its neighbours.

    Returns:
        Turned queries, turned keys and values ``(B, H, N, D)``; values and gate ``(B, N, H·D)``.
    """
    if is_eager(qkvg) and choose_backend(backend, qkvg) == "triton":
        return _Eager.apply(qkvg, rope)
    qk, v, gate = qkvg.split([2, 1, 1], dim=2)
    wide = qk.permute(2, 0, 3, 1, 4).to(torch.promote_types(qk.dtype, torch.float32))
    q, k = rotate(wide, rope).to(qk.dtype)  # together: fewer launches
    return q, k, v.squeeze(2).transpose(1, 2), v.flatten(2), gate.flatten(2)


@eager_function
class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkvg, rope):
        ctx.save_for_backward(rope)
        q, k = run(record_rotation, (qkvg, rope)).permute(2, 0, 3, 1, 4).unbind(0)
        v, gate = qkvg.select(2, 2), qkvg.select(2, 3)
        return q, k, v.transpose(1, 2), v.flatten(2), gate.flatten(2)

    @staticmethod
    def backward(ctx, *gradients):
        return run(record_rotation_gradient, (*gradients, *ctx.saved_tensors)), None
