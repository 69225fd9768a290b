"""Linear attention in Triton: what its kernels are made of, tiles of rows, features and states.

For names and the layout of tiles see triton_kernels.py.
"""

from __future__ import annotations

from typing import NamedTuple

from flash_bla.ops.feature_maps import integer_power
from flash_bla.ops.triton_support import INTERPRETING, fast_inverse, jit, tl


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
    FEW: bool  # keys: z of ``sum_keys`` sums rounded features
    WIDE: bool  # tiles that span 2³¹ elements and more
    ALIGN: int  # divides all strides but the columns'
    RATIOS: bool  # the loops leave norm ratios, as weights, and the queries' inverse norms; the keys' add the gradient
    PLAIN: bool  # the loops of triton_plain.py do all that is asked for
    ORDERED: bool  # tiles have their columns in the order of triton_order.py
    STAGES: int = 1  # of the loads' pipeline


# --- rows, columns, heads ---------------------------------------------------------------------------------------------
# Strides come as tuples in the order (batch, head, row, column).


@jit
def _place(heads, cu_seqlens, length, C: tl.constexpr):
    """Sequence, batch index, first of the group's heads, first row and number of rows of this program."""
    groups = tl.cdiv(heads, C.GROUP)
    sequence = (tl.program_id(0) // groups).to(tl.int64)
    group = tl.program_id(0) % groups
    if C.GROUP > 1:
        # A last group of fewer heads is not always the same programs', or they would meet on the same multiprocessors.
        group = (group + tl.program_id(1) + tl.program_id(0) // groups // 64) % groups
    head = group * C.GROUP
    if C.VARLEN:
        first = tl.load(cu_seqlens + sequence)
        return sequence, 0, head, first, tl.load(cu_seqlens + sequence + 1) - first
    else:
        return sequence, sequence, head, 0, length


@jit
def _split_at(sequence, heads, C: tl.constexpr):
    """Where the heads of a sequence begin among those of all splits."""
    sequences = tl.num_programs(0) // tl.cdiv(heads, C.GROUP)
    return (tl.program_id(1) * sequences.to(tl.int64) + sequence) * heads


@jit
def _columns(head, heads, D: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr):
    """Head (from the group's first) and channel of each column of a tile, and whether it exists."""
    column = tl.arange(0, BLOCK)
    if C.GROUP == 1:
        return column * 0, column, column < D
    else:
        h, channel = column // (BLOCK // C.GROUP), column % (BLOCK // C.GROUP)
        return h, channel, (channel < D) & (head + h < heads)


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
    if OPERAND == tl.bfloat16 and BLOCK <= 64:
        i = tl.arange(0, BLOCK)
        return tl.where(i[:, None] == i[None, :], 1.0, 0.0).to(TYPE)
    else:
        return 0.0


@jit
def _to_product_layout(x, identity, OPERAND: tl.constexpr):
    """x in float32, in the register layout of a product's result: as its product with the identity.

    Wide identities would take more shared memory than there is: the compiler has to choose the layout then.
    """
    if OPERAND == tl.bfloat16 and x.shape[1] <= 64:
        return tl.dot(x, identity)
    else:
        return x.to(tl.float32)


@jit
def _start(pointer, strides, batch, head, row):
    return pointer + batch * strides[0] + head.to(tl.int64) * strides[1] + tl.cast(row, tl.int64) * strides[2]


@jit
def _aligned(strides, C: tl.constexpr):
    """Strides that the compiler sees to be multiples of ALIGN: such columns go as vectors. Those of 16 it knows."""
    if C.ALIGN % 16 == 0:
        return strides
    else:
        ALIGN: tl.constexpr = C.ALIGN
        return strides[0] // ALIGN * ALIGN, strides[1] // ALIGN * ALIGN, strides[2] // ALIGN * ALIGN, strides[3]


@jit
def _tile(pointer, strides, batch, head, row, in_group, channel, C: tl.constexpr):
    """Where a tile starts, and its offsets from there."""
    strides = _aligned(strides, C)
    return _start(pointer, strides, batch, head, row), _offsets(in_group, channel, strides, C)


@jit
def _next(pointer, strides, C: tl.constexpr):
    return pointer + tl.full((), C.BLOCK_N, tl.int64) * strides[2]


@jit
def _zeros(rows: tl.constexpr, columns: tl.constexpr):
    return tl.zeros((rows, columns), tl.float32)


@jit
def _by_head(x, C: tl.constexpr):
    """Sums of a tile's columns by head: (rows, columns) to (rows, GROUP)."""
    if C.GROUP == 1:
        return tl.sum(x, 1)[:, None]
    else:
        return tl.sum(tl.reshape(x, x.shape[0], C.GROUP, x.shape[1] // C.GROUP), 2)


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
    return tl.sum(tl.sum(x, 1), 0)


@jit
def _add(a, b, c, d):
    return a + c, b + d


@jit
def _add_products(total, x, y, C: tl.constexpr):
    """total + ``_by_eighth`` of x y, by operations that multiply and add."""
    x, next_x = _row_pairs(x, C)
    y, next_y = _row_pairs(tl.broadcast_to(y, C.BLOCK_N, C.BLOCK_D), C)
    return total + x * y + next_x * next_y


@jit
def _row_pairs(x, C: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(x, C.BLOCK_N // 16, 2, 8, C.BLOCK_D), (0, 2, 3, 1)))


@jit
def _both_by_head(x, y, C: tl.constexpr):
    """``_by_head`` of two tiles, in one reduction: so the compiler gives both the same layout."""
    if C.GROUP == 1:
        x, y = tl.reduce((x, y), 1, _add)
        return x[:, None], y[:, None]
    else:
        x = tl.reshape(x, x.shape[0], C.GROUP, x.shape[1] // C.GROUP)
        y = tl.reshape(y, y.shape[0], C.GROUP, y.shape[1] // C.GROUP)
        return tl.reduce((x, y), 2, _add)


if INTERPRETING:  # a reduction of two takes the interpreter minutes

    @jit
    def _both_by_head(x, y, C: tl.constexpr):
        return _by_head(x, C), _by_head(y, C)


@jit
def _to_columns(x, C: tl.constexpr):
    """A number for each head to the columns of a tile: (rows, GROUP) to what broadcasts with (rows, columns)."""
    if C.GROUP == 1:
        return x
    else:
        x = tl.broadcast_to(x[:, :, None], x.shape[0], C.GROUP, C.BLOCK_D // C.GROUP)
        return tl.reshape(x, x.shape[0], C.BLOCK_D)


@jit
def _load_weight(w_ptr, strides, head, heads, inside, other, C: tl.constexpr):
    """Weights (rows, GROUP)."""
    if C.GROUP == 1:  # a vector, or else all threads that share a row would load and compute with its weight
        rows = tl.arange(0, C.BLOCK_N)
        rows = rows.to(tl.int64) if C.WIDE else rows
        return tl.load(w_ptr + rows * strides[2], mask=inside, other=other)[:, None]
    h = tl.arange(0, C.GROUP)
    mask = inside[:, None] & (head + h < heads)[None, :]
    return tl.load(w_ptr + _offsets(h, h * 0, (0, strides[1], strides[2], 0), C), mask=mask, other=other)


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
def _cosines(rope, C: tl.constexpr):
    """Cosines and sines, each float32 (rows, columns / 2), of a tile of rotary tables, which have them by turns.

    Tables by token come from the L2 cache. Tables by the axes of a grid, which stay in the L1 cache, were slower on an
    H200, by up to a quarter backward: their rows are gathered two numbers at a time.
    """
    return tl.split(tl.reshape(rope.to(tl.float32), C.BLOCK_N, C.BLOCK_D // 2, 2))


@jit
def _load_parameter(a_ptr, head, heads, C: tl.constexpr):
    """The map's parameter for each column, (1, BLOCK_D): the power of ``SIGNED``, or the focusing map's scale.

    That is infinite where there is no channel, so that its factor is 0.
    """
    if C.PARAMETER:
        h, channel, exists = _columns(head, heads, C.D, C.BLOCK_D, C)
        other = 1.0 if C.SIGNED else float("inf")
        return tl.load(a_ptr + (head + h) * C.D + channel, mask=exists, other=other)[None, :]
    else:
        return 1.0


@jit
def _power_gradient(da, a, C: tl.constexpr):
    """What ``PHI_DA`` of ``signed_power`` leaves out of the power's gradient."""
    return da * tl.reshape(0.6931471805599453 * fast_inverse(a), C.BLOCK_D)


@jit
def _load_factor(a_ptr, head, heads, C: tl.constexpr):
    """What the focusing map's features lack, (1, BLOCK_D): states are multiplied with it, which are smaller."""
    if C.PARAMETER and not C.SIGNED:
        inverse = 1.0 / _load_parameter(a_ptr, head, heads, C)
        factor = inverse
        for _ in tl.static_range(C.EXPONENT - 1):
            factor = factor * inverse
        return factor
    else:
        return 1.0


@jit
def _times_factor(state, z, factor, C: tl.constexpr):
    if C.PARAMETER and not C.SIGNED:
        return state * factor, z * tl.reshape(factor, C.BLOCK_D)
    else:
        return state, z


@jit
def _norm_ratio(x, a, C: tl.constexpr):
    """The norm ratio of each row, and what its gradient needs: u, n^-½ and Σ sᵖ (see triton_norm_ratios.py)."""
    u = (tl.maximum(x, 0.0) + 1e-6) * (1.0 / a)
    inverse_norm = tl.rsqrt(tl.sum(u * u, 1)[:, None])
    s = u * u * (inverse_norm * inverse_norm)
    powers = tl.sum(integer_power(s, C.EXPONENT), 1)[:, None]
    return integer_power(inverse_norm, C.EXPONENT - 1) * tl.rsqrt(powers), u, inverse_norm, powers


@jit
def _norm_ratio_gradient(u, inverse_norm, powers, d_log_ratio, C: tl.constexpr):
    """du from the gradient of the ratio's logarithm."""
    inverse_n = inverse_norm * inverse_norm
    g = d_log_ratio * inverse_n
    return (g - g * (C.EXPONENT / powers) * integer_power(u * u * inverse_n, C.EXPONENT - 1)) * u


@jit
def _add_rows(z, features, OPERAND: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr):
    """z plus the features' sums over rows: in each of 64 rows all of it for ``FEW``, and otherwise parts in 16.

    Of few tokens z must sum features rounded as those that S sums; of many the difference averages out.
    """
    if C.FEW:
        return tl.dot(tl.full((64, C.BLOCK_N), 1.0, OPERAND), features.to(OPERAND), z, input_precision=PRECISION)
    else:
        return z + _by_sixteenth(features, C)


# --- states -----------------------------------------------------------------------------------------------------------
# In memory (B, H, 1, ROWS, D): S, z as its next row, and of ``SOFTMAX`` two more: the queries' mean, and the logarithm
# of the exponentials' sum. Those of splits stand one after the other.


@jit
def _state_rows(C: tl.constexpr):
    return C.DV + (3 if C.SOFTMAX else 1)


@jit
def _state_offsets(head, heads, C: tl.constexpr):
    """Offsets of S from the first head's, those of z, and which exist."""
    h, d, exists = _columns(head, heads, C.D, C.BLOCK_D, C)
    hv, c, exists_v = _columns(head, heads, C.DV, C.BLOCK_DV, C)
    offsets = ((hv * _state_rows(C) + c) * C.D)[:, None] + d[None, :]
    mask = exists_v[:, None] & exists[None, :] & (hv[:, None] == h[None, :])
    return offsets, mask, (h * _state_rows(C) + C.DV) * C.D + d, exists


@jit
def _load_state(state_ptr, at, head, heads, C: tl.constexpr):
    """S and z of the group whose first head is the ``at``-th."""
    offsets, mask, z_offsets, exists = _state_offsets(head, heads, C)
    state_ptr += at * (_state_rows(C) * C.D)
    plus = tl.load(state_ptr + offsets, mask=mask, other=0.0)
    return plus, tl.load(state_ptr + z_offsets, mask=exists, other=0.0)


@jit
def _store_state(state_ptr, at, head, heads, plus, z_plus, C: tl.constexpr):
    offsets, mask, z_offsets, exists = _state_offsets(head, heads, C)
    state_ptr += at * (_state_rows(C) * C.D)
    tl.store(state_ptr + offsets, plus, mask=mask)
    tl.store(state_ptr + z_offsets, z_plus, mask=exists)


@jit
def _load_softmax(state_ptr, at, head, heads, C: tl.constexpr):
    """The queries' mean, (1, BLOCK_D), and the logarithm of each head, (1, GROUP)."""
    _, _, z_offsets, exists = _state_offsets(head, heads, C)
    state_ptr += at * (_state_rows(C) * C.D)
    h = tl.arange(0, C.GROUP)
    logarithm = tl.load(state_ptr + ((h + 1) * _state_rows(C) - 1) * C.D, mask=head + h < heads, other=0.0)
    return tl.load(state_ptr + z_offsets + C.D, mask=exists, other=0.0)[None, :], logarithm[None, :]


@jit
def _store_softmax(state_ptr, at, head, heads, mean, logarithm, C: tl.constexpr):
    """What ``_load_softmax`` loads, where the sequence is not split; ``merge_kernel`` needs the logarithm."""
    _, _, z_offsets, exists = _state_offsets(head, heads, C)
    pointers, exists = (state_ptr + at * (_state_rows(C) * C.D) + z_offsets)[None, :], exists[None, :]
    tl.store(pointers + C.D, mean, mask=exists)
    tl.store(pointers + 2 * C.D, tl.broadcast_to(_to_columns(logarithm, C), 1, C.BLOCK_D), mask=exists)


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
        hv = tl.arange(0, C.BLOCK_DV) // (C.BLOCK_DV // C.GROUP)
        h = tl.arange(0, C.BLOCK_D) // (C.BLOCK_D // C.GROUP)
        return tl.where(hv[:, None] == h[None, :], state, 0.0)


@jit
def _center(plus, z_plus, C: tl.constexpr):
    """S - z m, and the values' mean m = Σ S / Σ z."""
    if C.CENTER:
        sums = tl.sum(tl.where(z_plus < 0.0, -1.0, 1.0)[None, :] * plus, 1)
        total = _by_head(tl.abs(z_plus)[None, :], C)
        total = tl.reshape(tl.broadcast_to(_to_columns(total, C), 1, C.BLOCK_DV), C.BLOCK_DV)
        mean = tl.where(total > 0.0, sums / total, 0.0)
        return _mask_heads(plus - mean[:, None] * z_plus[None, :], C), mean
    else:
        return plus, tl.sum(_zeros(1, C.BLOCK_DV), 0)


# --- products with vectors --------------------------------------------------------------------------------------------
# A vector for each head becomes the 16 columns of a matrix: (head, part), with what a bfloat16 rounds off as the second
# part.


@jit
def _vector_operand(x, BLOCK: tl.constexpr, OPERAND: tl.constexpr, C: tl.constexpr):
    """The matrix (BLOCK, 16) of a vector of BLOCK elements."""
    PARTS: tl.constexpr = 16 // C.GROUP
    return _vector_columns(x[:, None] + _zeros(1, 16), tl.arange(0, 16) % PARTS, BLOCK, OPERAND, C)


@jit
def _vector_columns(x, part, BLOCK: tl.constexpr, OPERAND: tl.constexpr, C: tl.constexpr):
    PARTS: tl.constexpr = 16 // C.GROUP
    if C.GROUP > 1:
        head = tl.arange(0, BLOCK) // (BLOCK // C.GROUP)
        x = tl.where(head[:, None] == (tl.arange(0, 16) // PARTS)[None, :], x, 0.0)
    rounded = x.to(OPERAND)
    rest = (x - rounded.to(tl.float32)).to(OPERAND)
    return tl.where((part == 0)[None, :], rounded, tl.where((part == 1)[None, :], rest, 0.0))


@jit
def _weight_operand(x, OPERAND: tl.constexpr, C: tl.constexpr):
    """Numbers for each head, (rows, GROUP), as what is multiplied with a transposed ``_vector_operand``."""
    x = tl.broadcast_to(x[:, :, None], C.BLOCK_N, C.GROUP, 16 // C.GROUP)
    return tl.reshape(x, C.BLOCK_N, 16).to(OPERAND)


@jit
def _vector_product(x, operand, PRECISION: tl.constexpr, C: tl.constexpr):
    """The products of a tile's rows with the vector, by head: (rows, GROUP)."""
    products = tl.dot(x, operand, input_precision=PRECISION)
    if C.GROUP == 1:
        return tl.sum(products, 1)[:, None]
    else:
        return tl.sum(tl.reshape(products, C.BLOCK_N, C.GROUP, 16 // C.GROUP), 2)
