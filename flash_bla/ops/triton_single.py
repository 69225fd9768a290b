"""Linear attention of sequences that are one tile, in Triton: one launch a direction, for plain maps in bfloat16.

So few tokens' scores P = φ(q) φ(k)ᵀ are no larger than the state, and with them nothing is summed over tokens, and no
mean is to be taken out of the gradients. With i = 1 / (Σ P / M + ε) for each query and G = do vᵀ:

    o = s i P v
    dP = s i (G - i Σ P G / M),  dφ(q) = dP φ(k),  dφ(k) = dPᵀ φ(q),  dv = (s i P)ᵀ do

A program for each sequence and head backward, and one for each place on the device forward, which loads the next head's
tiles while it computes. For names see triton_kernels.py.
"""

from __future__ import annotations

from flash_bla.ops.triton_support import NOT_SPECIALIZED, jit, tl
from flash_bla.ops.triton_tiles import _offsets, _start


@jit
def _to_product_layout(x, OPERAND: tl.constexpr):
    """x in float32, in the register layout of a product's result: as what is added to a product of zeros."""
    return tl.dot(tl.zeros((x.shape[0], 16), OPERAND), tl.zeros((16, x.shape[1]), OPERAND), x.to(tl.float32))


@jit
def _load(pointer, strides, batch, head, column, inside, exists, other, C: tl.constexpr):
    tile = _offsets(column * 0, column, strides, C)
    return tl.load(_start(pointer, strides, batch, head, 0) + tile, mask=inside[:, None] & exists[None, :], other=other)


@jit
def _store(pointer, strides, batch, head, column, inside, exists, x, C: tl.constexpr):
    tile = _start(pointer, strides, batch, head, 0) + _offsets(column * 0, column, strides, C)
    tl.store(tile, x.to(pointer.dtype.element_ty), mask=inside[:, None] & exists[None, :])


@jit(do_not_specialize=NOT_SPECIALIZED)
def single_forward_kernel(
    q_ptr, q_strides, k_ptr, k_strides, v_ptr, v_strides, o_ptr, o_strides, query_length, key_length, heads, programs,
    scale, eps, PHI: tl.constexpr, PAD: tl.constexpr, OPERAND: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The forward pass of those of ``programs`` sequences and heads that are this one's turn."""
    d, c, n = tl.arange(0, C.BLOCK_D), tl.arange(0, C.BLOCK_DV), tl.arange(0, C.BLOCK_N)
    queries, keys = n < query_length, n < key_length
    one = 1.0 / tl.maximum(key_length, 1).to(tl.float32)
    if C.MEAN:
        scale = one
    for i in range(tl.program_id(0), programs, tl.num_programs(0)):
        batch, head = (i // heads).to(tl.int64), i % heads
        k = _load(k_ptr, k_strides, batch, head, d, keys, d < C.D, 0.0, C)
        k = tl.where(keys[:, None] & (d < C.D)[None, :], k.to(tl.float32), PAD)  # φ is zero where PAD stands
        q = _load(q_ptr, q_strides, batch, head, d, queries, d < C.D, 0.0, C)
        v = _load(v_ptr, v_strides, batch, head, c, keys, c < C.DV, 0.0, C).to(OPERAND)
        phi_k = PHI(k, 1.0, 1).to(OPERAND)
        phi_q = PHI(q.to(tl.float32), 1.0, 1).to(OPERAND)
        scores = tl.dot(phi_q, tl.trans(phi_k))
        inverse = scale / (tl.sum(scores, 1) * one + eps)
        o = tl.dot(scores.to(OPERAND), v) * inverse[:, None]
        _store(o_ptr, o_strides, batch, head, c, queries, c < C.DV, o, C)


@jit(do_not_specialize=NOT_SPECIALIZED)
def single_backward_kernel(
    q_ptr, q_strides, k_ptr, k_strides, v_ptr, v_strides, do_ptr, do_strides,
    dq_ptr, dq_strides, dk_ptr, dk_strides, dv_ptr, dv_strides, query_length, key_length, heads, scale, eps,
    PHI: tl.constexpr, PHI_DX: tl.constexpr, PAD: tl.constexpr, OPERAND: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The backward pass of a sequence and head: the gradients that have a pointer."""
    batch, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    d, c, n = tl.arange(0, C.BLOCK_D), tl.arange(0, C.BLOCK_DV), tl.arange(0, C.BLOCK_N)
    queries, keys = n < query_length, n < key_length
    k = _load(k_ptr, k_strides, batch, head, d, keys, d < C.D, PAD, C)
    q = _load(q_ptr, q_strides, batch, head, d, queries, d < C.D, PAD, C)
    v = _load(v_ptr, v_strides, batch, head, c, keys, c < C.DV, 0.0, C).to(OPERAND)
    do = _load(do_ptr, do_strides, batch, head, c, queries, c < C.DV, 0.0, C).to(OPERAND)
    one = 1.0 / tl.maximum(key_length, 1).to(tl.float32)
    if C.MEAN:
        scale = one
    k, q = _to_product_layout(k, OPERAND), _to_product_layout(q, OPERAND)
    phi_k, phi_q = PHI(k, 1.0, 1), PHI(q, 1.0, 1)
    k_operand, q_operand = phi_k.to(OPERAND), phi_q.to(OPERAND)
    scores = tl.dot(q_operand, tl.trans(k_operand))
    d_scores = tl.dot(do, tl.trans(v))
    inverse = 1.0 / (tl.sum(scores, 1) * one + tl.where(queries, eps, 1.0))
    shift = inverse * one * tl.sum(scores * d_scores, 1)
    inverse *= scale
    d_scores = (d_scores * inverse[:, None] - (shift * inverse)[:, None]).to(OPERAND)
    if dv_ptr is not None:
        dv = tl.dot(tl.trans((scores * inverse[:, None]).to(OPERAND)), do)
        _store(dv_ptr, dv_strides, batch, head, c, keys, c < C.DV, dv, C)
    if dq_ptr is not None:
        dq = tl.dot(d_scores, k_operand) * PHI_DX(q, phi_q, 1.0, 1)
        _store(dq_ptr, dq_strides, batch, head, d, queries, d < C.D, dq, C)
    if dk_ptr is not None:
        dk = tl.dot(tl.trans(d_scores), q_operand) * PHI_DX(k, phi_k, 1.0, 1)
        _store(dk_ptr, dk_strides, batch, head, d, keys, d < C.D, dk, C)
