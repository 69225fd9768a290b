"""Launches that put the parts of split sequences together."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_bla.ops.triton_kernels import merge_kernel, reduce_kernel
from flash_bla.ops.triton_support import Record, cdiv, power_of_two


def reduce(record: Record, partial: Tensor) -> Tensor:
    """Adds up the first dimension, always in the same order."""
    if partial.shape[0] == 1 or partial.numel() == 0:
        return partial[0]
    total = record.new_empty(partial.shape[1:], torch.float32)
    splits = partial.shape[0]
    rows, columns, warps = (4, 512, 4) if splits <= 8 else (16, 128, 4) if splits <= 64 else (1024, 8, 16)
    arguments = dict(
        partial_ptr=partial, sum_ptr=total, length=total.numel(), splits=splits, BLOCK=columns, SPLITS=rows
    )
    record.launch(reduce_kernel, (cdiv(total.numel(), columns), 1, 1), arguments, warps)
    return total


def merge_states(record: Record, partial: Tensor, query_sums: Tensor, query_length: int) -> Tensor:
    """The state of a softmax from those of its splits."""
    if partial.shape[0] == 1:
        return partial[0]
    state = record.new_empty(partial.shape[1:], torch.float32)
    rows, D = state.shape[-2:]
    heads = state.numel() // (rows * D)
    arguments = dict(
        partial_ptr=partial, query_sum_ptr=query_sums, state_ptr=state, query_length=query_length,
        splits=partial.shape[0], query_splits=query_sums.shape[0], D=D, ROWS=rows, BLOCK_D=max(16, power_of_two(D)),
        BLOCK=512, SPLITS=8,
    )  # fmt: skip
    record.launch(merge_kernel, (heads, cdiv((rows - 2) * D, 512), 1), arguments)
    return state
