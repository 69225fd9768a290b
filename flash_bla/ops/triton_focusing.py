"""``focusing_power`` in Triton: the outputs of all heads of a token, by a loop that computes its norm ratio as well.

A ratio takes all channels of its token. Where a program has those of the queries, no other need have read them before.
With u = (max(q, 0) + 1e-6) / scale, s = u² / ‖u‖² and the keys' sums S and z,

    o = uᵖ S / (uᵖ · z + ε / r),  r = ‖u‖^(1 - p) / (Σ sᵖ)^½

The keys' ratios are better computed apart: sums of all heads take the registers that this needs. For other names see
triton_kernels.py and triton_norm_ratios.py.
"""

from __future__ import annotations

from flash_bla.ops.feature_maps import integer_power
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
from flash_bla.ops.triton_plain import _by_thread, _to_value_columns, vector_by_thread
from flash_bla.ops.triton_support import NOT_SPECIALIZED, fast_inverse, jit, share, tl, wait_for_inputs
from flash_bla.ops.triton_tiles import _identity, _load_state, _next, _start, _zeros


@jit(do_not_specialize=NOT_SPECIALIZED)
def focusing_output_kernel(
    q_ptr, q_strides, o_ptr, o_strides, a_ptr, wq_ptr, wq_strides, state_ptr, query_length, eps,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """The outputs, ratios and inverse norms of one split (axis 1) of a sequence's queries (axis 0).

    Heads are in GROUPS tiles.
    """
    wait_for_inputs()
    GROUPS: tl.constexpr = (HEADS + C.GROUP - 1) // C.GROUP
    batch, zero = tl.program_id(0).to(tl.int64), tl.full((), 0, tl.int32)
    begin, end = share(query_length, tl.program_id(1), tl.num_programs(1), C.BLOCK_N)
    padded = tl.cdiv(query_length, 16) * 16  # the rows that ratios have
    q_ptr, q_tile = rows_tile(q_ptr, q_strides, batch, zero, begin, C.BLOCK_D, C)
    o_ptr, o_tile = rows_tile(o_ptr, o_strides, batch, zero, begin, C.BLOCK_DV, C)
    wq_ptr = _start(wq_ptr, wq_strides, batch, zero, begin)
    q_step, o_step = tl.cast(q_strides[1], tl.int64) * C.GROUP, tl.cast(o_strides[1], tl.int64) * C.GROUP
    identity = _identity(C.BLOCK_D, OPERAND, OPERAND)
    inverse_scales, states, sums = (), (), ()
    order_of_rows = row_order(C)
    for group in tl.static_range(GROUPS):
        head = zero + group * C.GROUP
        inverse_scales = inverse_scales + (1.0 / ordered_parameter(a_ptr, head, HEADS, C),)
        plus, z = _load_state(state_ptr, batch * HEADS + head, head, HEADS, C)
        states = states + (tl.trans(order(plus, C).to(OPERAND)),)
        sums = sums + (vector_by_thread(order_columns(z, C), OPERAND, C),)

    for start in range(begin, end, C.BLOCK_N):
        u = ()
        squares = _zeros(C.BLOCK_N, C.BLOCK_D)
        for group in tl.static_range(GROUPS):
            head = zero + group * C.GROUP
            inside = order_of_rows < end - start
            q = load_rows(q_ptr + group * q_step + q_tile, inside, head, HEADS, C.D, C.BLOCK_D, C)
            q = as_product(q, identity, OPERAND, C, ANCHORED=True)
            u = u + ((tl.maximum(q, 0.0) + 1e-6) * inverse_scales[group],)
            squares += u[group] * u[group]
        inverse_norm = tl.rsqrt(tl.sum(squares, 1)[:, None])
        inverse_n = inverse_norm * inverse_norm
        powers = _zeros(C.BLOCK_N, C.BLOCK_D)
        for group in tl.static_range(GROUPS):
            powers += integer_power(u[group] * u[group] * inverse_n, C.EXPONENT)
        ratio = integer_power(inverse_norm, C.EXPONENT - 1) * tl.rsqrt(tl.sum(powers, 1)[:, None])
        least = (eps / ratio)[:, :, None]
        rows = start - begin + tl.arange(0, C.BLOCK_N)
        pointers, written = wq_ptr + (rows * wq_strides[2])[:, None], (rows < padded - begin)[:, None]
        tl.store(pointers, ratio, mask=written)
        tl.store(pointers + wq_strides[0] // 2, inverse_norm, mask=written)
        for group in tl.static_range(GROUPS):
            phi = integer_power(u[group], C.EXPONENT).to(OPERAND)
            o = tl.dot(phi, states[group], input_precision=PRECISION)
            denominators = _by_thread(tl.dot(phi, sums[group], input_precision=PRECISION), C)
            o *= _to_value_columns(fast_inverse(denominators + least), C)
            head = zero + group * C.GROUP
            inside = start + order_of_rows < end  # said otherwise than for the loads: see ``write_plain_output``
            store_rows(o_ptr + group * o_step + o_tile, o, inside, head, HEADS, C.DV, C.BLOCK_DV, C)
        q_ptr, o_ptr = _next(q_ptr, q_strides, C), _next(o_ptr, o_strides, C)
