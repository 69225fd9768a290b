"""Linear attention in Triton: streaming kernels, their launches, and the torch.library operators over them.

Queries and keys play the same part in turn. With x̂ the numerator's features and x̃ the denominator's, both directions
consist of

    state      S = s Σ x̂ᵀ y,  z = Σ c x̃        over keys (y = v) forward; over queries (y = do / denominator) backward
    output     o = q̂ S / (q̃ · z + ε)            forward
    gradient   dx from dx̂ = y Sᵀ, dx̃ = c z      for queries with the keys' state, for keys with the queries' state

Where numerator and denominator share their features, the values' mean m = Σ S / Σ z is taken out of the state, which
becomes S - z m: then o = m + (q̂ (S - z m) - ε m) / (q̃ · z + ε), and the gradients, differences between values and
outputs, are not left to cancel between terms as large as the mean.

Precision, the same everywhere: features, sums and denominators are float32. Operands of matrix products are bfloat16
for bfloat16 inputs, and float32 otherwise, never tf32: sums over thousands of tokens and powers of features overflow
float16. What is rounded to bfloat16 is rounded once, before it enters numerator and denominator alike, so that the
rounding cancels between them.

``signed_power`` has features of two signs, φ(x) and φ(-x) ("SIGNS"), and two streams: the second half of v's channels
sees the queries with the opposite sign ("STREAMS"). With every other map both are 1.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from flash_bla.ops.feature_maps import TRITON_FEATURE_MAPS, FeatureMap
from flash_bla.ops.triton_support import INTERPRETING, jit, tl

# --- kernels ----------------------------------------------------------------------------------------------------------
# Lengths and counts are never specialised: a new sequence length compiles nothing. A program loops over the blocks of
# rows of one split of one sequence and head. Strides come as tuples in the order (batch, head, row, column).

NOT_SPECIALIZED = ["length", "heads", "splits"]


@jit
def _span(cu_seqlens, sequence, length, VARLEN: tl.constexpr):
    """Batch index, first row and number of rows of a sequence."""
    if VARLEN:
        first = tl.load(cu_seqlens + sequence)
        return sequence.to(tl.int64) * 0, first, tl.load(cu_seqlens + sequence + 1) - first
    else:
        return sequence.to(tl.int64), 0, length


@jit
def _share(split, count, BLOCK_N: tl.constexpr):
    """First row and end of a split: whole blocks, spread evenly over the splits."""
    chunk = tl.cdiv(tl.cdiv(count, tl.num_programs(2)), BLOCK_N) * BLOCK_N
    return split * chunk, tl.minimum(split * chunk + chunk, count)


@jit
def _tile(base, rows, columns, stride_row, stride_column):
    # 64-bit, because a tensor may hold more than 2³¹ elements
    return base + rows.to(tl.int64)[:, None] * stride_row + columns.to(tl.int64)[None, :] * stride_column


@jit
def _turn(x, cos, sin, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Turns adjacent pairs of columns."""
    even, odd = tl.split(tl.reshape(x, (ROWS, COLUMNS // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (ROWS, COLUMNS))


@jit
def _load_rope(cos, sin, strides, head, n, inside, ROPE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    if ROPE:
        pair = tl.arange(0, BLOCK_D // 2)
        mask = inside[:, None] & (pair < D // 2)[None, :]
        cos = tl.load(_tile(cos + head * strides[0], n, pair, strides[1], strides[2]), mask=mask, other=0.0)
        sin = tl.load(_tile(sin + head * strides[0], n, pair, strides[1], strides[2]), mask=mask, other=0.0)
        return cos, sin
    else:
        return 0.0, 0.0


@jit
def _load_weight(w, strides, batch, head, row, inside, WEIGHT: tl.constexpr):
    if WEIGHT:
        pointers = w + batch * strides[0] + head * strides[1] + row.to(tl.int64) * strides[2]
        return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)[:, None]
    else:
        return 1.0


@jit
def _load_parameter(a, head, d, PARAMETER: tl.constexpr, D: tl.constexpr):
    if PARAMETER:
        return tl.load(a + head * D + d, mask=d < D, other=1.0)[None, :]
    else:
        return 1.0


@jit
def _features(
    x, a, w, cos, sin, mask,
    PHI: tl.constexpr, EXPONENT: tl.constexpr, OPERAND: tl.constexpr, ROPE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """w φ(x): turned, as operand of the numerator; unturned and rounded alike, in float32, for the denominator."""
    features = tl.where(mask, PHI(x, a, EXPONENT) * w, 0.0)
    rounded = features.to(OPERAND)
    if ROPE:
        return _turn(features, cos, sin, BLOCK_N, BLOCK_D).to(OPERAND), rounded.to(tl.float32)
    else:
        return rounded, rounded.to(tl.float32)


@jit
def _store_state(state_ptr, z_ptr, at, state, z, d, c, mask, tile, D: tl.constexpr, DV: tl.constexpr):
    tl.store(_tile(state_ptr + at * D * DV, d, c, DV, 1), state, mask=mask)
    if tile == 0:
        tl.store(z_ptr + at * D + d, z, mask=d < D)


@jit(do_not_specialize=NOT_SPECIALIZED)
def _state_kernel(
    x_ptr, x_strides, xd_ptr, xd_strides, y_ptr, y_strides, a_ptr, w_ptr, w_strides, cos_ptr, sin_ptr, rope_strides,
    rows_ptr, rows_strides, cu_seqlens, state_ptr, z_ptr, length, heads, scale,
    PHI: tl.constexpr, EXPONENT: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, SIGNED: tl.constexpr, PARAMETER: tl.constexpr, WEIGHT: tl.constexpr,
    ROPE: tl.constexpr, DECOUPLED: tl.constexpr, NORMALIZE: tl.constexpr, VARLEN: tl.constexpr, MEAN: tl.constexpr,
    QUERIES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One split's sums: state (splits, B, H, STREAMS, SIGNS, D, DV) and z (splits, B, H, STREAMS, SIGNS, D).

    Keys: S = s Σ x̂ᵀ y, s = 1/M if ``MEAN``, and z = Σ x̃ / M. ``QUERIES``: y is do, and rows holds what divides it
    (1 / denominator) and the gradient of the denominator: S = Σ x̂ᵀ y rows₀, z = Σ x̃ rows₁.
    """
    STREAMS: tl.constexpr = 2 if SIGNED else 1
    program, tile, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    stream = program % STREAMS
    head = (program // STREAMS) % heads
    sequence = program // (STREAMS * heads)
    batch, first, count = _span(cu_seqlens, sequence, length, VARLEN)
    d = tl.arange(0, BLOCK_D)
    c = tile * BLOCK_DV + tl.arange(0, BLOCK_DV)
    x_ptr += batch * x_strides[0] + head * x_strides[1]
    if DECOUPLED:
        xd_ptr += batch * xd_strides[0] + head * xd_strides[1]
    y_ptr += batch * y_strides[0] + head * y_strides[1] + stream * DV * y_strides[3]
    a = _load_parameter(a_ptr, head, d, PARAMETER, D)
    sign = 1.0
    if QUERIES:
        rows_ptr += batch * rows_strides[0] + head * rows_strides[1] + stream * rows_strides[2]
        sign = 1.0 - 2.0 * stream
    state = tl.zeros((BLOCK_D, BLOCK_DV), tl.float32)
    z = tl.zeros((BLOCK_D,), tl.float32)
    if SIGNED:
        state_minus = tl.zeros((BLOCK_D, BLOCK_DV), tl.float32)
        z_minus = tl.zeros((BLOCK_D,), tl.float32)

    begin, end = _share(split, count, BLOCK_N)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = n < count
        row = first + n
        mask = inside[:, None] & (d < D)[None, :]
        x = tl.load(_tile(x_ptr, row, d, x_strides[2], x_strides[3]), mask=mask, other=0.0).to(tl.float32) * sign
        y_mask = inside[:, None] & (c < DV)[None, :]
        y = tl.load(_tile(y_ptr, row, c, y_strides[2], y_strides[3]), mask=y_mask, other=0.0)
        z_weight = tl.where(inside, 1.0, 0.0)
        if QUERIES and NORMALIZE:
            y = y.to(tl.float32) * tl.load(rows_ptr + row, mask=inside, other=0.0)[:, None]
            z_weight = tl.load(rows_ptr + rows_strides[3] + row, mask=inside, other=0.0)
        y = y.to(OPERAND)
        w = _load_weight(w_ptr, w_strides, batch, head, row, inside, WEIGHT)
        cos, sin = _load_rope(cos_ptr, sin_ptr, rope_strides, head, n, inside, ROPE, D, BLOCK_D)

        numerator, features = _features(x, a, w, cos, sin, mask, PHI, EXPONENT, OPERAND, ROPE, BLOCK_N, BLOCK_D)
        state = tl.dot(tl.trans(numerator), y, state, input_precision=PRECISION)
        if DECOUPLED:
            features = tl.load(_tile(xd_ptr, row, d, xd_strides[2], xd_strides[3]), mask=mask, other=0.0).to(tl.float32)
        z += tl.sum(features * z_weight[:, None], axis=0)
        if SIGNED:
            numerator, features = _features(-x, a, w, cos, sin, mask, PHI, EXPONENT, OPERAND, ROPE, BLOCK_N, BLOCK_D)
            state_minus = tl.dot(tl.trans(numerator), y, state_minus, input_precision=PRECISION)
            z_minus += tl.sum(features * z_weight[:, None], axis=0)

    z_scale = 1.0
    if not QUERIES:
        z_scale = 1.0 / tl.maximum(count, 1).to(tl.float32)
    if MEAN:
        scale = z_scale
    out = (split * tl.num_programs(0) + program).to(tl.int64) * STREAMS  # as many signs as streams
    mask = (d < D)[:, None] & (c < DV)[None, :]
    _store_state(state_ptr, z_ptr, out, state * scale, z * z_scale, d, c, mask, tile, D, DV)
    if SIGNED:
        _store_state(state_ptr, z_ptr, out + 1, state_minus * scale, z_minus * z_scale, d, c, mask, tile, D, DV)


@jit
def _add_splits(state_ptr, z_ptr, at, stride, splits, d, c, mask, D: tl.constexpr, DV: tl.constexpr):
    state = tl.load(_tile(state_ptr + at * D * DV, d, c, DV, 1), mask=mask, other=0.0)
    z = tl.load(z_ptr + at * D + d, mask=d < D, other=0.0)
    for _ in range(1, splits):
        at += stride
        state += tl.load(_tile(state_ptr + at * D * DV, d, c, DV, 1), mask=mask, other=0.0)
        z += tl.load(z_ptr + at * D + d, mask=d < D, other=0.0)
    return state, z


@jit(do_not_specialize=NOT_SPECIALIZED)
def _reduce_kernel(
    partial_state_ptr, partial_z_ptr, state_ptr, z_ptr, mean_ptr, splits,
    D: tl.constexpr, DV: tl.constexpr, SIGNED: tl.constexpr, CENTER: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Adds up the splits, always in the same order, and takes the mean m = Σ S / Σ z out of the state if ``CENTER``."""
    SIGNS: tl.constexpr = 2 if SIGNED else 1
    program, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    c = tile * BLOCK_DV + tl.arange(0, BLOCK_DV)
    mask = (d < D)[:, None] & (c < DV)[None, :]
    stride = tl.num_programs(0).to(tl.int64) * SIGNS
    state, z = _add_splits(partial_state_ptr, partial_z_ptr, program * SIGNS, stride, splits, d, c, mask, D, DV)
    if SIGNED:
        state_minus, z_minus = _add_splits(
            partial_state_ptr, partial_z_ptr, program * SIGNS + 1, stride, splits, d, c, mask, D, DV
        )
    if CENTER:
        mean = tl.sum(tl.where(z < 0.0, -1.0, 1.0)[:, None] * state, 0)
        total = tl.sum(tl.abs(z), 0)
        if SIGNED:
            mean += tl.sum(state_minus, 0)
            total += tl.sum(z_minus, 0)
        mean = tl.where(total > 0.0, mean / total, 0.0)
        tl.store(mean_ptr + program * DV + c, mean, mask=c < DV)
        state -= z[:, None] * mean[None, :]
        if SIGNED:
            state_minus -= z_minus[:, None] * mean[None, :]
    _store_state(state_ptr, z_ptr, program * SIGNS, state, z, d, c, mask, tile, D, DV)
    if SIGNED:
        _store_state(state_ptr, z_ptr, program * SIGNS + 1, state_minus, z_minus, d, c, mask, tile, D, DV)


@jit(do_not_specialize=NOT_SPECIALIZED)
def _output_kernel(
    x_ptr, x_strides, xd_ptr, xd_strides, o_ptr, o_strides, a_ptr, w_ptr, w_strides, cos_ptr, sin_ptr, rope_strides,
    cu_seqlens, state_ptr, z_ptr, mean_ptr, length, heads, eps,
    PHI: tl.constexpr, EXPONENT: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, SIGNED: tl.constexpr, PARAMETER: tl.constexpr, WEIGHT: tl.constexpr,
    ROPE: tl.constexpr, DECOUPLED: tl.constexpr, NORMALIZE: tl.constexpr, VARLEN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """o = m + (x̂ S - ε m) / (x̃ · z + ε) for one split of the queries; x̂ S without ``NORMALIZE``."""
    STREAMS: tl.constexpr = 2 if SIGNED else 1
    SIGNS: tl.constexpr = STREAMS
    program, split = tl.program_id(0), tl.program_id(2)
    head = program % heads
    batch, first, count = _span(cu_seqlens, program // heads, length, VARLEN)
    d = tl.arange(0, BLOCK_D)
    x_ptr += batch * x_strides[0] + head * x_strides[1]
    if DECOUPLED:
        xd_ptr += batch * xd_strides[0] + head * xd_strides[1]
    o_ptr += batch * o_strides[0] + head * o_strides[1]
    a = _load_parameter(a_ptr, head, d, PARAMETER, D)

    begin, end = _share(split, count, BLOCK_N)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = n < count
        row = first + n
        mask = inside[:, None] & (d < D)[None, :]
        x = tl.load(_tile(x_ptr, row, d, x_strides[2], x_strides[3]), mask=mask, other=0.0).to(tl.float32)
        w = _load_weight(w_ptr, w_strides, batch, head, row, inside, WEIGHT)
        cos, sin = _load_rope(cos_ptr, sin_ptr, rope_strides, head, n, inside, ROPE, D, BLOCK_D)
        for stream in tl.static_range(STREAMS):
            xs = x * (1.0 - 2.0 * stream)
            at = ((program * STREAMS + stream) * SIGNS).to(tl.int64)
            numerator, features = _features(xs, a, w, cos, sin, mask, PHI, EXPONENT, OPERAND, ROPE, BLOCK_N, BLOCK_D)
            if DECOUPLED:
                features = tl.load(_tile(xd_ptr, row, d, xd_strides[2], xd_strides[3]), mask=mask, other=0.0)
                features = features.to(tl.float32)
            if SIGNED:
                minus, features_minus = _features(
                    -xs, a, w, cos, sin, mask, PHI, EXPONENT, OPERAND, ROPE, BLOCK_N, BLOCK_D
                )
            if NORMALIZE:
                denominator = tl.sum(features * tl.load(z_ptr + at * D + d, mask=d < D, other=0.0)[None, :], 1) + eps
                if SIGNED:
                    z = tl.load(z_ptr + (at + 1) * D + d, mask=d < D, other=0.0)
                    denominator += tl.sum(features_minus * z[None, :], 1)
            for tile in range(tl.cdiv(DV, BLOCK_DV)):
                c = tile * BLOCK_DV + tl.arange(0, BLOCK_DV)
                s_mask = (d < D)[:, None] & (c < DV)[None, :]
                state = tl.load(_tile(state_ptr + at * D * DV, d, c, DV, 1), mask=s_mask, other=0.0).to(OPERAND)
                o = tl.dot(numerator, state, input_precision=PRECISION)
                if SIGNED:
                    state = tl.load(_tile(state_ptr + (at + 1) * D * DV, d, c, DV, 1), mask=s_mask, other=0.0)
                    o = tl.dot(minus, state.to(OPERAND), o, input_precision=PRECISION)
                if NORMALIZE:
                    mean = tl.load(mean_ptr + (program * STREAMS + stream) * DV + c, mask=c < DV, other=0.0)[None, :]
                    o = mean + (o - eps * mean) / denominator[:, None]
                pointers = _tile(o_ptr, row, stream * DV + c, o_strides[2], o_strides[3])
                tl.store(pointers, o.to(o_ptr.dtype.element_ty), mask=inside[:, None] & (c < DV)[None, :])


@jit
def _features_backward(
    x, a, w, cos, sin, mask, d_numerator, d_denominator,
    PHI: tl.constexpr, PHI_DX: tl.constexpr, PHI_DA: tl.constexpr, EXPONENT: tl.constexpr,
    PARAMETER: tl.constexpr, ROPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of w φ(x): by x, by the map's parameter (summed over rows), by w."""
    if ROPE:
        d_numerator = _turn(d_numerator, cos, -sin, BLOCK_N, BLOCK_D)
    gradient = tl.where(mask, d_numerator + d_denominator, 0.0)
    dw = tl.sum(gradient * PHI(x, a, EXPONENT), axis=1)
    gradient *= w
    da = 0.0
    if PARAMETER:
        da = tl.sum(gradient * PHI_DA(x, a, EXPONENT), axis=0)
    return gradient * PHI_DX(x, a, EXPONENT), da, dw


@jit(do_not_specialize=NOT_SPECIALIZED)
def _gradient_kernel(
    x_ptr, x_strides, xd_ptr, xd_strides, y_ptr, y_strides, a_ptr, w_ptr, w_strides, cos_ptr, sin_ptr, rope_strides,
    cu_seqlens, state_ptr, z_ptr, mean_ptr, rows_ptr, rows_strides,
    dx_ptr, dx_strides, dxd_ptr, dxd_strides, dy_ptr, dy_strides, da_ptr, dw_ptr, dw_strides,
    length, heads, scale, eps,
    PHI: tl.constexpr, PHI_DX: tl.constexpr, PHI_DA: tl.constexpr, EXPONENT: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, SIGNED: tl.constexpr, PARAMETER: tl.constexpr,
    WEIGHT: tl.constexpr, ROPE: tl.constexpr, DECOUPLED: tl.constexpr, NORMALIZE: tl.constexpr, VARLEN: tl.constexpr,
    MEAN: tl.constexpr, QUERIES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Gradients of one split of the queries (y = do, the keys' state) or of the keys (y = v, the queries' state).

    With dn = do / denominator and S, m as centered above: the queries' dq̂ = dn Sᵀ + c z with c = -dn · (o - m), which
    goes into rows₁ with 1 / denominator in rows₀; the keys' dk̂ = (s v - m / M) dSᵀ + dz / M and dv = s k̂ dS.
    """
    STREAMS: tl.constexpr = 2 if SIGNED else 1
    SIGNS: tl.constexpr = STREAMS
    program, split = tl.program_id(0), tl.program_id(2)
    head = program % heads
    batch, first, count = _span(cu_seqlens, program // heads, length, VARLEN)
    d = tl.arange(0, BLOCK_D)
    x_ptr += batch * x_strides[0] + head * x_strides[1]
    if DECOUPLED:
        xd_ptr += batch * xd_strides[0] + head * xd_strides[1]
    y_ptr += batch * y_strides[0] + head * y_strides[1]
    dx_ptr += batch * dx_strides[0] + head * dx_strides[1]
    if DECOUPLED:
        dxd_ptr += batch * dxd_strides[0] + head * dxd_strides[1]
    if QUERIES:
        rows_ptr += batch * rows_strides[0] + head * rows_strides[1]
    else:
        dy_ptr += batch * dy_strides[0] + head * dy_strides[1]
    a = _load_parameter(a_ptr, head, d, PARAMETER, D)
    z_scale = 1.0
    if not QUERIES:
        z_scale = 1.0 / tl.maximum(count, 1).to(tl.float32)
    if MEAN:
        scale = z_scale
    da = tl.zeros((BLOCK_D,), tl.float32)

    begin, end = _share(split, count, BLOCK_N)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = n < count
        row = first + n
        mask = inside[:, None] & (d < D)[None, :]
        x = tl.load(_tile(x_ptr, row, d, x_strides[2], x_strides[3]), mask=mask, other=0.0).to(tl.float32)
        if DECOUPLED:
            xd = tl.load(_tile(xd_ptr, row, d, xd_strides[2], xd_strides[3]), mask=mask, other=0.0).to(tl.float32)
        w = _load_weight(w_ptr, w_strides, batch, head, row, inside, WEIGHT)
        cos, sin = _load_rope(cos_ptr, sin_ptr, rope_strides, head, n, inside, ROPE, D, BLOCK_D)
        dx = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        dw = tl.zeros((BLOCK_N,), tl.float32)
        for stream in tl.static_range(STREAMS):
            sign = 1.0
            if QUERIES:
                sign = 1.0 - 2.0 * stream
            xs = x * sign
            at = ((program * STREAMS + stream) * SIGNS).to(tl.int64)
            z = tl.load(z_ptr + at * D + d, mask=d < D, other=0.0) * z_scale
            numerator, features = _features(xs, a, w, cos, sin, mask, PHI, EXPONENT, OPERAND, ROPE, BLOCK_N, BLOCK_D)
            if SIGNED:
                z_minus = tl.load(z_ptr + (at + 1) * D + d, mask=d < D, other=0.0) * z_scale
                minus, features_minus = _features(
                    -xs, a, w, cos, sin, mask, PHI, EXPONENT, OPERAND, ROPE, BLOCK_N, BLOCK_D
                )
                d_minus = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
            inverse = tl.zeros((BLOCK_N,), tl.float32) + 1.0  # 1 / denominator
            if QUERIES and NORMALIZE:
                if DECOUPLED:
                    denominator = tl.sum(xd * z[None, :], 1) + eps
                else:
                    denominator = tl.sum(features * z[None, :], 1) + eps
                if SIGNED:
                    denominator += tl.sum(features_minus * z_minus[None, :], 1)
                inverse = 1.0 / denominator
            d_plus = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
            z_weight = tl.zeros((BLOCK_N,), tl.float32)
            if NORMALIZE and not QUERIES:
                z_weight += 1.0

            for tile in range(tl.cdiv(DV, BLOCK_DV)):
                c = tile * BLOCK_DV + tl.arange(0, BLOCK_DV)
                y_mask = inside[:, None] & (c < DV)[None, :]
                y_column = stream * DV + c
                y = tl.load(_tile(y_ptr, row, y_column, y_strides[2], y_strides[3]), mask=y_mask, other=0.0)
                mean = tl.zeros((BLOCK_DV,), tl.float32)
                if NORMALIZE:
                    mean += tl.load(mean_ptr + (program * STREAMS + stream) * DV + c, mask=c < DV, other=0.0)
                if QUERIES:
                    y = (y.to(tl.float32) * inverse[:, None]).to(OPERAND)
                else:
                    y = (y.to(tl.float32) * scale - mean[None, :] * z_scale).to(OPERAND)
                s_mask = (d < D)[:, None] & (c < DV)[None, :]
                state = tl.load(_tile(state_ptr + at * D * DV, d, c, DV, 1), mask=s_mask, other=0.0).to(OPERAND)
                product = tl.dot(numerator, state, input_precision=PRECISION)
                d_plus = tl.dot(y, tl.trans(state), d_plus, input_precision=PRECISION)
                if SIGNED:
                    state = tl.load(_tile(state_ptr + (at + 1) * D * DV, d, c, DV, 1), mask=s_mask, other=0.0)
                    state = state.to(OPERAND)
                    product = tl.dot(minus, state, product, input_precision=PRECISION)
                    d_minus = tl.dot(y, tl.trans(state), d_minus, input_precision=PRECISION)
                if not QUERIES:
                    pointers = _tile(dy_ptr, row, y_column, dy_strides[2], dy_strides[3])
                    tl.store(pointers, (product * scale).to(dy_ptr.dtype.element_ty), mask=y_mask)
                elif NORMALIZE:
                    centered = (product - eps * mean[None, :]) * inverse[:, None]
                    z_weight -= tl.sum(y.to(tl.float32) * centered, 1)

            if QUERIES and NORMALIZE:
                out = rows_ptr + stream * rows_strides[2] + row
                tl.store(out, inverse, mask=inside)
                tl.store(out + rows_strides[3], z_weight, mask=inside)
            d_denominator = z_weight[:, None] * z[None, :]
            if DECOUPLED:
                pointers = _tile(dxd_ptr, row, d, dxd_strides[2], dxd_strides[3])
                tl.store(pointers, d_denominator.to(dxd_ptr.dtype.element_ty), mask=mask)
                d_denominator = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
            dxs, das, dws = _features_backward(
                xs, a, w, cos, sin, mask, d_plus, d_denominator,
                PHI, PHI_DX, PHI_DA, EXPONENT, PARAMETER, ROPE, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            dx += dxs * sign
            da += das
            dw += dws
            if SIGNED:
                dxs, das, dws = _features_backward(
                    -xs, a, w, cos, sin, mask, d_minus, z_weight[:, None] * z_minus[None, :],
                    PHI, PHI_DX, PHI_DA, EXPONENT, PARAMETER, ROPE, BLOCK_N, BLOCK_D,
                )  # fmt: skip
                dx -= dxs * sign
                da += das
                dw += dws
        pointers = _tile(dx_ptr, row, d, dx_strides[2], dx_strides[3])
        tl.store(pointers, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if WEIGHT:
            pointers = dw_ptr + batch * dw_strides[0] + head * dw_strides[1] + row.to(tl.int64) * dw_strides[2]
            tl.store(pointers, dw, mask=inside)
    if PARAMETER:
        tl.store(da_ptr + (split * tl.num_programs(0) + program).to(tl.int64) * D + d, da, mask=d < D)


# --- launches ---------------------------------------------------------------------------------------------------------


class _Problem(NamedTuple):
    """What the launches of both directions share."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_denominator: Tensor | None
    k_denominator: Tensor | None
    parameter: Tensor | None
    query_weight: Tensor | None
    key_weight: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    cu_seqlens: Tensor | None
    max_seqlen: int
    feature_map: str
    exponent: int
    normalize: bool
    scale: float | None
    eps: float

    @property
    def streams(self) -> int:
        return 2 if self.feature_map == "signed_power" else 1

    @property
    def sequences(self) -> int:
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def centered(self) -> bool:
        """Whether the values' mean is taken out of the state: where numerator and denominator have equal features."""
        return self.normalize and self.cos is None and self.q_denominator is None

    def empty_state(self, splits: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """State, z and the values' mean, the first two for each split."""
        _, H, _, D = self.q.shape
        D_v = self.v.shape[3] // self.streams
        shape = (self.sequences, H, self.streams)
        options = dict(dtype=torch.float32, device=self.q.device)
        state = torch.empty(splits, *shape, self.streams, D, D_v, **options)
        z = torch.empty(splits, *shape, self.streams, D, **options)
        return state, z, torch.zeros(*shape, D_v, **options)

    def empty_output(self) -> Tensor:
        B, H, N, _ = self.q.shape
        # laid out as (B, N, H, Dv), which the projection after an attention reads without a copy
        return self._empty(self.v, (B, N, H, self.v.shape[3])).transpose(1, 2)

    def empty_like(self, x: Tensor | None) -> Tensor:
        """A gradient of x, also laid out as (B, N, H, D); of no elements for None."""
        if x is None:
            return self.q.new_empty(0)
        return self._empty(x, x.transpose(1, 2).shape).transpose(1, 2) if x.ndim == 4 else self._empty(x, x.shape)

    def _empty(self, x: Tensor, shape) -> Tensor:
        # packed tokens that belong to no sequence must not come out as garbage
        return x.new_empty(shape) if self.cu_seqlens is None else x.new_zeros(shape)


def _launch(
    kernel, problem: _Problem, queries: bool, tensors: dict, *, splits: int, tiles: int, streams: int = 1, **options
) -> None:
    """Runs a kernel over queries or keys; ``tensors`` are those that it does not share with the others."""
    p = problem
    x, x_denominator = (p.q, p.q_denominator) if queries else (p.k, p.k_denominator)
    weight = p.query_weight if queries else p.key_weight
    H, length, D = x.shape[1:]
    D_v = p.v.shape[3] // p.streams
    block_n, block_d, block_dv = _blocks(D, D_v, p.streams, x.element_size())
    grid = (p.sequences * H * streams, tiles, splits)
    if grid[0] == 0:
        return
    arguments = dict(
        x_ptr=x, x_strides=x.stride(), xd_ptr=x_denominator,
        xd_strides=(0, 0, 0, 0) if x_denominator is None else x_denominator.stride(),
        a_ptr=p.parameter, w_ptr=weight, w_strides=(0, 0, 0) if weight is None else weight.stride(),
        cos_ptr=p.cos, sin_ptr=p.sin, rope_strides=_rope_strides(p.cos), cu_seqlens=p.cu_seqlens,
        length=length, heads=H,
        EXPONENT=p.exponent, D=D, DV=D_v, SIGNED=p.streams == 2, PARAMETER=p.parameter is not None,
        WEIGHT=weight is not None, ROPE=p.cos is not None, DECOUPLED=x_denominator is not None,
        NORMALIZE=p.normalize, VARLEN=p.cu_seqlens is not None, BLOCK_N=block_n, BLOCK_D=block_d, BLOCK_DV=block_dv,
        **_precision(x.dtype, hip=torch.version.hip is not None), **tensors, **options,
    )  # fmt: skip
    _call(kernel, grid, arguments, num_warps=4 if block_d <= 64 else 8)


_COMPILED: dict[tuple, object] = {}


def _call(kernel, grid: tuple[int, int, int], arguments: dict, num_warps: int = 4) -> None:
    """``kernel[grid](**arguments)``, without Triton's search for the compiled kernel where the same call came before.

    What Triton specialises on stands in the key: types, strides, whether pointers are multiples of 16, constants.
    """
    values = [arguments[name] for name in kernel.arg_names]
    if INTERPRETING:
        kernel[grid](*values)
        return
    device = arguments["state_ptr"].device
    key = (
        kernel,
        device,
        *((x.dtype, x.data_ptr() % 16 == 0) if isinstance(x, Tensor) else x
          for name, x in zip(kernel.arg_names, values, strict=True) if name not in NOT_SPECIALIZED),
    )  # fmt: skip
    with torch.cuda.device(device):  # Triton launches on the current device
        compiled = _COMPILED.get(key)
        if compiled is not None:
            compiled[grid](*values)
            return
        if len(_COMPILED) > 4096:  # strides change with the length: images of ever new sizes must not fill the memory
            _COMPILED.clear()
        _COMPILED[key] = kernel[grid](*values, num_warps=num_warps, num_stages=1)


def _rope_strides(table: Tensor | None) -> tuple[int, int, int]:
    if table is None:
        return (0, 0, 0)
    return (0 if table.shape[0] == 1 else table.stride(0), table.stride(1), table.stride(2))


def _blocks(D: int, D_v: int, streams: int, itemsize: int) -> tuple[int, int, int]:
    """BLOCK_N, BLOCK_D, BLOCK_DV. All of D is one block; rows and D_v split so that a program's tiles fit registers."""
    block_d = max(16, 1 << (D - 1).bit_length())
    block_dv = max(16, min(1 << (D_v - 1).bit_length(), 8192 // (block_d * streams)))
    block_n = max(16, min(64, 4096 // (block_d * itemsize)))
    return block_n, block_d, block_dv


def _precision(dtype: torch.dtype, hip: bool) -> dict:
    if dtype == torch.bfloat16 and not INTERPRETING:  # the interpreter cannot multiply bfloat16
        return dict(OPERAND=tl.bfloat16, PRECISION="ieee")
    return dict(OPERAND=tl.float32, PRECISION="ieee" if hip else "tf32x3")


def _splits(problem: _Problem, x: Tensor, programs: int) -> int:
    """Into how many parts to cut the sequences so that all multiprocessors have work."""
    length = x.shape[2] if problem.cu_seqlens is None else problem.max_seqlen
    wanted = _cdiv(4 * _multiprocessors(x.device), max(programs, 1))
    return max(1, min(wanted, _cdiv(length, 64), 65535))


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _state(problem: _Problem, queries: bool, y: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    p = problem
    x = p.q if queries else p.k
    D_v = p.v.shape[3] // p.streams
    tiles = _cdiv(D_v, _blocks(x.shape[3], D_v, p.streams, x.element_size())[2])
    splits = _splits(p, x, p.sequences * x.shape[1] * p.streams * tiles)
    state, z, mean = p.empty_state(splits)
    tensors = dict(
        y_ptr=y, y_strides=y.stride(), rows_ptr=rows, rows_strides=_rows_strides(rows), state_ptr=state, z_ptr=z
    )
    scale = 1.0 if queries or p.scale is None else p.scale
    _launch(_state_kernel, p, queries, tensors, splits=splits, tiles=tiles, streams=p.streams,
            scale=scale, MEAN=not queries and p.scale is None, QUERIES=queries,
            PHI=TRITON_FEATURE_MAPS[p.feature_map][0])  # fmt: skip
    center = p.centered and not queries
    if splits == 1 and not center:
        return state[0], z[0], mean
    whole_state, whole_z, _ = p.empty_state()
    D = x.shape[3]
    _, block_d, block_dv = _blocks(D, D_v, p.streams, x.element_size())
    if mean.numel() > 0:
        arguments = dict(
            partial_state_ptr=state, partial_z_ptr=z, state_ptr=whole_state, z_ptr=whole_z, mean_ptr=mean,
            splits=splits, D=D, DV=D_v, SIGNED=p.streams == 2, CENTER=center, BLOCK_D=block_d, BLOCK_DV=block_dv,
        )  # fmt: skip
        _call(_reduce_kernel, (mean.numel() // D_v, tiles, 1), arguments)
    return whole_state[0], whole_z[0], mean


def _gradient(
    problem: _Problem, queries: bool, y: Tensor, dy: Tensor | None, state: Tensor, z: Tensor, mean: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Writes dy, and returns the gradients of x, of the denominator's x, of the weight and of the parameter."""
    p = problem
    x, x_denominator, weight = (
        (p.q, p.q_denominator, p.query_weight) if queries else (p.k, p.k_denominator, p.key_weight)
    )
    splits = _splits(p, x, p.sequences * x.shape[1])
    dx, dx_denominator, dw = p.empty_like(x), p.empty_like(x_denominator), p.empty_like(weight)
    da = None if p.parameter is None else p.q.new_empty((splits, p.sequences, *p.parameter.shape), dtype=torch.float32)
    phi, phi_dx, phi_da = TRITON_FEATURE_MAPS[p.feature_map]
    tensors = dict(
        y_ptr=y, y_strides=y.stride(), state_ptr=state, z_ptr=z, mean_ptr=mean, rows_ptr=rows,
        rows_strides=_rows_strides(rows), dx_ptr=dx, dx_strides=dx.stride(), dxd_ptr=dx_denominator,
        dxd_strides=(0, 0, 0, 0) if x_denominator is None else dx_denominator.stride(),
        dy_ptr=dy, dy_strides=(0, 0, 0, 0) if dy is None else dy.stride(), da_ptr=da, dw_ptr=dw,
        dw_strides=(0, 0, 0) if weight is None else dw.stride(),
    )  # fmt: skip
    scale = 1.0 if queries or p.scale is None else p.scale
    _launch(_gradient_kernel, p, queries, tensors, splits=splits, tiles=1, scale=scale, eps=p.eps,
            MEAN=not queries and p.scale is None, QUERIES=queries, PHI=phi, PHI_DX=phi_dx, PHI_DA=phi_da)  # fmt: skip
    return dx, dx_denominator, dw, p.q.new_empty(0) if da is None else da.sum((0, 1))


def _rows_strides(rows: Tensor | None) -> tuple[int, int, int, int]:
    """Strides of rows (2, B, H, STREAMS, N) in the order (batch, head, stream, which)."""
    return (0, 0, 0, 0) if rows is None else (rows.stride(1), rows.stride(2), rows.stride(3), rows.stride(0))


# --- operators --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("flash_bla::linear_attention_forward", mutates_args=())
def linear_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, q_denominator: Tensor | None, k_denominator: Tensor | None,
    parameter: Tensor | None, query_weight: Tensor | None, key_weight: Tensor | None, cos: Tensor | None,
    sin: Tensor | None, cu_seqlens: Tensor | None, max_seqlen: int, feature_map: str, exponent: int, normalize: bool,
    scale: float | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The output, and for the backward pass the keys' state, z and the values' mean."""
    p = _Problem(q, k, v, q_denominator, k_denominator, parameter, query_weight, key_weight, cos, sin, cu_seqlens,
                 max_seqlen, feature_map, exponent, normalize, scale, eps)  # fmt: skip
    state, z, mean = _state(p, False, v)
    o = p.empty_output()
    tensors = dict(o_ptr=o, o_strides=o.stride(), state_ptr=state, z_ptr=z, mean_ptr=mean)
    _launch(_output_kernel, p, True, tensors, splits=_splits(p, q, p.sequences * q.shape[1]), tiles=1, eps=eps,
            PHI=TRITON_FEATURE_MAPS[feature_map][0])  # fmt: skip
    return o, state, z, mean


@linear_attention_forward.register_fake
def _(*arguments):
    p = _Problem(*arguments)
    state, z, mean = p.empty_state()
    return p.empty_output(), state[0], z[0], mean


@torch.library.custom_op("flash_bla::linear_attention_backward", mutates_args=())
def linear_attention_backward(
    do: Tensor, state: Tensor, z: Tensor, mean: Tensor, keys: bool,
    q: Tensor, k: Tensor, v: Tensor, q_denominator: Tensor | None, k_denominator: Tensor | None,
    parameter: Tensor | None, query_weight: Tensor | None, key_weight: Tensor | None, cos: Tensor | None,
    sin: Tensor | None, cu_seqlens: Tensor | None, max_seqlen: int, feature_map: str, exponent: int, normalize: bool,
    scale: float | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the first eight inputs of the forward operator; without ``keys`` those of the queries alone.

    A gradient that does not exist has no elements.
    """
    p = _Problem(q, k, v, q_denominator, k_denominator, parameter, query_weight, key_weight, cos, sin, cu_seqlens,
                 max_seqlen, feature_map, exponent, normalize, scale, eps)  # fmt: skip
    B, H, N, _ = q.shape
    rows = q.new_empty((2, B, H, p.streams, N), dtype=torch.float32)
    dq, dq_denominator, dq_weight, da = _gradient(p, True, do, None, state, z, mean, rows)
    if not keys:
        dk, dv, dk_denominator, dk_weight = (p.empty_like(None) for _ in range(4))
        return dq, dk, dv, dq_denominator, dk_denominator, da, dq_weight, dk_weight
    dv = p.empty_like(v)
    d_state, d_z, _ = _state(p, True, do, rows)
    dk, dk_denominator, dk_weight, da_keys = _gradient(p, False, v, dv, d_state, d_z, mean, rows)
    return dq, dk, dv, dq_denominator, dk_denominator, da + da_keys, dq_weight, dk_weight


@linear_attention_backward.register_fake
def _(do, state, z, mean, keys, *arguments):
    p = _Problem(*arguments)
    of_keys = [p.empty_like(x if keys else None) for x in (p.k, p.v, p.k_denominator, p.key_weight)]
    dk, dv, dk_denominator, dk_weight = of_keys
    return (p.empty_like(p.q), dk, dv, p.empty_like(p.q_denominator), dk_denominator, p.empty_like(p.parameter),
            p.empty_like(p.query_weight), dk_weight)  # fmt: skip


def _setup_context(ctx, inputs, output):
    tensors, ctx.options = inputs[:11], inputs[11:]
    ctx.save_for_backward(*tensors, *output[1:])


def _backward(ctx, do, *_):
    *tensors, state, z, mean = ctx.saved_tensors
    needed = ctx.needs_input_grad[:8]
    keys = any(needed[i] for i in (1, 2, 4, 5, 7))
    gradients = linear_attention_backward(do, state, z, mean, keys, *tensors, *ctx.options)
    gradients = (g if need else None for g, need in zip(gradients, needed, strict=True))
    return *gradients, *[None] * (3 + len(ctx.options))


linear_attention_forward.register_autograd(_backward, setup_context=_setup_context)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: FeatureMap,
    *,
    q_denominator: Tensor | None = None,
    k_denominator: Tensor | None = None,
    query_weight: Tensor | None = None,
    key_weight: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    normalize: bool = True,
    scale: float | None = None,
    eps: float = 1e-6,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """The operator on checked arguments; as ``linear_attention_reference``, and ``query_weight`` multiplies φ(q)."""
    cos, sin = (None, None) if rope is None else (table.float() for table in rope)
    parameter = None if feature_map.parameter is None else feature_map.parameter.float().contiguous()
    query_weight, key_weight = (None if w is None else w.float() for w in (query_weight, key_weight))
    return linear_attention_forward(
        q, k, v, q_denominator, k_denominator, parameter, query_weight, key_weight, cos, sin, cu_seqlens,
        max_seqlen or 0, feature_map.name, feature_map.exponent, normalize, scale, eps,
    )[0]  # fmt: skip
