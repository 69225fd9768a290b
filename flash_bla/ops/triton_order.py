"""Linear attention in Triton: tiles with their columns in the order in which a product's threads have them.

A thread has two neighbours of each eight columns of a product's result, but it loads and stores eight neighbours at a
time. In this order the two are the same, and nothing has to go through shared memory between memory and products: the
column 32 p + 8 j + 2 t + i of a tile is the channel 32 p + 8 t + 2 j + i (i < 2; t, j < 4; t is the thread of a row).
Whatever else has such columns is brought into the order before a loop, and back after it, by ``order``. A thread's rows
are a product's, too; only ``row_order`` knows of it.

Tiles have the order (``ORDERED``) where numbers take two bytes, a head has at least 32 columns, which are neighbours in
memory, and the chip leaves products in registers as Ampere and Hopper do. Elsewhere columns stay as they are.
"""

from __future__ import annotations

from flash_bla.ops.triton_support import anchored, fast_to_float, in_layout_of, jit, tl
from flash_bla.ops.triton_tiles import _aligned, _cosines, _load_factor, _load_parameter, _start, _to_product_layout

# --- the order --------------------------------------------------------------------------------------------------------


@jit
def order_columns(x, C: tl.constexpr):
    """Brings the last dimension of a vector, a matrix or ``_by_eighth``'s sums from the channels' order, or back."""
    if C.ORDERED:
        if len(x.shape) == 1:
            parts = tl.permute(tl.reshape(x, x.shape[0] // 32, 4, 4, 2), (0, 2, 1, 3))
            return tl.reshape(parts, x.shape[0])
        elif len(x.shape) == 2:
            parts = tl.permute(tl.reshape(x, x.shape[0], x.shape[1] // 32, 4, 4, 2), (0, 1, 3, 2, 4))
            return tl.reshape(parts, x.shape[0], x.shape[1])
        else:
            parts = tl.reshape(x, x.shape[0], x.shape[1], x.shape[2] // 32, 4, 4, 2)
            return tl.reshape(tl.permute(parts, (0, 1, 2, 4, 3, 5)), x.shape[0], x.shape[1], x.shape[2])
    else:
        return x


@jit
def order(x, C: tl.constexpr):
    """The same for both dimensions of a matrix.

    Float32 is brought into the order before it is rounded to operands: of operands themselves, the compiler would
    permute shared memory.
    """
    if C.ORDERED:
        parts = tl.permute(tl.reshape(x, x.shape[0] // 32, 4, 4, 2, x.shape[1]), (0, 2, 1, 3, 4))
        return order_columns(tl.reshape(parts, x.shape[0], x.shape[1]), C)
    else:
        return x


@jit
def column_order(BLOCK: tl.constexpr, C: tl.constexpr):
    """The column in the channels' order that each column of such a tile is."""
    column = tl.arange(0, BLOCK)
    if C.ORDERED:
        return column // 32 * 32 + column % 8 // 2 * 8 + column // 8 % 4 * 2 + column % 2
    else:
        return column


@jit
def row_order(C: tl.constexpr):
    """The row of the sequence in each row of a tile that ``load_rows`` loads."""
    rows = tl.arange(0, C.BLOCK_N)
    if C.ORDERED:
        HALF: tl.constexpr = C.BLOCK_N // 2
        return rows % HALF // 8 * 16 + rows // HALF * 8 + rows % 8
    else:
        return rows


# --- loads and stores -------------------------------------------------------------------------------------------------


@jit
def rows_tile(pointer, strides, batch, head, row, BLOCK: tl.constexpr, C: tl.constexpr):
    """Where a tile of ``load_rows`` and ``store_rows`` starts, and its offsets from there."""
    PITCH: tl.constexpr = BLOCK // C.GROUP
    strides = _aligned(strides, C)
    rows = row_order(C)
    columns = tl.arange(0, BLOCK // 32) * 32 if C.ORDERED else tl.arange(0, BLOCK)
    h, channel, neighbours = columns // PITCH, columns % PITCH, tl.arange(0, 32)
    if C.WIDE:
        rows, h, channel, neighbours = rows.to(tl.int64), h.to(tl.int64), channel.to(tl.int64), neighbours.to(tl.int64)
    columns = h * strides[1] + channel * strides[3]
    if C.ORDERED:
        offsets = (rows * strides[2])[None, :, None] + (neighbours * strides[3])[None, None, :]
        offsets += columns[:, None, None]
        # Columns are neighbours, or there is no such order (``Problem.ordered``). Rows are none: it is how to say that
        # a warp takes 32 columns of eight rows at a time.
        offsets = tl.max_contiguous(offsets, (1, 2, 8))
    else:
        offsets = (rows * strides[2])[:, None] + columns[None, :]
    return _start(pointer, strides, batch, head, row), offsets


@jit
def _mask(inside, head, heads, D: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr):
    PITCH: tl.constexpr = BLOCK // C.GROUP
    if C.ORDERED:
        first = tl.arange(0, BLOCK // 32) * 32
        exists = (first % PITCH)[:, None, None] + tl.arange(0, 32)[None, None, :] < D
        if C.GROUP > 1:
            exists = exists & (head + first // PITCH < heads)[:, None, None]
        return inside[None, :, None] & exists
    else:
        column = tl.arange(0, BLOCK)
        return inside[:, None] & ((column % PITCH < D) & (head + column // PITCH < heads))[None, :]


@jit
def load_rows(pointers, inside, head, heads, D: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr, other=0.0):
    """A tile (rows, columns) from ``rows_tile``'s pointers; ``inside`` says which rows of ``row_order`` exist."""
    x = tl.load(pointers, mask=_mask(inside, head, heads, D, BLOCK, C), other=other)
    if C.ORDERED:
        x = tl.reshape(x, BLOCK // 32, 2, C.BLOCK_N // 16, 8, 4, 4, 2)
        x = tl.reshape(tl.permute(x, (2, 1, 3, 0, 5, 4, 6)), C.BLOCK_N, BLOCK)
    return x


@jit
def store_rows(pointers, x, inside, head, heads, D: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr):
    x = x.to(pointers.dtype.element_ty)
    if C.ORDERED:
        x = tl.reshape(x, C.BLOCK_N // 16, 2, 8, BLOCK // 32, 4, 4, 2)
        x = tl.reshape(tl.permute(x, (3, 1, 0, 2, 5, 4, 6)), BLOCK // 32, C.BLOCK_N, 32)
    tl.store(pointers, x, mask=_mask(inside, head, heads, D, BLOCK, C))


@jit
def as_product(x, identity, OPERAND: tl.constexpr, C: tl.constexpr, product=None, ANCHORED: tl.constexpr = False):
    """A tile in float32, in the registers of a product's result.

    The compiler does not see that layouts are the same, and would compute features once for each of their uses. So
    where they have several, they are told to be where a ``product`` is, or else ``ANCHORED``.
    """
    if C.ORDERED:
        x = fast_to_float(anchored(x) if ANCHORED else x)
        return x if product is None else in_layout_of(x, product)
    else:
        return _to_product_layout(x, identity, OPERAND)


# --- what goes with tiles ---------------------------------------------------------------------------------------------


@jit
def load_rope(pointers, inside, head, heads, identity, OPERAND: tl.constexpr, C: tl.constexpr):
    """Cosines and sines from ``rows_tile``'s pointers, in a product's layout if ``identity`` is a matrix."""
    rope = load_rows(pointers, inside, head, heads, C.D, C.BLOCK_D, C)
    if OPERAND == tl.bfloat16 and identity is not None and C.BLOCK_D <= 64 and not C.ORDERED:
        rope = tl.dot(rope, identity)
    return _cosines(rope, C)


@jit
def ordered_parameter(a_ptr, head, heads, C: tl.constexpr):
    a = _load_parameter(a_ptr, head, heads, C)
    return order_columns(a, C) if C.PARAMETER else a


@jit
def ordered_factor(a_ptr, head, heads, C: tl.constexpr):
    factor = _load_factor(a_ptr, head, heads, C)
    return order_columns(factor, C) if C.PARAMETER and not C.SIGNED else factor
