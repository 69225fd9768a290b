"""Linear attention in Triton: the streaming kernels.

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

from flash_bla.ops.triton_support import NOT_SPECIALIZED, jit, tl
from flash_bla.ops.triton_support import tile_pointers as _tile

# A program loops over the blocks of rows of one split of one sequence and head. Strides come as tuples in the order
# (batch, head, row, column).


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
def state_kernel(
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
def reduce_kernel(
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
def output_kernel(
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
def gradient_kernel(
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
