"""Linear attention in Triton: the kernels of ``signed_power``, whose loops are those of triton_signed.py."""

from __future__ import annotations

from flash_bla.ops.triton_signed import (
    differentiate_signed_keys,
    differentiate_signed_queries,
    load_centered_states,
    load_states,
    store_states,
    store_vectors,
    sum_signed_keys,
    swapped,
    write_signed_output,
)
from flash_bla.ops.triton_support import NOT_SPECIALIZED, jit, share, tl, wait_for_inputs
from flash_bla.ops.triton_tiles import _columns, _place, _split_at

# --- the kernels: a program for each group of heads (axis 0) and split (axis 1) ---------------------------------------


@jit(do_not_specialize=NOT_SPECIALIZED)
def signed_state_kernel(
    k_ptr, k_strides, e_ptr, e_strides, v_ptr, v_strides, a_ptr, wk_ptr, wk_strides, cu_seqlens, state_ptr, key_length,
    heads, scale,
    PHI: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """R and r of one split of the keys."""
    wait_for_inputs()
    sequence, batch, head, first, count = _place(heads, cu_seqlens, key_length, C)
    begin, end = share(count, tl.program_id(1), tl.num_programs(1), C.BLOCK_N)
    plus, minus, r_plus, r_minus = sum_signed_keys(
        k_ptr, k_strides, e_ptr, e_strides, v_ptr, v_strides, a_ptr, wk_ptr, wk_strides, batch, head, heads, first,
        begin, end, count, scale, PHI, OPERAND, PRECISION, C,
    )  # fmt: skip
    at = _split_at(sequence, heads, C) + head
    store_states(state_ptr, at, head, heads, plus, minus, C)
    store_vectors(state_ptr, at, head, heads, r_plus, r_minus, C)


@jit(do_not_specialize=NOT_SPECIALIZED)
def signed_output_kernel(
    q_ptr, q_strides, o_ptr, o_strides, a_ptr, cu_seqlens, state_ptr, query_length, heads, eps,
    PHI: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The output of one split of the queries."""
    wait_for_inputs()
    sequence, batch, head, first, count = _place(heads, cu_seqlens, query_length, C)
    begin, end = share(count, tl.program_id(1), tl.num_programs(1), C.BLOCK_N)
    plus, minus, r_plus, r_minus = load_states(state_ptr, sequence * heads + head, head, heads, C)
    plus, minus = swapped(plus, minus, C)
    write_signed_output(
        q_ptr, q_strides, o_ptr, o_strides, a_ptr, plus, minus, r_plus, r_minus, batch, head, heads, first, begin, end,
        eps, PHI, OPERAND, PRECISION, C,
    )  # fmt: skip


@jit(do_not_specialize=NOT_SPECIALIZED)
def signed_query_kernel(
    q_ptr, q_strides, do_ptr, do_strides, a_ptr, cu_seqlens, state_ptr, d_state_ptr, mean_ptr, rows_ptr, rows_strides,
    dq_ptr, dq_strides, da_ptr, query_length, heads, eps,
    PHI: tl.constexpr, PHI_DX: tl.constexpr, PHI_DA: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    C: tl.constexpr, SUMS: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """dq of one split of the queries, its sums for the keys' gradients, and the values' mean."""
    wait_for_inputs()
    sequence, batch, head, first, count = _place(heads, cu_seqlens, query_length, C)
    begin, end = share(count, tl.program_id(1), tl.num_programs(1), C.BLOCK_N)
    at = sequence * heads + head
    plus, minus, r_plus, r_minus, mean = load_centered_states(state_ptr, at, head, heads, C)
    d_plus, d_minus, dr_plus, dr_minus, da = differentiate_signed_queries(
        q_ptr, q_strides, do_ptr, do_strides, a_ptr, rows_ptr, rows_strides, dq_ptr, dq_strides, plus, minus, r_plus,
        r_minus, mean, batch, head, heads, first, begin, end, eps, PHI, PHI_DX, PHI_DA, OPERAND, PRECISION, C,
        SUMS, GRADIENT,
    )  # fmt: skip
    splits = _split_at(sequence, heads, C) + head
    if SUMS:
        store_states(d_state_ptr, splits, head, heads, d_plus, d_minus, C)
        if tl.program_id(1) == 0:
            hv, c, exists = _columns(head, heads, C.DV, C.BLOCK_DV, C)
            tl.store(mean_ptr + (at + hv) * C.DV + c, mean, mask=exists)
    if GRADIENT:
        store_vectors(d_state_ptr, splits, head, heads, dr_plus, dr_minus, C)
        h, d, exists = _columns(head, heads, C.D, C.BLOCK_D, C)
        tl.store(da_ptr + (splits + h) * C.D + d, da, mask=exists)


@jit(do_not_specialize=NOT_SPECIALIZED)
def signed_key_kernel(
    k_ptr, k_strides, e_ptr, e_strides, v_ptr, v_strides, a_ptr, wk_ptr, wk_strides, cu_seqlens, d_state_ptr, mean_ptr,
    dk_ptr, dk_strides, dv_ptr, dv_strides, dwk_ptr, dwk_strides, da_ptr, key_length, heads, scale,
    PHI: tl.constexpr, PHI_DX: tl.constexpr, PHI_DA: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """The gradients of one split of the keys and values, and terms of the power's."""
    wait_for_inputs()
    sequence, batch, head, first, count = _place(heads, cu_seqlens, key_length, C)
    begin, end = share(count, tl.program_id(1), tl.num_programs(1), C.BLOCK_N)
    at = sequence * heads + head
    hv, c, exists = _columns(head, heads, C.DV, C.BLOCK_DV, C)
    mean = tl.load(mean_ptr + (at + hv) * C.DV + c, mask=exists, other=0.0)
    d_plus, d_minus, dr_plus, dr_minus = load_states(d_state_ptr, at, head, heads, C)
    d_plus, d_minus = swapped(d_plus, d_minus, C)
    da = differentiate_signed_keys(
        k_ptr, k_strides, e_ptr, e_strides, v_ptr, v_strides, a_ptr, wk_ptr, wk_strides, dk_ptr, dk_strides, dv_ptr,
        dv_strides, dwk_ptr, dwk_strides, d_plus, d_minus, dr_plus, dr_minus, mean, batch, head, heads, first, begin,
        end, count, scale, PHI, PHI_DX, PHI_DA, OPERAND, PRECISION, C,
    )  # fmt: skip
    h, d, exists = _columns(head, heads, C.D, C.BLOCK_D, C)
    tl.store(da_ptr + (_split_at(sequence, heads, C) + head + h) * C.D + d, da, mask=exists)


@jit(do_not_specialize=NOT_SPECIALIZED)
def signed_forward_kernel(
    q_ptr, q_strides, k_ptr, k_strides, e_ptr, e_strides, v_ptr, v_strides, o_ptr, o_strides, a_ptr, wk_ptr, wk_strides,
    state_ptr, query_length, key_length, heads, scale, eps,
    PHI: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The whole forward pass of a sequence; it keeps its state where there is a state_ptr."""
    wait_for_inputs()
    sequence, batch, head, _, _ = _place(heads, None, key_length, C)
    plus, minus, r_plus, r_minus = sum_signed_keys(
        k_ptr, k_strides, e_ptr, e_strides, v_ptr, v_strides, a_ptr, wk_ptr, wk_strides, batch, head, heads, 0, 0,
        key_length, key_length, scale, PHI, OPERAND, PRECISION, C,
    )  # fmt: skip
    if state_ptr is not None:
        at = sequence * heads + head
        store_states(state_ptr, at, head, heads, plus, minus, C)
        store_vectors(state_ptr, at, head, heads, r_plus, r_minus, C)
    plus, minus = swapped(plus, minus, C)
    write_signed_output(
        q_ptr, q_strides, o_ptr, o_strides, a_ptr, plus, minus, r_plus, r_minus, batch, head, heads, 0, 0, query_length,
        eps, PHI, OPERAND, PRECISION, C,
    )  # fmt: skip


@jit(do_not_specialize=NOT_SPECIALIZED)
def signed_backward_kernel(
    q_ptr, q_strides, k_ptr, k_strides, e_ptr, e_strides, v_ptr, v_strides, do_ptr, do_strides, a_ptr, wk_ptr,
    wk_strides, state_ptr, d_state_ptr, rows_ptr, rows_strides, dq_ptr, dq_strides, dk_ptr, dk_strides, dv_ptr,
    dv_strides, dwk_ptr, dwk_strides, da_ptr, query_length, key_length, heads, scale, eps,
    PHI: tl.constexpr, PHI_DX: tl.constexpr, PHI_DA: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """The whole backward pass of a sequence."""
    wait_for_inputs()
    sequence, batch, head, _, _ = _place(heads, None, key_length, C)
    at = sequence * heads + head
    plus, minus, r_plus, r_minus, mean = load_centered_states(state_ptr, at, head, heads, C)
    AT_ONCE: tl.constexpr = rows_ptr is None
    d_plus, d_minus, dr_plus, dr_minus, da = differentiate_signed_queries(
        q_ptr, q_strides, do_ptr, do_strides, a_ptr, rows_ptr, rows_strides, dq_ptr, dq_strides, plus, minus, r_plus,
        r_minus, mean, batch, head, heads, 0, 0, query_length, eps, PHI, PHI_DX, PHI_DA, OPERAND, PRECISION, C,
        True, AT_ONCE,
    )  # fmt: skip
    if not AT_ONCE:
        store_states(d_state_ptr, at, head, heads, d_plus, d_minus, C)  # registers would not hold them meanwhile
        tl.debug_barrier()  # what comes reads what other threads have written
        _, _, dr_plus, dr_minus, da = differentiate_signed_queries(
            q_ptr, q_strides, do_ptr, do_strides, a_ptr, rows_ptr, rows_strides, dq_ptr, dq_strides, plus, minus,
            r_plus, r_minus, mean, batch, head, heads, 0, 0, query_length, eps, PHI, PHI_DX, PHI_DA, OPERAND,
            PRECISION, C, False, True,
        )  # fmt: skip
        d_plus, d_minus, _, _ = load_states(d_state_ptr, at, head, heads, C)
    d_plus, d_minus = swapped(d_plus, d_minus, C)
    da += differentiate_signed_keys(
        k_ptr, k_strides, e_ptr, e_strides, v_ptr, v_strides, a_ptr, wk_ptr, wk_strides, dk_ptr, dk_strides, dv_ptr,
        dv_strides, dwk_ptr, dwk_strides, d_plus, d_minus, dr_plus, dr_minus, mean, batch, head, heads, 0, 0,
        key_length, key_length, scale, PHI, PHI_DX, PHI_DA, OPERAND, PRECISION, C,
    )  # fmt: skip
    h, d, exists = _columns(head, heads, C.D, C.BLOCK_D, C)
    tl.store(da_ptr + (at + h) * C.D + d, da, mask=exists)
