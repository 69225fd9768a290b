"""Sums of the columns of a matrix in Triton, which the gradients of biases are."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_bla.ops.triton_support import Record, cdiv, jit, multiprocessors, tl, wait_for_inputs

BLOCK_M, BLOCK_C = 32, 64


@jit(do_not_specialize=["length"])
def column_sums_kernel(x_ptr, partial_ptr, length, width, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Shares (programs, width) of the sums, in float32."""
    wait_for_inputs()
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(tl.program_id(1) * BLOCK_M, length, tl.num_programs(1) * BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        at = rows.to(tl.int64)[:, None] * width + columns[None, :]
        total += tl.load(x_ptr + at, mask=(rows < length)[:, None] & (columns < width)[None, :], other=0.0)
    tl.store(partial_ptr + tl.program_id(1) * width + columns, tl.sum(total, 0), mask=columns < width)


@jit(do_not_specialize=["rows", "heads"])
def shares_kernel(
    partial_ptr, d_weight_ptr, d_bias_ptr, rows, heads, filters,
    TAPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Adds up the programs' and the heads' shares of one tap, or of the bias, always in the same order."""
    wait_for_inputs()
    tap = tl.program_id(0)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    total = tl.zeros((BLOCK_N, BLOCK_F), tl.float32)
    for start in range(0, rows, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        at = ((n // heads * (TAPS + 1) + tap) * heads + n % heads)[:, None] * filters + f[None, :]
        total += tl.load(partial_ptr + at, mask=(n < rows)[:, None] & (f < filters)[None, :], other=0.0)
    total = tl.sum(total, 0)
    if tap < TAPS:
        if d_weight_ptr is not None:
            tl.store(d_weight_ptr + f * TAPS + tap, total.to(d_weight_ptr.dtype.element_ty), mask=f < filters)
    else:
        if d_bias_ptr is not None:
            tl.store(d_bias_ptr + f, total.to(d_bias_ptr.dtype.element_ty), mask=f < filters)


def add_shares(record: Record, partial: Tensor, filters: int, d_weight: Tensor | None, d_bias: Tensor | None) -> None:
    """Adds up programs' shares ``(programs, taps + 1, channels)`` of the gradients of weight and bias, in that order.

    Channels are heads of so many filters each, which they share.
    """
    programs, rows, channels = partial.shape
    heads = channels // filters
    arguments = dict(
        partial_ptr=partial, d_weight_ptr=d_weight, d_bias_ptr=d_bias, rows=programs * heads, heads=heads,
        filters=filters, TAPS=rows - 1, BLOCK_N=128, BLOCK_F=32,
    )  # fmt: skip
    record.launch(shares_kernel, (rows, cdiv(filters, 32), 1), arguments)


def column_sums(record: Record, x: Tensor) -> Tensor:
    """The sums ``(C,)`` of ``(M, C)`` in float32, always added in the same order."""
    length, width = x.shape
    blocks = cdiv(width, BLOCK_C)
    programs = max(1, min(cdiv(length, BLOCK_M), 8 * multiprocessors(record.device) // blocks))
    partial = record.new_empty((programs, 1, width), torch.float32)
    total = record.new_empty((width,), torch.float32)
    arguments = dict(
        x_ptr=record.contiguous(x), partial_ptr=partial, length=length, width=width, BLOCK_M=BLOCK_M, BLOCK_C=BLOCK_C
    )
    record.launch(column_sums_kernel, (blocks, programs, 1), arguments)
    add_shares(record, partial, width, None, total)
    return total
