"""The norm ratios of ``focusing_power`` in Triton, r = ‖u‖ / ‖uᵖ‖ of each token over all its heads.

A program has all channels of its tokens, in PARTS tiles side by side, and reads them once. With n = ‖u‖², s = u² / n,

    r = n^((1 - p) / 2) / (Σ sᵖ)^½
    dr/du = r / n · u · (1 - p s^(p - 1) / Σ sᵖ)

in which nothing overflows. The forward pass leaves n^-½ beside r: with both the gradient takes no sums, since
(Σ sᵖ)^-½ is r n^((p - 1) / 2).

Where there is a denominator, the queries' ratio cancels but for ε, and its gradient is zero in half precision, mostly.
Where a token has but one head, the loops over its rows compute the ratios and add the keys' gradient by them, mostly
(``Problem.ratios_in_loops``). Where it has few, the loop that writes the outputs computes those of the queries
(``Problem.query_ratios_in_outputs``).
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from flash_bla.ops.feature_maps import integer_power
from flash_bla.ops.triton_support import (
    NOT_SPECIALIZED,
    Record,
    cdiv,
    fast_inverse,
    fast_positive,
    fast_to_float,
    jit,
    multiprocessors,
    padded,
    power_of_two,
    share,
    tl,
    wait_for_inputs,
)

# Strides come as tuples in the order (batch, head, row, column).


@jit
def _zeros(rows: tl.constexpr, columns: tl.constexpr):
    return tl.zeros((rows, columns), tl.float32)


@jit
def _offsets(strides, W: tl.constexpr):
    """Offsets of each part's tile from its first row."""
    PARTS: tl.constexpr = W.PARTS
    rows = (tl.arange(0, W.BLOCK_N).to(tl.int64) * strides[2])[:, None]
    offsets = ()
    for part in tl.static_range(PARTS):
        c = part * W.BLOCK_C + tl.arange(0, W.BLOCK_C)
        columns = (c // W.D).to(tl.int64) * strides[1] + (c % W.D).to(tl.int64) * strides[3]
        offsets = offsets + (rows + columns[None, :],)
    return offsets


@jit
def _load_inverses(scale_ptr, W: tl.constexpr):
    """1 / scale of each part's columns; it is zero where there is no channel, and so is u."""
    PARTS: tl.constexpr = W.PARTS
    inverses = ()
    for part in tl.static_range(PARTS):
        c = part * W.BLOCK_C + tl.arange(0, W.BLOCK_C)
        inverses = inverses + ((1.0 / tl.load(scale_ptr + c, mask=c < W.C, other=float("inf")))[None, :],)
    return inverses


@jit
def _mask(inside, part: tl.constexpr, W: tl.constexpr):
    if (part + 1) * W.BLOCK_C <= W.C:
        return inside[:, None]
    else:
        return inside[:, None] & (part * W.BLOCK_C + tl.arange(0, W.BLOCK_C) < W.C)[None, :]


@jit
def _load_positive(x_ptr, offsets, e_ptr, e_offsets, inside, part: tl.constexpr, W: tl.constexpr):
    """A part of max(x, 0), of x + e if there is an encoding."""
    mask = _mask(inside, part, W)
    x = tl.load(x_ptr + offsets[part], mask=mask, other=0.0)
    if e_ptr is not None:
        x = x.to(tl.float32) + tl.load(e_ptr + e_offsets[part], mask=mask, other=0.0).to(tl.float32)
    return fast_positive(x)


@jit
def _start(pointer, strides, row):
    return pointer + tl.program_id(0).to(tl.int64) * strides[0] + tl.cast(row, tl.int64) * strides[2]


@jit
def _write_ratios(x_ptr, offsets, e_ptr, e_offsets, inside, inverses, ratio_ptr, norms, written, W: tl.constexpr):
    """Writes the ratio of each row and, ``norms`` later, the inverse norm."""
    PARTS: tl.constexpr = W.PARTS
    u = ()
    squares, powers = _zeros(W.BLOCK_N, W.BLOCK_C), _zeros(W.BLOCK_N, W.BLOCK_C)
    for part in tl.static_range(PARTS):
        # (x + 1e-6) / scale, by one operation for each number
        y = _load_positive(x_ptr, offsets, e_ptr, e_offsets, inside, part, W) * inverses[part] + inverses[part] * 1e-6
        squares += y * y
        u = u + (y,)
    inverse_norm = tl.rsqrt(tl.sum(squares, 1))
    inverse_n = inverse_norm * inverse_norm
    for part in tl.static_range(PARTS):
        powers += integer_power(u[part] * u[part] * inverse_n[:, None], W.P)
    ratio = integer_power(inverse_norm, W.P - 1) * tl.rsqrt(tl.sum(powers, 1))
    rows = tl.arange(0, W.BLOCK_N)
    tl.store(ratio_ptr + rows, ratio, mask=written)
    tl.store(ratio_ptr + norms + rows, inverse_norm, mask=written)


@jit(do_not_specialize=NOT_SPECIALIZED)
def norm_ratio_kernel(
    q_ptr, q_strides, k_ptr, k_strides, e_ptr, e_strides, scale_ptr, ratio_ptr, query_length, key_length,
    W: tl.constexpr,
):  # fmt: skip
    """The ratios and inverse norms of queries, if any, and keys, each padded.

    Programs share the rows (axis 1) of a sequence (axis 0). An encoding, if any, is added to the keys; its stride from
    one sequence to the next is zero.
    """
    wait_for_inputs()
    inverses = _load_inverses(scale_ptr, W)
    padded_queries, padded_keys = tl.cdiv(query_length, 16) * 16, tl.cdiv(key_length, 16) * 16
    norms = padded_queries + padded_keys
    rows = padded_keys if q_ptr is None else tl.maximum(padded_queries, padded_keys)
    begin, end = share(rows, tl.program_id(1), tl.num_programs(1), W.BLOCK_N)
    if q_ptr is not None:
        q_ptr, q_offsets = _start(q_ptr, q_strides, begin), _offsets(q_strides, W)
    k_ptr, k_offsets = _start(k_ptr, k_strides, begin), _offsets(k_strides, W)
    e_offsets = k_offsets
    if e_ptr is not None:
        e_ptr, e_offsets = _start(e_ptr, e_strides, begin), _offsets(e_strides, W)
    ratio_ptr += tl.program_id(0).to(tl.int64) * (2 * norms)
    step = tl.full((), W.BLOCK_N, tl.int64)
    for start in tl.range(begin, end, W.BLOCK_N, num_stages=3):
        n = start + tl.arange(0, W.BLOCK_N)
        ratios = ratio_ptr + start
        if q_ptr is not None:
            _write_ratios(
                q_ptr, q_offsets, None, q_offsets, n < query_length, inverses, ratios, norms, n < padded_queries, W
            )
            q_ptr += step * q_strides[2]
        ratios += padded_queries
        _write_ratios(k_ptr, k_offsets, e_ptr, e_offsets, n < key_length, inverses, ratios, norms, n < padded_keys, W)
        if e_ptr is not None:
            e_ptr += step * e_strides[2]
        k_ptr += step * k_strides[2]


@jit
def _sum_rows(x, W: tl.constexpr):
    """Sums over rows as far as a thread holds several of them in the layout of a load: to (ROWS, columns)."""
    return tl.sum(tl.reshape(x, W.BLOCK_N // W.ROWS, W.ROWS, W.BLOCK_C), 0)


@jit
def _gradient_rows(dr_ptr, length, HEADS: tl.constexpr):
    """Where the rows of a sequence's gradients start, and how far one head's are from the next's."""
    stride = tl.cdiv(length, 16) * 16
    return dr_ptr + tl.program_id(0).to(tl.int64) * HEADS * stride, stride


@jit
def _largest(dr_ptr, stride, first, end, HEADS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr):
    """The largest gradient of a block of rows."""
    h, n = tl.arange(0, BLOCK_H)[:, None], first + tl.arange(0, BLOCK)[None, :]
    dr = tl.load(dr_ptr + h * stride + n, mask=(h < HEADS) & (n < end), other=0.0)
    return tl.max(tl.max(tl.abs(dr), 1), 0)


@jit
def _any_gradient(dr_ptr, length, HEADS: tl.constexpr, BLOCK_H: tl.constexpr, W: tl.constexpr):
    begin, end = share(length, tl.program_id(1), tl.num_programs(1), W.BLOCK_N)
    dr_ptr, stride = _gradient_rows(dr_ptr, length, HEADS)
    largest = 0.0
    for first in range(begin, end, 128):
        largest = tl.maximum(largest, _largest(dr_ptr, stride, first, end, HEADS, BLOCK_H, 128))
    return largest > 0.0


@jit
def _add_gradients(
    x_ptr, x_strides, e_ptr, e_strides, dx_ptr, dx_strides, dr_ptr, ratio_ptr, norms, scale_ptr, dscale_ptr, length,
    LOG: tl.constexpr, HEADS: tl.constexpr, BLOCK_H: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Adds to dx what comes by the ratios, and sums for the scale's gradient; dr (B, H, N) is summed over the heads.

    The ratios are those of x + e, if there is an encoding; the inverse norms stand ``norms`` later. The rows of dr are
    padded. With ``LOG``, the gradient of the ratios' logarithms, most rows have none, and blocks of such rows are left
    out.
    """
    PARTS: tl.constexpr = W.PARTS
    inverses = _load_inverses(scale_ptr, W)
    begin, end = share(length, tl.program_id(1), tl.num_programs(1), W.BLOCK_N)
    rows = tl.arange(0, W.BLOCK_N)
    dr_ptr, stride = _gradient_rows(dr_ptr, length, HEADS)
    x_ptr, offsets = _start(x_ptr, x_strides, 0), _offsets(x_strides, W)
    e_offsets = _offsets(e_strides, W)
    dx_ptr, dx_offsets = _start(dx_ptr, dx_strides, 0), _offsets(dx_strides, W)
    dscale = ()
    for _ in tl.static_range(PARTS):
        dscale = dscale + (_zeros(W.ROWS, W.BLOCK_C),)
    BLOCK: tl.constexpr = 128 if LOG else 1 << 30
    for first in range(begin, end, BLOCK):
        last = end
        if LOG:
            largest = _largest(dr_ptr, stride, first, end, HEADS, BLOCK_H, BLOCK)
            last = tl.where(largest > 0.0, tl.minimum(first + BLOCK, end), first)
        for start in tl.range(first, last, W.BLOCK_N, num_stages=1 if LOG else 3):
            n = start + rows
            inside = n < end
            g = tl.load(dr_ptr + n, mask=inside, other=0.0)
            for head in tl.static_range(1, HEADS):
                g += tl.load(dr_ptr + head * stride + n, mask=inside, other=0.0)
            ratio = tl.load(ratio_ptr + n, mask=inside, other=1.0)
            inverse_norm = tl.load(ratio_ptr + norms + n, mask=inside, other=1.0)
            root, norm = ratio, fast_inverse(inverse_norm)  # (Σ sᵖ)^-½, of which a power of n^½ alone may overflow
            for _ in tl.static_range(W.P - 1):
                root *= norm
            g *= inverse_norm
            if not LOG:
                g *= ratio
            weight = (g * W.P * root * root)[:, None]
            g, inverse_norm = g[:, None], inverse_norm[:, None]
            at = tl.cast(start, tl.int64)
            x_rows, e_rows = x_ptr + at * x_strides[2], None
            if e_ptr is not None:
                e_rows = e_ptr + at * e_strides[2]
            sums = ()
            for part in tl.static_range(PARTS):
                x = _load_positive(x_rows, offsets, e_rows, e_offsets, inside, part, W)
                u = (x + 1e-6) * inverses[part]
                t = u * inverse_norm
                du = (g - weight * integer_power(t * t, W.P - 1)) * t
                mask = _mask(inside, part, W)
                pointers = dx_ptr + at * dx_strides[2] + dx_offsets[part]
                gradient = fast_to_float(tl.load(pointers, mask=mask, other=0.0))
                gradient += tl.where(x > 0.0, du, 0.0) * inverses[part]
                tl.store(pointers, gradient.to(dx_ptr.dtype.element_ty), mask=mask)
                sums = sums + (dscale[part] - _sum_rows(du * u, W),)
            dscale = sums
    terms = ()
    for part in tl.static_range(PARTS):
        terms = terms + (dscale[part] * inverses[part],)
    _store_parts(dscale_ptr, tl.sum(_beside(terms, 0, W.ALL_PARTS, W), 0), W)


@jit
def _beside(parts, FIRST: tl.constexpr, COUNT: tl.constexpr, W: tl.constexpr):
    """All parts as one tensor, whose last dimension they are: one sum over it waits as often as one over a part."""
    if COUNT > 1:
        HALF: tl.constexpr = COUNT // 2
        x = tl.join(_beside(parts, FIRST, HALF, W), _beside(parts, FIRST + HALF, HALF, W))
        return tl.reshape(tl.permute(x, (0, 1, 3, 2)), x.shape[0], x.shape[1], COUNT)
    elif FIRST < len(parts):
        return parts[FIRST][:, :, None]
    else:
        return parts[0][:, :, None] * 0.0


@jit
def _store_parts(pointer, x, W: tl.constexpr):
    """Stores (columns, parts)."""
    c = tl.arange(0, W.BLOCK_C)[:, None] + tl.arange(0, W.ALL_PARTS)[None, :] * W.BLOCK_C
    tl.store(pointer + c, x, mask=c < W.C)


@jit(do_not_specialize=NOT_SPECIALIZED)
def norm_ratio_gradient_kernel(
    q_ptr, q_strides, dq_ptr, dq_strides, d_log_ratio_ptr, k_ptr, k_strides, e_ptr, e_strides, dk_ptr, dk_strides,
    d_ratio_ptr, ratio_ptr, scale_ptr, dscale_ptr, query_length, key_length,
    HEADS: tl.constexpr, BLOCK_H: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Programs share the rows (axis 1) of a sequence (axis 0): of its queries (axis 2: 0), and of its keys (1)."""
    wait_for_inputs()
    program = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    dscale_ptr += (program * tl.num_programs(1) + tl.program_id(1)) * W.C
    padded_queries = tl.cdiv(query_length, 16) * 16
    norms = padded_queries + tl.cdiv(key_length, 16) * 16
    ratio_ptr += tl.program_id(0).to(tl.int64) * (2 * norms)
    if tl.program_id(2) == 0:
        if _any_gradient(d_log_ratio_ptr, query_length, HEADS, BLOCK_H, W):
            _add_gradients(
                q_ptr, q_strides, None, q_strides, dq_ptr, dq_strides, d_log_ratio_ptr, ratio_ptr, norms, scale_ptr,
                dscale_ptr, query_length, True, HEADS, BLOCK_H, W,
            )  # fmt: skip
        else:
            _store_parts(dscale_ptr, _zeros(W.BLOCK_C, W.ALL_PARTS), W)
    elif dk_ptr is not None:
        _add_gradients(
            k_ptr, k_strides, e_ptr, e_strides, dk_ptr, dk_strides, d_ratio_ptr, ratio_ptr + padded_queries, norms,
            scale_ptr, dscale_ptr, key_length, False, HEADS, BLOCK_H, W,
        )  # fmt: skip


STRIDES = ["x_batch", "x_head", "x_row", "y_batch", "y_head", "y_row"]


@jit(do_not_specialize=[*NOT_SPECIALIZED, *STRIDES, "x_ptr", "y_ptr"])
def multiply_kernel(
    x_ptr, x_batch, x_head, x_row, y_ptr, y_batch, y_head, y_row, product_ptr, heads, length, padded,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Products of (B, H, N), or copies of x without y: blocks (axis 1) of a sequence and head (axis 0)."""
    wait_for_inputs()
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    batch, head = tl.program_id(0).to(tl.int64) // heads, tl.program_id(0).to(tl.int64) % heads
    product = tl.load(x_ptr + batch * x_batch + head * x_head + n.to(tl.int64) * x_row, mask=n < length, other=0.0)
    if y_ptr is not None:
        product *= tl.load(y_ptr + batch * y_batch + head * y_head + n.to(tl.int64) * y_row, mask=n < length, other=0.0)
    tl.store(product_ptr + tl.program_id(0).to(tl.int64) * padded + n, product, mask=n < length)


# --- launches ---------------------------------------------------------------------------------------------------------


class _Width(NamedTuple):
    """How the channels of a token are spread over tiles."""

    C: int
    D: int  # C where heads follow one another without a gap
    PARTS: int
    ALL_PARTS: int  # the power of two from there
    BLOCK_C: int
    BLOCK_N: int
    ROWS: int  # of a tile that the threads of 4 warps load at a time, 16 bytes each
    P: int


def _width(x: Tensor, packed: bool, exponent: int, gradient: bool = False) -> _Width:
    """Tiles of at most 128 channels, which are few threads' of a warp, and as many rows as registers hold."""
    C = x.shape[1] * x.shape[3]
    block_c = min(128, C & -C)
    if block_c < 32 or C > 5 * block_c:
        block_c = max(32, power_of_two(cdiv(C, 4)))
    parts = cdiv(C, block_c)
    elements = 2048 if gradient and block_c > 64 else 4096
    block_n = power_of_two(max(1, min(128, elements // (parts * block_c))) + 1) // 2
    rows = min(block_n, max(1, 128 * 16 // x.element_size() // block_c))
    return _Width(C, C if packed else x.shape[3], parts, power_of_two(parts), block_c, block_n, rows, exponent)


def _programs(x: Tensor, length: int, W: _Width, resident: int, device: torch.device) -> tuple[int, int, int]:
    """A grid that fills all multiprocessors once, as far as there are rows."""
    splits = min(resident * multiprocessors(device) // max(x.shape[0], 1), cdiv(length, W.BLOCK_N))
    return x.shape[0], max(1, splits), 1


def _are_packed(*tensors: Tensor | None) -> bool:
    """Whether the heads of a token follow one another without a gap."""
    return all(x is None or x.stride(-3) == x.shape[-1] and x.stride(-1) == 1 for x in tensors)


def encoding_strides(encoding: Tensor | None) -> tuple[int, int, int, int]:
    """Those of an encoding (H, M, D), the same for all sequences."""
    return (0, 0, 0, 0) if encoding is None else (0, *encoding.stride())


def ratios_shape(q: Tensor, k: Tensor) -> tuple[int, int, int]:
    """That of norm ratios and, half a sequence's stride later, inverse norms: queries' and keys', each padded."""
    return q.shape[0], 2, padded(q.shape[2]) + padded(k.shape[2])


def split_ratios(ratios: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """The queries' ratios ``(B, 1, N)`` and the keys' ``(B, 1, M)``."""
    return ratios[:, :1, : q.shape[2]], ratios[:, :1, padded(q.shape[2]) :][:, :, : k.shape[2]]


def multiply(record: Record, x: Tensor, y: Tensor | None = None) -> Tensor:
    """x · y of float32 ``(B, H, N)``, or x, in padded rows."""
    B, H, N = x.shape
    product = record.new_empty((B, H, padded(N)), torch.float32)[:, :, :N]
    arguments = dict(x_ptr=x, y_ptr=y, product_ptr=product, heads=H, length=N, padded=padded(N), BLOCK=1024)
    for name, tensor in (("x", x), ("y", y)):
        strides = (0, 0, 0) if tensor is None else tensor.stride()
        arguments |= {f"{name}_{axis}": stride for axis, stride in zip(("batch", "head", "row"), strides, strict=True)}
    record.launch(multiply_kernel, (B * H, cdiv(N, 1024), 1), arguments)
    return product


def write_norm_ratios(
    record: Record, ratios: Tensor, q: Tensor, k: Tensor, encoding: Tensor | None, scale: Tensor, exponent: int,
    queries: bool = True,
) -> None:  # fmt: skip
    """‖u‖ / ‖uᵖ‖ and 1 / ‖u‖ with u = (max(x, 0) + 1e-6) / scale, over all heads and channels of a token.

    Args:
        record: Of the launch.
        ratios: Float32, see ``ratios_shape``: they are written here.
        q: ``(B, H, N, D)``, float16, bfloat16 or float32.
        k: ``(B, H, M, D)`` of the same type.
        encoding: ``(H, M, D)`` or None, what is added to the keys.
        scale: Positive, float32, ``(H, D)``.
        exponent: p.
        queries: Whether to write those of the queries, too.
    """
    W = _width(q, _are_packed(q, k, encoding), exponent)
    arguments = dict(
        q_ptr=q if queries else None, q_strides=q.stride(), k_ptr=k, k_strides=k.stride(), e_ptr=encoding,
        e_strides=encoding_strides(encoding), scale_ptr=record.contiguous(scale), ratio_ptr=ratios,
        query_length=q.shape[2], key_length=k.shape[2], W=W,
    )  # fmt: skip
    rows = max(q.shape[2], k.shape[2]) if queries else k.shape[2]
    grid = _programs(q, rows, W, 4, record.device)
    record.launch(norm_ratio_kernel, grid, arguments, maxnreg=128)


def ratio_gradient_programs(q: Tensor, k: Tensor, keys: bool, device: torch.device) -> int:
    """The rows of what ``add_ratio_gradients`` writes for the scale: one for each program."""
    return prod(_gradient_grid(q, k, keys, device))


def _gradient_grid(q: Tensor, k: Tensor, keys: bool, device: torch.device) -> tuple[int, int, int]:
    """The keys' programs fill all multiprocessors; those of the queries have little to do, mostly."""
    sequences, splits, _ = _programs(q, max(q.shape[2], k.shape[2]), _width(q, True, 1, gradient=True), 4, device)
    return sequences, splits, 2 if keys else 1


def add_ratio_gradients(
    record: Record, dq: Tensor, dk: Tensor | None, dscale: Tensor, d_log_ratio: Tensor, d_ratio: Tensor | None,
    ratios: Tensor, q: Tensor, k: Tensor, encoding: Tensor | None, scale: Tensor, exponent: int,
) -> tuple[()]:  # fmt: skip
    """Adds to the gradients of queries and keys what comes by their ratios.

    Args:
        record: Of the launch.
        dq: The gradient ``(B, H, N, D)``.
        dk: ``(B, H, M, D)``, or None if it is not needed.
        dscale: Float32 ``(rows, H, D)``: terms of the scale's gradient, the last of which are to be written.
        d_log_ratio: Gradient of the logarithms of the queries' ratios by head ``(B, H, N)``, in padded rows.
        d_ratio: Gradient of the keys' ratios ``(B, H, M)``, likewise, or None.
        ratios: What the forward pass has left, see ``ratios_shape``.
        q: ``(B, H, N, D)``.
        k: ``(B, H, M, D)``.
        encoding: ``(H, M, D)`` or None.
        scale: As in ``write_norm_ratios``.
        exponent: p.
    """
    grid = _gradient_grid(q, k, dk is not None, record.device)
    arguments = dict(
        q_ptr=q, q_strides=q.stride(), dq_ptr=dq, dq_strides=dq.stride(), d_log_ratio_ptr=d_log_ratio, k_ptr=k,
        k_strides=k.stride(), e_ptr=encoding, e_strides=encoding_strides(encoding), dk_ptr=dk,
        dk_strides=(0, 0, 0, 0) if dk is None else dk.stride(), d_ratio_ptr=d_ratio, ratio_ptr=ratios,
        scale_ptr=record.contiguous(scale), dscale_ptr=dscale[dscale.shape[0] - prod(grid) :],
        query_length=q.shape[2], key_length=k.shape[2],
        HEADS=q.shape[1], BLOCK_H=power_of_two(q.shape[1]),
        W=_width(q, _are_packed(q, k, encoding, dq, dk), exponent, gradient=True),
    )  # fmt: skip
    record.launch(norm_ratio_gradient_kernel, grid, arguments, maxnreg=128)
    return ()
