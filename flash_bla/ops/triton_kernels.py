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

Heads narrower than a tile share one: GROUP heads stand side by side in its columns, so that whole cache lines are read,
and their states are the diagonal blocks of one matrix whose other blocks are zero.

``signed_power`` has features of two signs, φ(x) and φ(-x) ("SIGNED"). The first half of the values' columns sees
[φ(q), φ(-q)], the second half [φ(-q), φ(q)]. So o = φ(q) S₊ + φ(-q) S₋, where S₊ holds the sums over φ(k) in the first
half of its columns and those over φ(-k) in the second, and S₋ the others. Registers cannot hold what the queries'
gradients and the sums dS need at a time: two programs beside each other share that work (``query_gradient_kernel``).

With ``SOFTMAX`` the keys' weights are w = M softmax(D^-0.5 · mean(φ(q)) · φ(k)). The queries are summed first
(``query_sum_kernel``); the keys' sums then keep a running maximum, and ``merge_kernel`` puts those of splits together.
Backward, w dw / M summed over the keys is S dS + z dz, so that it takes no pass of its own. But the mean's gradient
comes from the keys, and so the queries' gradients are a launch after theirs.

Rows outside a sequence are zeros, whose features need not be zero: their values and output gradients are, and what
belongs to them is not written. Only z sums keys alone, so there padding stands where φ is zero.

Precision: features, sums and denominators are float32. Operands of matrix products are bfloat16 for bfloat16 inputs,
and float32 otherwise, never tf32: sums over thousands of tokens and powers of features overflow float16.

Speed: these loops are bound by memory only while they issue few instructions. So v and do go to the matrix units as
they are; what divides or shifts them is applied to features and products. The states are kept transposed, (DV, D), for
which no operand that was computed has to be transposed. A tile is computed in one register layout, that of products'
results: where layouts differ, the compiler computes features once for each.
"""

from __future__ import annotations

from typing import NamedTuple

from flash_bla.ops.triton_support import INTERPRETING, NOT_SPECIALIZED, fast_rounded_positive_part, jit, tl


class Config(NamedTuple):
    """What is fixed when a kernel is compiled; BLOCK_* are the sides of the tiles."""

    D: int
    DV: int
    GROUP: int
    BLOCK_N: int
    BLOCK_D: int
    BLOCK_DV: int
    EXPONENT: int
    SIGNED: bool
    PARAMETER: bool
    NORMALIZE: bool
    CENTER: bool
    ROPE: bool
    DECOUPLED: bool
    QUERY_WEIGHT: bool
    KEY_WEIGHT: bool
    SOFTMAX: bool  # keys: weights are a softmax of their products with the queries' mean
    VARLEN: bool
    MEAN: bool  # s = 1 / M
    FEW: bool  # keys: z sums rounded features
    WIDE: bool  # tiles that span 2³¹ elements and more


# --- rows, columns, heads ---------------------------------------------------------------------------------------------
# Strides come as tuples in the order (batch, head, row, column).


@jit
def _place(heads, cu_seqlens, length, C: tl.constexpr):
    """Sequence, batch index, first of the group's heads, first row and number of rows of this program."""
    groups = tl.cdiv(heads, C.GROUP)
    sequence = (tl.program_id(0) // groups).to(tl.int64)
    head = tl.program_id(0) % groups * C.GROUP
    if C.VARLEN:
        first = tl.load(cu_seqlens + sequence)
        return sequence, 0, head, first, tl.load(cu_seqlens + sequence + 1) - first
    else:
        return sequence, sequence, head, 0, length


@jit
def _share(count, C: tl.constexpr):
    """First row and end of this program's split: whole blocks, spread evenly over the splits."""
    chunk = tl.cdiv(tl.cdiv(count, tl.num_programs(1)), C.BLOCK_N) * C.BLOCK_N
    begin = tl.program_id(1) * chunk
    return begin, tl.minimum(begin + chunk, count)


@jit
def _columns(head, heads, D: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr):
    """Head (from the group's first) and channel of each column of a tile, and whether it exists."""
    column = tl.arange(0, BLOCK)
    if C.GROUP == 1:
        return column * 0, column, column < D
    else:
        return column // D, column % D, head + column // D < heads


@jit
def _offsets(head, channel, strides, C: tl.constexpr):
    """Offsets in a tile from its first row and head."""
    if C.WIDE:
        rows, columns = tl.arange(0, C.BLOCK_N).to(tl.int64), (head.to(tl.int64), channel.to(tl.int64))
    else:
        rows, columns = tl.arange(0, C.BLOCK_N), (head, channel)
    return (rows * strides[2])[:, None] + (columns[0] * strides[1] + columns[1] * strides[3])[None, :]


@jit
def _identity(BLOCK: tl.constexpr, OPERAND: tl.constexpr, TYPE: tl.constexpr):
    if OPERAND == tl.bfloat16:
        i = tl.arange(0, BLOCK)
        return tl.where(i[:, None] == i[None, :], 1.0, 0.0).to(TYPE)
    else:
        return 0.0


@jit
def _to_product_layout(x, identity, OPERAND: tl.constexpr):
    """x in float32, in the register layout of a product's result: as its product with the identity."""
    if OPERAND == tl.bfloat16:
        return tl.dot(x, identity)
    else:
        return x.to(tl.float32)


@jit
def _start(pointer, strides, batch, head, row):
    return pointer + batch * strides[0] + head.to(tl.int64) * strides[1] + tl.cast(row, tl.int64) * strides[2]


@jit
def _next(pointer, strides, C: tl.constexpr):
    return pointer + tl.full((), C.BLOCK_N, tl.int64) * strides[2]


@jit
def _zeros(rows: tl.constexpr, columns: tl.constexpr):
    return tl.zeros((rows, columns), tl.float32)


@jit
def _by_head(x, D: tl.constexpr, C: tl.constexpr):
    """Sums of a tile's columns by head: (rows, columns) to (rows, GROUP)."""
    if C.GROUP == 1:
        return tl.sum(x, 1)[:, None]
    else:
        return tl.sum(tl.reshape(x, x.shape[0], C.GROUP, D), 2)


@jit
def _by_sixteenth(x, C: tl.constexpr):
    """Sums over rows as far as a thread holds several of them in the layout of a load: to (16, columns)."""
    return tl.sum(tl.reshape(x, C.BLOCK_N // 16, 16, C.BLOCK_D), 0)


@jit
def _zeros3(blocks: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr):
    return tl.zeros((blocks, rows, columns), tl.float32)


@jit
def _by_eighth(x, C: tl.constexpr):
    """The same in the layout of a product: to (rows / 16, 8, columns)."""
    return tl.sum(tl.reshape(x, C.BLOCK_N // 16, 2, 8, C.BLOCK_D), 1)


@jit
def _sum_eighths(x):
    return tl.sum(tl.sum(x, 0), 0)


@jit
def _add(a, b, c, d):
    return a + c, b + d


@jit
def _both_by_head(x, y, D: tl.constexpr, C: tl.constexpr):
    """``_by_head`` of two tiles, in one reduction: so the compiler gives both the same layout."""
    if C.GROUP == 1:
        x, y = tl.reduce((x, y), 1, _add)
        return x[:, None], y[:, None]
    else:
        x, y = tl.reshape(x, x.shape[0], C.GROUP, D), tl.reshape(y, y.shape[0], C.GROUP, D)
        return tl.reduce((x, y), 2, _add)


if INTERPRETING:  # a reduction of two takes the interpreter minutes

    @jit
    def _both_by_head(x, y, D: tl.constexpr, C: tl.constexpr):
        return _by_head(x, D, C), _by_head(y, D, C)


@jit
def _to_columns(x, D: tl.constexpr, C: tl.constexpr):
    """A number for each head to the columns of a tile: (rows, GROUP) to what broadcasts with (rows, columns)."""
    if C.GROUP == 1:
        return x
    else:
        x = tl.broadcast_to(x[:, :, None], x.shape[0], C.GROUP, D)
        return tl.reshape(x, x.shape[0], C.GROUP * D)


@jit
def _load_weight(w_ptr, strides, head, heads, inside, C: tl.constexpr):
    """Weights (rows, GROUP) to the columns of a tile."""
    h = tl.arange(0, C.GROUP)
    mask = inside[:, None] & (head + h < heads)[None, :]
    w = tl.load(w_ptr + _offsets(h, h * 0, (0, strides[1], strides[2], 0), C), mask=mask, other=0.0)
    return _to_columns(w, C.D, C)


@jit
def _store_weight(w_ptr, strides, head, heads, inside, dw, C: tl.constexpr):
    h = tl.arange(0, C.GROUP)
    mask = inside[:, None] & (head + h < heads)[None, :]
    tl.store(w_ptr + _offsets(h, h * 0, (0, strides[1], strides[2], 0), C), dw, mask=mask)


# --- features ---------------------------------------------------------------------------------------------------------


@jit
def _turn(x, cos, sin, C: tl.constexpr):
    """Turns adjacent pairs of columns."""
    even, odd = tl.split(tl.reshape(x, C.BLOCK_N, C.BLOCK_D // 2, 2))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), C.BLOCK_N, C.BLOCK_D)


@jit
def _load_rope(pointers, mask, identity, OPERAND: tl.constexpr, C: tl.constexpr):
    """Cosines and sines of a tile's pairs of columns, in a product's layout if ``identity`` is a matrix."""
    rope = tl.load(pointers, mask=mask, other=0.0)
    if OPERAND == tl.bfloat16 and identity is not None:
        rope = tl.dot(rope, identity)
    return tl.split(tl.reshape(rope.to(tl.float32), C.BLOCK_N, C.BLOCK_D // 2, 2))


@jit
def _load_parameter(a_ptr, head, heads, C: tl.constexpr):
    """The map's parameter for each column: the power of ``SIGNED``, or the reciprocal of the focusing map's scale."""
    if C.PARAMETER:
        h, channel, exists = _columns(head, heads, C.D, C.BLOCK_D, C)
        a = tl.load(a_ptr + (head + h) * C.D + channel, mask=exists, other=1.0)[None, :]
        return a if C.SIGNED else 1.0 / a
    else:
        return 1.0


@jit
def _signs(phi, C: tl.constexpr):
    """φ(x), and φ(-x) if ``SIGNED``: one of them is zero, and ``phi`` their difference."""
    if C.SIGNED:
        return tl.maximum(phi, 0.0), tl.maximum(-phi, 0.0)
    else:
        return phi, 0.0


@jit
def _operands(phi, w, OPERAND: tl.constexpr, C: tl.constexpr):
    """The same as operands, times the weight, if any."""
    if C.SIGNED and w is None:
        return fast_rounded_positive_part(phi, OPERAND), fast_rounded_positive_part(-phi, OPERAND)
    else:
        plus, minus = _signs(phi, C)
        if w is not None:
            plus, minus = plus * w, minus * w
        return plus.to(OPERAND), minus.to(OPERAND) if C.SIGNED else 0.0


@jit
def _of_sign(x, plus, minus):
    """``plus`` where x is positive, and -``minus`` elsewhere."""
    chosen = tl.where(x > 0.0, plus, minus).to(tl.int32, bitcast=True)
    return (chosen ^ (x.to(tl.int32, bitcast=True) & -(2**31))).to(tl.float32, bitcast=True)


@jit
def _rounded_if_few(features, OPERAND: tl.constexpr, C: tl.constexpr):
    """What z sums. Of few tokens it must be rounded as what S sums; of many the difference averages out."""
    if C.FEW:
        return features.to(OPERAND).to(tl.float32)
    else:
        return features


@jit
def _features_backward(x, a, phi, d_phi, PHI_DX: tl.constexpr, PHI_DA: tl.constexpr, C: tl.constexpr):
    """Gradients by x and by the map's parameter, the latter of each element, from φ(x) and the gradient by it."""
    if C.SIGNED:
        return d_phi * PHI_DX(x, phi, a, C.EXPONENT), d_phi * PHI_DA(x, phi, a, C.EXPONENT)
    else:
        return d_phi * PHI_DX(x, phi, a, C.EXPONENT), 0.0


# --- states -----------------------------------------------------------------------------------------------------------
# In memory (B, H, SIGNS, ROWS, D): S, z as its next row, and of ``SOFTMAX`` two more: the queries' mean, and the
# logarithm of the exponentials' sum. Those of splits stand one after the other; they have the logarithm alone, twice.


@jit
def _state_rows(C: tl.constexpr):
    return C.DV + (3 if C.SOFTMAX else 1)


@jit
def _state_offsets(head, heads, C: tl.constexpr):
    """Offsets of S₊ from the first head's, those of z₊, and which exist; S₋ and z₋ come (DV + 1) D later."""
    SIGNS: tl.constexpr = 2 if C.SIGNED else 1
    h, d, exists = _columns(head, heads, C.D, C.BLOCK_D, C)
    hv, c, exists_v = _columns(head, heads, C.DV, C.BLOCK_DV, C)
    offsets = ((hv * SIGNS * _state_rows(C) + c) * C.D)[:, None] + d[None, :]
    mask = exists_v[:, None] & exists[None, :] & (hv[:, None] == h[None, :])
    return offsets, mask, (h * SIGNS * _state_rows(C) + C.DV) * C.D + d, exists


@jit
def _load_state(state_ptr, at, head, heads, C: tl.constexpr):
    """S₊, S₋, z₊, z₋ of the group whose first head is the ``at``-th."""
    offsets, mask, z_offsets, exists = _state_offsets(head, heads, C)
    state_ptr += at * ((2 if C.SIGNED else 1) * _state_rows(C) * C.D)
    plus = tl.load(state_ptr + offsets, mask=mask, other=0.0)
    z_plus = tl.load(state_ptr + z_offsets, mask=exists, other=0.0)
    if C.SIGNED:
        state_ptr += (C.DV + 1) * C.D
        minus = tl.load(state_ptr + offsets, mask=mask, other=0.0)
        z_minus = tl.load(state_ptr + z_offsets, mask=exists, other=0.0)
        return plus, minus, z_plus, z_minus
    else:
        return plus, 0.0, z_plus, 0.0


@jit
def _store_state(state_ptr, at, head, heads, plus, minus, z_plus, z_minus, C: tl.constexpr):
    offsets, mask, z_offsets, exists = _state_offsets(head, heads, C)
    state_ptr += at * ((2 if C.SIGNED else 1) * _state_rows(C) * C.D)
    tl.store(state_ptr + offsets, plus, mask=mask)
    tl.store(state_ptr + z_offsets, z_plus, mask=exists)
    if C.SIGNED:
        state_ptr += (C.DV + 1) * C.D
        tl.store(state_ptr + offsets, minus, mask=mask)
        tl.store(state_ptr + z_offsets, z_minus, mask=exists)


@jit
def _load_softmax(state_ptr, at, head, heads, C: tl.constexpr):
    """The queries' mean, (1, BLOCK_D), and the logarithm of each head, (1, GROUP)."""
    _, _, z_offsets, exists = _state_offsets(head, heads, C)
    state_ptr += at * (_state_rows(C) * C.D)
    h = tl.arange(0, C.GROUP)
    logarithm = tl.load(state_ptr + ((h + 1) * _state_rows(C) - 1) * C.D, mask=head + h < heads, other=0.0)
    return tl.load(state_ptr + z_offsets + C.D, mask=exists, other=0.0)[None, :], logarithm[None, :]


@jit
def _sum_splits(pointers, stride, splits, exists):
    """The sum over splits of a vector: of the first split at these pointers, of each next one ``stride`` later."""
    total = _zeros(8, pointers.shape[0])
    for first in range(0, splits, 8):
        split = first + tl.arange(0, 8)
        mask = (split < splits)[:, None] & exists[None, :]
        total += tl.load(pointers[None, :] + split.to(tl.int64)[:, None] * stride, mask=mask, other=0.0)
    return tl.sum(total, 0)


@jit
def _sum_query_splits(x_ptr, at, splits, head, heads, C: tl.constexpr):
    """The sum over splits of vectors (splits, B, H, D) for the group whose first head is the ``at``-th."""
    h, d, exists = _columns(head, heads, C.D, C.BLOCK_D, C)
    sequences = (tl.num_programs(0) // tl.cdiv(heads, C.GROUP)).to(tl.int64)
    return _sum_splits(x_ptr + (at + h) * C.D + d, sequences * heads * C.D, splits, exists)


@jit
def _mask_heads(state, C: tl.constexpr):
    """Zero where a row and a column are not of the same head."""
    if C.GROUP == 1:
        return state
    else:
        hv, h = tl.arange(0, C.BLOCK_DV) // C.DV, tl.arange(0, C.BLOCK_D) // C.D
        return tl.where(hv[:, None] == h[None, :], state, 0.0)


@jit
def _first_half(C: tl.constexpr):
    """Which of the values' channels are in the first half of their head's."""
    return tl.arange(0, C.BLOCK_DV) % C.DV < C.DV // 2


@jit
def _swap_halves(plus, minus, C: tl.constexpr):
    """Sums over φ(k) and φ(-k) to S₊ and S₋, and back."""
    if C.SIGNED:
        first = _first_half(C)[:, None]
        return tl.where(first, plus, minus), tl.where(first, minus, plus)
    else:
        return plus, minus


@jit
def _center(plus, minus, z_plus, z_minus, C: tl.constexpr):
    """S - z m, and the values' mean m = Σ S / Σ z."""
    if C.CENTER:
        sums = tl.sum(tl.where(z_plus < 0.0, -1.0, 1.0)[None, :] * plus, 1)
        total = _by_head(tl.abs(z_plus)[None, :], C.D, C)
        if C.SIGNED:
            sums += tl.sum(minus, 1)
            total += _by_head(z_minus[None, :], C.D, C)
        total = tl.reshape(tl.broadcast_to(_to_columns(total, C.DV, C), 1, C.BLOCK_DV), C.BLOCK_DV)
        mean = tl.where(total > 0.0, sums / total, 0.0)
        if C.SIGNED:
            first = _first_half(C)[:, None]
            plus -= mean[:, None] * tl.where(first, z_plus[None, :], z_minus[None, :])
            minus -= mean[:, None] * tl.where(first, z_minus[None, :], z_plus[None, :])
            return _mask_heads(plus, C), _mask_heads(minus, C), mean
        else:
            return _mask_heads(plus - mean[:, None] * z_plus[None, :], C), minus, mean
    else:
        return plus, minus, tl.sum(_zeros(1, C.BLOCK_DV), 0)


# --- products with vectors --------------------------------------------------------------------------------------------
# A vector for each head becomes the 16 columns of a matrix: (head, part), with what a bfloat16 rounds off as the second
# part.


@jit
def _vector_operand(x, D: tl.constexpr, BLOCK: tl.constexpr, OPERAND: tl.constexpr, C: tl.constexpr):
    """The matrix (BLOCK, 16) of a vector of BLOCK elements, D for each head."""
    PARTS: tl.constexpr = 16 // C.GROUP
    column = tl.arange(0, 16)
    x = x[:, None] + _zeros(1, 16)
    if C.GROUP > 1:
        x = tl.where((tl.arange(0, BLOCK) // D)[:, None] == (column // PARTS)[None, :], x, 0.0)
    rounded = x.to(OPERAND)
    rest = (x - rounded.to(tl.float32)).to(OPERAND)
    part = (column % PARTS)[None, :]
    return tl.where(part == 0, rounded, tl.where(part == 1, rest, 0.0))


@jit
def _vector_product(x, operand, PRECISION: tl.constexpr, C: tl.constexpr):
    """The products of a tile's rows with the vector, by head: (rows, GROUP)."""
    products = tl.dot(x, operand, input_precision=PRECISION)
    if C.GROUP == 1:
        return tl.sum(products, 1)[:, None]
    else:
        return tl.sum(tl.reshape(products, C.BLOCK_N, C.GROUP, 16 // C.GROUP), 2)


@jit
def _to_value_columns(first, second, C: tl.constexpr):
    """A number for each head and half to the values' columns."""
    if C.SIGNED:
        return tl.where(_first_half(C)[None, :], _to_columns(first, C.DV, C), _to_columns(second, C.DV, C))
    else:
        return _to_columns(first, C.DV, C)


@jit
def _signed_denominators(phi, z_plus, z_minus, eps, C: tl.constexpr):
    """[φ(q), φ(-q)] · z and [φ(-q), φ(q)] · z + ε: those of the first and of the second half of the values' columns."""
    positive = phi > 0.0
    equal, opposite = tl.where(positive, z_plus, z_minus), tl.where(positive, z_minus, z_plus)
    first, second = _both_by_head(tl.abs(phi) * equal, tl.abs(phi) * opposite, C.D, C)
    return first + eps, second + eps


# --- the loops --------------------------------------------------------------------------------------------------------


@jit
def sum_keys(
    k_ptr, k_strides, kd_ptr, kd_strides, v_ptr, v_strides, a_ptr, wk_ptr, wk_strides, rope_ptr, rope_strides,
    mean, batch, head, heads, first, begin, end, count, scale,
    PHI: tl.constexpr, PAD: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """S₊, S₋ = s Σ φ(±k)ᵀ v and z₊, z₋ = Σ φ̃(±k) / M over the rows from ``begin`` to ``end``.

    With ``SOFTMAX`` a key's weight is M softmax(mean · φ(k)), of which the rows' share of the sums is known: S, z, and
    the logarithm of the share, to base 2. ``mean`` is (1, BLOCK_D), the weights' logarithm to base 2.
    """
    h, d, exists = _columns(head, heads, C.D, C.BLOCK_D, C)
    hv, c, exists_v = _columns(head, heads, C.DV, C.BLOCK_DV, C)
    k_ptr, k_tile = _start(k_ptr, k_strides, batch, head, first + begin), _offsets(h, d, k_strides, C)
    v_ptr, v_tile = _start(v_ptr, v_strides, batch, head, first + begin), _offsets(hv, c, v_strides, C)
    if C.DECOUPLED:
        kd_ptr, kd_tile = _start(kd_ptr, kd_strides, batch, head, first + begin), _offsets(h, d, kd_strides, C)
    if C.KEY_WEIGHT:
        wk_ptr = _start(wk_ptr, wk_strides, batch, head, first + begin)
    if C.ROPE:
        rope_ptr, rope_tile = _start(rope_ptr, rope_strides, batch, head, begin), _offsets(h, d, rope_strides, C)
    a = _load_parameter(a_ptr, head, heads, C)
    plus = _zeros(C.BLOCK_DV, C.BLOCK_D)
    minus = _zeros(C.BLOCK_DV, C.BLOCK_D)
    z_plus = _zeros(16, C.BLOCK_D)
    z_minus = _zeros(16, C.BLOCK_D)
    maximum = _zeros(1, C.GROUP) - 1e30
    total = _zeros(C.BLOCK_N, C.GROUP)

    for start in range(begin, end, C.BLOCK_N):
        n = start + tl.arange(0, C.BLOCK_N)
        inside = n < end
        mask, v_mask = inside[:, None] & exists[None, :], inside[:, None] & exists_v[None, :]
        # φ is zero where PAD stands; so is a weight of the softmax
        k = tl.load(k_ptr + k_tile, mask=mask, other=0.0 if C.SOFTMAX else PAD).to(tl.float32)
        v = tl.load(v_ptr + v_tile, mask=v_mask, other=0.0).to(OPERAND)
        phi_plus, phi_minus = _signs(PHI(k, a, C.EXPONENT), C)
        if C.KEY_WEIGHT:
            w = _load_weight(wk_ptr, wk_strides, head, heads, inside, C)
            phi_plus *= w
            phi_minus *= w
        if C.SOFTMAX:  # sums so far are of exponentials of less a maximum that may have grown
            scores = tl.where(inside[:, None], _by_head(phi_plus * mean, C.D, C), float("-inf"))
            larger = tl.maximum(maximum, tl.max(scores, 0)[None, :])
            fade = tl.exp2(maximum - larger)
            w = tl.exp2(scores - larger)
            maximum, total = larger, total * fade + w
            fade = _to_columns(fade, C.D, C)
            plus *= fade
            z_plus *= fade
            phi_plus *= _to_columns(w, C.D, C)
        if C.DECOUPLED:
            kd = tl.load(kd_ptr + kd_tile, mask=mask, other=0.0).to(tl.float32)
            z_plus += _by_sixteenth(kd, C)
        elif C.NORMALIZE:
            z_plus += _by_sixteenth(_rounded_if_few(phi_plus, OPERAND, C), C)
        if C.ROPE:
            cos, sin = _load_rope(rope_ptr + rope_tile, mask, None, OPERAND, C)
            rope_ptr = _next(rope_ptr, rope_strides, C)
            phi_plus = _turn(phi_plus, cos, sin, C)
        plus = tl.dot(tl.trans(v), phi_plus.to(OPERAND), plus, input_precision=PRECISION)
        if C.SIGNED:
            z_minus += _by_sixteenth(_rounded_if_few(phi_minus, OPERAND, C), C)
            minus = tl.dot(tl.trans(v), phi_minus.to(OPERAND), minus, input_precision=PRECISION)
        k_ptr, v_ptr = _next(k_ptr, k_strides, C), _next(v_ptr, v_strides, C)
        if C.DECOUPLED:
            kd_ptr = _next(kd_ptr, kd_strides, C)
        if C.KEY_WEIGHT:
            wk_ptr = _next(wk_ptr, wk_strides, C)

    one = 1.0 / tl.maximum(count, 1).to(tl.float32)
    if C.MEAN:
        scale = one
    if C.SOFTMAX:
        total = tl.sum(total, 0)[None, :]
        maximum += tl.log2(total)
        total = _to_columns(tl.where(total > 0.0, 1.0 / total, 0.0), C.D, C)
        plus *= total
        z_plus *= total
        scale, one = scale / one, 1.0
    plus, minus = _swap_halves(_mask_heads(plus * scale, C), _mask_heads(minus * scale, C), C)
    return plus, minus, tl.sum(z_plus, 0) * one, tl.sum(z_minus, 0) * one, maximum


@jit
def write_output(
    q_ptr, q_strides, qd_ptr, qd_strides, o_ptr, o_strides, a_ptr, wq_ptr, wq_strides, rope_ptr, rope_strides,
    plus, minus, z_plus, z_minus, batch, head, heads, first, begin, end, eps,
    PHI: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """o = φ(q) S / (φ̃(q) · z + ε)."""
    h, d, exists = _columns(head, heads, C.D, C.BLOCK_D, C)
    hv, c, exists_v = _columns(head, heads, C.DV, C.BLOCK_DV, C)
    q_ptr, q_tile = _start(q_ptr, q_strides, batch, head, first + begin), _offsets(h, d, q_strides, C)
    o_ptr, o_tile = _start(o_ptr, o_strides, batch, head, first + begin), _offsets(hv, c, o_strides, C)
    if C.DECOUPLED:
        qd_ptr, qd_tile = _start(qd_ptr, qd_strides, batch, head, first + begin), _offsets(h, d, qd_strides, C)
    if C.QUERY_WEIGHT:
        wq_ptr = _start(wq_ptr, wq_strides, batch, head, first + begin)
    if C.ROPE:
        rope_ptr, rope_tile = _start(rope_ptr, rope_strides, batch, head, begin), _offsets(h, d, rope_strides, C)
        rope_identity = _identity(C.BLOCK_D, OPERAND, tl.float16)
    a = _load_parameter(a_ptr, head, heads, C)
    plus = tl.trans(plus.to(OPERAND))
    if C.SIGNED:
        minus = tl.trans(minus.to(OPERAND))
        z_plus, z_minus = z_plus[None, :], z_minus[None, :]
    elif C.NORMALIZE:
        z = _vector_operand(z_plus, C.D, C.BLOCK_D, OPERAND, C)
    identity = _identity(C.BLOCK_D, OPERAND, OPERAND)

    for start in range(begin, end, C.BLOCK_N):
        n = start + tl.arange(0, C.BLOCK_N)
        inside = n < end
        mask = inside[:, None] & exists[None, :]
        q = tl.load(q_ptr + q_tile, mask=mask, other=0.0)
        if C.SIGNED or C.ROPE or C.QUERY_WEIGHT:  # features are used twice
            q = _to_product_layout(q, identity, OPERAND)
        phi = PHI(q.to(tl.float32), a, C.EXPONENT)
        if C.QUERY_WEIGHT:
            phi *= _load_weight(wq_ptr, wq_strides, head, heads, inside, C)
        turned = phi
        if C.ROPE:
            cos, sin = _load_rope(rope_ptr + rope_tile, mask, rope_identity, OPERAND, C)
            rope_ptr = _next(rope_ptr, rope_strides, C)
            turned = _turn(phi, cos, sin, C)
        phi_plus, phi_minus = _operands(turned, None, OPERAND, C)
        o = tl.dot(phi_plus, plus, input_precision=PRECISION)
        if C.SIGNED:
            o = tl.dot(phi_minus, minus, o, input_precision=PRECISION)
            first_half, second_half = _signed_denominators(phi, z_plus, z_minus, eps, C)
            o *= _to_value_columns(1.0 / first_half, 1.0 / second_half, C)
        elif C.NORMALIZE:
            denominator = phi.to(OPERAND)
            if C.DECOUPLED:
                denominator = tl.load(qd_ptr + qd_tile, mask=mask, other=0.0).to(OPERAND)
            o *= _to_columns(1.0 / (_vector_product(denominator, z, PRECISION, C) + eps), C.DV, C)
        tl.store(o_ptr + o_tile, o.to(o_ptr.dtype.element_ty), mask=inside[:, None] & exists_v[None, :])
        q_ptr, o_ptr = _next(q_ptr, q_strides, C), _next(o_ptr, o_strides, C)
        if C.DECOUPLED:
            qd_ptr = _next(qd_ptr, qd_strides, C)
        if C.QUERY_WEIGHT:
            wq_ptr = _next(wq_ptr, wq_strides, C)


@jit
def differentiate_queries(
    q_ptr, q_strides, qd_ptr, qd_strides, do_ptr, do_strides, a_ptr, wq_ptr, wq_strides,
    rope_ptr, rope_strides, dq_ptr, dq_strides, dqd_ptr, dqd_strides, dwq_ptr, dwq_strides,
    plus, minus, z_plus, z_minus, mean, d_mean, batch, head, heads, first, begin, end, eps,
    PHI: tl.constexpr, PHI_DX: tl.constexpr, PHI_DA: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr, C: tl.constexpr, SUMS: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """Writes the queries' gradients, and returns dS₊, dS₋, dz₊, dz₋ and the gradient of the map's parameter.

    ``SUMS`` or ``GRADIENT`` alone does without what only the other needs. ``d_mean`` is added to φ(q)'s gradients.
    """
    h, d, exists = _columns(head, heads, C.D, C.BLOCK_D, C)
    hv, c, exists_v = _columns(head, heads, C.DV, C.BLOCK_DV, C)
    q_ptr, q_tile = _start(q_ptr, q_strides, batch, head, first + begin), _offsets(h, d, q_strides, C)
    do_ptr, do_tile = _start(do_ptr, do_strides, batch, head, first + begin), _offsets(hv, c, do_strides, C)
    dq_ptr, dq_tile = _start(dq_ptr, dq_strides, batch, head, first + begin), _offsets(h, d, dq_strides, C)
    if C.DECOUPLED:
        qd_ptr, qd_tile = _start(qd_ptr, qd_strides, batch, head, first + begin), _offsets(h, d, qd_strides, C)
        dqd_ptr, dqd_tile = _start(dqd_ptr, dqd_strides, batch, head, first + begin), _offsets(h, d, dqd_strides, C)
    if C.QUERY_WEIGHT:
        wq_ptr = _start(wq_ptr, wq_strides, batch, head, first + begin)
        dwq_ptr = _start(dwq_ptr, dwq_strides, batch, head, first + begin)
    if C.ROPE:
        rope_ptr, rope_tile = _start(rope_ptr, rope_strides, batch, head, begin), _offsets(h, d, rope_strides, C)
        rope_identity = _identity(C.BLOCK_D, OPERAND, tl.float16)
    a = _load_parameter(a_ptr, head, heads, C)
    identity = _identity(C.BLOCK_D, OPERAND, OPERAND)
    plus = plus.to(OPERAND)
    if C.SIGNED:
        minus = minus.to(OPERAND)
        identity_v = _identity(C.BLOCK_DV, OPERAND, OPERAND)
        z_minus = z_minus[None, :]
    elif C.CENTER:
        mean_operand = _vector_operand(mean, C.DV, C.BLOCK_DV, OPERAND, C)
    z_plus = z_plus[None, :]
    # A weight counts by its logarithm's gradient, ε do · o / (φ̃(q) · z + ε)², where that is more than rounding.
    LEAST: tl.constexpr = 0.0 if q_ptr.dtype.element_ty == tl.float32 else 2.0**-12
    d_plus = _zeros(C.BLOCK_DV, C.BLOCK_D)
    d_minus = _zeros(C.BLOCK_DV, C.BLOCK_D)
    dz_plus = _zeros3(C.BLOCK_N // 16, 8, C.BLOCK_D)
    dz_minus = _zeros3(C.BLOCK_N // 16, 8, C.BLOCK_D)
    da = _zeros3(C.BLOCK_N // 16, 8, C.BLOCK_D)

    for start in range(begin, end, C.BLOCK_N):
        n = start + tl.arange(0, C.BLOCK_N)
        inside = n < end
        mask, do_mask = inside[:, None] & exists[None, :], inside[:, None] & exists_v[None, :]
        q = _to_product_layout(tl.load(q_ptr + q_tile, mask=mask, other=0.0), identity, OPERAND)
        do = tl.load(do_ptr + do_tile, mask=do_mask, other=0.0).to(OPERAND)
        phi = PHI(q, a, C.EXPONENT)
        unweighted = phi
        if C.QUERY_WEIGHT:
            w = _load_weight(wq_ptr, wq_strides, head, heads, inside, C)
            phi *= w
        turned = phi
        if not C.SIGNED:
            d_phi = tl.dot(do, plus, input_precision=PRECISION)
        if C.ROPE:
            cos, sin = _load_rope(rope_ptr + rope_tile, mask, rope_identity, OPERAND, C)
            rope_ptr = _next(rope_ptr, rope_strides, C)
            if SUMS:
                turned = _turn(phi, cos, sin, C)
            if GRADIENT:
                d_phi = _turn(d_phi, cos, -sin, C)

        if C.SIGNED:
            # the two halves of the values' columns have denominators of their own: dn itself is needed
            one = tl.where(inside, eps, 1.0)[:, None]  # no infinity outside, which would enter sums
            phi_plus, phi_minus = _operands(phi, None, OPERAND, C)
            first_half, second_half = _signed_denominators(phi, z_plus, z_minus, one, C)
            inverse = _to_value_columns(1.0 / first_half, 1.0 / second_half, C)
            dn = _to_product_layout(do, identity_v, OPERAND) * inverse
            dn_operand = dn.to(OPERAND)
            if SUMS:
                d_plus = tl.dot(tl.trans(dn_operand), phi_plus, d_plus, input_precision=PRECISION)
                d_minus = tl.dot(tl.trans(dn_operand), phi_minus, d_minus, input_precision=PRECISION)
            o = tl.dot(phi_plus, tl.trans(plus), input_precision=PRECISION)
            o = tl.dot(phi_minus, tl.trans(minus), o, input_precision=PRECISION)
            weights = (eps * mean[None, :] - o) * dn
            is_first = _first_half(C)[None, :]
            weight, other = _both_by_head(tl.where(is_first, weights, 0.0), tl.where(is_first, 0.0, weights), C.DV, C)
            weight, other = _to_columns(weight / first_half, C.D, C), _to_columns(other / second_half, C.D, C)
            if SUMS:
                dz_plus += _by_eighth((weight + other) * tl.abs(phi), C)  # of z₊ + z₋
                dz_minus += _by_eighth((weight - other) * phi, C)  # of z₊ - z₋
            if GRADIENT:
                d_phi = tl.dot(dn_operand, plus, input_precision=PRECISION)
                d_phi_minus = tl.dot(dn_operand, minus, input_precision=PRECISION)
                d_phi += weight * z_plus + other * z_minus
                d_phi_minus += weight * z_minus + other * z_plus
                d_phi = _of_sign(q, d_phi, d_phi_minus)
        elif C.NORMALIZE:
            denominator = phi
            if C.DECOUPLED:
                denominator = tl.load(qd_ptr + qd_tile, mask=mask, other=0.0).to(tl.float32)
            inverse, weight = _both_by_head(denominator * z_plus, (phi if GRADIENT else turned) * d_phi, C.D, C)
            inverse = 1.0 / (inverse + tl.where(inside, eps, 1.0)[:, None])
            shift = inverse * 0.0
            if C.CENTER:
                shift = _vector_product(do, mean_operand, PRECISION, C)
                weight -= eps * shift
            weight *= -inverse * inverse
            if C.QUERY_WEIGHT:
                share = eps * inverse
                dw = tl.where(share > LEAST, share * shift - eps * weight, 0.0)
            weight = _to_columns(weight, C.D, C)
            inverse = _to_columns(inverse, C.D, C)
            if SUMS:
                d_plus = tl.dot(tl.trans(do), (turned * inverse).to(OPERAND), d_plus, input_precision=PRECISION)
                dz_plus += _by_eighth(weight * denominator, C)
            d_phi *= inverse
        elif SUMS:
            d_plus = tl.dot(tl.trans(do), turned.to(OPERAND), d_plus, input_precision=PRECISION)

        if GRADIENT:
            if C.DECOUPLED:
                tl.store(dqd_ptr + dqd_tile, (weight * z_plus).to(dqd_ptr.dtype.element_ty), mask=mask)
            elif C.NORMALIZE and not C.SIGNED:
                d_phi += weight * z_plus
            if C.SOFTMAX:
                d_phi += d_mean
            if C.QUERY_WEIGHT:
                if not C.NORMALIZE:
                    dw = _by_head(d_phi * phi, C.D, C)
                _store_weight(dwq_ptr, dwq_strides, head, heads, inside, dw, C)
                d_phi *= w
            dq, da_rows = _features_backward(q, a, unweighted, d_phi, PHI_DX, PHI_DA, C)
            if C.SIGNED:
                da += _by_eighth(da_rows, C)  # zero where there is no row
            tl.store(dq_ptr + dq_tile, dq.to(dq_ptr.dtype.element_ty), mask=mask)
        q_ptr, do_ptr, dq_ptr = _next(q_ptr, q_strides, C), _next(do_ptr, do_strides, C), _next(dq_ptr, dq_strides, C)
        if C.DECOUPLED:
            qd_ptr, dqd_ptr = _next(qd_ptr, qd_strides, C), _next(dqd_ptr, dqd_strides, C)
        if C.QUERY_WEIGHT:
            wq_ptr, dwq_ptr = _next(wq_ptr, wq_strides, C), _next(dwq_ptr, dwq_strides, C)

    dz_plus, dz_minus, da = _sum_eighths(dz_plus), _sum_eighths(dz_minus), _sum_eighths(da)
    if C.GROUP * C.D < C.BLOCK_D:  # φ need not be zero in columns that do not exist
        d_plus, d_minus = tl.where(exists[None, :], d_plus, 0.0), tl.where(exists[None, :], d_minus, 0.0)
        dz_plus, dz_minus = tl.where(exists, dz_plus, 0.0), tl.where(exists, dz_minus, 0.0)
    if C.SIGNED:
        dz_plus, dz_minus = 0.5 * (dz_plus + dz_minus), 0.5 * (dz_plus - dz_minus)
        da *= 0.6931471805599453
    return _mask_heads(d_plus, C), _mask_heads(d_minus, C), dz_plus, dz_minus, da


@jit
def differentiate_keys(
    k_ptr, k_strides, kd_ptr, kd_strides, v_ptr, v_strides, a_ptr, wk_ptr, wk_strides,
    rope_ptr, rope_strides, dk_ptr, dk_strides, dkd_ptr, dkd_strides, dv_ptr, dv_strides, dwk_ptr, dwk_strides,
    d_plus, d_minus, dz_plus, dz_minus, mean, query_mean, logarithm, average, batch, head, heads, first, begin, end,
    count, scale,
    PHI: tl.constexpr, PHI_DX: tl.constexpr, PHI_DA: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of keys and values, and returns those of the map's parameter and of the queries' mean.

    The latter belong to ``SOFTMAX``, as do the mean itself and the exponentials' logarithm (see ``sum_keys``), and the
    average of the weights' gradients.
    """
    h, d, exists = _columns(head, heads, C.D, C.BLOCK_D, C)
    hv, c, exists_v = _columns(head, heads, C.DV, C.BLOCK_DV, C)
    k_ptr, k_tile = _start(k_ptr, k_strides, batch, head, first + begin), _offsets(h, d, k_strides, C)
    v_ptr, v_tile = _start(v_ptr, v_strides, batch, head, first + begin), _offsets(hv, c, v_strides, C)
    dk_ptr, dk_tile = _start(dk_ptr, dk_strides, batch, head, first + begin), _offsets(h, d, dk_strides, C)
    dv_ptr, dv_tile = _start(dv_ptr, dv_strides, batch, head, first + begin), _offsets(hv, c, dv_strides, C)
    if C.DECOUPLED:
        dkd_ptr, dkd_tile = _start(dkd_ptr, dkd_strides, batch, head, first + begin), _offsets(h, d, dkd_strides, C)
    if C.KEY_WEIGHT:
        wk_ptr = _start(wk_ptr, wk_strides, batch, head, first + begin)
        dwk_ptr = _start(dwk_ptr, dwk_strides, batch, head, first + begin)
    if C.ROPE:
        rope_ptr, rope_tile = _start(rope_ptr, rope_strides, batch, head, begin), _offsets(h, d, rope_strides, C)
        rope_identity = _identity(C.BLOCK_D, OPERAND, tl.float16)
    a = _load_parameter(a_ptr, head, heads, C)
    identity = _identity(C.BLOCK_D, OPERAND, OPERAND)
    one = 1.0 / tl.maximum(count, 1).to(tl.float32)
    if C.MEAN:
        scale = one
    if C.SOFTMAX:
        scale, one = scale / one, 1.0
    d_plus, d_minus = _swap_halves(d_plus, d_minus, C)
    d_plus = d_plus.to(OPERAND)
    # (v - m) dSᵀ = v dSᵀ - m dSᵀ with the same rounded dS: the mean cancels although v enters the product as it is
    dz_plus = ((dz_plus - tl.sum(mean[:, None] * d_plus.to(tl.float32), 0)) * one)[None, :]
    if C.SIGNED:
        d_minus = d_minus.to(OPERAND)
        dz_minus = ((dz_minus - tl.sum(mean[:, None] * d_minus.to(tl.float32), 0)) * one)[None, :]
    da = _zeros3(C.BLOCK_N // 16, 8, C.BLOCK_D)
    d_mean = _zeros3(C.BLOCK_N // 16, 8, C.BLOCK_D)

    for start in range(begin, end, C.BLOCK_N):
        n = start + tl.arange(0, C.BLOCK_N)
        inside = n < end
        mask, v_mask = inside[:, None] & exists[None, :], inside[:, None] & exists_v[None, :]
        k = _to_product_layout(tl.load(k_ptr + k_tile, mask=mask, other=0.0), identity, OPERAND)
        v = tl.load(v_ptr + v_tile, mask=v_mask, other=0.0).to(OPERAND)
        phi = PHI(k, a, C.EXPONENT)
        w = None
        if C.KEY_WEIGHT:
            w = _load_weight(wk_ptr, wk_strides, head, heads, inside, C)
        if C.SOFTMAX:
            w = tl.exp2(_by_head(phi * query_mean, C.D, C) - logarithm)
            w = _to_columns(tl.where(inside[:, None], w, 0.0), C.D, C)
        turned = phi
        if C.ROPE:
            cos, sin = _load_rope(rope_ptr + rope_tile, mask, rope_identity, OPERAND, C)
            rope_ptr = _next(rope_ptr, rope_strides, C)
            turned = _turn(phi, cos, sin, C)
        phi_plus, phi_minus = _operands(turned, w, OPERAND, C)
        dv = tl.dot(phi_plus, tl.trans(d_plus), input_precision=PRECISION)
        if C.SIGNED:
            dv = tl.dot(phi_minus, tl.trans(d_minus), dv, input_precision=PRECISION)
        tl.store(dv_ptr + dv_tile, (dv * scale).to(dv_ptr.dtype.element_ty), mask=v_mask)
        d_phi = tl.dot(v, d_plus, input_precision=PRECISION) * scale
        if C.ROPE:
            d_phi = _turn(d_phi, cos, -sin, C)
        if C.SIGNED:
            d_phi_minus = tl.dot(v, d_minus, input_precision=PRECISION) * scale
            d_phi = _of_sign(k, d_phi + dz_plus, d_phi_minus + dz_minus)
        if C.DECOUPLED:
            d_denominator = tl.broadcast_to(dz_plus, C.BLOCK_N, C.BLOCK_D)
            tl.store(dkd_ptr + dkd_tile, d_denominator.to(dkd_ptr.dtype.element_ty), mask=mask)
        elif C.NORMALIZE and not C.SIGNED:
            d_phi += dz_plus
        if C.KEY_WEIGHT:
            _store_weight(dwk_ptr, dwk_strides, head, heads, inside, _by_head(d_phi * phi, C.D, C), C)
            d_phi *= w
        if C.SOFTMAX:
            ds = w * (_to_columns(_by_head(d_phi * phi, C.D, C) - average, C.D, C))
            d_mean += _by_eighth(ds * phi, C)
            d_phi = d_phi * w + ds * (query_mean * 0.6931471805599453)
        dk, da_rows = _features_backward(k, a, phi, d_phi, PHI_DX, PHI_DA, C)
        if C.SIGNED:
            da += _by_eighth(da_rows, C)
        tl.store(dk_ptr + dk_tile, dk.to(dk_ptr.dtype.element_ty), mask=mask)
        k_ptr, v_ptr = _next(k_ptr, k_strides, C), _next(v_ptr, v_strides, C)
        dk_ptr, dv_ptr = _next(dk_ptr, dk_strides, C), _next(dv_ptr, dv_strides, C)
        if C.DECOUPLED:
            dkd_ptr = _next(dkd_ptr, dkd_strides, C)
        if C.KEY_WEIGHT:
            wk_ptr, dwk_ptr = _next(wk_ptr, wk_strides, C), _next(dwk_ptr, dwk_strides, C)

    da = _sum_eighths(da)
    if C.SIGNED:
        da *= 0.6931471805599453
    return da, _sum_eighths(d_mean)


@jit
def _scale_gradient(a_ptr, plus, z_plus, d_plus, dz_plus, head, heads, C: tl.constexpr):
    """The gradient of the focusing map's scale: by channel Σ φ dφ of queries is S dS + z dz, and so is that of keys."""
    a = _load_parameter(a_ptr, head, heads, C)
    return (tl.sum(plus * d_plus, 0) + z_plus * dz_plus) * tl.reshape(-2.0 * C.EXPONENT * a, C.BLOCK_D)


@jit
def _store_parameter_gradient(da_ptr, at, head, heads, da, C: tl.constexpr):
    h, channel, exists = _columns(head, heads, C.D, C.BLOCK_D, C)
    tl.store(da_ptr + (at + h) * C.D + channel, da, mask=exists)


# --- the kernels: a program for each group of heads (axis 0) and split (axis 1) ---------------------------------------


@jit
def _split_at(sequence, heads, C: tl.constexpr):
    """Where the heads of a sequence begin among those of all splits."""
    sequences = tl.num_programs(0) // tl.cdiv(heads, C.GROUP)
    return (tl.program_id(1) * sequences.to(tl.int64) + sequence) * heads


@jit(do_not_specialize=NOT_SPECIALIZED)
def query_sum_kernel(
    q_ptr, q_strides, query_sum_ptr, query_length, heads, PHI: tl.constexpr, PAD: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """Σ φ(q) over one split of the queries."""
    sequence, batch, head, first, count = _place(heads, None, query_length, C)
    begin, end = _share(count, C)
    h, d, exists = _columns(head, heads, C.D, C.BLOCK_D, C)
    q_ptr, q_tile = _start(q_ptr, q_strides, batch, head, first + begin), _offsets(h, d, q_strides, C)
    total = _zeros(16, C.BLOCK_D)
    for start in range(begin, end, C.BLOCK_N):
        inside = start + tl.arange(0, C.BLOCK_N) < end
        q = tl.load(q_ptr + q_tile, mask=inside[:, None] & exists[None, :], other=PAD).to(tl.float32)
        total += _by_sixteenth(PHI(q, 1.0, C.EXPONENT), C)
        q_ptr = _next(q_ptr, q_strides, C)
    at = _split_at(sequence, heads, C) + head
    tl.store(query_sum_ptr + (at + h) * C.D + d, tl.sum(total, 0), mask=exists)


@jit
def _softmax_scale(query_length, D: tl.constexpr):
    """What makes of Σ φ(q) the vector whose products with keys are a softmax's logarithms to base 2."""
    return (1.4426950408889634 * D**-0.5) / tl.maximum(query_length, 1).to(tl.float32)


@jit(do_not_specialize=NOT_SPECIALIZED)
def state_kernel(
    k_ptr, k_strides, kd_ptr, kd_strides, v_ptr, v_strides, a_ptr, wk_ptr, wk_strides, rope_ptr, rope_strides,
    cu_seqlens, query_sum_ptr, state_ptr, query_length, key_length, heads, query_splits, scale,
    PHI: tl.constexpr, PAD: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The sums over one split of the keys."""
    sequence, batch, head, first, count = _place(heads, cu_seqlens, key_length, C)
    begin, end = _share(count, C)
    mean = 0.0
    if C.SOFTMAX:
        mean = _sum_query_splits(query_sum_ptr, sequence * heads + head, query_splits, head, heads, C)
        mean = mean[None, :] * _softmax_scale(query_length, C.D)
    plus, minus, z_plus, z_minus, logarithm = sum_keys(
        k_ptr, k_strides, kd_ptr, kd_strides, v_ptr, v_strides, a_ptr, wk_ptr, wk_strides, rope_ptr,
        rope_strides, mean, batch, head, heads, first, begin, end, count, scale, PHI, PAD, OPERAND, PRECISION, C,
    )  # fmt: skip
    at = _split_at(sequence, heads, C) + head
    _store_state(state_ptr, at, head, heads, plus, minus, z_plus, z_minus, C)
    if C.SOFTMAX:
        h = tl.arange(0, C.GROUP)[None, :]
        tl.store(state_ptr + ((at + h + 1) * _state_rows(C) - 1) * C.D, logarithm, mask=head + h < heads)


@jit(do_not_specialize=NOT_SPECIALIZED)
def reduce_kernel(partial_ptr, sum_ptr, length, splits, BLOCK: tl.constexpr, SPLITS: tl.constexpr):
    """Adds up ``splits`` arrays of ``length``."""
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
    PHI: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The output for one split of the queries."""
    sequence, batch, head, first, count = _place(heads, cu_seqlens, query_length, C)
    begin, end = _share(count, C)
    plus, minus, z_plus, z_minus = _load_state(state_ptr, sequence * heads + head, head, heads, C)
    write_output(
        q_ptr, q_strides, qd_ptr, qd_strides, o_ptr, o_strides, a_ptr, wq_ptr, wq_strides, rope_ptr,
        rope_strides, plus, minus, z_plus, z_minus, batch, head, heads, first, begin, end, eps,
        PHI, OPERAND, PRECISION, C,
    )  # fmt: skip


@jit(do_not_specialize=NOT_SPECIALIZED)
def forward_kernel(
    q_ptr, q_strides, k_ptr, k_strides, v_ptr, v_strides, qd_ptr, qd_strides, kd_ptr, kd_strides, o_ptr, o_strides,
    a_ptr, wq_ptr, wq_strides, wk_ptr, wk_strides, rope_ptr, rope_strides, cu_seqlens, state_ptr,
    query_length, key_length, heads, scale, eps,
    PHI: tl.constexpr, PAD: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The whole forward pass of a sequence; without a state_ptr the backward pass will sum the keys again."""
    sequence, batch, head, first, count = _place(heads, cu_seqlens, key_length, C)
    plus, minus, z_plus, z_minus, _ = sum_keys(
        k_ptr, k_strides, kd_ptr, kd_strides, v_ptr, v_strides, a_ptr, wk_ptr, wk_strides, rope_ptr,
        rope_strides, 0.0, batch, head, heads, first, 0, count, count, scale, PHI, PAD, OPERAND, PRECISION, C,
    )  # fmt: skip
    if state_ptr is not None:
        _store_state(state_ptr, sequence * heads + head, head, heads, plus, minus, z_plus, z_minus, C)
    sequence, batch, head, first, count = _place(heads, cu_seqlens, query_length, C)
    write_output(
        q_ptr, q_strides, qd_ptr, qd_strides, o_ptr, o_strides, a_ptr, wq_ptr, wq_strides, rope_ptr,
        rope_strides, plus, minus, z_plus, z_minus, batch, head, heads, first, 0, count, eps,
        PHI, OPERAND, PRECISION, C,
    )  # fmt: skip


@jit(do_not_specialize=NOT_SPECIALIZED)
def query_gradient_kernel(
    q_ptr, q_strides, qd_ptr, qd_strides, do_ptr, do_strides, a_ptr, wq_ptr, wq_strides, rope_ptr, rope_strides,
    cu_seqlens, state_ptr, dq_ptr, dq_strides, dqd_ptr, dqd_strides, dwq_ptr, dwq_strides,
    d_state_ptr, mean_ptr, d_mean_ptr, da_ptr, query_length, heads, splits, eps,
    PHI: tl.constexpr, PHI_DX: tl.constexpr, PHI_DA: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr, C: tl.constexpr, SUMS: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """The gradients of one split of the queries, its sums for the keys' gradients, and the values' mean.

    Registers cannot hold both of ``SIGNED``: programs beside each other (axis 2) share the work, and what they read is
    in the cache for the second.
    """
    sequence, batch, head, first, count = _place(heads, cu_seqlens, query_length, C)
    begin, end = _share(count, C)
    at = sequence * heads + head
    plus, minus, z_plus, z_minus = _load_state(state_ptr, at, head, heads, C)
    plus, minus, mean = _center(plus, minus, z_plus, z_minus, C)
    d_mean = 0.0
    if C.SOFTMAX and GRADIENT:
        d_mean = _sum_query_splits(d_mean_ptr, at, splits, head, heads, C)[None, :]
        d_mean *= _softmax_scale(query_length, C.D) * 0.6931471805599453
    if SUMS:
        if tl.program_id(1) == 0:
            hv, c, exists = _columns(head, heads, C.DV, C.BLOCK_DV, C)
            tl.store(mean_ptr + (at + hv) * C.DV + c, mean, mask=exists)
    if C.SIGNED and SUMS and GRADIENT:
        if tl.program_id(2) == 0:
            d_plus, d_minus, dz_plus, dz_minus, _ = differentiate_queries(
                q_ptr, q_strides, qd_ptr, qd_strides, do_ptr, do_strides, a_ptr, wq_ptr, wq_strides, rope_ptr,
                rope_strides, dq_ptr, dq_strides, dqd_ptr, dqd_strides, dwq_ptr, dwq_strides, plus, minus, z_plus,
                z_minus, mean, d_mean, batch, head, heads, first, begin, end, eps,
                PHI, PHI_DX, PHI_DA, OPERAND, PRECISION, C, True, False,
            )  # fmt: skip
            at = _split_at(sequence, heads, C) + head
            _store_state(d_state_ptr, at, head, heads, d_plus, d_minus, dz_plus, dz_minus, C)
        else:
            _, _, _, _, da = differentiate_queries(
                q_ptr, q_strides, qd_ptr, qd_strides, do_ptr, do_strides, a_ptr, wq_ptr, wq_strides, rope_ptr,
                rope_strides, dq_ptr, dq_strides, dqd_ptr, dqd_strides, dwq_ptr, dwq_strides, plus, minus, z_plus,
                z_minus, mean, d_mean, batch, head, heads, first, begin, end, eps,
                PHI, PHI_DX, PHI_DA, OPERAND, PRECISION, C, False, True,
            )  # fmt: skip
            _store_parameter_gradient(da_ptr, _split_at(sequence, heads, C) + head, head, heads, da, C)
    else:
        d_plus, d_minus, dz_plus, dz_minus, da = differentiate_queries(
            q_ptr, q_strides, qd_ptr, qd_strides, do_ptr, do_strides, a_ptr, wq_ptr, wq_strides, rope_ptr,
            rope_strides, dq_ptr, dq_strides, dqd_ptr, dqd_strides, dwq_ptr, dwq_strides, plus, minus, z_plus,
            z_minus, mean, d_mean, batch, head, heads, first, begin, end, eps, PHI, PHI_DX, PHI_DA, OPERAND, PRECISION,
            C, SUMS, GRADIENT,
        )  # fmt: skip
        at = _split_at(sequence, heads, C) + head
        if SUMS:
            _store_state(d_state_ptr, at, head, heads, d_plus, d_minus, dz_plus, dz_minus, C)
        if C.SIGNED and GRADIENT:
            _store_parameter_gradient(da_ptr, at, head, heads, da, C)


@jit(do_not_specialize=NOT_SPECIALIZED)
def key_gradient_kernel(
    k_ptr, k_strides, kd_ptr, kd_strides, v_ptr, v_strides, a_ptr, wk_ptr, wk_strides, rope_ptr, rope_strides,
    cu_seqlens, state_ptr, d_state_ptr, mean_ptr, dk_ptr, dk_strides, dkd_ptr, dkd_strides, dv_ptr, dv_strides,
    dwk_ptr, dwk_strides, d_mean_ptr, da_ptr, key_length, heads, scale,
    PHI: tl.constexpr, PHI_DX: tl.constexpr, PHI_DA: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The gradients of one split of the keys and values, and its sums for the gradient of the queries' mean."""
    sequence, batch, head, first, count = _place(heads, cu_seqlens, key_length, C)
    begin, end = _share(count, C)
    at = sequence * heads + head
    d_plus, d_minus, dz_plus, dz_minus = _load_state(d_state_ptr, at, head, heads, C)
    hv, c, exists = _columns(head, heads, C.DV, C.BLOCK_DV, C)
    mean = tl.load(mean_ptr + (at + hv) * C.DV + c, mask=exists, other=0.0)
    query_mean, logarithm, average = 0.0, 0.0, 0.0
    if C.SOFTMAX or C.PARAMETER and not C.SIGNED:
        plus, minus, z_plus, z_minus = _load_state(state_ptr, at, head, heads, C)
        plus, _, _ = _center(plus, minus, z_plus, z_minus, C)
    if C.PARAMETER and not C.SIGNED and tl.program_id(1) == 0:
        da = _scale_gradient(a_ptr, plus, z_plus, d_plus, dz_plus, head, heads, C)
        _store_parameter_gradient(da_ptr, at, head, heads, da, C)
    if C.SOFTMAX:
        query_mean, logarithm = _load_softmax(state_ptr, at, head, heads, C)
        average = _by_head((tl.sum(plus * d_plus, 0) + z_plus * dz_plus)[None, :], C.D, C)
    da, d_mean = differentiate_keys(
        k_ptr, k_strides, kd_ptr, kd_strides, v_ptr, v_strides, a_ptr, wk_ptr, wk_strides, rope_ptr,
        rope_strides, dk_ptr, dk_strides, dkd_ptr, dkd_strides, dv_ptr, dv_strides, dwk_ptr, dwk_strides,
        d_plus, d_minus, dz_plus, dz_minus, mean, query_mean, logarithm, average, batch, head, heads, first, begin, end,
        count, scale, PHI, PHI_DX, PHI_DA, OPERAND, PRECISION, C,
    )  # fmt: skip
    at = _split_at(sequence, heads, C) + head
    if C.SIGNED:
        _store_parameter_gradient(da_ptr, at, head, heads, da, C)
    if C.SOFTMAX:
        h, d, exists = _columns(head, heads, C.D, C.BLOCK_D, C)
        tl.store(d_mean_ptr + (at + h) * C.D + d, d_mean, mask=exists)


@jit(do_not_specialize=NOT_SPECIALIZED)
def backward_kernel(
    q_ptr, q_strides, k_ptr, k_strides, v_ptr, v_strides, qd_ptr, qd_strides, kd_ptr, kd_strides, do_ptr, do_strides,
    a_ptr, wq_ptr, wq_strides, wk_ptr, wk_strides, rope_ptr, rope_strides, cu_seqlens, state_ptr,
    dq_ptr, dq_strides, dqd_ptr, dqd_strides, dwq_ptr, dwq_strides, dk_ptr, dk_strides, dkd_ptr, dkd_strides,
    dv_ptr, dv_strides, dwk_ptr, dwk_strides, da_ptr, query_length, key_length, heads, scale, eps,
    PHI: tl.constexpr, PHI_DX: tl.constexpr, PHI_DA: tl.constexpr, PAD: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The whole backward pass of a sequence."""
    sequence, batch, head, first, count = _place(heads, cu_seqlens, key_length, C)
    if state_ptr is None:
        plus, minus, z_plus, z_minus, _ = sum_keys(
            k_ptr, k_strides, kd_ptr, kd_strides, v_ptr, v_strides, a_ptr, wk_ptr, wk_strides, rope_ptr,
            rope_strides, 0.0, batch, head, heads, first, 0, count, count, scale, PHI, PAD, OPERAND, PRECISION, C,
        )  # fmt: skip
    else:
        plus, minus, z_plus, z_minus = _load_state(state_ptr, sequence * heads + head, head, heads, C)
    plus, minus, mean = _center(plus, minus, z_plus, z_minus, C)
    sequence, batch, head, first, count = _place(heads, cu_seqlens, query_length, C)
    d_plus, d_minus, dz_plus, dz_minus, da = differentiate_queries(
        q_ptr, q_strides, qd_ptr, qd_strides, do_ptr, do_strides, a_ptr, wq_ptr, wq_strides, rope_ptr,
        rope_strides, dq_ptr, dq_strides, dqd_ptr, dqd_strides, dwq_ptr, dwq_strides, plus, minus, z_plus, z_minus,
        mean, 0.0, batch, head, heads, first, 0, count, eps, PHI, PHI_DX, PHI_DA, OPERAND, PRECISION, C, True, True,
    )  # fmt: skip
    sequence, batch, head, first, count = _place(heads, cu_seqlens, key_length, C)
    da_keys, _ = differentiate_keys(
        k_ptr, k_strides, kd_ptr, kd_strides, v_ptr, v_strides, a_ptr, wk_ptr, wk_strides, rope_ptr,
        rope_strides, dk_ptr, dk_strides, dkd_ptr, dkd_strides, dv_ptr, dv_strides, dwk_ptr, dwk_strides,
        d_plus, d_minus, dz_plus, dz_minus, mean, 0.0, 0.0, 0.0, batch, head, heads, first, 0, count, count, scale,
        PHI, PHI_DX, PHI_DA, OPERAND, PRECISION, C,
    )  # fmt: skip
    if C.PARAMETER:
        da += da_keys
        if not C.SIGNED:
            da = _scale_gradient(a_ptr, plus, z_plus, d_plus, dz_plus, head, heads, C)
        _store_parameter_gradient(da_ptr, sequence * heads + head, head, heads, da, C)
