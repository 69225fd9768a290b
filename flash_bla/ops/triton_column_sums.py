"""Sums of the columns of a matrix in Triton, which the gradients of biases are."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_bla.ops.triton_support import cdiv, jit, launch, multiprocessors, tl

BLOCK_M, BLOCK_C = 32, 64


@jit(do_not_specialize=["length"])
def column_sums_kernel(x_ptr, partial_ptr, length, width, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Shares (programs, width) of the sums, in float32."""
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(tl.program_id(1) * BLOCK_M, length, tl.num_programs(1) * BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        at = rows.to(tl.int64)[:, None] * width + columns[None, :]
        total += tl.load(x_ptr + at, mask=(rows < length)[:, None] & (columns < width)[None, :], other=0.0)
    tl.store(partial_ptr + tl.program_id(1) * width + columns, tl.sum(total, 0), mask=columns < width)


def column_sums(x: Tensor) -> Tensor:
    """The sums ``(C,)`` of a contiguous ``(M, C)`` in float32, always added in the same order."""
    length, width = x.shape
    blocks = cdiv(width, BLOCK_C)
    programs = max(1, min(cdiv(length, BLOCK_M), 8 * multiprocessors(x.device) // blocks))
    partial = torch.empty((programs, width), dtype=torch.float32, device=x.device)

    def describe() -> tuple:
        arguments = dict(length=length, width=width, BLOCK_M=BLOCK_M, BLOCK_C=BLOCK_C)
        return (blocks, programs, 1), None, arguments

    launch(column_sums_kernel, dict(x_ptr=x, partial_ptr=partial), (), describe)
    return partial.sum(0)
