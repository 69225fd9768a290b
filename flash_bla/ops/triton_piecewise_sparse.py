"""Piecewise sparse attention in Triton: two kernels, their launches, and the torch.library operators over them.

Between the two, PyTorch chooses the blocks (``choose_blocks``). Sums, means, logits and weights are float32, and all
exponentials share one running maximum. Operands of the attention's products are of the inputs' type; those that have to
do with the slope H, a sum over all tokens, are bfloat16 or float32 as in linear attention: float16 would overflow.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_bla.ops.triton_support import NOT_SPECIALIZED, call, cdiv, jit, multiprocessors, precision, tl
from flash_bla.ops.triton_support import tile_pointers as _tile

MAX_HEAD_DIM = 128

# --- kernels ----------------------------------------------------------------------------------------------------------
# Strides come as tuples in the order (batch, head, row, column); what the first kernel writes is contiguous.


@jit(do_not_specialize=NOT_SPECIALIZED)
def statistics_kernel(
    q_ptr, q_strides, k_ptr, k_strides, v_ptr, v_strides, q_mean_ptr, k_mean_ptr, v_mean_ptr, slope_ptr, square_ptr,
    length, heads, blocks,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One split of the blocks and one tile of v's columns: means, H_j, and the split's sum of the H_j.

    slope (splits, B, H, D, D) takes the sums, square (B, H, blocks, D) the columns' squared norms. H_j is computed as
    Σ kᵀ v - |j| k̄ᵀ v̄: products of inputs are exact where they are half precision, deviations from a mean are not.
    """
    program, tile, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    programs = tl.num_programs(0).to(tl.int64)
    batch, head = program // heads, program % heads
    d = tl.arange(0, BLOCK_D)
    c = tile * BLOCK_DV + tl.arange(0, BLOCK_DV)
    q_ptr += batch * q_strides[0] + head * q_strides[1]
    k_ptr += batch * k_strides[0] + head * k_strides[1]
    v_ptr += batch * v_strides[0] + head * v_strides[1]
    slope = tl.zeros((BLOCK_D, BLOCK_DV), tl.float32)

    share = tl.cdiv(blocks, tl.num_programs(2))
    for block in range(split * share, tl.minimum(split * share + share, blocks)):
        q_sum = tl.zeros((BLOCK_D,), tl.float32)
        k_sum = tl.zeros((BLOCK_D,), tl.float32)
        v_sum = tl.zeros((BLOCK_DV,), tl.float32)
        block_slope = tl.zeros((BLOCK_D, BLOCK_DV), tl.float32)
        for start in range(block * BLOCK, block * BLOCK + BLOCK, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            inside = (n < length)[:, None]
            mask = inside & (d < D)[None, :]
            k = tl.load(_tile(k_ptr, n, d, k_strides[2], k_strides[3]), mask=mask, other=0.0)
            v = tl.load(_tile(v_ptr, n, c, v_strides[2], v_strides[3]), mask=inside & (c < D)[None, :], other=0.0)
            block_slope = tl.dot(tl.trans(k.to(OPERAND)), v.to(OPERAND), block_slope, input_precision=PRECISION)
            k_sum += tl.sum(k.to(tl.float32), 0)
            v_sum += tl.sum(v.to(tl.float32), 0)
            if tile == 0:
                q = tl.load(_tile(q_ptr, n, d, q_strides[2], q_strides[3]), mask=mask, other=0.0)
                q_sum += tl.sum(q.to(tl.float32), 0)
        size = tl.minimum(length - block * BLOCK, BLOCK).to(tl.float32)
        block_slope -= k_sum[:, None] * (v_sum / size)[None, :]
        slope += block_slope
        out = program * blocks + block
        tl.store(square_ptr + out * D + c, tl.sum(block_slope * block_slope, 0), mask=c < D)
        tl.store(v_mean_ptr + out * D + c, v_sum / size, mask=c < D)
        if tile == 0:
            tl.store(q_mean_ptr + out * D + d, q_sum / size, mask=d < D)
            tl.store(k_mean_ptr + out * D + d, k_sum / size, mask=d < D)

    out = split * programs + program
    tl.store(_tile(slope_ptr + out * D * D, d, c, D, 1), slope, mask=(d < D)[:, None] & (c < D)[None, :])


@jit
def _count(scores_ptr, threshold, blocks, ABOVE: tl.constexpr, BLOCK_J: tl.constexpr):
    """How many of a row's scores reach the threshold, or lie above it."""
    count = 0
    for start in range(0, blocks, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        key = _sortable(tl.load(scores_ptr + j, mask=j < blocks))
        count += tl.sum(((j < blocks) & (key > threshold if ABOVE else key >= threshold)).to(tl.int32), 0)
    return count


@jit
def _sortable(x):
    """Unsigned integers in the order of floating-point numbers."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@jit(do_not_specialize=NOT_SPECIALIZED)
def choice_kernel(scores_ptr, chosen_ptr, is_kept_ptr, blocks, kept, BLOCK_J: tl.constexpr):
    """Of a row of scores the highest ones' indices, ascending, and marks; of equal scores the first."""
    row = tl.program_id(0).to(tl.int64)
    scores_ptr += row * blocks
    threshold = (row * 0).to(tl.uint32)  # a score that exactly those to be kept reach, or equal; found bit by bit
    bit = threshold + 2147483648
    count = blocks
    while (bit > 0) & (count != kept):
        reached = _count(scores_ptr, threshold | bit, blocks, False, BLOCK_J)
        if reached >= kept:
            threshold |= bit
            count = reached
        bit = bit >> 1
    ties = kept - _count(scores_ptr, threshold, blocks, True, BLOCK_J)  # to be kept of the scores that equal it
    position = row * kept
    for start in range(0, blocks, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        key = _sortable(tl.load(scores_ptr + j, mask=j < blocks))
        is_tied = ((j < blocks) & (key == threshold)).to(tl.int32)
        is_kept = (((j < blocks) & (key > threshold)) | ((is_tied > 0) & (tl.cumsum(is_tied, 0) <= ties))).to(tl.int32)
        tl.store(is_kept_ptr + row * blocks + j, is_kept.to(tl.uint8), mask=j < blocks)
        tl.store(chosen_ptr + position + tl.cumsum(is_kept, 0) - 1, j, mask=is_kept > 0)
        position += tl.sum(is_kept, 0)
        ties -= tl.sum(is_tied, 0)


@jit
def _load(pointers, mask, FULL: tl.constexpr):
    """A tile, of which everything is there if FULL."""
    return tl.load(pointers) if FULL else tl.load(pointers, mask=mask, other=0.0)


@jit
def _weigh(logits, scale, maximum):
    """Weights under the new running maximum, that maximum, and the factor for what was summed under the old one."""
    new = tl.maximum(maximum, tl.max(logits, 1) * scale)
    return tl.exp2(logits * scale - new[:, None]), new, tl.exp2(maximum - new)


@jit(do_not_specialize=NOT_SPECIALIZED)
def attention_kernel(
    q_ptr, q_strides, k_ptr, k_strides, v_ptr, v_strides, o_ptr, o_strides, k_mean_ptr, v_mean_ptr, slope_ptr,
    chosen_ptr, is_kept_ptr, length, heads, blocks, kept, scale,
    OPERAND: tl.constexpr, SLOPE_OPERAND: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    EVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Output of BLOCK_M queries of one block.

    chosen (B, H, blocks, kept) lists the blocks that a block of queries keeps in ascending order, is_kept (B, H,
    blocks, blocks) marks them; slope is H · scale / N.
    """
    PARTS: tl.constexpr = BLOCK // BLOCK_M
    TILES: tl.constexpr = BLOCK // BLOCK_N
    FULL: tl.constexpr = D == BLOCK_D
    program = tl.program_id(0).to(tl.int64)
    block_row = program // PARTS  # of chosen and is_kept
    sequence = block_row // blocks  # batch and head in one
    batch, head = sequence // heads, sequence % heads
    m = ((block_row % blocks) * BLOCK + program % PARTS * BLOCK_M).to(tl.int32) + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    columns = (d < D)[None, :]
    mask = (m < length)[:, None] & columns
    q_ptr += batch * q_strides[0] + head * q_strides[1]
    o_ptr += batch * o_strides[0] + head * o_strides[1]
    k_tile = _tile(k_ptr + batch * k_strides[0] + head * k_strides[1], n, d, k_strides[2], k_strides[3])
    v_tile = _tile(v_ptr + batch * v_strides[0] + head * v_strides[1], n, d, v_strides[2], v_strides[3])
    chosen_ptr += block_row * kept
    q = tl.load(_tile(q_ptr, m, d, q_strides[2], q_strides[3]), mask=mask, other=0.0).to(OPERAND)
    q = tl.where(scale < 0, -q, q)  # so that the largest product has the largest logit
    scale = tl.maximum(tl.abs(scale), 1e-30) * 1.4426950408889634  # exponentials are powers of two
    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    o = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

    # the tokens of the blocks that are kept; the first tile holds a token, and so the maximum is finite after it
    for step in tl.range(kept * TILES, num_stages=STAGES):
        start = tl.load(chosen_ptr + step // TILES).to(tl.int64) * BLOCK + step % TILES * BLOCK_N
        inside = start + n < length
        kv_mask = columns if EVEN else inside[:, None] & columns
        k = _load(k_tile + start * k_strides[2], kv_mask, FULL and EVEN).to(OPERAND)
        v = _load(v_tile + start * v_strides[2], kv_mask, FULL and EVEN).to(OPERAND)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if not EVEN:
            logits = tl.where(inside[None, :], logits, float("-inf"))
        weights, maximum, factor = _weigh(logits, scale, maximum)
        total = total * factor + tl.sum(weights, 1)
        o = tl.dot(weights.to(OPERAND), v, o * factor[:, None], input_precision=PRECISION)

    # every other block: its mean stands for each of its tokens
    k_tile = _tile(k_mean_ptr + sequence * blocks * D, n, d, D, 1)
    v_tile = _tile(v_mean_ptr + sequence * blocks * D, n, d, D, 1)
    expanded = tl.zeros((BLOCK_M,), tl.float32)
    for start in tl.range(0, blocks, BLOCK_N, num_stages=STAGES - 1):
        j = start + n
        inside = j < blocks
        k = tl.load(k_tile + start * D, mask=inside[:, None] & columns, other=0.0).to(OPERAND)
        v = tl.load(v_tile + start * D, mask=inside[:, None] & columns, other=0.0).to(OPERAND)
        is_kept = tl.load(is_kept_ptr + block_row * blocks + j, mask=inside, other=1)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        weights, maximum, factor = _weigh(tl.where((is_kept == 0)[None, :], logits, float("-inf")), scale, maximum)
        weights *= tl.minimum(length - j * BLOCK, BLOCK).to(tl.float32)[None, :]
        total *= factor
        expanded = expanded * factor + tl.sum(weights, 1)
        o = tl.dot(weights.to(OPERAND), v, o * factor[:, None], input_precision=PRECISION)

    # what k turns away from its block's mean, to first order
    slope_ptr += sequence * D * D
    turned = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in tl.range(0, D, BLOCK_C, num_stages=1):
        c = start + tl.arange(0, BLOCK_C)
        q_mask = (m < length)[:, None] & (c < D)[None, :]
        q_part = tl.load(_tile(q_ptr, m, c, q_strides[2], q_strides[3]), mask=q_mask, other=0.0).to(SLOPE_OPERAND)
        slope = tl.load(_tile(slope_ptr, c, d, D, 1), mask=(c < D)[:, None] & columns, other=0.0).to(SLOPE_OPERAND)
        turned = tl.dot(q_part, slope, turned, input_precision=PRECISION)
    o = (o + turned * expanded[:, None]) / (total + expanded)[:, None]
    tl.store(_tile(o_ptr, m, d, o_strides[2], o_strides[3]), o.to(o_ptr.dtype.element_ty), mask=mask)


# --- operators --------------------------------------------------------------------------------------------------------


def check_limits(q: Tensor, block_size: int) -> None:
    """Raises a ValueError for what the kernels cannot take."""
    instead = "backend='reference' takes any"
    if block_size < 16 or block_size & (block_size - 1):
        raise ValueError(f"backend 'triton' takes a block_size of 16, 32, 64, 128, ..., got {block_size}; {instead}")
    if q.shape[-1] > MAX_HEAD_DIM:
        raise ValueError(f"backend 'triton' takes heads up to {MAX_HEAD_DIM} wide, got {q.shape[-1]}; {instead}")


@torch.library.custom_op("flash_bla::piecewise_sparse_statistics", mutates_args=())
def block_statistics(q: Tensor, k: Tensor, v: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of ``BlockStatistics``."""
    B, H, N, D = q.shape
    arguments = _arguments(q, k, v, block_size)
    blocks, block_d = arguments["blocks"], arguments["BLOCK_D"]
    block_dv = min(block_d, 64)
    tiles = cdiv(D, block_dv)
    splits = min(blocks, cdiv(4 * multiprocessors(q.device), max(B * H * tiles, 1)))
    q_mean, k_mean, v_mean, square = (q.new_empty((B, H, blocks, D), dtype=torch.float32) for _ in range(4))
    slope = q.new_empty((splits, B, H, D, D), dtype=torch.float32)
    arguments |= dict(
        q_mean_ptr=q_mean, k_mean_ptr=k_mean, v_mean_ptr=v_mean, slope_ptr=slope, square_ptr=square,
        BLOCK_N=min(block_size, 64), BLOCK_DV=block_dv,
    )  # fmt: skip
    if q.numel() > 0:
        call(statistics_kernel, (B * H, tiles, splits), arguments, num_warps=4 if block_d <= 64 else 8)
    return q_mean, k_mean, v_mean, slope.sum(0), square.sum(-1).sqrt()


@block_statistics.register_fake
def _(q, k, v, block_size):
    B, H, N, D = q.shape
    blocks = cdiv(N, block_size)
    shapes = [*[(B, H, blocks, D)] * 3, (B, H, D, D), (B, H, blocks)]
    return tuple(q.new_empty(shape, dtype=torch.float32) for shape in shapes)


@torch.library.custom_op("flash_bla::piecewise_sparse_choice", mutates_args=())
def choose(scores: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Of scores ``(B, H, blocks, blocks)`` in float32 the highest of each row: their indices, ascending, and marks."""
    blocks = scores.shape[-1]
    scores = scores.contiguous()
    chosen = scores.new_empty((*scores.shape[:-1], kept), dtype=torch.int32)
    is_kept = torch.empty_like(scores, dtype=torch.uint8)
    arguments = dict(
        scores_ptr=scores, chosen_ptr=chosen, is_kept_ptr=is_kept, blocks=blocks, kept=kept, BLOCK_J=1024
    )
    if scores.numel() > 0:
        call(choice_kernel, (scores.numel() // blocks, 1, 1), arguments)
    return chosen, is_kept


@choose.register_fake
def _(scores, kept):
    chosen = scores.new_empty((*scores.shape[:-1], kept), dtype=torch.int32)
    return chosen, scores.new_empty(scores.shape, dtype=torch.uint8)


@torch.library.custom_op("flash_bla::piecewise_sparse_attention", mutates_args=())
def attend(
    q: Tensor, k: Tensor, v: Tensor, k_mean: Tensor, v_mean: Tensor, slope: Tensor, chosen: Tensor, is_kept: Tensor,
    block_size: int, scale: float,
) -> Tensor:  # fmt: skip
    """The attention with the blocks given by their statistics, and those to keep by their indices and by marks."""
    B, H, N, D = q.shape
    blocks, kept = chosen.shape[2:]
    o = _empty_output(q)
    if q.numel() == 0:
        return o
    rows = min(block_size, 64)
    arguments = _arguments(q, k, v, block_size) | dict(
        o_ptr=o, o_strides=o.stride(), k_mean_ptr=k_mean.to(q.dtype), v_mean_ptr=v_mean.to(q.dtype),
        slope_ptr=(slope * (scale / N)).to(torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32), chosen_ptr=chosen, is_kept_ptr=is_kept, kept=kept, scale=scale,
        SLOPE_OPERAND=precision(q.dtype)["OPERAND"], BLOCK_M=rows,
        BLOCK_N=rows if q.element_size() == 2 else min(rows, 32), BLOCK_C=32, EVEN=N % block_size == 0, STAGES=3 if q.element_size() == 2 else 2,
    )  # fmt: skip
    call(attention_kernel, (B * H * blocks * (block_size // rows), 1, 1), arguments)
    return o


@attend.register_fake
def _(q, k, v, k_mean, v_mean, slope, chosen, is_kept, block_size, scale):
    return _empty_output(q)


def _empty_output(q: Tensor) -> Tensor:
    B, H, N, D = q.shape
    # laid out as (B, N, H, D), which the projection after an attention reads without a copy
    return q.new_empty((B, N, H, D)).transpose(1, 2)


def _arguments(q: Tensor, k: Tensor, v: Tensor, block_size: int) -> dict:
    """What both kernels take."""
    _, H, N, D = q.shape
    shared = precision(q.dtype)
    if q.dtype == torch.float16:  # safe where inputs are multiplied with each other, or with weights
        shared["OPERAND"] = tl.float16
    return dict(
        q_ptr=q, q_strides=q.stride(), k_ptr=k, k_strides=k.stride(), v_ptr=v, v_strides=v.stride(), length=N, heads=H,
        blocks=cdiv(N, block_size), D=D, BLOCK=block_size, BLOCK_D=max(16, 1 << (D - 1).bit_length()), **shared,
    )  # fmt: skip


def _no_backward(ctx, do):
    raise RuntimeError(
        "piecewise_sparse_attention has no backward pass on Triton: call it under torch.no_grad(), or with "
        "backend='reference' for gradients (its memory grows with the square of the length)"
    )


attend.register_autograd(_no_backward)
