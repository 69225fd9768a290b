"""Rotation of queries and keys that stand in one tensor with values and gate, in Triton."""

from __future__ import annotations

from torch import Tensor

from flash_bla.ops.arguments import split_heads
from flash_bla.ops.triton_support import NOT_SPECIALIZED, Record, cdiv, jit, power_of_two, tl, wait_for_inputs


@jit
def _load(base, strides, batch, head, n, d, inside):
    base += batch * strides[0] + head * strides[1]
    return tl.load(base + n.to(tl.int64)[:, None] * strides[2] + d[None, :] * strides[3], mask=inside, other=0.0)


@jit
def _store(base, strides, batch, head, n, d, inside, value):
    base += batch * strides[0] + head * strides[1]
    pointers = base + n.to(tl.int64)[:, None] * strides[2] + d[None, :] * strides[3]
    tl.store(pointers, value.to(base.dtype.element_ty), mask=inside)


@jit
def _turn(x, rope, sign: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    cos, sin = tl.split(tl.reshape(rope.to(tl.float32), BLOCK_N, BLOCK_D // 2, 2))
    even, odd = tl.split(tl.reshape(x.to(tl.float32), BLOCK_N, BLOCK_D // 2, 2))
    sin *= sign
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), BLOCK_N, BLOCK_D)


@jit(do_not_specialize=NOT_SPECIALIZED)
def rotate_kernel(
    q_ptr, q_strides, k_ptr, k_strides, v_ptr, v_strides, more_v_ptr, more_v_strides, gate_ptr, gate_strides,
    rope_ptr, rope_strides, new_q_ptr, new_q_strides, new_k_ptr, new_k_strides, new_v_ptr, new_v_strides,
    new_gate_ptr, new_gate_strides, heads, length,
    SIGN: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Turns q and k, back if ``SIGN`` is -1: blocks (axis 1) of a head (axis 0).

    If there are values, it adds up the two tensors of them, and copies the gate.
    """
    wait_for_inputs()
    n, d = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    batch, head = tl.program_id(0).to(tl.int64) // heads, tl.program_id(0).to(tl.int64) % heads
    inside = (n < length)[:, None] & (d < D)[None, :]
    rope = _load(rope_ptr, rope_strides, batch, head, n, d, inside)
    q = _turn(_load(q_ptr, q_strides, batch, head, n, d, inside), rope, SIGN, BLOCK_N, BLOCK_D)
    _store(new_q_ptr, new_q_strides, batch, head, n, d, inside, q)
    k = _turn(_load(k_ptr, k_strides, batch, head, n, d, inside), rope, SIGN, BLOCK_N, BLOCK_D)
    _store(new_k_ptr, new_k_strides, batch, head, n, d, inside, k)
    if v_ptr is not None:
        v = _load(v_ptr, v_strides, batch, head, n, d, inside).to(tl.float32)
        v += _load(more_v_ptr, more_v_strides, batch, head, n, d, inside).to(tl.float32)
        _store(new_v_ptr, new_v_strides, batch, head, n, d, inside, v)
        gate = _load(gate_ptr, gate_strides, batch, head, n, d, inside)
        _store(new_gate_ptr, new_gate_strides, batch, head, n, d, inside, gate)


def _launch(record: Record, rope: Tensor, sign: int, old: list[Tensor | None], new: list[Tensor | None]) -> None:
    """``old`` are q, k, v, more of v and gate, ``new`` those without the fourth: each ``(B, H, N, D)``."""
    B, H, N, D = old[0].shape
    block_d = power_of_two(D)
    block_n = max(1, 4096 // block_d)
    arguments = dict(heads=H, length=N, SIGN=sign, D=D, BLOCK_N=block_n, BLOCK_D=block_d, rope_ptr=rope)
    arguments["rope_strides"] = (0, 0 if rope.shape[0] == 1 else rope.stride(0), rope.stride(1), 1)
    names = ("q", "k", "v", "more_v", "gate", "new_q", "new_k", "new_v", "new_gate")
    for name, x in zip(names, old + new, strict=True):
        arguments |= {f"{name}_ptr": x, f"{name}_strides": (0, 0, 0, 0) if x is None else x.stride()}
    record.launch(rotate_kernel, (B * H, cdiv(N, block_n), 1), arguments)


def record_rotation(record: Record, qkvg: Tensor, rope: Tensor) -> Tensor:
    """Turned queries and keys ``(B, N, 2, H, D)`` of ``(B, N, 4, H, D)``."""
    B, N, _, H, D = qkvg.shape
    turned = record.new_empty((B, N, 2, H, D), qkvg.dtype)
    old, new = (list(x.permute(2, 0, 3, 1, 4).unbind(0)[:2]) for x in (qkvg, turned))
    _launch(record, record.contiguous(rope), 1, [*old, None, None, None], [*new, None, None])
    return turned


def record_rotation_gradient(
    record: Record, dq: Tensor, dk: Tensor, dv: Tensor, d_values: Tensor, d_gate: Tensor, rope: Tensor
) -> Tensor:
    """The gradient ``(B, N, 4, H, D)`` from those of what ``rotate_packed`` gives."""
    B, H, N, D = dq.shape
    gradient = record.new_empty((B, N, 4, H, D), dq.dtype)
    d_values, d_gate = (split_heads(record.contiguous(x), gradient.shape[3]) for x in (d_values, d_gate))
    new = list(gradient.permute(2, 0, 3, 1, 4).unbind(0))
    _launch(record, record.contiguous(rope), -1, [dq, dk, dv, d_values, d_gate], new)
    return gradient
