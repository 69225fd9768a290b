"""Weights of tokens for linear attention in Triton: kernels, their launches, and the torch.library operators over them.

    norm_ratios   r = ‖u‖ / ‖uᵖ‖ of each query and key, over all heads          (focusing_power, see feature_maps.py)
    key_weights   w = N softmax(D^-0.5 · mean(φ(q)) · φ(k)) of each key and head, φ = elu + 1                  (RALA)

Everything is computed in float32, and sums are always added up in the same order.

Norm ratios: a program has all channels of its tokens, in PARTS tiles side by side, and reads them once. With s = u² / n
and n = ‖u‖², in which nothing overflows, r = n^((1 - p) / 2) / (Σ sᵖ)^½ and

    dr/du = r / n · u · (1 - p s^(p - 1) / Σ sᵖ)

Key weights: the forward pass sums φ(q), then writes scores and keeps their maximum and sum of exponentials, and then
normalises. The backward pass goes through the keys, which gives the gradient of mean(φ(q)), and then through the
queries. Where there are many sequences, a program for each does it all in one launch; long sequences are split, with a
launch for each of these steps. GROUP narrow heads stand side by side in a tile, so that whole cache lines are read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flash_bla.ops.feature_maps import TRITON_FEATURE_MAPS
from flash_bla.ops.triton_support import NOT_SPECIALIZED, call, cdiv, jit, multiprocessors, tl

phi, phi_dx, _, _ = TRITON_FEATURE_MAPS["elu1"]

# --- kernels of the norm ratios ---------------------------------------------------------------------------------------
# Strides come as tuples in the order (batch, head, row, column). Programs on axis 0 share the blocks of rows of all
# sequences; on axis 1 the first has the queries and the second the keys.


@jit
def _share(sequences, length, BLOCK_N: tl.constexpr):
    """How many blocks this program has, and the sequence and row at which they begin."""
    blocks = tl.cdiv(length, BLOCK_N)
    share = tl.cdiv(sequences * blocks, tl.num_programs(0))
    begin = tl.minimum(tl.program_id(0) * share, sequences * blocks)
    count = tl.minimum(share, sequences * blocks - begin)
    return count, begin // blocks, begin % blocks * BLOCK_N


@jit
def _next(batch, start, length, BLOCK_N: tl.constexpr):
    start += BLOCK_N
    return tl.where(start < length, batch, batch + 1), tl.where(start < length, start, 0)


@jit
def _first(pointer, strides, batch, start):
    return pointer + batch.to(tl.int64) * strides[0] + start.to(tl.int64) * strides[2]


@jit
def _power(x, P: tl.constexpr):
    power = 1.0
    for _ in tl.static_range(P):
        power = power * x
    return power


@jit
def _offsets(strides, D: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Offsets of each part's tile from its first row."""
    rows = (tl.arange(0, BLOCK_N).to(tl.int64) * strides[2])[:, None]
    offsets = ()
    for part in tl.static_range(PARTS):
        c = part * BLOCK_C + tl.arange(0, BLOCK_C)
        columns = (c // D).to(tl.int64) * strides[1] + (c % D).to(tl.int64) * strides[3]
        offsets = offsets + (rows + columns[None, :],)
    return offsets


@jit
def _load_scale(scale_ptr, C: tl.constexpr, PARTS: tl.constexpr, BLOCK_C: tl.constexpr):
    """1 / scale of each part's columns, and the least u; both are zero where there is no channel, and so is u."""
    inverses, least = (), ()
    for part in tl.static_range(PARTS):
        c = part * BLOCK_C + tl.arange(0, BLOCK_C)
        inverse = 1.0 / tl.load(scale_ptr + c, mask=c < C, other=float("inf"))
        inverses = inverses + (inverse[None, :],)
        least = least + ((inverse * 1e-6)[None, :],)
    return inverses, least


@jit
def _mask(inside, part: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr):
    if (part + 1) * BLOCK_C <= C:
        return inside[:, None]
    else:
        return inside[:, None] & (part * BLOCK_C + tl.arange(0, BLOCK_C) < C)[None, :]


@jit
def _load_u(
    x_ptr, offsets, inside, inverses, least, P: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The parts of u, 1 / n, and Σ sᵖ."""
    u = ()
    squares = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for part in tl.static_range(PARTS):
        x = tl.load(x_ptr + offsets[part], mask=_mask(inside, part, C, BLOCK_C), other=0.0).to(tl.float32)
        y = tl.maximum(x, 0.0) * inverses[part] + least[part]
        squares += y * y
        u = u + (y,)
    inverse_n = 1.0 / tl.sum(squares, 1)
    powers = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for part in tl.static_range(PARTS):
        powers += _power(u[part] * u[part] * inverse_n[:, None], P)
    return u, inverse_n, tl.sum(powers, 1)


@jit
def _sum_rows(x, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr):
    """Sums over rows as far as a thread holds several of them in the layout of a load: to (ROWS, columns)."""
    return tl.sum(tl.reshape(x, BLOCK_N // ROWS, ROWS, BLOCK), 0)


@jit
def _ratio(inverse_n, powers, P: tl.constexpr):
    return _power(tl.sqrt(inverse_n), P - 1) * tl.rsqrt(powers)


@jit
def _write_ratios(
    x_ptr, x_strides, scale_ptr, ratio_ptr, sequences, length,
    P: tl.constexpr, D: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """r of this program's share of the tokens."""
    rows = tl.arange(0, BLOCK_N)
    offsets = _offsets(x_strides, D, PARTS, BLOCK_N, BLOCK_C)
    inverses, least = _load_scale(scale_ptr, C, PARTS, BLOCK_C)
    count, batch, start = _share(sequences, length, BLOCK_N)
    for _ in range(count):
        inside = start + rows < length
        x = _first(x_ptr, x_strides, batch, start)
        _, inverse_n, powers = _load_u(x, offsets, inside, inverses, least, P, C, PARTS, BLOCK_N, BLOCK_C)
        ratio = _first(ratio_ptr, (length, 0, 1), batch, start)
        tl.store(ratio + rows, _ratio(inverse_n, powers, P), mask=inside)
        batch, start = _next(batch, start, length, BLOCK_N)


@jit
def _differentiate_ratios(
    x_ptr, x_strides, scale_ptr, dr_ptr, dr_strides, dx_ptr, dx_strides, dscale_ptr, sequences, length,
    P: tl.constexpr, D: tl.constexpr, C: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dx of this program's share of the tokens, and its sum for dscale; dr is summed over the heads."""
    rows = tl.arange(0, BLOCK_N)
    h = tl.arange(0, BLOCK_H)
    offsets = _offsets(x_strides, D, PARTS, BLOCK_N, BLOCK_C)
    dx_offsets = _offsets(dx_strides, D, PARTS, BLOCK_N, BLOCK_C)
    dr_offsets = (rows.to(tl.int64) * dr_strides[2])[:, None] + (h.to(tl.int64) * dr_strides[1])[None, :]
    inverses, least = _load_scale(scale_ptr, C, PARTS, BLOCK_C)
    dscale = ()
    for _ in tl.static_range(PARTS):
        dscale = dscale + (tl.zeros((ROWS, BLOCK_C), tl.float32),)
    count, batch, start = _share(sequences, length, BLOCK_N)
    for _ in range(count):
        inside = start + rows < length
        x = _first(x_ptr, x_strides, batch, start)
        dx = _first(dx_ptr, dx_strides, batch, start)
        dr = _first(dr_ptr, dr_strides, batch, start)
        dr = tl.sum(tl.load(dr + dr_offsets, mask=inside[:, None] & (h < HEADS)[None, :], other=0.0), 1)
        u, inverse_n, powers = _load_u(x, offsets, inside, inverses, least, P, C, PARTS, BLOCK_N, BLOCK_C)
        g = (dr * _ratio(inverse_n, powers, P) * inverse_n)[:, None]
        weight = g * (P / powers)[:, None]
        sums = ()
        for part in tl.static_range(PARTS):
            y = u[part]
            du = (g - weight * _power(y * y * inverse_n[:, None], P - 1)) * y
            grad = tl.where(y > least[part], du * inverses[part], 0.0)
            mask = _mask(inside, part, C, BLOCK_C)
            tl.store(dx + dx_offsets[part], grad.to(dx_ptr.dtype.element_ty), mask=mask)
            sums = sums + (dscale[part] - _sum_rows(du * y, ROWS, BLOCK_N, BLOCK_C),)
        dscale = sums
        batch, start = _next(batch, start, length, BLOCK_N)
    row = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    for part in tl.static_range(PARTS):
        c = part * BLOCK_C + tl.arange(0, BLOCK_C)
        total = tl.sum(dscale[part] * inverses[part], 0)
        tl.store(dscale_ptr + row * C + c, total, mask=c < C)


@jit(do_not_specialize=[*NOT_SPECIALIZED, "sequences"])
def norm_ratio_kernel(
    q_ptr, q_strides, q_ratio_ptr, k_ptr, k_strides, k_ratio_ptr, scale_ptr, sequences, query_length, key_length,
    P: tl.constexpr, D: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The ratios (B, N) of queries and keys."""
    if tl.program_id(1) == 0:
        _write_ratios(
            q_ptr, q_strides, scale_ptr, q_ratio_ptr, sequences, query_length, P, D, C, PARTS, BLOCK_N, BLOCK_C
        )  # fmt: skip
    else:
        _write_ratios(
            k_ptr, k_strides, scale_ptr, k_ratio_ptr, sequences, key_length, P, D, C, PARTS, BLOCK_N, BLOCK_C
        )  # fmt: skip


@jit(do_not_specialize=[*NOT_SPECIALIZED, "sequences"])
def norm_ratio_gradient_kernel(
    q_ptr, q_strides, drq_ptr, drq_strides, dq_ptr, dq_strides, k_ptr, k_strides, drk_ptr, drk_strides, dk_ptr,
    dk_strides, scale_ptr, dscale_ptr, sequences, query_length, key_length,
    P: tl.constexpr, D: tl.constexpr, C: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Gradients of queries and keys, and sums (2, programs, C) for that of the scale."""
    if tl.program_id(1) == 0:
        _differentiate_ratios(
            q_ptr, q_strides, scale_ptr, drq_ptr, drq_strides, dq_ptr, dq_strides, dscale_ptr, sequences, query_length,
            P, D, C, HEADS, PARTS, BLOCK_N, BLOCK_C, BLOCK_H, ROWS,
        )  # fmt: skip
    else:
        _differentiate_ratios(
            k_ptr, k_strides, scale_ptr, drk_ptr, drk_strides, dk_ptr, dk_strides, dscale_ptr, sequences, key_length,
            P, D, C, HEADS, PARTS, BLOCK_N, BLOCK_C, BLOCK_H, ROWS,
        )  # fmt: skip


# --- operator of the norm ratios --------------------------------------------------------------------------------------


class _Width(NamedTuple):
    """How the channels of a token are spread over tiles."""

    C: int
    D: int  # C where heads follow one another without a gap
    PARTS: int
    BLOCK_C: int
    BLOCK_N: int
    P: int


def _width(q: Tensor, k: Tensor, exponent: int, elements: int) -> _Width:
    """Tiles whose rows a warp holds up to 256 channels of, and as many rows as make ``elements``."""
    H, D = q.shape[1], q.shape[3]
    packed = all(x.stride(1) == D and x.stride(3) == 1 for x in (q, k))
    block_c = max(32, _power_of_two(cdiv(H * D, 3 if H * D <= 768 else 4)))
    parts = cdiv(H * D, block_c)
    block_n = max(1, min(128, elements // (parts * block_c)))
    return _Width(H * D, H * D if packed else D, parts, block_c, _power_of_two(block_n + 1) // 2, exponent)


def _power_of_two(n: int) -> int:
    """The least that is not below n."""
    return 1 << (n - 1).bit_length()


def _rows(x: Tensor, block_n: int, width: int) -> int:
    """Rows of a tile that the threads of 4 warps load at a time, 16 bytes each."""
    return min(block_n, max(1, 128 * 16 // x.element_size() // width))


def _empty_gradient(x: Tensor) -> Tensor:
    """Laid out as (B, N, H, D), as the attention's own gradients."""
    return x.new_empty(x.transpose(1, 2).shape).transpose(1, 2)


def _programs(q: Tensor, k: Tensor, width: _Width) -> int:
    """Programs for the queries, and as many for the keys, which fill all multiprocessors once."""
    blocks = q.shape[0] * cdiv(max(q.shape[2], k.shape[2]), width.BLOCK_N)
    return min(blocks, cdiv(_resident(width) * multiprocessors(q.device), 2))


def _resident(width: _Width) -> int:
    """Programs on a multiprocessor at a time: more parts take more registers."""
    return 4 if width.PARTS <= 3 else 3


def _launch(kernel, programs: int, width: _Width, arguments: dict) -> None:
    if programs:
        maxnreg = 65536 // (128 * _resident(width)) // 8 * 8  # which come in eights
        call(kernel, (programs, 2, 1), arguments | width._asdict(), maxnreg=maxnreg)


@torch.library.custom_op("flash_bla::norm_ratios", mutates_args=())
def norm_ratios(q: Tensor, k: Tensor, scale: Tensor, exponent: int) -> tuple[Tensor, Tensor]:
    """‖u‖ / ‖uᵖ‖ with u = (max(x, 0) + 1e-6) / scale, over all heads and channels of a token.

    Args:
        q: ``(B, H, N, D)``, float16, bfloat16 or float32.
        k: ``(B, H, M, D)`` of the same type.
        scale: Positive, float32, contiguous ``(H, D)``.
        exponent: p.

    Returns:
        The queries' ``(B, H, N)`` and the keys' ``(B, H, M)``, float32, the same memory for all heads.
    """
    B, H = q.shape[:2]
    q_ratio, k_ratio = (x.new_empty((B, x.shape[2]), dtype=torch.float32) for x in (q, k))
    width = _width(q, k, exponent, 8192)
    arguments = dict(
        q_ptr=q, q_strides=q.stride(), q_ratio_ptr=q_ratio, k_ptr=k, k_strides=k.stride(), k_ratio_ptr=k_ratio,
        scale_ptr=scale, sequences=B, query_length=q.shape[2], key_length=k.shape[2],
    )  # fmt: skip
    _launch(norm_ratio_kernel, _programs(q, k, width), width, arguments)
    return tuple(ratio[:, None].expand(B, H, -1) for ratio in (q_ratio, k_ratio))


@norm_ratios.register_fake
def _(q, k, scale, exponent):
    B, H = q.shape[:2]
    return tuple(x.new_empty((B, 1, x.shape[2]), dtype=torch.float32).expand(B, H, -1) for x in (q, k))


@torch.library.custom_op("flash_bla::norm_ratios_backward", mutates_args=())
def norm_ratios_backward(
    drq: Tensor, drk: Tensor, q: Tensor, k: Tensor, scale: Tensor, exponent: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and scale."""
    B, H = q.shape[:2]
    dq, dk = _empty_gradient(q), _empty_gradient(k)
    width = _width(q, k, exponent, 4096)
    programs = _programs(q, k, width)
    dscale = scale.new_empty((2 * programs, *scale.shape))
    arguments = dict(
        q_ptr=q, q_strides=q.stride(), drq_ptr=drq, drq_strides=drq.stride(), dq_ptr=dq, dq_strides=dq.stride(),
        k_ptr=k, k_strides=k.stride(), drk_ptr=drk, drk_strides=drk.stride(), dk_ptr=dk, dk_strides=dk.stride(),
        scale_ptr=scale, dscale_ptr=dscale, sequences=B, query_length=q.shape[2], key_length=k.shape[2],
        HEADS=H, BLOCK_H=_power_of_two(H), ROWS=_rows(q, width.BLOCK_N, width.BLOCK_C),
    )  # fmt: skip
    _launch(norm_ratio_gradient_kernel, programs, width, arguments)
    return dq, dk, dscale.sum(0)


@norm_ratios_backward.register_fake
def _(drq, drk, q, k, scale, exponent):
    return _empty_gradient(q), _empty_gradient(k), torch.empty_like(scale)


def _save_ratios(ctx, inputs, output):
    *tensors, ctx.exponent = inputs
    ctx.save_for_backward(*tensors)


def _ratios_backward(ctx, drq, drk):
    gradients = norm_ratios_backward(drq, drk, *ctx.saved_tensors, ctx.exponent)
    return *(g if need else None for g, need in zip(gradients, ctx.needs_input_grad[:3], strict=True)), None


norm_ratios.register_autograd(_ratios_backward, setup_context=_save_ratios)


# --- kernels of the key weights: a program for each group of heads (axis 0) and split of the rows (axis 1) ------------


class Config(NamedTuple):
    """What is fixed when a kernel is compiled."""

    D: int
    GROUP: int
    BLOCK_N: int
    BLOCK_D: int
    ROWS: int  # that the threads load at a time
    BLOCK_M: int  # keys at a time where there is a number for each, and no channels


@jit
def _place(heads, C: tl.constexpr):
    """Batch index, and first of the group's heads."""
    groups = tl.cdiv(heads, C.GROUP)
    return (tl.program_id(0) // groups).to(tl.int64), tl.program_id(0) % groups * C.GROUP


@jit
def _split(count, BLOCK: tl.constexpr):
    """First row and end of this program's split: whole blocks, spread evenly over the splits."""
    chunk = tl.cdiv(tl.cdiv(count, tl.num_programs(1)), BLOCK) * BLOCK
    begin = tl.minimum(tl.program_id(1) * chunk, count)
    return begin, tl.minimum(begin + chunk, count)


@jit
def _tile(x_ptr, strides, batch, head, heads, C: tl.constexpr):
    """Pointers to a tile at the sequence's first row, and which columns exist."""
    column = tl.arange(0, C.BLOCK_D)
    h = (head + column // C.D).to(tl.int64)
    columns = h * strides[1] + (column % C.D).to(tl.int64) * strides[3]
    rows = tl.arange(0, C.BLOCK_N).to(tl.int64) * strides[2]
    exists = (column < C.GROUP * C.D) & (h < heads)
    return x_ptr + batch * strides[0] + (rows[:, None] + columns[None, :]), exists


@jit
def _numbers(head, heads, C: tl.constexpr):
    """The heads of the group, and which exist."""
    h = head + tl.arange(0, C.GROUP)
    return h, h < heads


@jit
def _zeros(rows: tl.constexpr, columns: tl.constexpr):
    return tl.zeros((rows, columns), tl.float32)


@jit
def _by_head(x, GROUP: tl.constexpr, D: tl.constexpr):
    """Sums of a tile's columns by head: (rows, columns) to (rows, GROUP)."""
    if GROUP == 1:
        return tl.sum(x, 1)[:, None]
    else:
        return tl.sum(tl.reshape(x, x.shape[0], GROUP, D), 2)


@jit
def _to_columns(x, GROUP: tl.constexpr, D: tl.constexpr):
    """A number for each head to the columns of a tile: (rows, GROUP) to what broadcasts with (rows, columns)."""
    if GROUP == 1:
        return x
    else:
        x = tl.broadcast_to(x[:, :, None], x.shape[0], GROUP, D)
        return tl.reshape(x, x.shape[0], GROUP * D)


@jit
def _vector(ptr, batch, head, heads, C: tl.constexpr):
    """Pointers to the group's channels in (B, H, D), and which exist."""
    column = tl.arange(0, C.BLOCK_D)
    exists = (column < C.GROUP * C.D) & (head + column // C.D < heads)
    return ptr + (batch * heads + head) * C.D + column, exists


@jit
def _store_split(ptr, x, C: tl.constexpr):
    """A vector of this program to (splits, programs, BLOCK_D)."""
    at = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(ptr + at * C.BLOCK_D + tl.arange(0, C.BLOCK_D), x)


@jit
def _add_splits(ptr, splits, C: tl.constexpr):
    """Sum over the splits of such vectors."""
    total = _zeros(8, C.BLOCK_D)
    for first in range(0, splits, 8):
        split = first + tl.arange(0, 8)
        at = split.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
        offsets = at[:, None] * C.BLOCK_D + tl.arange(0, C.BLOCK_D)[None, :]
        total += tl.load(ptr + offsets, mask=(split < splits)[:, None], other=0.0)
    return tl.sum(total, 0)


@jit
def _sum_features(q_ptr, q_strides, batch, head, heads, begin, end, C: tl.constexpr):
    """Σ φ(q) over the rows from ``begin`` to ``end``."""
    q, exists = _tile(q_ptr, q_strides, batch, head, heads, C)
    rows = tl.arange(0, C.BLOCK_N)
    total = _zeros(C.ROWS, C.BLOCK_D)
    for start in range(begin, end, C.BLOCK_N):
        mask = (start + rows < end)[:, None] & exists[None, :]
        # φ is zero where there is no row
        x = tl.load(q + tl.cast(start, tl.int64) * q_strides[2], mask=mask, other=-1e4).to(tl.float32)
        total += _sum_rows(phi(x, 1.0, 1), C.ROWS, C.BLOCK_N, C.BLOCK_D)
    return tl.sum(total, 0)


@jit
def _write_scores(k_ptr, k_strides, w_ptr, mean, batch, head, heads, begin, end, count, C: tl.constexpr):
    """Writes the scores' logarithms to base 2, and returns for each head their maximum and the sum of exponentials."""
    k, exists = _tile(k_ptr, k_strides, batch, head, heads, C)
    h, head_exists = _numbers(head, heads, C)
    rows = tl.arange(0, C.BLOCK_N)
    w = w_ptr + (batch * heads + h)[None, :] * count + rows[:, None]
    mean = (mean * 1.4426950408889634)[None, :]
    maximum = _zeros(C.BLOCK_N, C.GROUP) - 1e30
    total = _zeros(C.BLOCK_N, C.GROUP)
    for start in range(begin, end, C.BLOCK_N):
        inside = (start + rows < end)[:, None]
        mask = inside & exists[None, :]
        x = tl.load(k + tl.cast(start, tl.int64) * k_strides[2], mask=mask, other=-1e4).to(tl.float32)
        scores = _by_head(phi(x, 1.0, 1) * mean, C.GROUP, C.D)
        tl.store(w + start, scores, mask=inside & head_exists[None, :])
        # each row of a tile has a maximum of its own, so that rows meet only once
        scores = tl.where(inside, scores, float("-inf"))
        new = tl.maximum(maximum, scores)
        total = total * tl.exp2(maximum - new) + tl.exp2(scores - new)
        maximum = new
    largest = tl.max(maximum, 0)
    return largest, tl.sum(total * tl.exp2(maximum - largest[None, :]), 0)


@jit
def _normalize(w_ptr, maximum, total, batch, head, heads, begin, end, count, C: tl.constexpr):
    """Scores to weights, in place."""
    h, head_exists = _numbers(head, heads, C)
    w_ptr += (batch * heads + h)[:, None] * count
    factor = count.to(tl.float32) / total
    for start in range(begin, end, C.BLOCK_M):
        m = start + tl.arange(0, C.BLOCK_M)[None, :]
        mask = (m < end) & head_exists[:, None]
        scores = tl.load(w_ptr + m, mask=mask, other=0.0)
        tl.store(w_ptr + m, tl.exp2(scores - maximum[:, None]) * factor[:, None], mask=mask)


@jit
def _mean_gradient(w_ptr, dw_ptr, dw_strides, batch, head, heads, count, C: tl.constexpr):
    """Σ w dw / M of each head."""
    h, head_exists = _numbers(head, heads, C)
    w_ptr += (batch * heads + h)[:, None] * count
    dw_ptr += batch * dw_strides[0] + (h.to(tl.int64) * dw_strides[1])[:, None]
    total = _zeros(C.GROUP, C.BLOCK_M)
    for start in range(0, count, C.BLOCK_M):
        m = start + tl.arange(0, C.BLOCK_M)[None, :]
        mask = (m < count) & head_exists[:, None]
        w = tl.load(w_ptr + m, mask=mask, other=0.0)
        total += w * tl.load(dw_ptr + m.to(tl.int64) * dw_strides[2], mask=mask, other=0.0)
    return tl.sum(total, 1) / count.to(tl.float32)


@jit
def _differentiate_keys(
    k_ptr, k_strides, w_ptr, dw_ptr, dw_strides, dk_ptr, dk_strides, mean, average, batch, head, heads, begin, end,
    count, C: tl.constexpr,
):  # fmt: skip
    """Writes dk, and returns Σ ds φ(k) with ds = w (dw - Σ w dw / M)."""
    k, exists = _tile(k_ptr, k_strides, batch, head, heads, C)
    dk, _ = _tile(dk_ptr, dk_strides, batch, head, heads, C)
    h, head_exists = _numbers(head, heads, C)
    rows = tl.arange(0, C.BLOCK_N)
    w = w_ptr + (batch * heads + h)[None, :] * count + rows[:, None]
    dw = dw_ptr + batch * dw_strides[0] + (h.to(tl.int64) * dw_strides[1])[None, :]
    dw += (rows.to(tl.int64) * dw_strides[2])[:, None]
    d_mean = _zeros(C.ROWS, C.BLOCK_D)
    for start in range(begin, end, C.BLOCK_N):
        inside = (start + rows < end)[:, None]
        mask, weight_mask = inside & exists[None, :], inside & head_exists[None, :]
        step = tl.cast(start, tl.int64)
        ds = tl.load(dw + step * dw_strides[2], mask=weight_mask, other=0.0) - average[None, :]
        ds *= tl.load(w + start, mask=weight_mask, other=0.0)
        x = tl.load(k + step * k_strides[2], mask=mask, other=0.0).to(tl.float32)
        features = phi(x, 1.0, 1)
        ds = _to_columns(ds, C.GROUP, C.D)
        d_mean += _sum_rows(ds * features, C.ROWS, C.BLOCK_N, C.BLOCK_D)
        dx = ds * mean[None, :] * phi_dx(x, features, 1.0, 1)
        tl.store(dk + step * dk_strides[2], dx.to(dk_ptr.dtype.element_ty), mask=mask)
    return tl.sum(d_mean, 0)


@jit
def _differentiate_queries(
    q_ptr, q_strides, dq_ptr, dq_strides, d_mean, batch, head, heads, begin, end, C: tl.constexpr
):  # fmt: skip
    """dq from the gradient by each φ(q)."""
    q, exists = _tile(q_ptr, q_strides, batch, head, heads, C)
    dq, _ = _tile(dq_ptr, dq_strides, batch, head, heads, C)
    rows = tl.arange(0, C.BLOCK_N)
    for start in range(begin, end, C.BLOCK_N):
        mask = (start + rows < end)[:, None] & exists[None, :]
        step = tl.cast(start, tl.int64)
        x = tl.load(q + step * q_strides[2], mask=mask, other=0.0).to(tl.float32)
        dx = d_mean[None, :] * phi_dx(x, phi(x, 1.0, 1), 1.0, 1)
        tl.store(dq + step * dq_strides[2], dx.to(dq_ptr.dtype.element_ty), mask=mask)


@jit(do_not_specialize=NOT_SPECIALIZED)
def key_weight_kernel(
    q_ptr, q_strides, k_ptr, k_strides, w_ptr, mean_ptr, query_length, key_length, heads, scale, C: tl.constexpr
):  # fmt: skip
    """The whole forward pass of a sequence; mean (B, H, D) is the features' mean times ``scale``."""
    batch, head = _place(heads, C)
    mean = _sum_features(q_ptr, q_strides, batch, head, heads, 0, query_length, C)
    mean *= scale / query_length.to(tl.float32)
    pointers, exists = _vector(mean_ptr, batch, head, heads, C)
    tl.store(pointers, mean, mask=exists)
    maximum, total = _write_scores(k_ptr, k_strides, w_ptr, mean, batch, head, heads, 0, key_length, key_length, C)
    tl.debug_barrier()  # other threads of this program wrote what is read now
    _normalize(w_ptr, maximum, total, batch, head, heads, 0, key_length, key_length, C)


@jit(do_not_specialize=NOT_SPECIALIZED)
def feature_sum_kernel(q_ptr, q_strides, sum_ptr, query_length, heads, C: tl.constexpr):
    """Σ φ(q) of one split."""
    batch, head = _place(heads, C)
    begin, end = _split(query_length, C.BLOCK_N)
    _store_split(sum_ptr, _sum_features(q_ptr, q_strides, batch, head, heads, begin, end, C), C)


@jit(do_not_specialize=NOT_SPECIALIZED)
def score_kernel(
    k_ptr, k_strides, sum_ptr, w_ptr, mean_ptr, statistics_ptr, query_length, key_length, heads, splits, scale,
    C: tl.constexpr,
):  # fmt: skip
    """Scores, their statistics (splits, programs, 2, GROUP), and the mean of the features times ``scale``."""
    batch, head = _place(heads, C)
    mean = _add_splits(sum_ptr, splits, C) * (scale / query_length.to(tl.float32))
    if tl.program_id(1) == 0:
        pointers, exists = _vector(mean_ptr, batch, head, heads, C)
        tl.store(pointers, mean, mask=exists)
    begin, end = _split(key_length, C.BLOCK_N)
    maximum, total = _write_scores(k_ptr, k_strides, w_ptr, mean, batch, head, heads, begin, end, key_length, C)
    at = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * 2 * C.GROUP
    tl.store(statistics_ptr + at + tl.arange(0, C.GROUP), maximum)
    tl.store(statistics_ptr + at + C.GROUP + tl.arange(0, C.GROUP), total)


@jit(do_not_specialize=NOT_SPECIALIZED)
def normalize_kernel(
    w_ptr, statistics_ptr, key_length, heads, splits, BLOCK_S: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """One split of the scores to weights."""
    batch, head = _place(heads, C)
    split = tl.arange(0, BLOCK_S)
    mask = (split < splits)[:, None]
    at = (split.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * 2 * C.GROUP
    statistics_ptr += at[:, None] + tl.arange(0, C.GROUP)[None, :]
    maxima = tl.load(statistics_ptr, mask=mask, other=-1e30)
    totals = tl.load(statistics_ptr + C.GROUP, mask=mask, other=0.0)
    maximum = tl.max(maxima, 0)
    total = tl.sum(totals * tl.exp2(maxima - maximum[None, :]), 0)
    begin, end = _split(key_length, C.BLOCK_M)
    _normalize(w_ptr, maximum, total, batch, head, heads, begin, end, key_length, C)


@jit(do_not_specialize=NOT_SPECIALIZED)
def key_weight_gradient_kernel(
    q_ptr, q_strides, dq_ptr, dq_strides, k_ptr, k_strides, dk_ptr, dk_strides, w_ptr, dw_ptr, dw_strides, mean_ptr,
    query_length, key_length, heads, scale, C: tl.constexpr,
):  # fmt: skip
    """The whole backward pass of a sequence."""
    batch, head = _place(heads, C)
    pointers, exists = _vector(mean_ptr, batch, head, heads, C)
    mean = tl.load(pointers, mask=exists, other=0.0)
    average = _mean_gradient(w_ptr, dw_ptr, dw_strides, batch, head, heads, key_length, C)
    d_mean = _differentiate_keys(
        k_ptr, k_strides, w_ptr, dw_ptr, dw_strides, dk_ptr, dk_strides, mean, average, batch, head, heads, 0,
        key_length, key_length, C,
    )  # fmt: skip
    d_mean *= scale / query_length.to(tl.float32)
    _differentiate_queries(q_ptr, q_strides, dq_ptr, dq_strides, d_mean, batch, head, heads, 0, query_length, C)


@jit(do_not_specialize=NOT_SPECIALIZED)
def key_gradient_kernel(
    k_ptr, k_strides, dk_ptr, dk_strides, w_ptr, dw_ptr, dw_strides, mean_ptr, d_sum_ptr, key_length, heads,
    C: tl.constexpr,
):  # fmt: skip
    """dk of one split of the keys, and its sum for the queries."""
    batch, head = _place(heads, C)
    pointers, exists = _vector(mean_ptr, batch, head, heads, C)
    mean = tl.load(pointers, mask=exists, other=0.0)
    average = _mean_gradient(w_ptr, dw_ptr, dw_strides, batch, head, heads, key_length, C)
    begin, end = _split(key_length, C.BLOCK_N)
    d_sum = _differentiate_keys(
        k_ptr, k_strides, w_ptr, dw_ptr, dw_strides, dk_ptr, dk_strides, mean, average, batch, head, heads, begin, end,
        key_length, C,
    )  # fmt: skip
    _store_split(d_sum_ptr, d_sum, C)


@jit(do_not_specialize=NOT_SPECIALIZED)
def query_gradient_kernel(
    q_ptr, q_strides, dq_ptr, dq_strides, d_sum_ptr, query_length, heads, splits, scale, C: tl.constexpr
):  # fmt: skip
    """dq of one split of the queries."""
    batch, head = _place(heads, C)
    d_mean = _add_splits(d_sum_ptr, splits, C) * (scale / query_length.to(tl.float32))
    begin, end = _split(query_length, C.BLOCK_N)
    _differentiate_queries(q_ptr, q_strides, dq_ptr, dq_strides, d_mean, batch, head, heads, begin, end, C)


# --- operator of the key weights --------------------------------------------------------------------------------------


def _config(q: Tensor) -> Config:
    H, D = q.shape[1], q.shape[3]
    group = min(64 // D, 1 << (H.bit_length() - 1)) if D in (8, 16, 32) else 1
    block_d = max(16, _power_of_two(group * D))
    block_n = max(8, min(64, 4096 // block_d))
    return Config(D, group, block_n, block_d, ROWS=_rows(q, block_n, block_d), BLOCK_M=512 // group)


def _programs_of_heads(q: Tensor, C: Config) -> int:
    return q.shape[0] * cdiv(q.shape[1], C.GROUP)


def _whole(q: Tensor, k: Tensor, C: Config) -> bool:
    """Whether one launch, with a program for each sequence, is faster than a launch for each step."""
    return max(q.shape[2], k.shape[2]) <= 256 or _programs_of_heads(q, C) >= 4 * multiprocessors(q.device)


def _splits(x: Tensor, C: Config, block: int) -> int:
    """Into how many parts to cut sequences so that five programs run on each multiprocessor."""
    return max(1, min(5 * multiprocessors(x.device) // _programs_of_heads(x, C), cdiv(x.shape[2], block), 128))


@torch.library.custom_op("flash_bla::key_weights", mutates_args=())
def key_weights_forward(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """The weights ``(B, H, M)`` and, for the backward pass, D^-0.5 mean(φ(q)) ``(B, H, D)``, both float32."""
    B, H, N, D = q.shape
    M = k.shape[2]
    w, mean = (q.new_empty(shape, dtype=torch.float32) for shape in ((B, H, M), (B, H, D)))
    C = _config(q)
    programs = _programs_of_heads(q, C)
    if programs == 0:
        return w, mean
    arguments = dict(
        q_ptr=q, q_strides=q.stride(), k_ptr=k, k_strides=k.stride(), w_ptr=w, mean_ptr=mean,
        query_length=N, key_length=M, heads=H, scale=D**-0.5, C=C,
    )  # fmt: skip
    if _whole(q, k, C):
        call(key_weight_kernel, (programs, 1, 1), arguments)
        return w, mean
    splits = _splits(q, C, C.BLOCK_N)
    sums = mean.new_empty((splits, programs, C.BLOCK_D))
    call(feature_sum_kernel, (programs, splits, 1), arguments | dict(sum_ptr=sums))
    key_splits = _splits(k, C, C.BLOCK_N)
    statistics = mean.new_empty((key_splits, programs, 2, C.GROUP))
    arguments |= dict(sum_ptr=sums, statistics_ptr=statistics)
    call(score_kernel, (programs, key_splits, 1), arguments | dict(splits=splits))
    arguments |= dict(splits=key_splits, BLOCK_S=_power_of_two(key_splits))
    call(normalize_kernel, (programs, _splits(k, C, C.BLOCK_M), 1), arguments)
    return w, mean


@key_weights_forward.register_fake
def _(q, k):
    B, H, _, D = q.shape
    return tuple(q.new_empty(shape, dtype=torch.float32) for shape in ((B, H, k.shape[2]), (B, H, D)))


@torch.library.custom_op("flash_bla::key_weights_backward", mutates_args=())
def key_weights_backward(dw: Tensor, w: Tensor, mean: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of q and k."""
    B, H, N, D = q.shape
    dq, dk = _empty_gradient(q), _empty_gradient(k)
    C = _config(q)
    programs = _programs_of_heads(q, C)
    if programs == 0:
        return dq, dk
    arguments = dict(
        q_ptr=q, q_strides=q.stride(), dq_ptr=dq, dq_strides=dq.stride(), k_ptr=k, k_strides=k.stride(), dk_ptr=dk,
        dk_strides=dk.stride(), w_ptr=w, dw_ptr=dw, dw_strides=dw.stride(), mean_ptr=mean,
        query_length=N, key_length=k.shape[2], heads=H, scale=D**-0.5, C=C,
    )  # fmt: skip
    if _whole(q, k, C):
        call(key_weight_gradient_kernel, (programs, 1, 1), arguments)
        return dq, dk
    splits = _splits(k, C, C.BLOCK_N)
    arguments |= dict(d_sum_ptr=mean.new_empty((splits, programs, C.BLOCK_D)), splits=splits)
    call(key_gradient_kernel, (programs, splits, 1), arguments)
    call(query_gradient_kernel, (programs, _splits(q, C, C.BLOCK_N), 1), arguments)
    return dq, dk


@key_weights_backward.register_fake
def _(dw, w, mean, q, k):
    return _empty_gradient(q), _empty_gradient(k)


def _save_weights(ctx, inputs, output):
    ctx.save_for_backward(*output, *inputs)


def _weights_backward(ctx, dw, _):
    gradients = key_weights_backward(dw, *ctx.saved_tensors)
    return tuple(g if need else None for g, need in zip(gradients, ctx.needs_input_grad, strict=True))


key_weights_forward.register_autograd(_weights_backward, setup_context=_save_weights)
