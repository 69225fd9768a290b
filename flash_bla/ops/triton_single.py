"""Linear attention of sequences that are one tile, in Triton: one launch a direction, in bfloat16.

So few tokens' scores P = φ(q) φ(k)ᵀ are no larger than the state, and with them nothing is summed over tokens, and no
mean is to be taken out of the gradients. With i = 1 / (Σ P / M + ε) for each query and G = do vᵀ:

    o = s i P v
    dP = s i (G - i Σ P G / M),  dφ(q) = dP φ(k),  dφ(k) = dPᵀ φ(q),  dv = (s i P)ᵀ do

With a rotary encoding the first term of dP belongs to the scores of turned features, and the second to the others.

``signed_power`` has scores for each half of the values' columns, of equal and of opposite signs. (Two products of
sign(x) |x|ᵃ and of |x|ᵃ would give their sum and difference; but gradients then cancel between numbers rounded.)

A program for each sequence and head backward, and one for each place on the device forward and where nothing but a
feature map is asked for, which loads the next head's tiles while it computes. For names see triton_kernels.py.
"""

from __future__ import annotations

from flash_bla.ops.triton_kernels import _store_parameter_gradient
from flash_bla.ops.triton_order import (
    load_rope,
    load_rows,
    order_columns,
    ordered_factor,
    ordered_parameter,
    row_order,
    rows_tile,
    store_rows,
)
from flash_bla.ops.triton_plain import _by_thread, _to_value_columns
from flash_bla.ops.triton_support import (
    NOT_SPECIALIZED,
    fast_inverse,
    fast_rounded_parts,
    jit,
    tl,
    wait_for_inputs,
)
from flash_bla.ops.triton_tiles import (
    _by_eighth,
    _identity,
    _load_weight,
    _offsets,
    _power_gradient,
    _start,
    _store_weight,
    _sum_eighths,
    _to_product_layout,
    _turn,
)


@jit
def _added_to_product(x, OPERAND: tl.constexpr):
    """x in float32, in the register layout of a product's result: as what is added to a product of zeros."""
    return tl.dot(tl.zeros((x.shape[0], 16), OPERAND), tl.zeros((16, x.shape[1]), OPERAND), x.to(tl.float32))


@jit
def _operands(phi, w, OPERAND: tl.constexpr, C: tl.constexpr):
    """φ(x) and, if ``SIGNED``, φ(-x) as operands, times the weight, if any; ``phi`` is their difference."""
    if C.SIGNED:
        if w is None:
            return fast_rounded_parts(phi, OPERAND, True)
        else:
            return (tl.maximum(phi, 0.0) * w).to(OPERAND), (tl.maximum(-phi, 0.0) * w).to(OPERAND)
    else:
        return (phi if w is None else phi * w).to(OPERAND), 0.0


@jit
def _of_sign(x, plus, minus):
    """``plus`` where x is positive, and -``minus`` elsewhere."""
    chosen = tl.where(x > 0.0, plus, minus).to(tl.int32, bitcast=True)
    return (chosen ^ (x.to(tl.int32, bitcast=True) & -(2**31))).to(tl.float32, bitcast=True)


@jit
def _features_backward(x, a, phi, d_phi, PHI_DX: tl.constexpr, PHI_DA: tl.constexpr, C: tl.constexpr):
    """Gradients by x and by the map's parameter, the latter of each element, from φ(x) and the gradient by it."""
    if C.SIGNED:
        dx = d_phi * PHI_DX(x, phi, a, C.EXPONENT)
        return dx, dx * PHI_DA(x, phi, a, C.EXPONENT)
    else:
        return d_phi * PHI_DX(x, phi, a, C.EXPONENT), 0.0


@jit
def _load(pointer, strides, batch, head, column, inside, exists, other, C: tl.constexpr):
    tile = _offsets(column * 0, column, strides, C)
    return tl.load(_start(pointer, strides, batch, head, 0) + tile, mask=inside[:, None] & exists[None, :], other=other)


@jit
def _load_rows(pointer, strides, batch, head, length, other, D: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr):
    """A tile of a sequence of this length, its columns in the order of products."""
    pointer, tile = rows_tile(pointer, strides, batch, head, 0, BLOCK, C)
    return load_rows(pointer + tile, row_order(C) < length, 0, 1, D, BLOCK, C, other)


@jit
def _store_rows(pointer, strides, batch, head, length, x, D: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr):
    pointer, tile = rows_tile(pointer, strides, batch, head, 0, BLOCK, C)
    store_rows(pointer + tile, x, row_order(C) < length, 0, 1, D, BLOCK, C)


@jit
def _plus_encoding(k, e_ptr, e_strides, head, length, C: tl.constexpr):
    """Keys in float32, with their encoding, if any."""
    if e_ptr is not None:
        return k.to(tl.float32) + _load_rows(e_ptr, e_strides, 0, head, length, 0.0, C.D, C.BLOCK_D, C).to(tl.float32)
    else:
        return k.to(tl.float32)


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
def _least(wq_ptr, wq_strides, batch, head, heads, queries, eps, C: tl.constexpr):
    """What is added to the sums of scores: the queries' weights cancel but for ε."""
    if C.QUERY_WEIGHT:
        w = _load_weight(_start(wq_ptr, wq_strides, batch, head, 0), wq_strides, head, heads, queries, 1.0, C)
        return eps / w
    else:
        return eps


@jit
def _turned(phi, operand, w, cos, sin, OPERAND: tl.constexpr, C: tl.constexpr):
    """The operand of the numerator, which ``operand`` is without a rotary encoding."""
    if C.ROPE:
        return _turn(phi if w is None else phi * w, cos, sin, C).to(OPERAND)
    else:
        return operand


@jit
def _scores(q, k, turned_q, turned_k, half: tl.constexpr, C: tl.constexpr):
    """Those of turned features, and the others; if ``SIGNED``, of equal signs in the first half, then of opposite."""
    if C.SIGNED:
        scores = tl.dot(q[0], tl.trans(k[half]))
        scores = tl.dot(q[1], tl.trans(k[1 - half]), scores)
        return scores, scores
    else:
        scores = tl.dot(q[0], tl.trans(k[0]))
        return tl.dot(turned_q, tl.trans(turned_k)) if C.ROPE else scores, scores


@jit
def _feature_gradients(d_scores, d_others, phi, turned, cos, sin, C: tl.constexpr):
    """By φ(x), and by φ(-x) if ``SIGNED``, from those by both scores, and the operands of the other side."""
    if C.SIGNED:
        plus = tl.dot(d_others, phi[1], tl.dot(d_scores, phi[0]))
        return plus, tl.dot(d_others, phi[0], tl.dot(d_scores, phi[1]))
    elif C.ROPE:
        return tl.dot(d_others, phi[0], _turn(tl.dot(d_scores, turned), cos, -sin, C)), 0.0
    else:
        return tl.dot(d_scores, phi[0]), 0.0


@jit
def _again(
    x, phi, pointer, strides, e_ptr, e_strides, batch, head, length, a,
    PHI: tl.constexpr, PAD: tl.constexpr, OPERAND: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """x and φ(x), loaded and computed again where registers cannot hold them until now."""
    if C.PARAMETER:
        x = _load_rows(pointer, strides, batch, head, length, PAD, C.D, C.BLOCK_D, C)
        x = _plus_encoding(x, e_ptr, e_strides, head, length, C)
        x = _added_to_product(x, OPERAND)
        return x, PHI(x, a, C.EXPONENT)
    else:
        return x, phi


@jit(do_not_specialize=NOT_SPECIALIZED)
def single_forward_kernel(
    q_ptr, q_strides, k_ptr, k_strides, e_ptr, e_strides, v_ptr, v_strides, o_ptr, o_strides, a_ptr, wq_ptr, wq_strides,
    wk_ptr, wk_strides, rope_ptr, rope_strides, query_length, key_length, heads, programs, scale, eps,
    PHI: tl.constexpr, PAD: tl.constexpr, OPERAND: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The forward pass of those of ``programs`` sequences and heads that are this one's turn."""
    wait_for_inputs()
    HALVES: tl.constexpr = 2 if C.SIGNED else 1
    d, n = tl.arange(0, C.BLOCK_D), tl.arange(0, C.BLOCK_N)
    queries, keys = n < query_length, n < key_length
    one = 1.0 / tl.maximum(key_length, 1).to(tl.float32)
    if C.MEAN:
        scale = one
    for i in range(tl.program_id(0), programs, tl.num_programs(0)):
        batch, head = (i // heads).to(tl.int64), i % heads
        a = ordered_parameter(a_ptr, head, heads, C)
        k = _load_rows(k_ptr, k_strides, batch, head, key_length, 0.0, C.D, C.BLOCK_D, C)
        k = _plus_encoding(k, e_ptr, e_strides, head, key_length, C)
        k = tl.where(keys[:, None] & order_columns(d < C.D, C)[None, :], k, PAD)  # φ is zero where PAD stands
        q = _load_rows(q_ptr, q_strides, batch, head, query_length, 0.0, C.D, C.BLOCK_D, C)
        factor = ordered_factor(a_ptr, head, heads, C)
        k, q = PHI(k, a, C.EXPONENT) * (factor * factor), PHI(q.to(tl.float32), a, C.EXPONENT)
        w = None
        if C.KEY_WEIGHT:
            w = _load_weight(_start(wk_ptr, wk_strides, batch, head, 0), wk_strides, head, heads, keys, 0.0, C)
        phi_k, phi_q = _operands(k, w, OPERAND, C), _operands(q, None, OPERAND, C)
        cos, sin = 0.0, 0.0
        if C.ROPE:
            rope, rope_tile = rows_tile(rope_ptr, rope_strides, 0, head, 0, C.BLOCK_D, C)
            cos, sin = load_rope(rope + rope_tile, row_order(C) < query_length, 0, 1, None, OPERAND, C)
        turned_k = _turned(k, phi_k[0], w, cos, sin, OPERAND, C)
        turned_q = _turned(q, phi_q[0], None, cos, sin, OPERAND, C)
        least = _least(wq_ptr, wq_strides, batch, head, heads, queries, eps, C)
        for half in tl.static_range(HALVES):
            c, exists = _half_columns(half, C)
            v = _load(v_ptr, v_strides, batch, head, c, keys, exists, 0.0, C).to(OPERAND)
            scores, others = _scores(phi_q, phi_k, turned_q, turned_k, half, C)
            inverse = scale / (tl.sum(others, 1)[:, None] * one + least)
            o = tl.dot(scores.to(OPERAND), v) * inverse
            _store(o_ptr, o_strides, batch, head, c, queries, exists, o, C)


@jit(do_not_specialize=NOT_SPECIALIZED)
def single_backward_kernel(
    q_ptr, q_strides, k_ptr, k_strides, e_ptr, e_strides, v_ptr, v_strides, do_ptr, do_strides, a_ptr, wq_ptr,
    wq_strides, wk_ptr, wk_strides, rope_ptr, rope_strides, dq_ptr, dq_strides, dk_ptr, dk_strides, dv_ptr, dv_strides,
    dwq_ptr, dwq_strides, dwk_ptr, dwk_strides, da_ptr, query_length, key_length, heads, scale, eps,
    PHI: tl.constexpr, PHI_DX: tl.constexpr, PHI_DA: tl.constexpr, PAD: tl.constexpr, OPERAND: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """The backward pass of a sequence and head: the gradients that have a pointer."""
    wait_for_inputs()
    HALVES: tl.constexpr = 2 if C.SIGNED else 1
    batch, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    n = tl.arange(0, C.BLOCK_N)
    queries, keys = n < query_length, n < key_length
    k = _load_rows(k_ptr, k_strides, batch, head, key_length, PAD, C.D, C.BLOCK_D, C)
    q = _load_rows(q_ptr, q_strides, batch, head, query_length, PAD, C.D, C.BLOCK_D, C)
    # all loads before anything waits for one of them
    DV: tl.constexpr = C.DV // HALVES
    WIDTH: tl.constexpr = C.BLOCK_DV // HALVES if C.BLOCK_DV > 16 else 16
    values, gradients = (), ()
    for half in tl.static_range(HALVES):
        v, do = v_ptr + half * DV * v_strides[3], do_ptr + half * DV * do_strides[3]
        values = values + (_load_rows(v, v_strides, batch, head, key_length, 0.0, DV, WIDTH, C),)
        gradients = gradients + (_load_rows(do, do_strides, batch, head, query_length, 0.0, DV, WIDTH, C),)
    a = ordered_parameter(a_ptr, head, heads, C)
    w = None
    if C.KEY_WEIGHT:
        w = _load_weight(_start(wk_ptr, wk_strides, batch, head, 0), wk_strides, head, heads, keys, 0.0, C)
    factor = ordered_factor(a_ptr, head, heads, C)
    factor *= factor  # that of the queries, too
    least = tl.where(queries[:, None], _least(wq_ptr, wq_strides, batch, head, heads, queries, eps, C), 1.0)
    one = 1.0 / tl.maximum(key_length, 1).to(tl.float32)
    if C.MEAN:
        scale = one
    k = _plus_encoding(k, e_ptr, e_strides, head, key_length, C)
    k, q = _added_to_product(k, OPERAND), _added_to_product(q, OPERAND)
    phi_k, phi_q = PHI(k, a, C.EXPONENT), PHI(q, a, C.EXPONENT)
    q_operands = _operands(phi_q, None, OPERAND, C)
    k_operands = _operands(phi_k * factor, w, OPERAND, C)
    cos, sin = 0.0, 0.0
    if C.ROPE:
        rope = _load_rows(rope_ptr, rope_strides, 0, head, query_length, 0.0, C.D, C.BLOCK_D, C)
        cos, sin = tl.split(tl.reshape(_added_to_product(rope, OPERAND), C.BLOCK_N, C.BLOCK_D // 2, 2))
    turned_q = _turned(phi_q, q_operands[0], None, cos, sin, OPERAND, C)
    turned_k = _turned(phi_k * factor, k_operands[0], w, cos, sin, OPERAND, C)
    for half in tl.static_range(HALVES):
        v, do = values[half].to(OPERAND), gradients[half].to(OPERAND)
        scores, others = _scores(q_operands, k_operands, turned_q, turned_k, half, C)
        d_scores = tl.dot(do, tl.trans(v))
        inverse = fast_inverse(tl.sum(others, 1)[:, None] * one + least)
        shift = inverse * tl.sum(scores * d_scores, 1)[:, None]
        if C.QUERY_WEIGHT:
            # by the weight's logarithm, ε do · o / (φ̃(q) · z + ε)², where that is more than rounding
            share = least * inverse
            dw = tl.where(share > 2.0**-12, share * (scale * shift), 0.0)
            dwq = _start(dwq_ptr, dwq_strides, batch, head, 0)
            _store_weight(dwq, dwq_strides, head, heads, queries, dw, C)
        inverse *= scale
        shift *= inverse * one
        if dv_ptr is not None:
            dv = tl.dot(tl.trans((scores * inverse).to(OPERAND)), do)
            _store_rows(dv_ptr + half * DV * dv_strides[3], dv_strides, batch, head, key_length, dv, DV, WIDTH, C)
        d_scores *= inverse
        if C.ROPE:
            d_others = tl.broadcast_to(-shift, C.BLOCK_N, C.BLOCK_N)
        else:
            d_others = d_scores - shift
        if half == 0:
            d_first = d_scores if C.ROPE else d_others
    d_scores, d_others = d_first.to(OPERAND), d_others.to(OPERAND)
    d_phi, d_minus = _feature_gradients(d_scores, d_others, k_operands, turned_k, cos, sin, C)
    x, phi = _again(q, phi_q, q_ptr, q_strides, None, e_strides, batch, head, query_length, a, PHI, PAD, OPERAND, C)
    if C.SIGNED:
        d_phi = _of_sign(x, d_phi, d_minus)
    dq, da = _features_backward(x, a, phi, d_phi, PHI_DX, PHI_DA, C)
    _store_rows(dq_ptr, dq_strides, batch, head, query_length, dq, C.D, C.BLOCK_D, C)
    if C.PARAMETER:
        # by the focusing map's scale, by channel Σ φ dφ, of queries as much as of keys
        da = _by_eighth(da if C.SIGNED else phi * d_phi, C)
    if dk_ptr is not None:
        d_scores, d_others = tl.trans(d_scores), tl.trans(d_others)
        d_phi, d_minus = _feature_gradients(d_scores, d_others, q_operands, turned_q, cos, sin, C)
        x, phi = _again(k, phi_k, k_ptr, k_strides, e_ptr, e_strides, batch, head, key_length, a, PHI, PAD, OPERAND, C)
        d_phi = _of_sign(x, d_phi, d_minus) if C.SIGNED else d_phi * factor
        if C.KEY_WEIGHT:
            dwk = _start(dwk_ptr, dwk_strides, batch, head, 0)
            _store_weight(dwk, dwk_strides, head, heads, keys, tl.sum(d_phi * phi, 1)[:, None], C)
            d_phi *= w
        dk, da_keys = _features_backward(x, a, phi, d_phi, PHI_DX, PHI_DA, C)
        _store_rows(dk_ptr, dk_strides, batch, head, key_length, dk, C.D, C.BLOCK_D, C)
        if C.SIGNED:
            da += _by_eighth(da_keys, C)
    if C.PARAMETER:
        da = _sum_eighths(da)
        if C.SIGNED:
            da = _power_gradient(da, a, C)
        else:
            da *= tl.reshape(-2.0 * C.EXPONENT / a, C.BLOCK_D)
        _store_parameter_gradient(da_ptr, batch * heads + head, head, heads, order_columns(da, C), C)


# --- where nothing but a feature map is asked for: see triton_plain.py ------------------------------------------------
# One program for each place on the device also backward. Denominators are sums of scores as they are rounded.


@jit
def _next_head(batch, head, heads, more):
    """The sequence and head of this program's next turn; ``more`` is how many programs and heads there are, divided."""
    batch, head = batch + more, head + (tl.num_programs(0) - more * heads)
    return tl.where(head < heads, batch, batch + 1), tl.where(head < heads, head, head - heads)


@jit(do_not_specialize=NOT_SPECIALIZED)
def plain_single_forward_kernel(
    q_ptr, q_strides, k_ptr, k_strides, v_ptr, v_strides, o_ptr, o_strides, query_length, key_length, heads, programs,
    scale, eps, PHI: tl.constexpr, PHI_ROUNDED: tl.constexpr, OPERAND: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The forward pass of those of ``programs`` sequences and heads that are this one's turn."""
    wait_for_inputs()
    d, c, n = tl.arange(0, C.BLOCK_D), tl.arange(0, C.BLOCK_DV), tl.arange(0, C.BLOCK_N)
    queries, keys = n < query_length, n < key_length
    one = 1.0 / tl.maximum(key_length, 1).to(tl.float32)
    if C.MEAN:
        scale = one
    # keys that are none have features of their own, but no values, and count as nothing in the denominators
    quarters = tl.where(keys[:, None], tl.full((C.BLOCK_N, 16), 0.25, OPERAND), 0.0)
    batch, head, more = tl.program_id(0) // heads, tl.program_id(0) % heads, tl.num_programs(0) // heads
    for _ in range(tl.program_id(0), programs, tl.num_programs(0)):
        k = _load(k_ptr, k_strides, batch.to(tl.int64), head, d, keys, d < C.D, 0.0, C)
        q = _load(q_ptr, q_strides, batch.to(tl.int64), head, d, queries, d < C.D, 0.0, C)
        v = _load(v_ptr, v_strides, batch.to(tl.int64), head, c, keys, c < C.DV, 0.0, C).to(OPERAND)
        k, q = PHI_ROUNDED(k, PHI, C.EXPONENT, OPERAND), PHI_ROUNDED(q, PHI, C.EXPONENT, OPERAND)
        if C.D < C.BLOCK_D:
            k = tl.where((d < C.D)[None, :], k, 0.0)
        scores = tl.dot(q, tl.trans(k)).to(OPERAND)
        o = tl.dot(scores, v)
        inverse = scale * fast_inverse(_by_thread(tl.dot(scores, quarters), C) * one + eps)
        o *= _to_value_columns(inverse, C)
        _store(o_ptr, o_strides, batch.to(tl.int64), head, c, queries, c < C.DV, o, C)
        batch, head = _next_head(batch, head, heads, more)


@jit(do_not_specialize=NOT_SPECIALIZED)
def plain_single_backward_kernel(
    q_ptr, q_strides, k_ptr, k_strides, v_ptr, v_strides, do_ptr, do_strides, dq_ptr, dq_strides, dk_ptr, dk_strides,
    dv_ptr, dv_strides, query_length, key_length, heads, programs, scale, eps,
    PHI: tl.constexpr, PHI_DX: tl.constexpr, OPERAND: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The backward pass of those of ``programs`` sequences and heads that are this one's turn."""
    wait_for_inputs()
    d, c, n = tl.arange(0, C.BLOCK_D), tl.arange(0, C.BLOCK_DV), tl.arange(0, C.BLOCK_N)
    queries, keys = n < query_length, n < key_length
    one = 1.0 / tl.maximum(key_length, 1).to(tl.float32)
    if C.MEAN:
        scale = one
    least = tl.where(queries[:, None], eps, 1.0)
    identity = _identity(C.BLOCK_D, OPERAND, OPERAND)
    batch, head, more = tl.program_id(0) // heads, tl.program_id(0) % heads, tl.num_programs(0) // heads
    for _ in range(tl.program_id(0), programs, tl.num_programs(0)):
        k = _load(k_ptr, k_strides, batch.to(tl.int64), head, d, keys, d < C.D, 0.0, C)
        q = _load(q_ptr, q_strides, batch.to(tl.int64), head, d, queries, d < C.D, 0.0, C)
        v = _load(v_ptr, v_strides, batch.to(tl.int64), head, c, keys, c < C.DV, 0.0, C).to(OPERAND)
        do = _load(do_ptr, do_strides, batch.to(tl.int64), head, c, queries, c < C.DV, 0.0, C).to(OPERAND)
        k, q = _to_product_layout(k, identity, OPERAND), _to_product_layout(q, identity, OPERAND)
        phi_k = tl.where(keys[:, None] & (d < C.D)[None, :], PHI(k, 1.0, C.EXPONENT), 0.0)
        phi_q = PHI(q, 1.0, C.EXPONENT)
        k_operand, q_operand = phi_k.to(OPERAND), phi_q.to(OPERAND)
        scores = tl.dot(q_operand, tl.trans(k_operand))
        d_scores = tl.dot(do, tl.trans(v))
        inverse = fast_inverse(tl.sum(scores, 1)[:, None] * one + least)
        shift = inverse * tl.sum(scores * d_scores, 1)[:, None]
        inverse *= scale
        shift *= inverse * one
        if dv_ptr is not None:
            dv = tl.dot(tl.trans((scores * inverse).to(OPERAND)), do)
            _store(dv_ptr, dv_strides, batch.to(tl.int64), head, c, keys, c < C.DV, dv, C)
        d_scores = (d_scores * inverse - shift).to(OPERAND)
        dq = tl.dot(d_scores, k_operand) * PHI_DX(q, phi_q, 1.0, C.EXPONENT)
        _store(dq_ptr, dq_strides, batch.to(tl.int64), head, d, queries, d < C.D, dq, C)
        if dk_ptr is not None:
            dk = tl.dot(tl.trans(d_scores), q_operand) * PHI_DX(k, phi_k, 1.0, C.EXPONENT)
            _store(dk_ptr, dk_strides, batch.to(tl.int64), head, d, keys, d < C.D, dk, C)
        batch, head = _next_head(batch, head, heads, more)
