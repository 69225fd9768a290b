"""Linear attention in Triton: the loops over rows where nothing but a feature map is asked for, in bfloat16.

They do what those of triton_loops.py do, with fewer instructions: forward with two thirds of them. Features are rounded
to operands as they are computed, two at a time. S is summed as φ(k)ᵀ v, not transposed: φ(k)ᵀ is loaded as such and
goes to the matrix units from registers, as no other operand that is computed can, and so nothing waits for shared
memory. z is a product as well (``add_to_sums``), and comes as what the queries are multiplied with. Rows outside a
sequence are zeros, as are their values: they count for nothing in S, and z sums a tile that has such rows apart.

So are keys summed that have weights, a focusing map or another type, where a feature takes but its own channel.

For equations and names see triton_kernels.py.
"""

from __future__ import annotations

from flash_bla.ops.triton_order import (
    as_product,
    column_order,
    load_rows,
    order,
    order_columns,
    row_order,
    rows_tile,
    store_rows,
)
from flash_bla.ops.triton_support import fast_inverse, jit, tl
from flash_bla.ops.triton_tiles import (
    _add_products,
    _both_by_head,
    _by_eighth,
    _center,
    _columns,
    _identity,
    _load_weight,
    _mask_heads,
    _next,
    _start,
    _state_offsets,
    _state_rows,
    _sum_eighths,
    _tile,
    _to_columns,
    _vector_operand,
    _vector_product,
    _zeros,
    _zeros3,
)

# --- states: S (D, DV) and z (D, parts), each of whose columns is z ---------------------------------------------------
# Of a product's result, a thread holds of each 8 columns the pair that is its own among 4 threads'. Columns of z are
# (head, thread, z rounded and what that leaves), so that each thread gets the denominators that it needs.


@jit
def _parts(C: tl.constexpr):
    return tl.arange(0, 8 * C.GROUP if C.GROUP > 1 else 16)


@jit
def _add_halves(z, C: tl.constexpr):
    """The sum of both halves of 16 columns, in each 8 of the parts."""
    z = tl.sum(tl.reshape(z, C.BLOCK_D, 2, 8), 1)[:, None, :]
    parts: tl.constexpr = _parts(C).shape[0]
    return tl.reshape(tl.broadcast_to(z, C.BLOCK_D, parts // 8, 8), C.BLOCK_D, parts)


@jit
def _mask_plain(plus, z, C: tl.constexpr):
    """Zero where a row does not exist or, in S, a column is of another head."""
    h, _, exists = _columns(0, C.GROUP, C.D, C.BLOCK_D, C)
    hv = tl.arange(0, C.BLOCK_DV) // (C.BLOCK_DV // C.GROUP)
    if C.GROUP > 1:
        plus = tl.where(exists[:, None] & (h[:, None] == hv[None, :]), plus, 0.0)
    elif C.D < C.BLOCK_D:
        plus = tl.where(exists[:, None], plus, 0.0)
    if C.GROUP * C.D < C.BLOCK_D:
        z = tl.where(exists[:, None], z, 0.0)
    return plus, z


@jit
def store_plain_state(state_ptr, at, head, heads, plus, z, C: tl.constexpr):
    offsets, mask, z_offsets, exists = _state_offsets(head, heads, C)
    state_ptr += at * (_state_rows(C) * C.D)
    tl.store(state_ptr + tl.trans(offsets), plus, mask=tl.trans(mask))
    first = (_parts(C) == 0)[None, :]
    tl.store(state_ptr + (z_offsets[:, None] + _parts(C)[None, :]), z, mask=exists[:, None] & first)


@jit
def load_plain_state(state_ptr, at, head, heads, C: tl.constexpr):
    offsets, mask, z_offsets, exists = _state_offsets(head, heads, C)
    state_ptr += at * (_state_rows(C) * C.D)
    plus = tl.load(state_ptr + tl.trans(offsets), mask=tl.trans(mask), other=0.0)
    z_offsets = z_offsets[:, None] + (_parts(C) * 0)[None, :]
    return plus, tl.load(state_ptr + z_offsets, mask=exists[:, None], other=0.0)


@jit
def _z_operand(z, OPERAND: tl.constexpr, C: tl.constexpr):
    """What features are multiplied with for the denominators of ``_by_thread``, from z (D, parts)."""
    part = _parts(C)[None, :]
    rounded = z.to(OPERAND)
    rest = (z - rounded.to(tl.float32)).to(OPERAND)
    z = tl.where(part % 2 == 0, rounded, rest)
    if C.GROUP == 1:
        return tl.where(part < 8, z, 0.0)
    else:
        h = tl.arange(0, C.BLOCK_D) // (C.BLOCK_D // C.GROUP)
        return tl.where(part // 8 == h[:, None], z, 0.0)


@jit
def vector_by_thread(z, OPERAND: tl.constexpr, C: tl.constexpr):
    """``_z_operand`` of a vector (D)."""
    return _z_operand(z[:, None] + _zeros(1, _parts(C).shape[0]), OPERAND, C)


@jit
def _by_thread(products, C: tl.constexpr):
    """Sums of a product's parts, as each of 4 threads has them: (rows, parts) to (rows, GROUP, 4)."""
    sums = tl.sum(tl.reshape(products, C.BLOCK_N, products.shape[1] // 8, 4, 2), 3)
    return tl.sum(sums, 1)[:, None, :] if C.GROUP == 1 else sums


@jit
def _to_value_columns(x, C: tl.constexpr):
    """(rows, GROUP, 4) to the columns that each thread has of a tile of values."""
    x = tl.reshape(x, C.BLOCK_N, C.GROUP, 1, 4, 1)
    x = tl.broadcast_to(x, C.BLOCK_N, C.GROUP, C.BLOCK_DV // C.GROUP // 8, 4, 2)
    return tl.reshape(x, C.BLOCK_N, C.BLOCK_DV)


# --- states without the mean: S - z m, rounded ------------------------------------------------------------------------
# For a backward pass whose programs would all begin with ``_center``, while few of them run at a time. In memory, for
# each head, z (D) and the values' mean m (DV) in float32, and then S - z m (D, DV) in bfloat16.


@jit
def _centered_size(C: tl.constexpr):
    """Of a head, in numbers of two bytes."""
    return 2 * (C.D + C.DV) + C.D * C.DV


@jit
def _centered_offsets(column, head, heads, C: tl.constexpr):
    """Offsets of S, whose rows are these columns of queries and keys, of z and of the mean, and which of each exist."""
    PITCH: tl.constexpr = C.BLOCK_D // C.GROUP
    h, d = column // PITCH, column % PITCH
    hv, c, exists_v = _columns(head, heads, C.DV, C.BLOCK_DV, C)
    exists = (d < C.D) & (head + h < heads)
    offsets = (h * _centered_size(C) + 2 * (C.D + C.DV) + d * C.DV)[:, None] + c[None, :]
    mask = exists[:, None] & exists_v[None, :] & (h[:, None] == hv[None, :])
    size = _centered_size(C) // 2
    return offsets, mask, h * size + d, exists, hv * size + C.D + c, exists_v


@jit
def _centered_pointers(state_ptr, at, C: tl.constexpr):
    """The ``at``-th head's state as bfloat16 and as float32."""
    state_ptr += at * _centered_size(C)
    numbers_ptr = state_ptr.to(tl.pointer_type(tl.float32), bitcast=True)
    return state_ptr.to(tl.pointer_type(tl.bfloat16), bitcast=True), numbers_ptr


@jit
def store_centered_state(state_ptr, at, head, heads, plus, z, C: tl.constexpr):
    """From S (D, DV) and z (D, parts)."""
    column = tl.arange(0, C.BLOCK_D)
    offsets, mask, z_offsets, exists, mean_offsets, exists_v = _centered_offsets(column, head, heads, C)
    state_ptr, numbers_ptr = _centered_pointers(state_ptr, at, C)
    z = tl.sum(z, 1) / z.shape[1]
    plus, mean = _center(tl.trans(plus), z, C)
    tl.store(state_ptr + offsets, tl.trans(plus).to(tl.bfloat16), mask=mask)
    tl.store(numbers_ptr + z_offsets, z, mask=exists)
    tl.store(numbers_ptr + mean_offsets, mean, mask=exists_v)


@jit
def load_centered_state(state_ptr, at, head, heads, OPERAND: tl.constexpr, C: tl.constexpr):
    """S (DV, D) as an operand and z (1, D), their columns in the order of triton_order.py, and the mean (DV)."""
    column = column_order(C.BLOCK_D, C)
    offsets, mask, z_offsets, exists, mean_offsets, exists_v = _centered_offsets(column, head, heads, C)
    state_ptr, numbers_ptr = _centered_pointers(state_ptr, at, C)
    plus = tl.trans(tl.load(state_ptr + offsets, mask=mask, other=0.0).to(OPERAND))
    z = tl.load(numbers_ptr + z_offsets, mask=exists, other=0.0)[None, :]
    return plus, z, tl.load(numbers_ptr + mean_offsets, mask=exists_v, other=0.0)


# --- loops ------------------------------------------------------------------------------------------------------------


@jit
def sum_plain_keys(
    k_ptr, k_strides, e_ptr, e_strides, v_ptr, v_strides, wk_ptr, wk_strides, batch, head, heads, first, begin, end,
    count, scale,
    PHI: tl.constexpr, PHI_ROUNDED: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """S = s Σ φ(k)ᵀ v and z = Σ φ(k) / M over the rows from ``begin`` to ``end``, of keys with weights, too."""
    h, d, exists = _columns(head, heads, C.D, C.BLOCK_D, C)
    hv, c, exists_v = _columns(head, heads, C.DV, C.BLOCK_DV, C)
    k_ptr, k_tile = _tile(k_ptr, k_strides, batch, head, first + begin, h, d, C)
    v_ptr, v_tile = _tile(v_ptr, v_strides, batch, head, first + begin, hv, c, C)
    if e_ptr is not None:
        e_ptr, e_tile = _tile(e_ptr, e_strides, 0, head, begin, h, d, C)
    if C.KEY_WEIGHT:
        wk_ptr = _start(wk_ptr, wk_strides, batch, head, first + begin)
    plus, z = _zeros(C.BLOCK_D, C.BLOCK_DV), _zeros(C.BLOCK_D, 16)
    last, twos = sum_operand(begin, end, OPERAND, C)

    for start in range(begin, end, C.BLOCK_N):
        inside = start + tl.arange(0, C.BLOCK_N) < end
        mask, v_mask = inside[None, :] & exists[:, None], inside[:, None] & exists_v[None, :]
        k = tl.load(k_ptr + tl.trans(k_tile), mask=mask, other=0.0)
        v = tl.load(v_ptr + v_tile, mask=v_mask, other=0.0).to(OPERAND)
        if e_ptr is not None:
            k = k.to(tl.float32) + tl.load(e_ptr + tl.trans(e_tile), mask=mask, other=0.0).to(tl.float32)
            e_ptr = _next(e_ptr, e_strides, C)
        if C.KEY_WEIGHT:
            w = _to_columns(_load_weight(wk_ptr, wk_strides, head, heads, inside, 0.0, C), C)
            wk_ptr = _next(wk_ptr, wk_strides, C)
            phi = (PHI(k.to(tl.float32), 1.0, C.EXPONENT) * tl.trans(w)).to(OPERAND)
        else:
            phi = PHI_ROUNDED(k, PHI, C.EXPONENT, OPERAND)
        plus = tl.dot(phi, v, plus, input_precision=PRECISION)
        if C.NORMALIZE:
            z = add_to_sums(z, phi, twos, start < last, PRECISION)
        k_ptr, v_ptr = _next(k_ptr, k_strides, C), _next(v_ptr, v_strides, C)

    one = 1.0 / tl.maximum(count, 1).to(tl.float32)
    if C.MEAN:
        scale = one
    return _mask_plain(plus * scale, _add_halves(z * one, C), C)


@jit
def sum_operand(begin, end, OPERAND: tl.constexpr, C: tl.constexpr):
    """The first row of the last tile, and what tiles of features are multiplied with for their sums over rows.

    The first half of the sums' 16 columns is of all tiles but the last, the second half of the last without the rows
    that do not exist, of which φ(0) may be much more than a feature.
    """
    last = begin + (tl.maximum(end - begin, 1) - 1) // C.BLOCK_N * C.BLOCK_N
    exists = (tl.arange(0, 16) < 8)[None, :] | (last + tl.arange(0, C.BLOCK_N) < end)[:, None]
    return last, tl.where(exists, 2.0, 0.0).to(OPERAND)


@jit
def add_to_sums(sums, phi, twos, before_last, PRECISION: tl.constexpr):
    """The sums with those of one more tile.

    Twos and halves: by itself the compiler would make the loop's products one sum that goes on through it, and then
    wait after each instruction of either.
    """
    halves = tl.where(tl.arange(0, 16) < 8, 0.5, 0.0)[None, :]
    return sums + tl.where(before_last, halves, 0.5 - halves) * tl.dot(phi, twos, input_precision=PRECISION)


@jit
def write_plain_output(
    q_ptr, q_strides, o_ptr, o_strides, plus, z, batch, head, heads, first, begin, end, eps,
    PHI: tl.constexpr, PHI_ROUNDED: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """o = φ(q) S / (φ(q) · z + ε)."""
    h, d, exists = _columns(head, heads, C.D, C.BLOCK_D, C)
    q_ptr, q_tile = _tile(q_ptr, q_strides, batch, head, first + begin, h, d, C)
    o_ptr, o_tile = rows_tile(o_ptr, o_strides, batch, head, first + begin, C.BLOCK_DV, C)
    plus = order_columns(plus, C).to(OPERAND)
    z = _z_operand(z, OPERAND, C)

    for start in range(begin, end, C.BLOCK_N):
        inside = tl.arange(0, C.BLOCK_N) < end - start
        q = tl.load(q_ptr + q_tile, mask=inside[:, None] & exists[None, :], other=0.0)
        phi = PHI_ROUNDED(q, PHI, C.EXPONENT, OPERAND)
        o = tl.dot(phi, plus, input_precision=PRECISION)
        if C.NORMALIZE:
            denominator = _by_thread(tl.dot(phi, z, input_precision=PRECISION), C)
            o *= _to_value_columns(fast_inverse(denominator + eps), C)
        # said otherwise than for the load, which comes tiles before: its masks would be kept until here
        store_rows(o_ptr + o_tile, o, start + row_order(C) < end, head, heads, C.DV, C.BLOCK_DV, C)
        q_ptr, o_ptr = _next(q_ptr, q_strides, C), _next(o_ptr, o_strides, C)


@jit
def differentiate_plain_queries(
    q_ptr, q_strides, do_ptr, do_strides, dq_ptr, dq_strides, plus, z, mean, batch, head, heads, first, begin, end, eps,
    PHI: tl.constexpr, PHI_DX: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr,
    SUMS: tl.constexpr,
):  # fmt: skip
    """Writes the queries' gradients, and returns dS (DV, D), and dz in parts (BLOCK_N / 16, 8, D) to be added up.

    S is (DV, D) here and z (D), as ``_load_state`` gives them, and ``mean`` the values' mean; or all three are
    ``load_centered_state``'s. Without ``SUMS`` neither dS nor dz is needed.
    """
    _, _, exists = _columns(head, heads, C.D, C.BLOCK_D, C)
    hv, c, exists_v = _columns(head, heads, C.DV, C.BLOCK_DV, C)
    q_ptr, q_tile = rows_tile(q_ptr, q_strides, batch, head, first + begin, C.BLOCK_D, C)
    do_ptr, do_tile = _tile(do_ptr, do_strides, batch, head, first + begin, hv, c, C)
    dq_ptr, dq_tile = rows_tile(dq_ptr, dq_strides, batch, head, first + begin, C.BLOCK_D, C)
    identity = _identity(C.BLOCK_D, OPERAND, OPERAND)
    if len(z.shape) == 1:
        plus, z = order_columns(plus, C).to(OPERAND), order_columns(z, C)[None, :]
    mean = _vector_operand(mean, C.BLOCK_DV, OPERAND, C)
    rows = row_order(C)
    d_plus = _zeros(C.BLOCK_DV, C.BLOCK_D)
    dz = _zeros3(C.BLOCK_N // 16, 8, C.BLOCK_D)

    for start in range(begin, end, C.BLOCK_N):
        inside = tl.arange(0, C.BLOCK_N) < end - start
        q = load_rows(q_ptr + q_tile, rows < end - start, head, heads, C.D, C.BLOCK_D, C)
        do = tl.load(do_ptr + do_tile, mask=inside[:, None] & exists_v[None, :], other=0.0).to(OPERAND)
        q = as_product(q, identity, OPERAND, C)
        phi = PHI(q, 1.0, C.EXPONENT)
        d_phi = tl.dot(do, plus, input_precision=PRECISION)
        if C.NORMALIZE:
            inverse, weight = _both_by_head(phi * z, phi * d_phi, C)
            inverse = fast_inverse(inverse + tl.where(inside[:, None], eps, 1.0))
            # -dn · o / (φ(q) · z + ε), with what the mean has taken out of S
            weight = (eps * _vector_product(do, mean, PRECISION, C) - weight) * inverse
            inverse, weight = _to_columns(inverse, C), _to_columns(weight, C)
            d_phi += weight * z
            scaled = phi * inverse
            if SUMS:
                dz = _add_products(dz, scaled, weight, C)
        else:
            scaled, inverse = phi, 1.0
        if SUMS:
            d_plus = tl.dot(tl.trans(do), scaled.to(OPERAND), d_plus, input_precision=PRECISION)
        dq = d_phi * PHI_DX(q, scaled, 1.0, C.EXPONENT, inverse)
        store_rows(dq_ptr + dq_tile, dq, start + rows < end, head, heads, C.D, C.BLOCK_D, C)
        q_ptr, do_ptr, dq_ptr = _next(q_ptr, q_strides, C), _next(do_ptr, do_strides, C), _next(dq_ptr, dq_strides, C)

    d_plus, dz = order_columns(d_plus, C), order_columns(dz, C)
    if C.GROUP * C.D < C.BLOCK_D:  # φ need not be zero in columns that do not exist
        d_plus, dz = tl.where(exists[None, :], d_plus, 0.0), tl.where(exists[None, None, :], dz, 0.0)
    return _mask_heads(d_plus, C), dz


@jit
def differentiate_plain_keys(
    k_ptr, k_strides, e_ptr, e_strides, v_ptr, v_strides, dk_ptr, dk_strides, dv_ptr, dv_strides, d_plus, dz, scale,
    batch, head, heads, first, begin, end,
    PHI: tl.constexpr, PHI_DX: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of keys and values, from dS (DV, D), rounded, and dz (D), with all factors but s."""
    k_ptr, k_tile = rows_tile(k_ptr, k_strides, batch, head, first + begin, C.BLOCK_D, C)
    v_ptr, v_tile = rows_tile(v_ptr, v_strides, batch, head, first + begin, C.BLOCK_DV, C)
    dk_ptr, dk_tile = rows_tile(dk_ptr, dk_strides, batch, head, first + begin, C.BLOCK_D, C)
    dv_ptr, dv_tile = rows_tile(dv_ptr, dv_strides, batch, head, first + begin, C.BLOCK_DV, C)
    if e_ptr is not None:
        e_ptr, e_tile = rows_tile(e_ptr, e_strides, 0, head, begin, C.BLOCK_D, C)
    identity = _identity(C.BLOCK_D, OPERAND, OPERAND)
    if C.MEAN:
        scale = 1.0
    d_plus, dz = order(d_plus, C).to(OPERAND), order_columns(dz, C)[None, :]
    rows = row_order(C)

    for start in range(begin, end, C.BLOCK_N):
        k = load_rows(k_ptr + k_tile, rows < end - start, head, heads, C.D, C.BLOCK_D, C)
        v = load_rows(v_ptr + v_tile, rows < end - start, head, heads, C.DV, C.BLOCK_DV, C).to(OPERAND)
        k = as_product(k, identity, OPERAND, C)
        if e_ptr is not None:
            e = load_rows(e_ptr + e_tile, rows < end - start, head, heads, C.D, C.BLOCK_D, C)
            k += as_product(e, identity, OPERAND, C)
            e_ptr = _next(e_ptr, e_strides, C)
        phi = PHI(k, 1.0, C.EXPONENT)
        dv = tl.dot(phi.to(OPERAND), tl.trans(d_plus), input_precision=PRECISION) * scale
        store_rows(dv_ptr + dv_tile, dv, start + rows < end, head, heads, C.DV, C.BLOCK_DV, C)
        d_phi = tl.dot(v, d_plus, input_precision=PRECISION) * scale
        if C.NORMALIZE:
            d_phi += dz
        dk = d_phi * PHI_DX(k, phi, 1.0, C.EXPONENT)
        store_rows(dk_ptr + dk_tile, dk, start + rows < end, head, heads, C.D, C.BLOCK_D, C)
        k_ptr, v_ptr = _next(k_ptr, k_strides, C), _next(v_ptr, v_strides, C)
        dk_ptr, dv_ptr = _next(dk_ptr, dk_strides, C), _next(dv_ptr, dv_strides, C)


@jit
def plain_gradient_operands(d_plus, dz, mean, count, OPERAND: tl.constexpr, C: tl.constexpr):
    """dS and dz of ``differentiate_plain_keys`` from their sums; dz (D), or in parts.

    (v - m) dSᵀ = v dSᵀ - m dSᵀ with the same rounded dS: the mean cancels although v enters the product as it is.
    """
    one = 1.0 / tl.maximum(count, 1).to(tl.float32)
    if C.MEAN:
        d_plus *= one
        dz *= one
        one = 1.0
    d_plus = d_plus.to(OPERAND).to(tl.float32)
    if C.CENTER:
        shift = mean[:, None] * d_plus
        if len(dz.shape) == 3 and C.BLOCK_N == C.BLOCK_DV:  # one sum over rows for both
            dz -= _by_eighth(shift, C)
            dz = _sum_eighths(dz)
        else:
            dz = (_sum_eighths(dz) if len(dz.shape) == 3 else dz) - tl.sum(shift, 0)
    elif len(dz.shape) == 3:
        dz = _sum_eighths(dz)
    return d_plus, dz * one
