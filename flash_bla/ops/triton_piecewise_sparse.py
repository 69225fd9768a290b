"""Piecewise sparse attention in Triton: two kernels, their launches, and the torch.library operators over them.

Between the two, PyTorch chooses the blocks (``choose_blocks``). Sums, means, logits and weights are float32, and all
exponentials share one running maximum. Operands of products are of the inputs' type; the slope H, a sum over all
tokens, is divided by its largest entry, so that float16 holds it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flash_bla.ops.triton_support import (
    NOT_SPECIALIZED,
    Record,
    as_outputs,
    cdiv,
    jit,
    multiprocessors,
    precision,
    run,
    tl,
    wait_for_inputs,
)
from flash_bla.ops.triton_support import tile_pointers as _tile

MAX_HEAD_DIM = 128
PADDING = 64  # what is stored for all blocks is padded to a multiple, so that tiles of them need no masks

# --- kernels ----------------------------------------------------------------------------------------------------------
# Strides come as tuples in the order (batch, head, row, column); what the first kernel writes is contiguous.


@jit(do_not_specialize=NOT_SPECIALIZED)
def statistics_kernel(
    q_ptr, q_strides, k_ptr, k_strides, v_ptr, v_strides, q_mean_ptr, k_mean_ptr, v_mean_ptr, slope_ptr, norm_ptr,
    length, heads, blocks,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, NORMS: tl.constexpr,
):  # fmt: skip
    """One split of the blocks: means, the norms of the H_j if NORMS, and the split's sum of the H_j.

    slope (splits, B, H, D, D) takes the sums. H_j is computed as Σ kᵀ v - |j| k̄ᵀ v̄: products of inputs are exact where
    they are half precision, deviations from a mean are not.
    """
    wait_for_inputs()
    PARTS: tl.constexpr = BLOCK // BLOCK_N
    program, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)  # offsets are of 64 bits
    programs = tl.num_programs(0).to(tl.int64)
    batch, head = program // heads, program % heads
    d = tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    q_tile = _tile(q_ptr + batch * q_strides[0] + head * q_strides[1], n, d, q_strides[2], q_strides[3])
    k_tile = _tile(k_ptr + batch * k_strides[0] + head * k_strides[1], n, d, k_strides[2], k_strides[3])
    v_tile = _tile(v_ptr + batch * v_strides[0] + head * v_strides[1], n, d, v_strides[2], v_strides[3])
    slope = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)

    share = tl.cdiv(blocks, tl.num_programs(1))
    for block in range(split * share, tl.minimum(split * share + share, blocks)):
        q_sum = tl.zeros((BLOCK_D,), tl.float32)
        k_sum = tl.zeros((BLOCK_D,), tl.float32)
        v_sum = tl.zeros((BLOCK_D,), tl.float32)
        block_slope = tl.zeros((BLOCK_D, BLOCK_D), tl.float32) if NORMS else slope
        for part in tl.static_range(PARTS):
            start = block * BLOCK + part * BLOCK_N
            mask = (start + n < length)[:, None] & (d < D)[None, :]
            q = tl.load(q_tile + start * q_strides[2], mask=mask, other=0.0)
            k = tl.load(k_tile + start * k_strides[2], mask=mask, other=0.0)
            v = tl.load(v_tile + start * v_strides[2], mask=mask, other=0.0)
            block_slope = tl.dot(tl.trans(k.to(OPERAND)), v.to(OPERAND), block_slope, input_precision=PRECISION)
            q_sum += tl.sum(q.to(tl.float32), 0)
            k_sum += tl.sum(k.to(tl.float32), 0)
            v_sum += tl.sum(v.to(tl.float32), 0)
        size = tl.minimum(length - block * BLOCK, BLOCK).to(tl.float32)
        block_slope -= k_sum[:, None] * (v_sum / size)[None, :]
        out = program * blocks + block
        if NORMS:
            tl.store(norm_ptr + out, tl.sqrt(tl.sum(block_slope * block_slope)))
            slope += block_slope
        else:
            slope = block_slope
        tl.store(q_mean_ptr + out * D + d, q_sum / size, mask=d < D)
        tl.store(k_mean_ptr + out * D + d, k_sum / size, mask=d < D)
        tl.store(v_mean_ptr + out * D + d, v_sum / size, mask=d < D)

    out = split * programs + program
    tl.store(_tile(slope_ptr + out * D * D, d, d, D, 1), slope, mask=(d < D)[:, None] & (d < D)[None, :])


@jit
def _count(scores_ptr, threshold, blocks, ABOVE: tl.constexpr, BLOCK_J: tl.constexpr):
    """How many of a row's scores reach the threshold, or lie above it."""
    j = tl.arange(0, BLOCK_J)
    counts = tl.zeros((BLOCK_J,), tl.int32)
    for start in range(0, blocks, BLOCK_J):
        inside = j < blocks - start
        key = _sortable(tl.load(scores_ptr + start + j, mask=inside))
        counts += (inside & (key > threshold if ABOVE else key >= threshold)).to(tl.int32)
    return tl.sum(counts, 0)


@jit
def _sortable(x):
    """Unsigned integers in the order of floating-point numbers."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@jit(do_not_specialize=NOT_SPECIALIZED)
def choice_kernel(
    scores_ptr, chosen_ptr, log_size_ptr, length, blocks, padded, kept, BLOCK: tl.constexpr, LOG_BLOCK: tl.constexpr,
    BLOCK_J: tl.constexpr,
):  # fmt: skip
    """The indices of the highest of a row of scores, ascending; of equal ones the first."""
    wait_for_inputs()
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
    last_log_size = tl.log2((length - (blocks - 1) * BLOCK).to(tl.float32))
    position = row * kept
    for start in range(0, padded, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        inside = j < blocks
        key = _sortable(tl.load(scores_ptr + j, mask=inside))
        is_tied = (inside & (key == threshold)).to(tl.int32)
        is_kept = ((inside & (key > threshold)) | ((is_tied > 0) & (tl.cumsum(is_tied, 0) <= ties))).to(tl.int32)
        log_size = tl.where(j == blocks - 1, last_log_size, LOG_BLOCK)
        log_size = tl.where(inside & (is_kept == 0), log_size, float("-inf"))
        tl.store(log_size_ptr + row * padded + j, log_size, mask=j < padded)
        tl.store(chosen_ptr + position + tl.cumsum(is_kept, 0) - 1, j, mask=is_kept > 0)
        position += tl.sum(is_kept, 0)
        ties -= tl.sum(is_tied, 0)


@jit
def _attend(o, total, maximum, logits, scale, v, PRECISION: tl.constexpr):
    """Adds values with the weights 2^(logits · scale) to what was summed under the running maximum."""
    new = tl.maximum(maximum, tl.max(logits, 1) * scale)
    weights = tl.exp2(logits * scale - new[:, None])
    factor = tl.exp2(maximum - new)
    o = tl.dot(weights.to(v.dtype), v, o * factor[:, None], input_precision=PRECISION)
    return o, total * factor + tl.sum(weights, 1), new, factor


@jit(do_not_specialize=NOT_SPECIALIZED)
def attention_kernel(
    q_ptr, q_strides, k_ptr, k_strides, v_ptr, v_strides, o_ptr, o_strides, k_mean_ptr, v_mean_ptr, slope_ptr,
    slope_scale_ptr, chosen_ptr, log_size_ptr, length, heads, blocks, kept, scale,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, PADDING: tl.constexpr,
):  # fmt: skip
    """Output of BLOCK_M queries of one block.

    chosen (B, H, blocks, kept) lists the blocks that a block of queries keeps, ascending; log_size (B, H, blocks,
    padded) is -∞ for them and log2 of the number of tokens for the others. k_mean and v_mean are (B, H, padded, D), and
    slope · slope_scale is H · scale / N.
    """
    wait_for_inputs()
    PARTS: tl.constexpr = BLOCK // BLOCK_M
    TILES: tl.constexpr = BLOCK // BLOCK_N
    program = tl.program_id(0).to(tl.int64)
    block_row = program // PARTS  # of chosen and log_size
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

    # the tokens of the blocks that are kept; only the last of these blocks may end before it is full
    chosen = tl.load(chosen_ptr).to(tl.int64)  # always one step ahead of the tiles, which need not wait for it
    for step in range((kept - 1) * TILES):
        start = chosen * BLOCK + step % TILES * BLOCK_N
        k = tl.load(k_tile + start * k_strides[2], mask=columns, other=0.0).to(OPERAND)
        v = tl.load(v_tile + start * v_strides[2], mask=columns, other=0.0).to(OPERAND)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        o, total, maximum, _ = _attend(o, total, maximum, logits, scale, v, PRECISION)
        chosen = tl.load(chosen_ptr + (step + 1) // TILES).to(tl.int64)
    first = chosen * BLOCK
    for start in tl.range(first, tl.minimum(first + BLOCK, length), BLOCK_N, num_stages=1):
        inside = (start + n < length)[:, None]
        k = tl.load(k_tile + start * k_strides[2], mask=inside & columns, other=0.0).to(OPERAND)
        v = tl.load(v_tile + start * v_strides[2], mask=inside & columns, other=0.0).to(OPERAND)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        logits = tl.where((start + n < length)[None, :], logits, float("-inf"))
        o, total, maximum, _ = _attend(o, total, maximum, logits, scale, v, PRECISION)

    # every other block: its mean stands for each of its tokens
    padded = tl.cdiv(blocks, PADDING) * PADDING
    k_tile = _tile(k_mean_ptr + sequence * padded * D, n, d, D, 1)
    v_tile = _tile(v_mean_ptr + sequence * padded * D, n, d, D, 1)
    log_size_ptr += block_row * padded
    expanded = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, padded, BLOCK_N):
        k = tl.load(k_tile + start * D, mask=columns, other=0.0).to(OPERAND)
        v = tl.load(v_tile + start * D, mask=columns, other=0.0).to(OPERAND)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + tl.load(log_size_ptr + start + n)[None, :]
        o, expanded, maximum, factor = _attend(o, expanded, maximum, logits, 1.0, v, PRECISION)
        total *= factor

    # what k turns away from its block's mean, to first order
    slope_ptr += sequence * D * D
    turned = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in tl.range(0, D, BLOCK_C, num_stages=1):
        c = start + tl.arange(0, BLOCK_C)
        q_mask = (m < length)[:, None] & (c < D)[None, :]
        q_part = tl.load(_tile(q_ptr, m, c, q_strides[2], q_strides[3]), mask=q_mask, other=0.0).to(OPERAND)
        slope = tl.load(_tile(slope_ptr, c, d, D, 1), mask=(c < D)[:, None] & columns, other=0.0).to(OPERAND)
        turned = tl.dot(q_part, slope, turned, input_precision=PRECISION)
    o += turned * (expanded * tl.load(slope_scale_ptr + sequence))[:, None]
    o /= (total + expanded)[:, None]
    tl.store(_tile(o_ptr, m, d, o_strides[2], o_strides[3]), o.to(o_ptr.dtype.element_ty), mask=mask)


# --- operators --------------------------------------------------------------------------------------------------------


def check_limits(q: Tensor, block_size: int) -> None:
    """Raises a ValueError for what the kernels cannot take."""
    instead = "backend='reference' takes any"
    if block_size < 16 or block_size & (block_size - 1):
        raise ValueError(f"backend 'triton' takes a block_size of 16, 32, 64, 128, ..., got {block_size}; {instead}")
    if q.shape[-1] > MAX_HEAD_DIM:
        raise ValueError(f"backend 'triton' takes heads up to {MAX_HEAD_DIM} wide, got {q.shape[-1]}; {instead}")


def record_statistics(
    record: Record, q: Tensor, k: Tensor, v: Tensor, block_size: int, norms: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Means, the splits' sums of the H_j, and their norms if asked for."""
    B, H, N, D = q.shape
    arguments = _arguments(q, k, v, block_size)
    blocks, block_d = arguments["blocks"], arguments["BLOCK_D"]
    splits = min(blocks, cdiv(2 * multiprocessors(record.device), max(B * H, 1)))
    q_mean, k_mean, v_mean = (record.new_empty((B, H, blocks, D), torch.float32) for _ in range(3))
    slope = record.new_empty((splits, B, H, D, D), torch.float32)
    norm = record.new_empty((B, H, blocks), torch.float32) if norms else None
    arguments |= dict(
        q_mean_ptr=q_mean, k_mean_ptr=k_mean, v_mean_ptr=v_mean, slope_ptr=slope, norm_ptr=norm,
        BLOCK_N=min(block_size, 64), NORMS=norms,
    )  # fmt: skip
    if q.numel() > 0:
        narrow = block_d <= 64 or (q.element_size() == 2 and not norms)  # the sums fit into the registers of 4 warps
        grid = (B * H, splits, 1)
        record.launch(statistics_kernel, grid, arguments, num_warps=4 if narrow else 8, num_stages=2)
    return q_mean, k_mean, v_mean, slope, norm


@torch.library.custom_op("flash_bla::piecewise_sparse_statistics", mutates_args=())
def block_statistics(
    q: Tensor, k: Tensor, v: Tensor, block_size: int, norms: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of ``BlockStatistics``; the last of them is empty unless norms are asked for."""
    *means, slope, norm = run(record_statistics, (q, k, v), (block_size, norms))
    return as_outputs((*means, slope.sum(0), norm), slope)


@block_statistics.register_fake
def _(q, k, v, block_size, norms):
    B, H, N, D = q.shape
    blocks = cdiv(N, block_size)
    shapes = [*[(B, H, blocks, D)] * 3, (B, H, D, D), (B, H, blocks) if norms else 0]
    return tuple(q.new_empty(shape, dtype=torch.float32) for shape in shapes)


def record_choice(record: Record, scores: Tensor, kept: int, length: int, block_size: int) -> tuple[Tensor, Tensor]:
    """As ``choose``."""
    chosen, log_size = _empty_choice(record, scores, kept)
    arguments = dict(
        scores_ptr=record.contiguous(scores), chosen_ptr=chosen, log_size_ptr=log_size, length=length,
        blocks=scores.shape[-1], padded=log_size.shape[-1], kept=kept, BLOCK=block_size,
        LOG_BLOCK=math.log2(block_size), BLOCK_J=256,
    )  # fmt: skip
    if scores.numel() > 0:
        record.launch(choice_kernel, (scores.numel() // scores.shape[-1], 1, 1), arguments, num_warps=1)
    return chosen, log_size


@torch.library.custom_op("flash_bla::piecewise_sparse_choice", mutates_args=())
def choose(scores: Tensor, kept: int, length: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Of scores ``(B, H, blocks, blocks)`` in float32 the highest of each row.

    Returns their indices, ascending, and the logarithms of the other blocks' numbers of tokens, -∞ for those kept and
    for the padding.
    """
    return run(record_choice, (scores,), (kept, length, block_size))


@choose.register_fake
def _(scores, kept, length, block_size):
    return _empty_choice(scores, scores, kept)


def _empty_choice(memory: Record | Tensor, scores: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    *rows, blocks = scores.shape
    padded = cdiv(blocks, PADDING) * PADDING
    return (
        memory.new_empty((*rows, kept), dtype=torch.int32),
        memory.new_empty((*rows, padded), dtype=scores.dtype),
    )


def record_attention(
    record: Record, q: Tensor, k: Tensor, v: Tensor, k_mean: Tensor, v_mean: Tensor, slope: Tensor, slope_scale: Tensor,
    chosen: Tensor, log_size: Tensor, block_size: int, scale: float,
) -> Tensor:  # fmt: skip
    """As ``attend``, with padded means and the slope in the type of q; the slope is to be multiplied by its scale."""
    B, H, _, _ = q.shape
    blocks, kept = chosen.shape[2:]
    o = _empty_output(record, q)
    half, rows = q.element_size() == 2, min(block_size, 64)
    arguments = _arguments(q, k, v, block_size) | dict(
        o_ptr=o, o_strides=o.stride(), k_mean_ptr=k_mean, v_mean_ptr=v_mean, slope_ptr=slope,
        slope_scale_ptr=slope_scale, chosen_ptr=chosen, log_size_ptr=log_size, kept=kept, scale=scale, BLOCK_M=rows,
        BLOCK_N=rows if half else min(rows, 32), BLOCK_C=32, PADDING=PADDING,
    )  # fmt: skip
    grid = (B * H * blocks * (block_size // rows), 1, 1)
    record.launch(attention_kernel, grid, arguments, num_stages=3 if half else 1)
    return o


@torch.library.custom_op("flash_bla::piecewise_sparse_attention", mutates_args=())
def attend(
    q: Tensor, k: Tensor, v: Tensor, k_mean: Tensor, v_mean: Tensor, slope: Tensor, chosen: Tensor, log_size: Tensor,
    block_size: int, scale: float,
) -> Tensor:  # fmt: skip
    """The attention with the blocks given by their statistics, and those to keep as ``choose`` returns them."""
    if q.numel() == 0:
        return _empty_output(q, q)
    largest = torch.linalg.vector_norm(slope, float("inf"), dim=(-2, -1), keepdim=True).clamp_min(1e-30)
    padding = (0, 0, 0, log_size.shape[-1] - chosen.shape[2])
    means = (torch.nn.functional.pad(x, padding).to(q.dtype) for x in (k_mean, v_mean))
    slopes = (slope / largest).to(q.dtype), largest * (scale / q.shape[2])
    return run(record_attention, (q, k, v, *means, *slopes, chosen, log_size), (block_size, scale))


@attend.register_fake
def _(q, k, v, k_mean, v_mean, slope, chosen, log_size, block_size, scale):
    return _empty_output(q, q)


def _empty_output(memory: Record | Tensor, q: Tensor) -> Tensor:
    B, H, N, D = q.shape
    # laid out as (B, N, H, D), which the projection after an attention reads without a copy
    return memory.new_empty((B, N, H, D), dtype=q.dtype).transpose(1, 2)


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
