"""Linear attention of sequences that are one tile, in Triton: one launch a direction, in bfloat16.

So few tokens' scores P = φ(q) φ(k)ᵀ are no larger than the state, and with them nothing is summed over tokens, and no
mean is to be taken out of the gradients. With i = 1 / (Σ P / M + ε) for each query and G = do vᵀ:

    o = s i P v
    dP = s i (G - i Σ P G / M),  dφ(q) = dP φ(k),  dφ(k) = dPᵀ φ(q),  dv = (s i P)ᵀ do

With a rotary encoding the first term of dP belongs to the scores of turned features, and the second to the others.

``signed_power`` has scores for each half of the values' columns, P₊ of equal signs and P₋ of opposite ones. With
φ(x) = sign(x) |x|ᵃ they are P₊ ± P₋ = |φ(q)| |φ(k)|ᵀ and φ(q) φ(k)ᵀ, two products instead of four; the kernels have
twice P₊ and P₋, and twice the ε.

A program for each sequence and head backward, and one for each place on the device forward, which loads the next head's
tiles while it computes. For names see triton_kernels.py.
"""

from __future__ import annotations

from flash_bla.ops.triton_kernels import _store_parameter_gradient
from flash_bla.ops.triton_support import NOT_SPECIALIZED, jit, tl
from flash_bla.ops.triton_tiles import (
    _features_backward,
    _load_factor,
    _load_parameter,
    _load_rope,
    _load_weight,
    _offsets,
    _start,
    _store_weight,
    _turn,
)


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


@jit
def _half_columns(half: tl.constexpr, C: tl.constexpr):
    """The values' columns that see the same scores, half of them if ``SIGNED``, and whether they exist."""
    if C.SIGNED:
        c = tl.arange(0, C.BLOCK_DV // 2 if C.BLOCK_DV > 16 else 16)
        return half * (C.DV // 2) + c, c < C.DV // 2
    else:
        c = tl.arange(0, C.BLOCK_DV)
        return c, c < C.DV


@jit
def _key_factor(a_ptr, wk_ptr, wk_strides, batch, head, heads, keys, C: tl.constexpr):
    """What the keys' features are to be multiplied with: their weight, and what the focusing map's features lack."""
    w = 1.0
    if C.KEY_WEIGHT:
        w = _load_weight(_start(wk_ptr, wk_strides, batch, head, 0), wk_strides, head, heads, keys, 0.0, C)
    factor = _load_factor(a_ptr, head, heads, C)
    return w, factor * factor  # that of the queries, too


@jit
def _least(wq_ptr, wq_strides, batch, head, heads, queries, eps, C: tl.constexpr):
    """What is added to the sums of scores: the queries' weights cancel but for ε."""
    if C.QUERY_WEIGHT:
        w = _load_weight(_start(wq_ptr, wq_strides, batch, head, 0), wq_strides, head, heads, queries, 1.0, C)
        return eps / w
    elif C.SIGNED:
        return 2.0 * eps
    else:
        return eps


@jit
def _scores(q, k, turned_q, turned_k, OPERAND: tl.constexpr, C: tl.constexpr):
    """The scores of turned features and the others; if ``SIGNED``, φ(q) φ(k)ᵀ and |φ(q)| |φ(k)|ᵀ."""
    scores = tl.dot(turned_q.to(OPERAND), tl.trans(turned_k.to(OPERAND)))
    if C.SIGNED:
        return scores, tl.dot(tl.abs(q).to(OPERAND), tl.trans(tl.abs(k).to(OPERAND)))
    elif C.ROPE:
        return scores, tl.dot(q.to(OPERAND), tl.trans(k.to(OPERAND)))
    else:
        return scores, scores


@jit
def _half_scores(scores, others, half: tl.constexpr, C: tl.constexpr):
    """The scores of the numerator and of the denominator."""
    if C.SIGNED:
        scores = others + scores if half == 0 else others - scores
        return scores, scores
    else:
        return scores, others


@jit
def _feature_gradient(d_scores, d_others, x, phi, turned, cos, sin, OPERAND: tl.constexpr, C: tl.constexpr):
    """Of φ(x), from the gradients by what ``_scores`` returns, and the features of the other side."""
    d_phi = tl.dot(d_scores, turned.to(OPERAND))
    if C.SIGNED:
        magnitudes = tl.dot(d_others, tl.abs(phi).to(OPERAND)).to(tl.int32, bitcast=True)
        d_phi += (magnitudes ^ (x.to(tl.int32, bitcast=True) & -(2**31))).to(tl.float32, bitcast=True)
    elif C.ROPE:
        d_phi = tl.dot(d_others, phi.to(OPERAND), _turn(d_phi, cos, -sin, C))
    return d_phi


@jit
def _again(
    x, phi, pointer, strides, batch, head, column, inside, a,
    PHI: tl.constexpr, PAD: tl.constexpr, OPERAND: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """x and φ(x), loaded and computed again where registers cannot hold them until now."""
    if C.PARAMETER:
        x = _to_product_layout(_load(pointer, strides, batch, head, column, inside, column < C.D, PAD, C), OPERAND)
        return x, PHI(x, a, C.EXPONENT)
    else:
        return x, phi


@jit(do_not_specialize=NOT_SPECIALIZED)
def single_forward_kernel(
    q_ptr, q_strides, k_ptr, k_strides, v_ptr, v_strides, o_ptr, o_strides, a_ptr, wq_ptr, wq_strides, wk_ptr,
    wk_strides, rope_ptr, rope_strides, query_length, key_length, heads, programs, scale, eps,
    PHI: tl.constexpr, PAD: tl.constexpr, OPERAND: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The forward pass of those of ``programs`` sequences and heads that are this one's turn."""
    HALVES: tl.constexpr = 2 if C.SIGNED else 1
    d, n = tl.arange(0, C.BLOCK_D), tl.arange(0, C.BLOCK_N)
    queries, keys = n < query_length, n < key_length
    one = 1.0 / tl.maximum(key_length, 1).to(tl.float32)
    if C.MEAN:
        scale = one
    for i in range(tl.program_id(0), programs, tl.num_programs(0)):
        batch, head = (i // heads).to(tl.int64), i % heads
        a = _load_parameter(a_ptr, head, heads, C)
        k = _load(k_ptr, k_strides, batch, head, d, keys, d < C.D, 0.0, C)
        k = tl.where(keys[:, None] & (d < C.D)[None, :], k.to(tl.float32), PAD)  # φ is zero where PAD stands
        q = _load(q_ptr, q_strides, batch, head, d, queries, d < C.D, 0.0, C)
        w, factor = _key_factor(a_ptr, wk_ptr, wk_strides, batch, head, heads, keys, C)
        k, q = PHI(k, a, C.EXPONENT) * w * factor, PHI(q.to(tl.float32), a, C.EXPONENT)
        turned_k, turned_q = k, q
        if C.ROPE:
            rope = _start(rope_ptr, rope_strides, 0, head, 0) + _offsets(d * 0, d, rope_strides, C)
            cos, sin = _load_rope(rope, queries[:, None] & (d < C.D)[None, :], None, OPERAND, C)
            turned_k, turned_q = _turn(k, cos, sin, C), _turn(q, cos, sin, C)
        scores, others = _scores(q, k, turned_q, turned_k, OPERAND, C)
        least = _least(wq_ptr, wq_strides, batch, head, heads, queries, eps, C)
        for half in tl.static_range(HALVES):
            c, exists = _half_columns(half, C)
            v = _load(v_ptr, v_strides, batch, head, c, keys, exists, 0.0, C).to(OPERAND)
            numerator, denominator = _half_scores(scores, others, half, C)
            inverse = scale / (tl.sum(denominator, 1)[:, None] * one + least)
            o = tl.dot(numerator.to(OPERAND), v) * inverse
            _store(o_ptr, o_strides, batch, head, c, queries, exists, o, C)


@jit(do_not_specialize=NOT_SPECIALIZED)
def single_backward_kernel(
    q_ptr, q_strides, k_ptr, k_strides, v_ptr, v_strides, do_ptr, do_strides, a_ptr, wq_ptr, wq_strides, wk_ptr,
    wk_strides, rope_ptr, rope_strides, dq_ptr, dq_strides, dk_ptr, dk_strides, dv_ptr, dv_strides, dwq_ptr,
    dwq_strides, dwk_ptr, dwk_strides, da_ptr, query_length, key_length, heads, scale, eps,
    PHI: tl.constexpr, PHI_DX: tl.constexpr, PHI_DA: tl.constexpr, PAD: tl.constexpr, OPERAND: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """The backward pass of a sequence and head: the gradients that have a pointer."""
    HALVES: tl.constexpr = 2 if C.SIGNED else 1
    batch, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    d, n = tl.arange(0, C.BLOCK_D), tl.arange(0, C.BLOCK_N)
    queries, keys = n < query_length, n < key_length
    k = _load(k_ptr, k_strides, batch, head, d, keys, d < C.D, PAD, C)
    q = _load(q_ptr, q_strides, batch, head, d, queries, d < C.D, PAD, C)
    a = _load_parameter(a_ptr, head, heads, C)
    w, factor = _key_factor(a_ptr, wk_ptr, wk_strides, batch, head, heads, keys, C)
    least = tl.where(queries[:, None], _least(wq_ptr, wq_strides, batch, head, heads, queries, eps, C), 1.0)
    one = 1.0 / tl.maximum(key_length, 1).to(tl.float32)
    if C.MEAN:
        scale = one
    k, q = _to_product_layout(k, OPERAND), _to_product_layout(q, OPERAND)
    phi_k, phi_q = PHI(k, a, C.EXPONENT), PHI(q, a, C.EXPONENT)
    weighted = phi_k * w * factor
    turned_k, turned_q, cos, sin = weighted, phi_q, 0.0, 0.0
    if C.ROPE:
        rope = _load(rope_ptr, rope_strides, 0, head, d, queries, d < C.D, 0.0, C)
        cos, sin = tl.split(tl.reshape(_to_product_layout(rope, OPERAND), C.BLOCK_N, C.BLOCK_D // 2, 2))
        turned_k, turned_q = _turn(weighted, cos, sin, C), _turn(phi_q, cos, sin, C)
    scores, others = _scores(phi_q, weighted, turned_q, turned_k, OPERAND, C)
    for half in tl.static_range(HALVES):
        c, exists = _half_columns(half, C)
        v = _load(v_ptr, v_strides, batch, head, c, keys, exists, 0.0, C).to(OPERAND)
        do = _load(do_ptr, do_strides, batch, head, c, queries, exists, 0.0, C).to(OPERAND)
        numerator, denominator = _half_scores(scores, others, half, C)
        d_scores = tl.dot(do, tl.trans(v))
        inverse = 1.0 / (tl.sum(denominator, 1)[:, None] * one + least)
        shift = inverse * tl.sum(numerator * d_scores, 1)[:, None]
        if C.QUERY_WEIGHT:
            # by the weight's logarithm, ε do · o / (φ̃(q) · z + ε)², where that is more than rounding
            share = least * inverse
            dw = tl.where(share > 2.0**-12, share * (scale * shift), 0.0)
            dwq = _start(dwq_ptr, dwq_strides, batch, head, 0)
            _store_weight(dwq, dwq_strides, head, heads, queries, dw, C)
        inverse *= scale
        shift *= inverse * one
        if dv_ptr is not None:
            dv = tl.dot(tl.trans((numerator * inverse).to(OPERAND)), do)
            _store(dv_ptr, dv_strides, batch, head, c, keys, exists, dv, C)
        d_scores *= inverse
        if C.ROPE:
            d_others = tl.broadcast_to(-shift, C.BLOCK_N, C.BLOCK_N)
        else:
            d_scores -= shift
            if half == 0:
                d_others = d_scores
            else:
                d_scores, d_others = d_others - d_scores, d_others + d_scores
    d_scores, d_others = d_scores.to(OPERAND), d_others.to(OPERAND)
    x, phi = _again(q, phi_q, q_ptr, q_strides, batch, head, d, queries, a, PHI, PAD, OPERAND, C)
    d_phi = _feature_gradient(d_scores, d_others, x, weighted, turned_k, cos, sin, OPERAND, C)
    dq, da = _features_backward(x, a, phi, d_phi, PHI_DX, PHI_DA, C)
    _store(dq_ptr, dq_strides, batch, head, d, queries, d < C.D, dq, C)
    if C.PARAMETER and not C.SIGNED:  # by channel Σ φ dφ, of queries as much as of keys
        da = phi * d_phi
    if dk_ptr is not None:
        d_scores, d_others = tl.trans(d_scores), tl.trans(d_others)
        x, phi = _again(k, phi_k, k_ptr, k_strides, batch, head, d, keys, a, PHI, PAD, OPERAND, C)
        d_phi = _feature_gradient(d_scores, d_others, x, phi_q, turned_q, cos, sin, OPERAND, C) * factor
        if C.KEY_WEIGHT:
            dwk = _start(dwk_ptr, dwk_strides, batch, head, 0)
            _store_weight(dwk, dwk_strides, head, heads, keys, tl.sum(d_phi * phi, 1)[:, None], C)
        dk, da_keys = _features_backward(x, a, phi, d_phi * w, PHI_DX, PHI_DA, C)
        _store(dk_ptr, dk_strides, batch, head, d, keys, d < C.D, dk, C)
        da += da_keys
    if C.PARAMETER:
        da = tl.sum(da, 0)
        if C.SIGNED:
            da *= 0.6931471805599453
        else:
            da *= tl.reshape(-2.0 * C.EXPONENT / a, C.BLOCK_D)
        _store_parameter_gradient(da_ptr, batch * heads + head, head, heads, da, C)
