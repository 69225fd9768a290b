"""Linear attention in Triton: the four loops over rows that its kernels consist of.

For equations and names see triton_kernels.py.
"""

from __future__ import annotations

from flash_bla.ops.triton_order import (
    as_product,
    load_rope,
    load_rows,
    order,
    order_columns,
    ordered_parameter,
    row_order,
    rows_tile,
    store_rows,
)
from flash_bla.ops.triton_plain import _by_thread, _to_value_columns, vector_by_thread
from flash_bla.ops.triton_support import fast_inverse, fast_to_float, jit, tl
from flash_bla.ops.triton_tiles import (
    _add_rows,
    _both_by_head,
    _by_eighth,
    _by_head,
    _columns,
    _cosines,
    _identity,
    _load_factor,
    _load_parameter,
    _load_weight,
    _mask_heads,
    _next,
    _norm_ratio,
    _norm_ratio_gradient,
    _start,
    _store_weight,
    _sum_eighths,
    _tile,
    _times_factor,
    _to_columns,
    _turn,
    _vector_operand,
    _vector_product,
    _weight_operand,
    _zeros,
    _zeros3,
)


@jit
def sum_keys(
    k_ptr, k_strides, e_ptr, e_strides, kd_ptr, kd_strides, v_ptr, v_strides, a_ptr, wk_ptr, wk_strides, rope_ptr,
    rope_strides, mean, batch, head, heads, first, begin, end, count, scale,
    PHI: tl.constexpr, PAD: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """S = s Σ φ(k)ᵀ v and z = Σ φ̃(k) / M over the rows from ``begin`` to ``end``; with ``RATIOS`` writes the weights.

    With ``SOFTMAX`` a key's weight is M softmax(mean · φ(k)), of which the rows' share of the sums is known: S, z, and
    the logarithm of the share, to base 2. ``mean`` is (1, BLOCK_D), the weights' logarithm to base 2.
    """
    h, d, exists = _columns(head, heads, C.D, C.BLOCK_D, C)
    hv, c, exists_v = _columns(head, heads, C.DV, C.BLOCK_DV, C)
    k_ptr, k_tile = _tile(k_ptr, k_strides, batch, head, first + begin, h, d, C)
    v_ptr, v_tile = _tile(v_ptr, v_strides, batch, head, first + begin, hv, c, C)
    if e_ptr is not None:
        e_ptr, e_tile = _tile(e_ptr, e_strides, 0, head, begin, h, d, C)
    if C.DECOUPLED:
        kd_ptr, kd_tile = _tile(kd_ptr, kd_strides, batch, head, first + begin, h, d, C)
    if C.KEY_WEIGHT:
        wk_ptr = _start(wk_ptr, wk_strides, batch, head, first + begin)
    if C.ROPE:
        rope_ptr, rope_tile = _tile(rope_ptr, rope_strides, batch, head, begin, h, d, C)
    a = _load_parameter(a_ptr, head, heads, C)
    plus = _zeros(C.BLOCK_DV, C.BLOCK_D)
    z_plus = _zeros(64 if C.FEW else 16, C.BLOCK_D)
    maximum = _zeros(1, C.GROUP) - 1e30
    total = _zeros(C.BLOCK_N, C.GROUP)

    for start in range(begin, end, C.BLOCK_N):
        inside = tl.arange(0, C.BLOCK_N) < end - start
        mask, v_mask = inside[:, None] & exists[None, :], inside[:, None] & exists_v[None, :]
        # φ is zero where PAD stands; so is a weight of the softmax
        k = fast_to_float(tl.load(k_ptr + k_tile, mask=mask, other=0.0 if C.SOFTMAX else PAD))
        if e_ptr is not None:
            k += fast_to_float(tl.load(e_ptr + e_tile, mask=mask, other=0.0))
            e_ptr = _next(e_ptr, e_strides, C)
        v = tl.load(v_ptr + v_tile, mask=v_mask, other=0.0).to(OPERAND)
        inside = start + tl.arange(0, C.BLOCK_N) < end  # said otherwise than for the loads: see ``write_plain_output``
        phi = PHI(k, a, C.EXPONENT)
        if C.RATIOS:
            ratio = _norm_ratio(k, a, C)[0]
            _store_weight(wk_ptr, wk_strides, head, heads, inside, ratio, C)
            phi *= tl.where(inside[:, None], ratio, 0.0)
        elif C.KEY_WEIGHT:
            phi *= _to_columns(_load_weight(wk_ptr, wk_strides, head, heads, inside, 0.0, C), C)
        if C.SOFTMAX:  # sums so far are of exponentials of less a maximum that may have grown
            scores = tl.where(inside[:, None], _by_head(phi * mean, C), float("-inf"))
            larger = tl.maximum(maximum, tl.max(scores, 0)[None, :])
            fade = tl.exp2(maximum - larger)
            w = tl.exp2(scores - larger)
            maximum, total = larger, total * fade + w
            fade = _to_columns(fade, C)
            plus *= fade
            z_plus *= fade
            phi *= _to_columns(w, C)
        if C.DECOUPLED:
            kd = tl.load(kd_ptr + kd_tile, mask=mask, other=0.0).to(tl.float32)
            z_plus = _add_rows(z_plus, kd, OPERAND, PRECISION, C)
        elif C.NORMALIZE:
            z_plus = _add_rows(z_plus, phi, OPERAND, PRECISION, C)
        if C.ROPE:
            cos, sin = _cosines(tl.load(rope_ptr + rope_tile, mask=mask, other=0.0), C)
            rope_ptr = _next(rope_ptr, rope_strides, C)
            phi = _turn(phi, cos, sin, C)
        plus = tl.dot(tl.trans(v), phi.to(OPERAND), plus, input_precision=PRECISION)
        k_ptr, v_ptr = _next(k_ptr, k_strides, C), _next(v_ptr, v_strides, C)
        if C.DECOUPLED:
            kd_ptr = _next(kd_ptr, kd_strides, C)
        if C.KEY_WEIGHT:
            wk_ptr = _next(wk_ptr, wk_strides, C)

    z_plus = tl.sum(z_plus, 0)
    if C.FEW:  # all rows are the same
        z_plus /= 64
    one = 1.0 / tl.maximum(count, 1).to(tl.float32)
    if C.MEAN:
        scale = one
    if C.SOFTMAX:
        total = tl.sum(total, 0)[None, :]
        maximum += tl.log2(total)
        total = _to_columns(tl.where(total > 0.0, 1.0 / total, 0.0), C)
        plus *= total
        z_plus *= tl.sum(total, 0)
        scale, one = scale / one, 1.0
    plus, z_plus = _times_factor(_mask_heads(plus * scale, C), z_plus * one, _load_factor(a_ptr, head, heads, C), C)
    return plus, z_plus, maximum


@jit
def write_output(
    q_ptr, q_strides, qd_ptr, qd_strides, o_ptr, o_strides, a_ptr, wq_ptr, wq_strides, rope_ptr, rope_strides,
    plus, z_plus, batch, head, heads, first, begin, end, eps,
    PHI: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """o = φ(q) S / (φ̃(q) · z + ε); with ``RATIOS`` writes the weights."""
    q_ptr, q_tile = rows_tile(q_ptr, q_strides, batch, head, first + begin, C.BLOCK_D, C)
    o_ptr, o_tile = rows_tile(o_ptr, o_strides, batch, head, first + begin, C.BLOCK_DV, C)
    if C.DECOUPLED:
        qd_ptr, qd_tile = rows_tile(qd_ptr, qd_strides, batch, head, first + begin, C.BLOCK_D, C)
    if C.QUERY_WEIGHT:
        wq_ptr = _start(wq_ptr, wq_strides, batch, head, first + begin)
        if not C.RATIOS:
            w = _load_weight(wq_ptr, wq_strides, head, heads, begin + tl.arange(0, C.BLOCK_N) < end, 1.0, C)
    if C.ROPE:
        rope_ptr, rope_tile = rows_tile(rope_ptr, rope_strides, batch, head, begin, C.BLOCK_D, C)
        rope_identity = _identity(C.BLOCK_D, OPERAND, tl.float16)
    a = ordered_parameter(a_ptr, head, heads, C)
    plus, z_plus = _times_factor(plus, z_plus, _load_factor(a_ptr, head, heads, C), C)
    plus = tl.trans(order(plus, C).to(OPERAND))
    if C.NORMALIZE:
        z = vector_by_thread(order_columns(z_plus, C), OPERAND, C)
    rows = row_order(C)
    identity = _identity(C.BLOCK_D, OPERAND, OPERAND)

    for start in range(begin, end, C.BLOCK_N):
        q = load_rows(q_ptr + q_tile, rows < end - start, head, heads, C.D, C.BLOCK_D, C)
        inside = start + tl.arange(0, C.BLOCK_N) < end
        if C.ROPE or C.PARAMETER:  # features are used twice
            q = as_product(q, identity, OPERAND, C, ANCHORED=True)
        phi = PHI(q.to(tl.float32), a, C.EXPONENT)
        least = eps
        if C.RATIOS:
            w, _, inverse_norm, _ = _norm_ratio(q, a, C)
            _store_weight(wq_ptr, wq_strides, head, heads, inside, w, C)
            _store_weight(wq_ptr + wq_strides[0] // 2, wq_strides, head, heads, inside, inverse_norm, C)
        if C.QUERY_WEIGHT:
            if C.NORMALIZE:
                least = eps / w
            else:
                phi *= _to_columns(w, C)
            # the next tile's: by itself, the compiler loads ahead only what products take
            wq_ptr = _next(wq_ptr, wq_strides, C)
            if not C.RATIOS:
                following = start + C.BLOCK_N + tl.arange(0, C.BLOCK_N) < end
                w = _load_weight(wq_ptr, wq_strides, head, heads, following, 1.0, C)
        turned = phi
        if C.ROPE:
            cos, sin = load_rope(rope_ptr + rope_tile, rows < end - start, head, heads, rope_identity, OPERAND, C)
            rope_ptr = _next(rope_ptr, rope_strides, C)
            turned = _turn(phi, cos, sin, C)
        o = tl.dot(turned.to(OPERAND), plus, input_precision=PRECISION)
        if C.NORMALIZE:
            denominator = phi.to(OPERAND)
            if C.DECOUPLED:
                denominator = load_rows(qd_ptr + qd_tile, rows < end - start, head, heads, C.D, C.BLOCK_D, C)
                denominator = denominator.to(OPERAND)
            denominator = _by_thread(tl.dot(denominator, z, input_precision=PRECISION), C)
            if C.QUERY_WEIGHT:
                least = least[:, :, None]
            o *= _to_value_columns(fast_inverse(denominator + least), C)
        store_rows(o_ptr + o_tile, o, start + rows < end, head, heads, C.DV, C.BLOCK_DV, C)
        q_ptr, o_ptr = _next(q_ptr, q_strides, C), _next(o_ptr, o_strides, C)
        if C.DECOUPLED:
            qd_ptr = _next(qd_ptr, qd_strides, C)


@jit
def differentiate_queries(
    q_ptr, q_strides, qd_ptr, qd_strides, do_ptr, do_strides, a_ptr, wq_ptr, wq_strides,
    rope_ptr, rope_strides, dq_ptr, dq_strides, dqd_ptr, dqd_strides, dwq_ptr, dwq_strides,
    plus, z_plus, mean, d_mean, batch, head, heads, first, begin, end, eps,
    PHI: tl.constexpr, PHI_DX: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr, C: tl.constexpr, SUMS: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """Writes the queries' gradients, and returns dS and dz.

    ``SUMS`` or ``GRADIENT`` alone does without what only the other needs. ``d_mean`` is added to φ(q)'s gradients.
    """
    _, _, exists = _columns(head, heads, C.D, C.BLOCK_D, C)
    hv, c, exists_v = _columns(head, heads, C.DV, C.BLOCK_DV, C)
    q_ptr, q_tile = rows_tile(q_ptr, q_strides, batch, head, first + begin, C.BLOCK_D, C)
    do_ptr, do_tile = _tile(do_ptr, do_strides, batch, head, first + begin, hv, c, C)
    dq_ptr, dq_tile = rows_tile(dq_ptr, dq_strides, batch, head, first + begin, C.BLOCK_D, C)
    if C.DECOUPLED:
        qd_ptr, qd_tile = rows_tile(qd_ptr, qd_strides, batch, head, first + begin, C.BLOCK_D, C)
        dqd_ptr, dqd_tile = rows_tile(dqd_ptr, dqd_strides, batch, head, first + begin, C.BLOCK_D, C)
    if C.QUERY_WEIGHT:
        wq_ptr = _start(wq_ptr, wq_strides, batch, head, first + begin)
        dwq_ptr = _start(dwq_ptr, dwq_strides, batch, head, first + begin)
    if C.ROPE:
        rope_ptr, rope_tile = rows_tile(rope_ptr, rope_strides, batch, head, begin, C.BLOCK_D, C)
        rope_identity = _identity(C.BLOCK_D, OPERAND, tl.float16)
    a = ordered_parameter(a_ptr, head, heads, C)
    factor = _load_factor(a_ptr, head, heads, C)
    identity = _identity(C.BLOCK_D, OPERAND, OPERAND)
    plus, z_plus = _times_factor(plus, z_plus, factor, C)
    plus, z_plus = order_columns(plus, C).to(OPERAND), order_columns(z_plus, C)
    rows = row_order(C)
    if C.CENTER:
        mean_operand = _vector_operand(mean, C.BLOCK_DV, OPERAND, C)
    # What z adds as a product saves registers, where they are short and shared memory can hold z.
    BY_PRODUCT: tl.constexpr = C.QUERY_WEIGHT and C.NORMALIZE and not C.DECOUPLED and C.BLOCK_D <= 128
    if BY_PRODUCT:
        z = _vector_operand(z_plus, C.BLOCK_D, OPERAND, C)
    z_plus = z_plus[None, :]
    # A weight counts by its logarithm's gradient, ε do · o / (φ̃(q) · z + ε)², where that is more than rounding.
    LEAST: tl.constexpr = 0.0 if q_ptr.dtype.element_ty == tl.float32 else 2.0**-12
    if C.SOFTMAX and GRADIENT:
        d_mean = order_columns(d_mean, C)
    d_plus = _zeros(C.BLOCK_DV, C.BLOCK_D)
    dz_plus = _zeros3(C.BLOCK_N // 16, 8, C.BLOCK_D)

    # where no product takes the queries, the compiler loads them ahead only if it is told a number of stages
    STAGES: tl.constexpr = None if SUMS else C.STAGES
    for start in tl.range(begin, end, C.BLOCK_N, num_stages=STAGES):
        inside = tl.arange(0, C.BLOCK_N) < end - start
        q = load_rows(q_ptr + q_tile, rows < end - start, head, heads, C.D, C.BLOCK_D, C)
        do = tl.load(do_ptr + do_tile, mask=inside[:, None] & exists_v[None, :], other=0.0).to(OPERAND)
        q = as_product(q, identity, OPERAND, C)
        inside = start + tl.arange(0, C.BLOCK_N) < end
        phi = PHI(q, a, C.EXPONENT)
        unweighted = phi
        least = eps
        if C.QUERY_WEIGHT:
            w = _load_weight(wq_ptr, wq_strides, head, heads, inside, 1.0, C)
            if C.NORMALIZE:
                least = eps / w
            else:
                phi *= _to_columns(w, C)
        turned = phi
        d_phi = tl.dot(do, plus, input_precision=PRECISION)
        if C.ROPE:
            cos, sin = load_rope(rope_ptr + rope_tile, rows < end - start, head, heads, rope_identity, OPERAND, C)
            rope_ptr = _next(rope_ptr, rope_strides, C)
            if SUMS:
                turned = _turn(phi, cos, sin, C)
            if GRADIENT:
                d_phi = _turn(d_phi, cos, -sin, C)

        if C.NORMALIZE:
            denominator = phi
            if C.DECOUPLED:
                denominator = load_rows(qd_ptr + qd_tile, rows < end - start, head, heads, C.D, C.BLOCK_D, C)
                denominator = denominator.to(tl.float32)
            if BY_PRODUCT:
                inverse = _vector_product(denominator.to(OPERAND), z, PRECISION, C)
                weight = _by_head(phi * d_phi, C)
            else:
                inverse, weight = _both_by_head(denominator * z_plus, (phi if GRADIENT else turned) * d_phi, C)
            inverse = fast_inverse(inverse + tl.where(inside[:, None], least, 1.0))
            shift = inverse * 0.0
            if C.CENTER:
                shift = _vector_product(do, mean_operand, PRECISION, C)
                weight -= least * shift
            weight *= -inverse  # in two steps: the square is infinite where a query's features are tiny
            weight *= inverse
            if C.QUERY_WEIGHT:
                share = least * inverse
                dw = tl.where(share > LEAST, share * shift - least * weight, 0.0)
            if BY_PRODUCT:
                operand = _weight_operand(weight / inverse, OPERAND, C)
                d_phi = tl.dot(operand, tl.trans(z), d_phi, input_precision=PRECISION)
            weight = _to_columns(weight, C)
            inverse = _to_columns(inverse, C)
            if SUMS:
                d_plus = tl.dot(tl.trans(do), (turned * inverse).to(OPERAND), d_plus, input_precision=PRECISION)
                dz_plus += _by_eighth(weight * denominator, C)
            d_phi *= inverse
        elif SUMS:
            d_plus = tl.dot(tl.trans(do), turned.to(OPERAND), d_plus, input_precision=PRECISION)

        if GRADIENT:
            if C.DECOUPLED:
                dqd = weight * z_plus
                store_rows(dqd_ptr + dqd_tile, dqd, start + rows < end, head, heads, C.D, C.BLOCK_D, C)
            elif C.NORMALIZE and not BY_PRODUCT:
                d_phi += weight * z_plus
            if C.SOFTMAX:
                d_phi += d_mean
            if C.QUERY_WEIGHT:
                if not C.NORMALIZE:
                    dw = _by_head(d_phi * phi, C)
                    d_phi *= _to_columns(w, C)
                _store_weight(dwq_ptr, dwq_strides, head, heads, inside, dw, C)
            dq = d_phi * PHI_DX(q, unweighted, a, C.EXPONENT)
            store_rows(dq_ptr + dq_tile, dq, start + rows < end, head, heads, C.D, C.BLOCK_D, C)
        q_ptr, do_ptr, dq_ptr = _next(q_ptr, q_strides, C), _next(do_ptr, do_strides, C), _next(dq_ptr, dq_strides, C)
        if C.DECOUPLED:
            qd_ptr, dqd_ptr = _next(qd_ptr, qd_strides, C), _next(dqd_ptr, dqd_strides, C)
        if C.QUERY_WEIGHT:
            wq_ptr, dwq_ptr = _next(wq_ptr, wq_strides, C), _next(dwq_ptr, dwq_strides, C)

    d_plus, dz_plus = order_columns(d_plus, C), order_columns(_sum_eighths(dz_plus), C)
    if C.GROUP * C.D < C.BLOCK_D:  # φ need not be zero in columns that do not exist
        d_plus, dz_plus = tl.where(exists[None, :], d_plus, 0.0), tl.where(exists, dz_plus, 0.0)
    d_plus, dz_plus = _times_factor(d_plus, dz_plus, factor, C)
    return _mask_heads(d_plus, C), dz_plus


@jit
def differentiate_keys(
    k_ptr, k_strides, e_ptr, e_strides, kd_ptr, kd_strides, v_ptr, v_strides, a_ptr, wk_ptr, wk_strides,
    rope_ptr, rope_strides, dk_ptr, dk_strides, dkd_ptr, dkd_strides, dv_ptr, dv_strides, dwk_ptr, dwk_strides,
    d_plus, dz_plus, mean, query_mean, logarithm, average, batch, head, heads, first, begin, end,
    count, scale,
    PHI: tl.constexpr, PHI_DX: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of keys and values, and returns sums over the rows (BLOCK_D).

    With ``SOFTMAX`` they are the gradient of the queries' mean; to it also belong the mean itself, the exponentials'
    logarithm (see ``sum_keys``) and the average of the weights' gradients. With ``RATIOS`` they are the gradient of the
    scale as far as it comes by the keys' norm ratios.
    """
    k_ptr, k_tile = rows_tile(k_ptr, k_strides, batch, head, first + begin, C.BLOCK_D, C)
    v_ptr, v_tile = rows_tile(v_ptr, v_strides, batch, head, first + begin, C.BLOCK_DV, C)
    if e_ptr is not None:
        e_ptr, e_tile = rows_tile(e_ptr, e_strides, 0, head, begin, C.BLOCK_D, C)
    dk_ptr, dk_tile = rows_tile(dk_ptr, dk_strides, batch, head, first + begin, C.BLOCK_D, C)
    dv_ptr, dv_tile = rows_tile(dv_ptr, dv_strides, batch, head, first + begin, C.BLOCK_DV, C)
    if C.DECOUPLED:
        dkd_ptr, dkd_tile = rows_tile(dkd_ptr, dkd_strides, batch, head, first + begin, C.BLOCK_D, C)
    if C.KEY_WEIGHT:
        wk_ptr = _start(wk_ptr, wk_strides, batch, head, first + begin)
        dwk_ptr = _start(dwk_ptr, dwk_strides, batch, head, first + begin)
    if C.ROPE:
        rope_ptr, rope_tile = rows_tile(rope_ptr, rope_strides, batch, head, begin, C.BLOCK_D, C)
        rope_identity = _identity(C.BLOCK_D, OPERAND, tl.float16)
    a = ordered_parameter(a_ptr, head, heads, C)
    identity = _identity(C.BLOCK_D, OPERAND, OPERAND)
    one = 1.0 / tl.maximum(count, 1).to(tl.float32)
    if C.MEAN:
        if not C.SOFTMAX:
            d_plus, dz_plus = d_plus * one, dz_plus * one
        scale, one = 1.0, 1.0
    elif C.SOFTMAX:
        scale, one = scale / one, 1.0
    d_plus, dz_plus = _times_factor(d_plus, dz_plus, _load_factor(a_ptr, head, heads, C), C)
    d_plus = d_plus.to(OPERAND).to(tl.float32)
    # (v - m) dSᵀ = v dSᵀ - m dSᵀ with the same rounded dS: the mean cancels although v enters the product as it is
    dz_plus = order_columns((dz_plus - tl.sum(mean[:, None] * d_plus, 0)) * one, C)[None, :]
    d_plus = order(d_plus, C).to(OPERAND)
    d_state = tl.trans(d_plus)
    if C.SOFTMAX:
        query_mean = order_columns(query_mean, C)
    rows = row_order(C)
    sums = _zeros3(C.BLOCK_N // 16, 8, C.BLOCK_D)

    for start in range(begin, end, C.BLOCK_N):
        k = load_rows(k_ptr + k_tile, rows < end - start, head, heads, C.D, C.BLOCK_D, C)
        v = load_rows(v_ptr + v_tile, rows < end - start, head, heads, C.DV, C.BLOCK_DV, C).to(OPERAND)
        d_phi = tl.dot(v, d_plus, input_precision=PRECISION) * scale
        k = as_product(k, identity, OPERAND, C, d_phi)
        if e_ptr is not None:
            e = load_rows(e_ptr + e_tile, rows < end - start, head, heads, C.D, C.BLOCK_D, C)
            k += as_product(e, identity, OPERAND, C)
            e_ptr = _next(e_ptr, e_strides, C)
        inside = start + tl.arange(0, C.BLOCK_N) < end
        phi = PHI(k, a, C.EXPONENT)
        w = None
        if C.KEY_WEIGHT:
            w = _to_columns(_load_weight(wk_ptr, wk_strides, head, heads, inside, 0.0, C), C)
        if C.SOFTMAX:
            w = tl.exp2(_by_head(phi * query_mean, C) - logarithm)
            w = _to_columns(tl.where(inside[:, None], w, 0.0), C)
        turned = phi
        if C.ROPE:
            cos, sin = load_rope(rope_ptr + rope_tile, rows < end - start, head, heads, rope_identity, OPERAND, C)
            rope_ptr = _next(rope_ptr, rope_strides, C)
            turned = _turn(phi, cos, sin, C)
        operand = (turned if w is None else turned * w).to(OPERAND)
        dv = tl.dot(operand, d_state, input_precision=PRECISION)
        store_rows(dv_ptr + dv_tile, dv * scale, start + rows < end, head, heads, C.DV, C.BLOCK_DV, C)
        if C.SOFTMAX:  # of rounded features as S is, or what is left of its difference from the average were rounding
            dw = d_phi * operand.to(tl.float32)
        if C.ROPE:
            d_phi = _turn(d_phi, cos, -sin, C)
        if C.DECOUPLED:
            d_denominator = tl.broadcast_to(dz_plus, C.BLOCK_N, C.BLOCK_D)
            store_rows(dkd_ptr + dkd_tile, d_denominator, start + rows < end, head, heads, C.D, C.BLOCK_D, C)
        elif C.NORMALIZE:
            d_phi += dz_plus
            if C.SOFTMAX:
                dw += dz_plus * (phi * w)
        if C.RATIOS:
            d_phi *= w  # the ratio, as the forward pass has left it
            _, u, inverse_norm, powers = _norm_ratio(k, a, C)
            du = _norm_ratio_gradient(u, inverse_norm, powers, _by_head(d_phi * phi, C), C)
            sums -= _by_eighth(du * u, C)
        elif C.KEY_WEIGHT:
            _store_weight(dwk_ptr, dwk_strides, head, heads, inside, _by_head(d_phi * phi, C), C)
            d_phi *= w
        if C.SOFTMAX:
            ds = _to_columns(_by_head(dw, C), C) - w * _to_columns(average, C)
            sums += _by_eighth(ds * phi, C)
            d_phi = d_phi * w + ds * (query_mean * 0.6931471805599453)
        dk = d_phi * PHI_DX(k, phi, a, C.EXPONENT)
        if C.RATIOS:
            inverse = 1.0 / a
            dk += tl.where(u > 1e-6 * inverse, du * inverse, 0.0)  # k > 0, by what is in registers anyway
        store_rows(dk_ptr + dk_tile, dk, start + rows < end, head, heads, C.D, C.BLOCK_D, C)
        k_ptr, v_ptr = _next(k_ptr, k_strides, C), _next(v_ptr, v_strides, C)
        dk_ptr, dv_ptr = _next(dk_ptr, dk_strides, C), _next(dv_ptr, dv_strides, C)
        if C.DECOUPLED:
            dkd_ptr = _next(dkd_ptr, dkd_strides, C)
        if C.KEY_WEIGHT:
            wk_ptr, dwk_ptr = _next(wk_ptr, wk_strides, C), _next(dwk_ptr, dwk_strides, C)

    if C.RATIOS:
        sums *= 1.0 / a
    return order_columns(_sum_eighths(sums), C)
