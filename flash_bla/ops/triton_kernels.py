"""Linear attention in Triton: the kernels.

With φ the numerator's features (turned by the rotary encoding, if any) and φ̃ the denominator's, forward and backward
pass are four loops over rows, of which each reads and writes every tensor once:

    sum_keys              S = s Σ φ(k)ᵀ v,  z = Σ φ̃(k) / M
    write_output          o = φ(q) S / (φ̃(q) · z + ε)
    differentiate_queries dφ(q) = dn Sᵀ,  dφ̃(q) = c z;  sums dS = Σ φ(q)ᵀ dn,  dz = Σ c φ̃(q)
    differentiate_keys    dφ(k) = s v dSᵀ,  dφ̃(k) = dz / M,  dv = s φ(k) dS

where dn = do / (φ̃(q) · z + ε) and c = -dn · o / (φ̃(q) · z + ε) = -φ(q) · (dn Sᵀ) / (φ̃(q) · z + ε): the backward pass
needs no o.

Where numerator and denominator have the same features, the values' mean m = Σ S / Σ z is taken out of S and v in the
backward pass, S - z m and v - m: gradients are differences between values and outputs, and are then not left to cancel
between terms as large as the mean.

Short sequences take one launch a direction, a program for each (``forward_kernel``, ``backward_kernel``). Long ones are
split: the sums of the splits are added up, always in the same order, by ``reduce_kernel``.

Heads narrower than a tile share one: GROUP heads stand side by side in its columns, each in as many as the next power
of two, so that whole cache lines are read, and their states are the diagonal blocks of one matrix whose other blocks
are zero.

``signed_power`` has loops of its own: triton_signed.py. So has what asks for nothing but a feature map, in bfloat16:
triton_plain.py; other keys' sums are by its loop, too, where they can (``_sum_keys``). The outputs of focusing_power
have one in triton_focusing.py, where a token's heads are few.

An encoding of the keys' places, the same for all sequences, is added to them before their feature map.

With ``SOFTMAX`` the keys' weights are w = M softmax(D^-0.5 · mean(φ(q)) · φ(k)). The queries are summed first
(``query_sum_kernel``); the keys' sums then keep a running maximum, and ``merge_kernel`` puts those of splits together.
Backward, w dw / M summed over the keys is S dS + z dz, so that it takes no pass of its own. But the mean's gradient
comes from the keys, and so the queries' gradients are a launch after theirs.

Rows outside a sequence are zeros, whose features need not be zero: their values and output gradients are, and what
belongs to them is not written. Only z sums keys alone: there padding stands where φ is zero, or such rows are left out.

Precision: features, sums and denominators are float32. Operands of matrix products, of which some are sums of features,
are bfloat16 for bfloat16 inputs, and float32 otherwise, never tf32: sums over thousands of tokens and powers of
features overflow float16.

Speed: these loops are bound by memory only while they issue few instructions. So v and do go to the matrix units as
they are; what divides or shifts them is applied to features and products. The states are kept transposed, (DV, D), for
which the backward pass has no operand to transpose that was computed. A tile is computed in one register layout, that
of products' results: where layouts differ, the compiler computes features once for each. triton_order.py has the order
of columns in which tiles come from memory, and go there, in that layout.
"""

from __future__ import annotations

from flash_bla.ops.triton_loops import differentiate_keys, differentiate_queries, sum_keys, write_output
from flash_bla.ops.triton_plain import (
    add_to_sums,
    differentiate_plain_keys,
    differentiate_plain_queries,
    load_centered_state,
    load_plain_state,
    plain_gradient_operands,
    store_centered_state,
    store_plain_state,
    sum_operand,
    sum_plain_keys,
    write_plain_output,
)
from flash_bla.ops.triton_support import NOT_SPECIALIZED, jit, prefetch_rows, share, tl, wait_for_inputs
from flash_bla.ops.triton_tiles import (
    _by_head,
    _center,
    _columns,
    _load_factor,
    _load_parameter,
    _load_softmax,
    _load_state,
    _next,
    _place,
    _split_at,
    _store_softmax,
    _store_state,
    _sum_eighths,
    _sum_query_splits,
    _sum_splits,
    _tile,
    _times_factor,
    _zeros,
)

# --- the kernels: a program for each group of heads (axis 0) and split (axis 1) ---------------------------------------


@jit
def _sum_keys(
    k_ptr, k_strides, e_ptr, e_strides, kd_ptr, kd_strides, v_ptr, v_strides, a_ptr, wk_ptr, wk_strides, rope_ptr,
    rope_strides, mean, batch, head, heads, first, begin, end, count, scale,
    PHI: tl.constexpr, PHI_ROUNDED: tl.constexpr, PAD: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """What ``sum_keys`` returns, by the faster loop where a feature depends on its own channel and weight alone."""
    if C.ROPE or C.DECOUPLED or C.SOFTMAX or C.RATIOS:
        return sum_keys(
            k_ptr, k_strides, e_ptr, e_strides, kd_ptr, kd_strides, v_ptr, v_strides, a_ptr, wk_ptr, wk_strides,
            rope_ptr, rope_strides, mean, batch, head, heads, first, begin, end, count, scale,
            PHI, PAD, OPERAND, PRECISION, C,
        )  # fmt: skip
    else:
        plus, z = sum_plain_keys(
            k_ptr, k_strides, e_ptr, e_strides, v_ptr, v_strides, wk_ptr, wk_strides, batch, head, heads, first, begin,
            end, count, scale, PHI, PHI_ROUNDED, OPERAND, PRECISION, C,
        )  # fmt: skip
        plus, z = tl.trans(plus), tl.sum(z, 1) / z.shape[1]
        plus, z = _times_factor(plus, z, _load_factor(a_ptr, head, heads, C), C)
        return plus, z, 0.0


@jit
def _scale_gradient(a_ptr, plus, z_plus, d_plus, dz_plus, head, heads, C: tl.constexpr):
    """The gradient of the focusing map's scale: by channel Σ φ dφ of queries is S dS + z dz, and so is that of keys."""
    scale = tl.reshape(_load_parameter(a_ptr, head, heads, C), C.BLOCK_D)
    return (tl.sum(plus * d_plus, 0) + z_plus * dz_plus) * (-2.0 * C.EXPONENT / scale)


@jit
def _store_parameter_gradient(da_ptr, at, head, heads, da, C: tl.constexpr):
    h, channel, exists = _columns(head, heads, C.D, C.BLOCK_D, C)
    tl.store(da_ptr + (at + h) * C.D + channel, da, mask=exists)


@jit(do_not_specialize=NOT_SPECIALIZED)
def query_sum_kernel(
    q_ptr, q_strides, query_sum_ptr, query_length, heads,
    PHI: tl.constexpr, PHI_ROUNDED: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Σ φ(q) over one split of the queries."""
    wait_for_inputs()
    sequence, batch, head, first, count = _place(heads, None, query_length, C)
    begin, end = share(count, tl.program_id(1), tl.num_programs(1), C.BLOCK_N)
    h, d, exists = _columns(head, heads, C.D, C.BLOCK_D, C)
    q_ptr, q_tile = _tile(q_ptr, q_strides, batch, head, first + begin, h, d, C)
    total = _zeros(C.BLOCK_D, 16)
    last, twos = sum_operand(begin, end, OPERAND, C)
    for start in range(begin, end, C.BLOCK_N):
        inside = start + tl.arange(0, C.BLOCK_N) < end
        q = tl.load(q_ptr + tl.trans(q_tile), mask=inside[None, :] & exists[:, None], other=0.0)
        phi = PHI_ROUNDED(q, PHI, C.EXPONENT, OPERAND)
        total = add_to_sums(total, phi, twos, start < last, PRECISION)
        q_ptr = _next(q_ptr, q_strides, C)
    at = _split_at(sequence, heads, C) + head
    tl.store(query_sum_ptr + (at + h) * C.D + d, tl.sum(total, 1) / 8, mask=exists)


@jit
def _softmax_scale(query_length, D: tl.constexpr):
    """What makes of Σ φ(q) the vector whose products with keys are a softmax's logarithms to base 2."""
    return (1.4426950408889634 * D**-0.5) / tl.maximum(query_length, 1).to(tl.float32)


@jit(do_not_specialize=NOT_SPECIALIZED)
def state_kernel(
    k_ptr, k_strides, e_ptr, e_strides, kd_ptr, kd_strides, v_ptr, v_strides, a_ptr, wk_ptr, wk_strides, rope_ptr,
    rope_strides, cu_seqlens, query_sum_ptr, state_ptr, query_length, key_length, heads, query_splits, scale,
    PHI: tl.constexpr, PHI_ROUNDED: tl.constexpr, PAD: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """The sums over one split of the keys."""
    wait_for_inputs()
    sequence, batch, head, first, count = _place(heads, cu_seqlens, key_length, C)
    begin, end = share(count, tl.program_id(1), tl.num_programs(1), C.BLOCK_N)
    if C.PLAIN:
        plus, z_plus = sum_plain_keys(
            k_ptr, k_strides, e_ptr, e_strides, v_ptr, v_strides, wk_ptr, wk_strides, batch, head, heads, first, begin,
            end, count, scale, PHI, PHI_ROUNDED, OPERAND, PRECISION, C,
        )  # fmt: skip
        store_plain_state(state_ptr, _split_at(sequence, heads, C) + head, head, heads, plus, z_plus, C)
        return
    mean = 0.0
    if C.SOFTMAX:
        mean = _sum_query_splits(query_sum_ptr, sequence * heads + head, query_splits, head, heads, C)
        mean = mean[None, :] * _softmax_scale(query_length, C.D)
    plus, z_plus, logarithm = _sum_keys(
        k_ptr, k_strides, e_ptr, e_strides, kd_ptr, kd_strides, v_ptr, v_strides, a_ptr, wk_ptr, wk_strides, rope_ptr,
        rope_strides, mean, batch, head, heads, first, begin, end, count, scale,
        PHI, PHI_ROUNDED, PAD, OPERAND, PRECISION, C,
    )  # fmt: skip
    at = _split_at(sequence, heads, C) + head
    _store_state(state_ptr, at, head, heads, plus, z_plus, C)
    if C.SOFTMAX:
        _store_softmax(state_ptr, at, head, heads, mean, logarithm, C)


@jit(do_not_specialize=NOT_SPECIALIZED)
def reduce_kernel(partial_ptr, sum_ptr, length, splits, BLOCK: tl.constexpr, SPLITS: tl.constexpr):
    """Adds up ``splits`` arrays of ``length``."""
    wait_for_inputs()
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        mask = (split < splits)[:, None] & (i < length)[None, :]
        partial = tl.load(partial_ptr + split.to(tl.int64)[:, None] * length + i[None, :], mask=mask, other=0.0)
        total += tl.sum(partial, 0)
    tl.store(sum_ptr + i, total, mask=i < length)


@jit(do_not_specialize=NOT_SPECIALIZED)
def merge_kernel(
    partial_ptr, query_sum_ptr, state_ptr, query_length, splits, query_splits,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The state of ``SOFTMAX`` from the splits': a program for each head (axis 0) and block of S and z (axis 1)."""
    wait_for_inputs()
    at, heads = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    partial_ptr += at * (ROWS * D)
    state_ptr += at * (ROWS * D)
    split = tl.arange(0, SPLITS)
    maximum = tl.full((SPLITS,), -1e30, tl.float32)
    for first in range(0, splits, SPLITS):
        offsets = (first + split).to(tl.int64) * heads * (ROWS * D) + (ROWS - 1) * D
        maximum = tl.maximum(maximum, tl.load(partial_ptr + offsets, mask=first + split < splits, other=-1e30))
    maximum = tl.max(maximum, 0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = i < (ROWS - 2) * D
    sums, total = tl.zeros((BLOCK,), tl.float32), tl.zeros((SPLITS,), tl.float32)
    for first in range(0, splits, SPLITS):
        mask = first + split < splits
        offsets = (first + split).to(tl.int64) * heads * (ROWS * D)
        share = tl.load(partial_ptr + offsets + (ROWS - 1) * D, mask=mask, other=float("-inf"))
        share = tl.exp2(share - maximum)
        total += share
        partial = partial_ptr + offsets[:, None] + i[None, :]
        sums += tl.sum(share[:, None] * tl.load(partial, mask=mask[:, None] & exists[None, :], other=0.0), 0)
    total = tl.sum(total, 0)
    tl.store(state_ptr + i, sums / tl.maximum(total, 1e-30), mask=exists)  # zero without any keys
    if tl.program_id(1) == 0:
        d = tl.arange(0, BLOCK_D)
        mean = _sum_splits(query_sum_ptr + at * D + d, heads * D, query_splits, d < D)
        tl.store(state_ptr + (ROWS - 2) * D + d, mean * _softmax_scale(query_length, D), mask=d < D)
        tl.store(state_ptr + (ROWS - 1) * D + d, d * 0.0 + maximum + tl.log2(total), mask=d < D)


@jit(do_not_specialize=NOT_SPECIALIZED)
def output_kernel(
    q_ptr, q_strides, qd_ptr, qd_strides, o_ptr, o_strides, a_ptr, wq_ptr, wq_strides, rope_ptr, rope_strides,
    cu_seqlens, state_ptr, query_length, heads, eps,
    PHI: tl.constexpr, PHI_ROUNDED: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The output for one split of the queries."""
    wait_for_inputs()
    sequence, batch, head, first, count = _place(heads, cu_seqlens, query_length, C)
    begin, end = share(count, tl.program_id(1), tl.num_programs(1), C.BLOCK_N)
    if C.PLAIN:
        plus, z_plus = load_plain_state(state_ptr, sequence * heads + head, head, heads, C)
        write_plain_output(
            q_ptr, q_strides, o_ptr, o_strides, plus, z_plus, batch, head, heads, first, begin, end, eps,
            PHI, PHI_ROUNDED, OPERAND, PRECISION, C,
        )  # fmt: skip
        return
    plus, z_plus = _load_state(state_ptr, sequence * heads + head, head, heads, C)
    write_output(
        q_ptr, q_strides, qd_ptr, qd_strides, o_ptr, o_strides, a_ptr, wq_ptr, wq_strides, rope_ptr,
        rope_strides, plus, z_plus, batch, head, heads, first, begin, end, eps,
        PHI, OPERAND, PRECISION, C,
    )  # fmt: skip


@jit(do_not_specialize=NOT_SPECIALIZED)
def forward_kernel(
    q_ptr, q_strides, k_ptr, k_strides, e_ptr, e_strides, v_ptr, v_strides, qd_ptr, qd_strides, kd_ptr, kd_strides,
    o_ptr, o_strides, a_ptr, wq_ptr, wq_strides, wk_ptr, wk_strides, rope_ptr, rope_strides, cu_seqlens, state_ptr,
    query_length, key_length, heads, scale, eps,
    PHI: tl.constexpr, PHI_ROUNDED: tl.constexpr, PAD: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """The whole forward pass of a sequence; without a state_ptr the backward pass will sum the keys again."""
    wait_for_inputs()
    sequence, batch, head, first, count = _place(heads, cu_seqlens, key_length, C)
    if C.PLAIN:
        plus, z_plus = sum_plain_keys(
            k_ptr, k_strides, e_ptr, e_strides, v_ptr, v_strides, wk_ptr, wk_strides, batch, head, heads, first, 0,
            count, count, scale, PHI, PHI_ROUNDED, OPERAND, PRECISION, C,
        )  # fmt: skip
        if state_ptr is not None:
            at = sequence * heads + head
            if state_ptr.dtype.element_ty == tl.float32:
                store_plain_state(state_ptr, at, head, heads, plus, z_plus, C)
            else:
                store_centered_state(state_ptr, at, head, heads, plus, z_plus, C)
        sequence, batch, head, first, count = _place(heads, cu_seqlens, query_length, C)
        write_plain_output(
            q_ptr, q_strides, o_ptr, o_strides, plus, z_plus, batch, head, heads, first, 0, count, eps,
            PHI, PHI_ROUNDED, OPERAND, PRECISION, C,
        )  # fmt: skip
        return
    plus, z_plus, _ = _sum_keys(
        k_ptr, k_strides, e_ptr, e_strides, kd_ptr, kd_strides, v_ptr, v_strides, a_ptr, wk_ptr, wk_strides, rope_ptr,
        rope_strides, 0.0, batch, head, heads, first, 0, count, count, scale,
        PHI, PHI_ROUNDED, PAD, OPERAND, PRECISION, C,
    )  # fmt: skip
    if state_ptr is not None:
        _store_state(state_ptr, sequence * heads + head, head, heads, plus, z_plus, C)
    sequence, batch, head, first, count = _place(heads, cu_seqlens, query_length, C)
    write_output(
        q_ptr, q_strides, qd_ptr, qd_strides, o_ptr, o_strides, a_ptr, wq_ptr, wq_strides, rope_ptr,
        rope_strides, plus, z_plus, batch, head, heads, first, 0, count, eps,
        PHI, OPERAND, PRECISION, C,
    )  # fmt: skip


@jit(do_not_specialize=NOT_SPECIALIZED)
def query_gradient_kernel(
    q_ptr, q_strides, qd_ptr, qd_strides, do_ptr, do_strides, a_ptr, wq_ptr, wq_strides, rope_ptr, rope_strides,
    cu_seqlens, state_ptr, dq_ptr, dq_strides, dqd_ptr, dqd_strides, dwq_ptr, dwq_strides,
    d_state_ptr, mean_ptr, d_mean_ptr, query_length, heads, splits, eps,
    PHI: tl.constexpr, PHI_DX: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr, C: tl.constexpr, SUMS: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """The gradients of one split of the queries, its sums for the keys' gradients, and the values' mean."""
    wait_for_inputs()
    sequence, batch, head, first, count = _place(heads, cu_seqlens, query_length, C)
    begin, end = share(count, tl.program_id(1), tl.num_programs(1), C.BLOCK_N)
    at = sequence * heads + head
    if state_ptr.dtype.element_ty == tl.float32:
        plus, z_plus = _load_state(state_ptr, at, head, heads, C)
        plus, mean = _center(plus, z_plus, C)
    else:
        plus, z_plus, mean = load_centered_state(state_ptr, at, head, heads, OPERAND, C)
    d_mean = 0.0
    if C.SOFTMAX and GRADIENT:
        d_mean = _sum_query_splits(d_mean_ptr, at, splits, head, heads, C)[None, :]
        d_mean *= _softmax_scale(query_length, C.D) * 0.6931471805599453
    if SUMS:
        if tl.program_id(1) == 0:
            hv, c, exists = _columns(head, heads, C.DV, C.BLOCK_DV, C)
            tl.store(mean_ptr + (at + hv) * C.DV + c, mean, mask=exists)
    if C.PLAIN:
        d_plus, dz_plus = differentiate_plain_queries(
            q_ptr, q_strides, do_ptr, do_strides, dq_ptr, dq_strides, plus, z_plus, mean, batch, head, heads, first,
            begin, end, eps, PHI, PHI_DX, OPERAND, PRECISION, C, SUMS,
        )  # fmt: skip
        if SUMS:
            at = _split_at(sequence, heads, C) + head
            _store_state(d_state_ptr, at, head, heads, d_plus, _sum_eighths(dz_plus), C)
    else:
        d_plus, dz_plus = differentiate_queries(
            q_ptr, q_strides, qd_ptr, qd_strides, do_ptr, do_strides, a_ptr, wq_ptr, wq_strides, rope_ptr,
            rope_strides, dq_ptr, dq_strides, dqd_ptr, dqd_strides, dwq_ptr, dwq_strides, plus, z_plus, mean, d_mean,
            batch, head, heads, first, begin, end, eps, PHI, PHI_DX, OPERAND, PRECISION, C, SUMS, GRADIENT,
        )  # fmt: skip
        if SUMS:
            _store_state(d_state_ptr, _split_at(sequence, heads, C) + head, head, heads, d_plus, dz_plus, C)


@jit(do_not_specialize=NOT_SPECIALIZED)
def key_gradient_kernel(
    k_ptr, k_strides, e_ptr, e_strides, kd_ptr, kd_strides, v_ptr, v_strides, a_ptr, wk_ptr, wk_strides, rope_ptr,
    rope_strides, cu_seqlens, state_ptr, d_state_ptr, mean_ptr, dk_ptr, dk_strides, dkd_ptr, dkd_strides, dv_ptr,
    dv_strides, dwk_ptr, dwk_strides, sums_ptr, da_ptr, key_length, heads, scale,
    PHI: tl.constexpr, PHI_DX: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The gradients of one split of the keys and values, and its sums: see ``differentiate_keys``."""
    wait_for_inputs()
    sequence, batch, head, first, count = _place(heads, cu_seqlens, key_length, C)
    begin, end = share(count, tl.program_id(1), tl.num_programs(1), C.BLOCK_N)
    at = sequence * heads + head
    d_plus, dz_plus = _load_state(d_state_ptr, at, head, heads, C)
    hv, c, exists = _columns(head, heads, C.DV, C.BLOCK_DV, C)
    mean = tl.load(mean_ptr + (at + hv) * C.DV + c, mask=exists, other=0.0)
    if C.PLAIN:
        d_plus, dz_plus = plain_gradient_operands(d_plus, dz_plus, mean, count, OPERAND, C)
        differentiate_plain_keys(
            k_ptr, k_strides, e_ptr, e_strides, v_ptr, v_strides, dk_ptr, dk_strides, dv_ptr, dv_strides, d_plus,
            dz_plus, scale, batch, head, heads, first, begin, end, PHI, PHI_DX, OPERAND, PRECISION, C,
        )  # fmt: skip
        return
    query_mean, logarithm, average = 0.0, 0.0, 0.0
    if C.SOFTMAX or C.PARAMETER:
        plus, z_plus = _load_state(state_ptr, at, head, heads, C)
        plus, _ = _center(plus, z_plus, C)
    if C.PARAMETER and tl.program_id(1) == 0:
        da = _scale_gradient(a_ptr, plus, z_plus, d_plus, dz_plus, head, heads, C)
        _store_parameter_gradient(da_ptr, at, head, heads, da, C)
    if C.SOFTMAX:
        query_mean, logarithm = _load_softmax(state_ptr, at, head, heads, C)
        rounded = d_plus.to(OPERAND).to(tl.float32)  # as the keys' gradients take it
        average = _by_head((tl.sum(plus * rounded, 0) + z_plus * dz_plus)[None, :], C)
    sums = differentiate_keys(
        k_ptr, k_strides, e_ptr, e_strides, kd_ptr, kd_strides, v_ptr, v_strides, a_ptr, wk_ptr, wk_strides, rope_ptr,
        rope_strides, dk_ptr, dk_strides, dkd_ptr, dkd_strides, dv_ptr, dv_strides, dwk_ptr, dwk_strides,
        d_plus, dz_plus, mean, query_mean, logarithm, average, batch, head, heads, first, begin, end,
        count, scale, PHI, PHI_DX, OPERAND, PRECISION, C,
    )  # fmt: skip
    if C.SOFTMAX or C.RATIOS:
        at = _split_at(sequence, heads, C) + head
        h, d, exists = _columns(head, heads, C.D, C.BLOCK_D, C)
        tl.store(sums_ptr + (at + h) * C.D + d, sums, mask=exists)


@jit(do_not_specialize=NOT_SPECIALIZED)
def backward_kernel(
    q_ptr, q_strides, k_ptr, k_strides, e_ptr, e_strides, v_ptr, v_strides, qd_ptr, qd_strides, kd_ptr, kd_strides,
    do_ptr, do_strides, a_ptr, wq_ptr, wq_strides, wk_ptr, wk_strides, rope_ptr, rope_strides, cu_seqlens, state_ptr,
    dq_ptr, dq_strides, dqd_ptr, dqd_strides, dwq_ptr, dwq_strides, dk_ptr, dk_strides, dkd_ptr, dkd_strides, dv_ptr,
    dv_strides, dwk_ptr, dwk_strides, da_ptr, query_length, key_length, heads, scale, eps,
    PHI: tl.constexpr, PHI_ROUNDED: tl.constexpr, PHI_DX: tl.constexpr, PAD: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The whole backward pass of a sequence."""
    wait_for_inputs()
    sequence, batch, head, first, count = _place(heads, cu_seqlens, key_length, C)
    at = sequence * heads + head
    CENTERED: tl.constexpr = False if state_ptr is None else state_ptr.dtype.element_ty != tl.float32
    if CENTERED:
        plus, z_plus, mean = load_centered_state(state_ptr, at, head, heads, OPERAND, C)
    else:
        if state_ptr is None:
            plus, z_plus, _ = _sum_keys(
                k_ptr, k_strides, e_ptr, e_strides, kd_ptr, kd_strides, v_ptr, v_strides, a_ptr, wk_ptr, wk_strides,
                rope_ptr, rope_strides, 0.0, batch, head, heads, first, 0, count, count, scale,
                PHI, PHI_ROUNDED, PAD, OPERAND, PRECISION, C,
            )  # fmt: skip
        else:
            plus, z_plus = _load_state(state_ptr, at, head, heads, C)
        plus, mean = _center(plus, z_plus, C)
    sequence, batch, head, first, count = _place(heads, cu_seqlens, query_length, C)
    if C.PLAIN:
        d_plus, dz_plus = differentiate_plain_queries(
            q_ptr, q_strides, do_ptr, do_strides, dq_ptr, dq_strides, plus, z_plus, mean, batch, head, heads, first, 0,
            count, eps, PHI, PHI_DX, OPERAND, PRECISION, C, True,
        )  # fmt: skip
        sequence, batch, head, first, count = _place(heads, cu_seqlens, key_length, C)
        if CENTERED and C.ORDERED:  # keys and values come while dz is summed up
            prefetch_rows(k_ptr, k_strides, batch, head, first, count, C.D)
            prefetch_rows(v_ptr, v_strides, batch, head, first, count, C.DV)
        d_plus, dz_plus = plain_gradient_operands(d_plus, dz_plus, mean, count, OPERAND, C)
        differentiate_plain_keys(
            k_ptr, k_strides, e_ptr, e_strides, v_ptr, v_strides, dk_ptr, dk_strides, dv_ptr, dv_strides, d_plus,
            dz_plus, scale, batch, head, heads, first, 0, count, PHI, PHI_DX, OPERAND, PRECISION, C,
        )  # fmt: skip
    else:
        d_plus, dz_plus = differentiate_queries(
            q_ptr, q_strides, qd_ptr, qd_strides, do_ptr, do_strides, a_ptr, wq_ptr, wq_strides, rope_ptr,
            rope_strides, dq_ptr, dq_strides, dqd_ptr, dqd_strides, dwq_ptr, dwq_strides, plus, z_plus,
            mean, 0.0, batch, head, heads, first, 0, count, eps, PHI, PHI_DX, OPERAND, PRECISION, C, True, True,
        )  # fmt: skip
        sequence, batch, head, first, count = _place(heads, cu_seqlens, key_length, C)
        differentiate_keys(
            k_ptr, k_strides, e_ptr, e_strides, kd_ptr, kd_strides, v_ptr, v_strides, a_ptr, wk_ptr, wk_strides,
            rope_ptr, rope_strides, dk_ptr, dk_strides, dkd_ptr, dkd_strides, dv_ptr, dv_strides, dwk_ptr, dwk_strides,
            d_plus, dz_plus, mean, 0.0, 0.0, 0.0, batch, head, heads, first, 0, count, count, scale,
            PHI, PHI_DX, OPERAND, PRECISION, C,
        )  # fmt: skip
        if C.PARAMETER:
            da = _scale_gradient(a_ptr, plus, z_plus, d_plus, dz_plus, head, heads, C)
            _store_parameter_gradient(da_ptr, at, head, heads, da, C)
