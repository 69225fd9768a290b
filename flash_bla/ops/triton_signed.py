"""Linear attention in Triton: ``signed_power``, whose features φ(x) and φ(-x) are the parts of p = sign(x) |x|ᵃ.

A tile of features is a pair, F = [max(p, 0), min(p, 0)], and so are the sums over keys and their gradients. With
R = s Σ F(k)ᵀ v and r = Σ F(k) / M the output of the first half of the values' columns, which sees equal signs, is
F(q) R / (F(q) · r + ε). The second half sees opposite signs: R and r are swapped there, R' and r', each part for the
negative of the other. So the loops over rows are

    sum_signed_keys              R, r
    write_signed_output          o = F(q) R' / n,  n = F(q) · r' + ε
    differentiate_signed_queries dF(q) = dn R'ᵀ + c r',  dn = do / n,  c = -dn · o / n;
                                 dR' = Σ F(q)ᵀ dn,  dr' = Σ c F(q)
    differentiate_signed_keys    dF(k) = s v dRᵀ + dr / M,  dv = s F(k) dR

of which dp is one part, by the sign of x. Of heads wider than 32 the third would need more registers than there are:
there it runs twice, first for dR' alone, and finds 1 / n and c of each row and half in memory the second time. On
Hopper chips latency bounds these loops, eight warps of 255 registers a multiprocessor: twice as wide a product for both
parts takes as long as two, and more warps that spill take longer.
The values' mean is taken out of R and v as in triton_kernels.py, which see for names. In memory R and r are a state
with two signs, (B, H, 2, Dv + 1, D). The kernels are in triton_signed_kernels.py: one launch a direction for short
sequences, as triton_kernels.py has them.
"""

from __future__ import annotations

from flash_bla.ops.triton_order import (
    as_product,
    load_rows,
    order,
    order_columns,
    ordered_parameter,
    row_order,
    rows_tile,
    store_rows,
)
from flash_bla.ops.triton_plain import _to_value_columns
from flash_bla.ops.triton_support import computed_here, fast_inverse, fast_rounded_parts, fast_to_float, jit, tl
from flash_bla.ops.triton_tiles import (
    _add_products,
    _both_by_head,
    _by_head,
    _columns,
    _identity,
    _load_parameter,
    _load_weight,
    _mask_heads,
    _next,
    _power_gradient,
    _start,
    _store_weight,
    _sum_eighths,
    _tile,
    _to_columns,
    _vector_columns,
    _zeros,
    _zeros3,
)

# --- pairs of tiles, one for each part --------------------------------------------------------------------------------


@jit
def _products(x, pair, sums, PRECISION: tl.constexpr):
    """x times each of a pair, added to those sums, if any."""
    if sums is None:
        return tl.dot(x, pair[0], input_precision=PRECISION), tl.dot(x, pair[1], input_precision=PRECISION)
    else:
        plus = tl.dot(x, pair[0], sums[0], input_precision=PRECISION)
        return plus, tl.dot(x, pair[1], sums[1], input_precision=PRECISION)


@jit
def _product(features, pair, total, PRECISION: tl.constexpr):
    """F times what has both parts as its rows, added to the total."""
    total = tl.dot(features[0], pair[0], total, input_precision=PRECISION)
    return tl.dot(features[1], pair[1], total, input_precision=PRECISION)


# --- states -----------------------------------------------------------------------------------------------------------


@jit
def _first_half(C: tl.constexpr):
    """Which of the values' channels are in the first half of their head's."""
    return tl.arange(0, C.BLOCK_DV) % (C.BLOCK_DV // C.GROUP) < C.DV // 2


@jit
def _is_first(C: tl.constexpr):
    """The same for the columns of a tile in a loop."""
    return order_columns(_first_half(C), C)[None, :]


@jit
def _times_halves(x, first, second, is_first, C: tl.constexpr):
    """The values' columns times a number for each head and half."""
    return tl.where(is_first, x * _to_columns(first, C), x * _to_columns(second, C))


@jit
def _state_offsets(head, heads, C: tl.constexpr):
    """Offsets of R's first part from the first head's, of r's, and which exist; the others come (DV + 1) D later."""
    h, d, exists = _columns(head, heads, C.D, C.BLOCK_D, C)
    hv, c, exists_v = _columns(head, heads, C.DV, C.BLOCK_DV, C)
    offsets = ((hv * (2 * (C.DV + 1)) + c) * C.D)[:, None] + d[None, :]
    mask = exists_v[:, None] & exists[None, :] & (hv[:, None] == h[None, :])
    return offsets, mask, (h * (2 * (C.DV + 1)) + C.DV) * C.D + d, exists


@jit
def load_states(state_ptr, at, head, heads, C: tl.constexpr):
    """R and r of the group whose first head is the ``at``-th, their parts one after the other."""
    offsets, mask, vector_offsets, exists = _state_offsets(head, heads, C)
    state_ptr += at * (2 * (C.DV + 1) * C.D)
    other_ptr = state_ptr + (C.DV + 1) * C.D
    return (
        tl.load(state_ptr + offsets, mask=mask, other=0.0),
        tl.load(other_ptr + offsets, mask=mask, other=0.0),
        tl.load(state_ptr + vector_offsets, mask=exists, other=0.0),
        tl.load(other_ptr + vector_offsets, mask=exists, other=0.0),
    )


@jit
def _store_parts(state_ptr, at, offsets, mask, plus, minus, C: tl.constexpr):
    state_ptr += at * (2 * (C.DV + 1) * C.D) + offsets
    tl.store(state_ptr, plus, mask=mask)
    tl.store(state_ptr + (C.DV + 1) * C.D, minus, mask=mask)


@jit
def store_states(state_ptr, at, head, heads, plus, minus, C: tl.constexpr):
    offsets, mask, _, _ = _state_offsets(head, heads, C)
    _store_parts(state_ptr, at, offsets, mask, plus, minus, C)


@jit
def store_vectors(state_ptr, at, head, heads, plus, minus, C: tl.constexpr):
    _, _, offsets, exists = _state_offsets(head, heads, C)
    _store_parts(state_ptr, at, offsets, exists, plus, minus, C)


@jit
def swapped(plus, minus, C: tl.constexpr):
    """R' of R, and R of R'."""
    first = _first_half(C)[:, None]
    return tl.where(first, plus, -minus), tl.where(first, minus, -plus)


@jit
def _take_mean_out(plus, minus, r_plus, r_minus, C: tl.constexpr):
    """R' - r' m, and the values' mean m = Σ φ(k) v / Σ φ(k)."""
    total = _by_head((r_plus - r_minus)[None, :], C)
    total = tl.reshape(tl.broadcast_to(_to_columns_v(total, C), 1, C.BLOCK_DV), C.BLOCK_DV)
    mean = tl.sum(plus - minus, 1)
    mean = tl.where(total > 0.0, mean / total, 0.0)
    first = _first_half(C)[:, None]
    plus -= mean[:, None] * tl.where(first, r_plus[None, :], -r_minus[None, :])
    minus -= mean[:, None] * tl.where(first, r_minus[None, :], -r_plus[None, :])
    return _mask_heads(plus, C), _mask_heads(minus, C), mean


@jit
def _to_columns_v(x, C: tl.constexpr):
    """A number for each head, (1, GROUP), to the values' columns."""
    if C.GROUP == 1:
        return x
    else:
        x = tl.broadcast_to(x[:, :, None], 1, C.GROUP, C.BLOCK_DV // C.GROUP)
        return tl.reshape(x, 1, C.BLOCK_DV)


@jit
def load_centered_states(state_ptr, at, head, heads, C: tl.constexpr):
    """R' - r' m, r, and the values' mean m, of the group whose first head is the ``at``-th."""
    plus, minus, r_plus, r_minus = load_states(state_ptr, at, head, heads, C)
    plus, minus = swapped(plus, minus, C)
    plus, minus, mean = _take_mean_out(plus, minus, r_plus, r_minus, C)
    return plus, minus, r_plus, r_minus, mean


# --- products with vectors: columns (head, part of the number, half), see ``_vector_operand`` -------------------------


@jit
def _vector_operands(plus, minus, OPERAND: tl.constexpr, C: tl.constexpr):
    """r' as what F is multiplied with, the parts (BLOCK_D, 16)."""
    column = tl.arange(0, 16)
    first, part = (column % 2 == 0)[None, :], column % (16 // C.GROUP) // 2
    above = _vector_columns(tl.where(first, plus[:, None], -minus[:, None]), part, C.BLOCK_D, OPERAND, C)
    return above, _vector_columns(tl.where(first, minus[:, None], -plus[:, None]), part, C.BLOCK_D, OPERAND, C)


@jit
def _denominators(features, vectors, eps, PRECISION: tl.constexpr, C: tl.constexpr):
    """n of the first half of the values' columns, and of the second: (rows, GROUP)."""
    products = _product(features, vectors, _zeros(C.BLOCK_N, 16), PRECISION)
    first, second = tl.split(tl.reshape(products, C.BLOCK_N, C.GROUP, 8 // C.GROUP, 2))
    return tl.sum(first, 2) + eps, tl.sum(second, 2) + eps


@jit
def _halves_operand(first, second, OPERAND: tl.constexpr, C: tl.constexpr):
    """A vector for each half as what features are multiplied with, so that each thread has the products that it needs.

    As the parts in triton_plain.py: columns are (head, half, thread, number rounded and what that leaves).
    """
    column = tl.arange(0, 16 * C.GROUP)[None, :]
    x = tl.where(column // 8 % 2 == 0, first[:, None], second[:, None])
    rounded = x.to(OPERAND)
    x = tl.where(column % 2 == 0, rounded, (x - rounded.to(tl.float32)).to(OPERAND))
    if C.GROUP > 1:
        h = tl.arange(0, C.BLOCK_D)[:, None] // (C.BLOCK_D // C.GROUP)
        x = tl.where(column // 16 == h, x, 0.0)
    return x


@jit
def _by_thread_and_half(products, C: tl.constexpr):
    """Sums of a product's parts for the first and the second half, as each of 4 threads has them: (rows, GROUP, 4)."""
    sums = tl.sum(tl.reshape(products, C.BLOCK_N, C.GROUP, 2, 4, 2), 4)
    return tl.split(tl.permute(sums, (0, 1, 3, 2)))


@jit
def _weights(first, second, OPERAND: tl.constexpr, C: tl.constexpr):
    """Numbers for each head and half, (rows, GROUP), as what is multiplied with transposed ``_vector_operands``."""
    x = tl.join(first, second)[:, :, None, :]
    return tl.reshape(tl.broadcast_to(x, C.BLOCK_N, C.GROUP, 8 // C.GROUP, 2), C.BLOCK_N, 16).to(OPERAND)


@jit
def _row_operand(x, OPERAND: tl.constexpr):
    """A vector as the operand (16, its length), which ones multiply to a tile whose rows all are that vector."""
    rounded = x.to(OPERAND)
    rest = (x - rounded.to(tl.float32)).to(OPERAND)
    row = tl.arange(0, 16)[:, None]
    return tl.where(row == 0, rounded[None, :], tl.where(row == 1, rest[None, :], 0.0))


@jit
def _ones(OPERAND: tl.constexpr, C: tl.constexpr):
    return tl.full((C.BLOCK_N, 16), 1.0, OPERAND)


@jit
def _rows_start(rows_ptr, strides, batch, head, row):
    """Where the four numbers of rows from ``row`` on stand, (B, H, N, 4)."""
    return _start(rows_ptr, (strides[0], strides[1], 4, 1), batch, head, row)


@jit
def _row_pointers(rows_ptr, strides, head, heads, inside, C: tl.constexpr):
    """Where they are, (rows, 4 GROUP), and which exist: those of a row go together."""
    column = tl.arange(0, 4 * C.GROUP)
    offsets = tl.arange(0, C.BLOCK_N)[:, None] * 4 + ((column // 4).to(tl.int64) * strides[1] + column % 4)[None, :]
    mask = inside[:, None]
    if C.GROUP > 1:
        mask = mask & (head + column // 4 < heads)[None, :]
    return rows_ptr + offsets, mask


@jit
def _load_row_numbers(rows_ptr, strides, head, heads, inside, C: tl.constexpr):
    """The four numbers of rows, each (rows, GROUP)."""
    pointers, mask = _row_pointers(rows_ptr, strides, head, heads, inside, C)
    x = tl.load(pointers, mask=mask, other=0.0)
    first, second = tl.split(tl.reshape(x, C.BLOCK_N, C.GROUP, 2, 2))
    a, b = tl.split(first)
    c, d = tl.split(second)
    return a, b, c, d


@jit
def _store_row_numbers(rows_ptr, strides, head, heads, inside, a, b, c, d, C: tl.constexpr):
    pointers, mask = _row_pointers(rows_ptr, strides, head, heads, inside, C)
    x = tl.join(tl.join(a, b), tl.join(c, d))
    tl.store(pointers, tl.reshape(x, C.BLOCK_N, 4 * C.GROUP), mask=mask)


# --- the loops over rows ----------------------------------------------------------------------------------------------


@jit
def _weighted_parts(p, w, OPERAND: tl.constexpr):
    """The features as ``fast_rounded_parts`` gives them, times a weight of either sign."""
    return (tl.maximum(p, 0.0) * w).to(OPERAND), (tl.minimum(p, 0.0) * w).to(OPERAND)


@jit
def sum_signed_keys(
    k_ptr, k_strides, e_ptr, e_strides, v_ptr, v_strides, a_ptr, wk_ptr, wk_strides, batch, head, heads, first, begin,
    end, count, scale,
    PHI: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The parts of R and r."""
    h, d, exists = _columns(head, heads, C.D, C.BLOCK_D, C)
    hv, c, exists_v = _columns(head, heads, C.DV, C.BLOCK_DV, C)
    k_ptr, k_tile = _tile(k_ptr, k_strides, batch, head, first + begin, h, d, C)
    v_ptr, v_tile = _tile(v_ptr, v_strides, batch, head, first + begin, hv, c, C)
    if e_ptr is not None:
        e_ptr, e_tile = _tile(e_ptr, e_strides, 0, head, begin, h, d, C)
    if C.KEY_WEIGHT:
        wk_ptr = _start(wk_ptr, wk_strides, batch, head, first + begin)
    a = tl.trans(_load_parameter(a_ptr, head, heads, C))
    plus, minus = _zeros(C.BLOCK_D, C.BLOCK_DV), _zeros(C.BLOCK_D, C.BLOCK_DV)
    r_plus, r_minus = _zeros(C.BLOCK_D, 16), _zeros(C.BLOCK_D, 16)
    twos = tl.full((C.BLOCK_N, 16), 2.0, OPERAND)  # and halves: see ``add_to_sums``
    for start in range(begin, end, C.BLOCK_N):
        inside = start + tl.arange(0, C.BLOCK_N) < end
        mask = inside[None, :] & exists[:, None]
        k = fast_to_float(tl.load(k_ptr + tl.trans(k_tile), mask=mask, other=0.0))
        if e_ptr is not None:
            k += tl.load(e_ptr + tl.trans(e_tile), mask=mask, other=0.0).to(tl.float32)
            e_ptr = _next(e_ptr, e_strides, C)
        v = tl.load(v_ptr + v_tile, mask=inside[:, None] & exists_v[None, :], other=0.0).to(OPERAND)
        p = PHI(k, a, C.EXPONENT)
        if C.KEY_WEIGHT:
            w = _to_columns(_load_weight(wk_ptr, wk_strides, head, heads, inside, 0.0, C), C)
            wk_ptr = _next(wk_ptr, wk_strides, C)
            p_plus, p_minus = _weighted_parts(p, tl.trans(w), OPERAND)
        else:
            p_plus, p_minus = fast_rounded_parts(p, OPERAND, False)
        plus = tl.dot(p_plus, v, plus, input_precision=PRECISION)
        minus = tl.dot(p_minus, v, minus, input_precision=PRECISION)
        r_plus += 0.5 * tl.dot(p_plus, twos, input_precision=PRECISION)
        r_minus += 0.5 * tl.dot(p_minus, twos, input_precision=PRECISION)
        k_ptr, v_ptr = _next(k_ptr, k_strides, C), _next(v_ptr, v_strides, C)
    one = 1.0 / tl.maximum(count, 1).to(tl.float32)
    if C.MEAN:
        scale = one
    plus, minus = _mask_heads(tl.trans(plus) * scale, C), _mask_heads(tl.trans(minus) * scale, C)
    return plus, minus, tl.sum(r_plus, 1) * (one / 16), tl.sum(r_minus, 1) * (one / 16)


@jit
def write_signed_output(
    q_ptr, q_strides, o_ptr, o_strides, a_ptr, plus, minus, r_plus, r_minus, batch, head, heads, first, begin, end, eps,
    PHI: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    q_ptr, q_tile = rows_tile(q_ptr, q_strides, batch, head, first + begin, C.BLOCK_D, C)
    o_ptr, o_tile = rows_tile(o_ptr, o_strides, batch, head, first + begin, C.BLOCK_DV, C)
    a = ordered_parameter(a_ptr, head, heads, C)
    identity = _identity(C.BLOCK_D, OPERAND, OPERAND)
    states = tl.trans(order(plus, C).to(OPERAND)), tl.trans(order(minus, C).to(OPERAND))
    r_plus, r_minus = order_columns(r_plus, C), order_columns(r_minus, C)
    vectors = _halves_operand(r_plus, -r_minus, OPERAND, C), _halves_operand(r_minus, -r_plus, OPERAND, C)
    is_first = _is_first(C)
    rows = row_order(C)
    for start in range(begin, end, C.BLOCK_N):
        q = load_rows(q_ptr + q_tile, rows < end - start, head, heads, C.D, C.BLOCK_D, C)
        features = fast_rounded_parts(PHI(as_product(q, identity, OPERAND, C), a, C.EXPONENT), OPERAND, False)
        products = _product(features, vectors, _zeros(C.BLOCK_N, 16 * C.GROUP), PRECISION)
        first_half, second_half = _by_thread_and_half(products, C)
        o = _product(features, states, _zeros(C.BLOCK_N, C.BLOCK_DV), PRECISION)
        first_half = _to_value_columns(fast_inverse(first_half + eps), C)
        second_half = _to_value_columns(fast_inverse(second_half + eps), C)
        o *= tl.where(is_first, first_half, second_half)
        # rows said otherwise than for the load: see ``write_plain_output``
        store_rows(o_ptr + o_tile, o, start + rows < end, head, heads, C.DV, C.BLOCK_DV, C)
        q_ptr, o_ptr = _next(q_ptr, q_strides, C), _next(o_ptr, o_strides, C)


@jit
def _stacked(features, C: tl.constexpr):
    """Both parts, transposed, below each other: (2 D, rows), which a product takes 64 of at a time."""
    both = tl.permute(tl.join(features[0], features[1]), (2, 1, 0))
    return tl.reshape(both, 2 * C.BLOCK_D, C.BLOCK_N)


@jit
def _unstacked(x, C: tl.constexpr):
    """The parts (columns, D) of (2 D, columns)."""
    return tl.split(tl.permute(tl.reshape(x, 2, C.BLOCK_D, x.shape[1]), (2, 1, 0)))


@jit
def differentiate_signed_queries(
    q_ptr, q_strides, do_ptr, do_strides, a_ptr, rows_ptr, rows_strides, dq_ptr, dq_strides,
    plus, minus, r_plus, r_minus, mean, batch, head, heads, first, begin, end, eps,
    PHI: tl.constexpr, PHI_DX: tl.constexpr, PHI_DA: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    C: tl.constexpr, SUMS: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """Writes dq; the parts of dR' and of dr, and the terms of the power's gradient.

    ``SUMS`` alone gives dR', and writes the rows' numbers; ``GRADIENT`` alone gives all else, and reads them.
    """
    q_ptr, q_tile = rows_tile(q_ptr, q_strides, batch, head, first + begin, C.BLOCK_D, C)
    do_ptr, do_tile = rows_tile(do_ptr, do_strides, batch, head, first + begin, C.BLOCK_DV, C)
    if GRADIENT:
        dq_ptr, dq_tile = rows_tile(dq_ptr, dq_strides, batch, head, first + begin, C.BLOCK_D, C)
    if not (SUMS and GRADIENT):
        rows_ptr = _rows_start(rows_ptr, rows_strides, batch, head, first + begin)
    a = ordered_parameter(a_ptr, head, heads, C)
    identity, identity_v = _identity(C.BLOCK_D, OPERAND, OPERAND), _identity(C.BLOCK_DV, OPERAND, OPERAND)
    states = order(plus, C).to(OPERAND), order(minus, C).to(OPERAND)
    vectors = _vector_operands(order_columns(r_plus, C), order_columns(r_minus, C), OPERAND, C)
    if SUMS:
        moved = _row_operand(order_columns(-eps * mean, C), OPERAND)
    is_first = _is_first(C)
    rows = row_order(C)
    zero = tl.minimum(end, 0).to(tl.int32)
    d_states = _zeros(2 * C.BLOCK_D, C.BLOCK_DV)
    dr_plus = _zeros3(C.BLOCK_N // 16, 8, C.BLOCK_D)
    dr_minus = _zeros3(C.BLOCK_N // 16, 8, C.BLOCK_D)
    da = _zeros3(C.BLOCK_N // 16, 8, C.BLOCK_D)
    # with a number of stages told, all loads come ahead, not just those of what products take
    for start in tl.range(begin, end, C.BLOCK_N, num_stages=C.STAGES):
        q = load_rows(q_ptr + q_tile, rows < end - start, head, heads, C.D, C.BLOCK_D, C)
        do = load_rows(do_ptr + do_tile, rows < end - start, head, heads, C.DV, C.BLOCK_DV, C)
        if SUMS:
            inside = start + tl.arange(0, C.BLOCK_N) < end
            o = tl.dot(_ones(OPERAND, C), moved, input_precision=PRECISION)
            ALIKE: tl.constexpr = C.BLOCK_D == C.BLOCK_DV  # queries and outputs
            p = PHI(as_product(q, identity, OPERAND, C, o if ALIKE else None, not ALIKE), a, C.EXPONENT)
            features = fast_rounded_parts(p, OPERAND, False)
            one = tl.where(inside, eps, 1.0)[:, None]  # no infinity outside, which would enter sums
            first_half, second_half = _denominators(features, vectors, one, PRECISION, C)
            first_half, second_half = fast_inverse(first_half), fast_inverse(second_half)
            dn = _times_halves(as_product(do, identity_v, OPERAND, C, o), first_half, second_half, is_first, C)
            o = _product(features, (tl.trans(states[0]), tl.trans(states[1])), o, PRECISION) * dn
            dn = dn.to(OPERAND)
            d_states = tl.dot(_stacked(features, C), dn, d_states, input_precision=PRECISION)
            weight, other = _both_by_head(tl.where(is_first, o, 0.0), tl.where(is_first, 0.0, o), C)
            weight, other = -weight * first_half, -other * second_half
            if not GRADIENT:
                _store_row_numbers(
                    rows_ptr, rows_strides, head, heads, inside, first_half, second_half, weight, other, C
                )
        else:
            inside = tl.arange(0, C.BLOCK_N) < end - start
            first_half, second_half, weight, other = _load_row_numbers(rows_ptr, rows_strides, head, heads, inside, C)
            dn = _times_halves(as_product(do, identity_v, OPERAND, C), first_half, second_half, is_first, C)
            dn = dn.to(OPERAND)
        if GRADIENT:
            transposed = tl.trans(vectors[0]), tl.trans(vectors[1])
            d_features = _products(_weights(weight, other, OPERAND, C), transposed, None, PRECISION)
            d_plus, d_minus = _products(dn, states, d_features, PRECISION)
            q = as_product(q, identity, OPERAND, C, d_plus)
            dq = tl.where(q > 0.0, d_plus, d_minus) * PHI_DX(q, 0.0, a, C.EXPONENT)
            store_rows(dq_ptr + dq_tile, dq, start + rows < end, head, heads, C.D, C.BLOCK_D, C)
            da = computed_here(_add_products(da, dq, PHI_DA(q, 0.0, a, C.EXPONENT), C), zero)  # zero without a row
            p = PHI(q, a, C.EXPONENT)
            weight, other = _to_columns(weight, C), _to_columns(other, C)
            dr_plus = _add_products(dr_plus, p, tl.where(q > 0.0, weight, -other), C)
            dr_minus = _add_products(dr_minus, p, tl.where(q > 0.0, -other, weight), C)
            dq_ptr = _next(dq_ptr, dq_strides, C)
        q_ptr, do_ptr = _next(q_ptr, q_strides, C), _next(do_ptr, do_strides, C)
        if not (SUMS and GRADIENT):
            rows_ptr += 4 * C.BLOCK_N
    d_plus, d_minus = _unstacked(d_states, C)
    d_plus, d_minus = _mask_heads(order(d_plus, C), C), _mask_heads(order(d_minus, C), C)
    da = order_columns(_power_gradient(_sum_eighths(da), a, C), C)
    return d_plus, d_minus, order_columns(_sum_eighths(dr_plus), C), order_columns(_sum_eighths(dr_minus), C), da


@jit
def differentiate_signed_keys(
    k_ptr, k_strides, e_ptr, e_strides, v_ptr, v_strides, a_ptr, wk_ptr, wk_strides, dk_ptr, dk_strides, dv_ptr,
    dv_strides, dwk_ptr, dwk_strides, d_plus, d_minus, dr_plus, dr_minus, mean, batch, head, heads, first, begin, end,
    count, scale,
    PHI: tl.constexpr, PHI_DX: tl.constexpr, PHI_DA: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of keys and values; the terms of the power's."""
    k_ptr, k_tile = rows_tile(k_ptr, k_strides, batch, head, first + begin, C.BLOCK_D, C)
    v_ptr, v_tile = rows_tile(v_ptr, v_strides, batch, head, first + begin, C.BLOCK_DV, C)
    if e_ptr is not None:
        e_ptr, e_tile = rows_tile(e_ptr, e_strides, 0, head, begin, C.BLOCK_D, C)
    dk_ptr, dk_tile = rows_tile(dk_ptr, dk_strides, batch, head, first + begin, C.BLOCK_D, C)
    dv_ptr, dv_tile = rows_tile(dv_ptr, dv_strides, batch, head, first + begin, C.BLOCK_DV, C)
    if C.KEY_WEIGHT:
        wk_ptr = _start(wk_ptr, wk_strides, batch, head, first + begin)
        dwk_ptr = _start(dwk_ptr, dwk_strides, batch, head, first + begin)
    a = ordered_parameter(a_ptr, head, heads, C)
    identity = _identity(C.BLOCK_D, OPERAND, OPERAND)
    one = 1.0 / tl.maximum(count, 1).to(tl.float32)
    if C.MEAN:
        d_plus, d_minus, dr_plus, dr_minus, one = d_plus * one, d_minus * one, dr_plus * one, dr_minus * one, 1.0
    d_plus, d_minus = fast_to_float(d_plus.to(OPERAND)), fast_to_float(d_minus.to(OPERAND))
    # (v - m) dRᵀ = v dRᵀ - m dRᵀ with the same rounded dR: the mean cancels although v enters the product as it is
    dr_plus = (dr_plus - tl.sum(mean[:, None] * d_plus, 0)) * one
    dr_minus = (dr_minus - tl.sum(mean[:, None] * d_minus, 0)) * one
    d_plus, d_minus = order(d_plus, C).to(OPERAND), order(d_minus, C).to(OPERAND)
    vectors = _row_operand(order_columns(dr_plus, C), OPERAND), _row_operand(order_columns(dr_minus, C), OPERAND)
    d_states = d_plus, d_minus
    transposed = tl.trans(d_plus), tl.trans(d_minus)
    rows = row_order(C)
    zero = tl.minimum(end, 0).to(tl.int32)
    da = _zeros3(C.BLOCK_N // 16, 8, C.BLOCK_D)
    for start in range(begin, end, C.BLOCK_N):
        inside = tl.arange(0, C.BLOCK_N) < end - start
        k = load_rows(k_ptr + k_tile, rows < end - start, head, heads, C.D, C.BLOCK_D, C)
        v = load_rows(v_ptr + v_tile, rows < end - start, head, heads, C.DV, C.BLOCK_DV, C).to(OPERAND)
        if C.MEAN:
            d_features = _products(_ones(OPERAND, C), vectors, None, PRECISION)
            dk_plus, dk_minus = _products(v, d_states, d_features, PRECISION)
        else:
            dk_plus, dk_minus = _products(v, d_states, None, PRECISION)
            plus, minus = _products(_ones(OPERAND, C), vectors, None, PRECISION)
            dk_plus, dk_minus = dk_plus * scale + plus, dk_minus * scale + minus
        k = as_product(k, identity, OPERAND, C, dk_plus)
        if e_ptr is not None:
            e = load_rows(e_ptr + e_tile, rows < end - start, head, heads, C.D, C.BLOCK_D, C)
            k += as_product(e, identity, OPERAND, C)
            e_ptr = _next(e_ptr, e_strides, C)
        dp = tl.where(k > 0.0, dk_plus, dk_minus)
        p = PHI(k, a, C.EXPONENT)
        if C.KEY_WEIGHT:
            w = _to_columns(_load_weight(wk_ptr, wk_strides, head, heads, inside, 0.0, C), C)
            _store_weight(dwk_ptr, dwk_strides, head, heads, inside, _by_head(dp * p, C), C)
            dp *= w
            wk_ptr, dwk_ptr = _next(wk_ptr, wk_strides, C), _next(dwk_ptr, dwk_strides, C)
        dk = dp * PHI_DX(k, 0.0, a, C.EXPONENT)
        store_rows(dk_ptr + dk_tile, dk, start + rows < end, head, heads, C.D, C.BLOCK_D, C)
        da = computed_here(_add_products(da, dk, PHI_DA(k, 0.0, a, C.EXPONENT), C), zero)
        dv = _zeros(C.BLOCK_N, C.BLOCK_DV)
        if C.KEY_WEIGHT:
            features = _weighted_parts(p, w, OPERAND)
        else:
            features = fast_rounded_parts(p, OPERAND, False)
        dv = _product(features, transposed, dv, PRECISION)
        if not C.MEAN:
            dv *= scale
        store_rows(dv_ptr + dv_tile, dv, start + rows < end, head, heads, C.DV, C.BLOCK_DV, C)
        k_ptr, v_ptr = _next(k_ptr, k_strides, C), _next(v_ptr, v_strides, C)
        dk_ptr, dv_ptr = _next(dk_ptr, dk_strides, C), _next(dv_ptr, dv_strides, C)
    return order_columns(_power_gradient(_sum_eighths(da), a, C), C)
