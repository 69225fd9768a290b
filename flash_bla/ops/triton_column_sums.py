"""Sums over all rows or programs in Triton, which the gradients of parameters are.

A record's sums are launched at its end, several at a time: their kernels take less time than their launches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flash_bla.ops.triton_support import Record, cdiv, jit, multiprocessors, tl, wait_for_inputs

BLOCKS = dict(BLOCK_M=32, BLOCK_C=64, BLOCK_N=128, BLOCK_F=32)


@jit
def _column_sums(
    x_ptr, partial_ptr, length, width, stride, program, programs, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    blocks = tl.cdiv(width, BLOCK_C)
    columns = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(program // blocks * BLOCK_M, length, programs * BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        at = rows.to(tl.int64)[:, None] * stride + columns[None, :]
        total += tl.load(x_ptr + at, mask=(rows < length)[:, None] & (columns < width)[None, :], other=0.0)
    tl.store(partial_ptr + program // blocks * width + columns, tl.sum(total, 0), mask=columns < width)


@jit(do_not_specialize=["length", "length2", "programs", "programs2"])
def column_sums_kernel(
    x_ptr, partial_ptr, length, width, stride, programs, x_ptr2, partial_ptr2, length2, width2, stride2, programs2,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Shares (programs, width) of the sums, in float32, of one matrix or two."""
    wait_for_inputs()
    program = tl.program_id(0)
    first = programs * tl.cdiv(width, BLOCK_C)
    if program < first:
        _column_sums(x_ptr, partial_ptr, length, width, stride, program, programs, BLOCK_M, BLOCK_C)
    elif x_ptr2 is not None:
        _column_sums(x_ptr2, partial_ptr2, length2, width2, stride2, program - first, programs2, BLOCK_M, BLOCK_C)


@jit
def _add_shares(
    partial_ptr, d_weight_ptr, d_bias_ptr, rows, heads, filters, taps, program, BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
):  # fmt: skip
    tap = program % (taps + 1)
    f = program // (taps + 1) * BLOCK_F + tl.arange(0, BLOCK_F)
    total = tl.zeros((BLOCK_N, BLOCK_F), tl.float32)
    for start in range(0, rows, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        at = ((n // heads * (taps + 1) + tap) * heads + n % heads)[:, None] * filters + f[None, :]
        total += tl.load(partial_ptr + at, mask=(n < rows)[:, None] & (f < filters)[None, :], other=0.0)
    total = tl.sum(total, 0)
    if tap < taps:
        if d_weight_ptr is not None:
            tl.store(d_weight_ptr + f * taps + tap, total.to(d_weight_ptr.dtype.element_ty), mask=f < filters)
    else:
        if d_bias_ptr is not None:
            tl.store(d_bias_ptr + f, total.to(d_bias_ptr.dtype.element_ty), mask=f < filters)


@jit(do_not_specialize=["rows", "heads", "taps", "rows2", "heads2", "taps2", "rows3", "heads3", "taps3"])
def shares_kernel(
    partial_ptr, d_weight_ptr, d_bias_ptr, rows, heads, filters, taps,
    partial_ptr2, d_weight_ptr2, d_bias_ptr2, rows2, heads2, filters2, taps2,
    partial_ptr3, d_weight_ptr3, d_bias_ptr3, rows3, heads3, filters3, taps3, BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Adds up the programs' and the heads' shares of a tap, or of a bias, always in the same order; of up to three."""
    wait_for_inputs()
    program = tl.program_id(0)
    first = (taps + 1) * tl.cdiv(filters, BLOCK_F)
    if program < first:
        _add_shares(partial_ptr, d_weight_ptr, d_bias_ptr, rows, heads, filters, taps, program, BLOCK_N, BLOCK_F)
    elif partial_ptr2 is not None:
        program -= first
        second = (taps2 + 1) * tl.cdiv(filters2, BLOCK_F)
        if program < second:
            _add_shares(
                partial_ptr2, d_weight_ptr2, d_bias_ptr2, rows2, heads2, filters2, taps2, program, BLOCK_N, BLOCK_F
            )
        elif partial_ptr3 is not None:
            _add_shares(
                partial_ptr3, d_weight_ptr3, d_bias_ptr3, rows3, heads3, filters3, taps3, program - second, BLOCK_N,
                BLOCK_F,
            )  # fmt: skip


def add_shares(record: Record, partial: Tensor, filters: int, d_weight: Tensor | None, d_bias: Tensor | None) -> None:
    """Adds up programs' shares ``(programs, taps + 1, channels)`` of the gradients of weight and bias, in that order.

    Channels are heads of so many filters each, which they share.
    """
    programs, rows, channels = partial.shape
    heads = channels // filters
    arguments = dict(
        partial_ptr=partial, d_weight_ptr=d_weight, d_bias_ptr=d_bias, rows=programs * heads, heads=heads,
        filters=filters, taps=rows - 1,
    )  # fmt: skip
    record.at_end(_launch, (shares_kernel, rows * cdiv(filters, BLOCKS["BLOCK_F"]), arguments))


def column_sums(record: Record, x: Tensor) -> Tensor:
    """The sums ``(C,)`` of ``(M, C)`` in float32, always added in the same order."""
    length, width = x.shape
    blocks = cdiv(width, BLOCKS["BLOCK_C"])
    programs = max(1, min(cdiv(length, BLOCKS["BLOCK_M"]), 8 * multiprocessors(record.device) // blocks))
    partial = record.new_empty((programs, 1, width), torch.float32)
    total = record.new_empty((width,), torch.float32)
    x = x if x.stride(1) == 1 else record.contiguous(x)
    arguments = dict(
        x_ptr=x, partial_ptr=partial, length=length, width=width, stride=x.stride(0), programs=programs
    )  # fmt: skip
    record.at_end(_launch, (column_sums_kernel, blocks * programs, arguments))
    add_shares(record, partial, width, None, total)
    return total


def _launch(record: Record, sums: list[tuple[Any, int, dict]]) -> None:
    """Launches kernels on so many programs, with arguments; two or three at a time."""
    for kernel, most in ((column_sums_kernel, 2), (shares_kernel, 3)):  # which adds up the former's shares
        launches = [(programs, arguments) for other, programs, arguments in sums if other is kernel]
        for i in range(0, len(launches), most):
            together = dict.fromkeys(kernel.arg_names) | BLOCKS
            for j, (_, arguments) in enumerate(launches[i : i + most]):
                together |= {f"{name}{j + 1 if j else ''}": value for name, value in arguments.items()}
            record.launch(kernel, (sum(programs for programs, _ in launches[i : i + most]), 1, 1), together)
