"""Layer normalisation in Triton.

A tile holds whole rows, so that each element is read once. The backward pass computes the statistics again rather than
keeping them; a program sums its share of the parameters' gradients, and the shares are added in a fixed order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_bla.ops.triton_column_sums import add_shares
from flash_bla.ops.triton_support import Record, cdiv, jit, multiprocessors, tl, wait_for_inputs

TILE = 2048  # elements


@jit
def _load(base, rows, columns, inside, WIDTH: tl.constexpr):
    return tl.load(base + rows.to(tl.int64)[:, None] * WIDTH + columns[None, :], mask=inside, other=0.0)


@jit
def _normalize(x, inside, eps, WIDTH: tl.constexpr):
    """The rows with mean 0 and variance 1, and their factors."""
    centered = tl.where(inside, x - (tl.sum(x, 1) * (1.0 / WIDTH))[:, None], 0.0)
    factor = tl.rsqrt(tl.sum(centered * centered, 1) * (1.0 / WIDTH) + eps)
    return centered * factor[:, None], factor[:, None]


@jit(do_not_specialize=["length"])
def norm_forward_kernel(
    x_ptr, add_ptr, sum_ptr, y_ptr, weight_ptr, bias_ptr, length, eps,
    SLOPE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    wait_for_inputs()
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_C)
    inside = (rows < length)[:, None] & (columns < WIDTH)[None, :]
    at = rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    x = _load(x_ptr, rows, columns, inside, WIDTH).to(tl.float32)
    if add_ptr is not None:
        x += _load(add_ptr, rows, columns, inside, WIDTH).to(tl.float32)
        x = x.to(sum_ptr.dtype.element_ty)  # the norm is that of the sum as it is kept
        tl.store(sum_ptr + at, x, mask=inside)
        x = x.to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    y = _normalize(x, inside, eps, WIDTH)[0] * weight[None, :] + bias[None, :]
    if SLOPE != 1:
        y = tl.where(y > 0, y, y * SLOPE)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@jit(do_not_specialize=["length"])
def norm_backward_kernel(
    dy_ptr, ds_ptr, x_ptr, weight_ptr, bias_ptr, dx_ptr, partial_ptr, length, eps,
    SLOPE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradient of x, ds included, and shares (programs, 2, C) of those of weight and bias."""
    wait_for_inputs()
    columns = tl.arange(0, BLOCK_C)
    weight = tl.load(weight_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)[None, :]
    d_weight = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    d_bias = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(tl.program_id(0) * BLOCK_M, length, tl.num_programs(0) * BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        inside = (rows < length)[:, None] & (columns < WIDTH)[None, :]
        x = _load(x_ptr, rows, columns, inside, WIDTH).to(tl.float32)
        dy = _load(dy_ptr, rows, columns, inside, WIDTH).to(tl.float32)
        x, factor = _normalize(x, inside, eps, WIDTH)
        if SLOPE != 1:
            bias = tl.load(bias_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)[None, :]
            dy = tl.where(x * weight + bias > 0, dy, dy * SLOPE)
        d_weight += dy * x
        d_bias += dy
        dy *= weight
        dx = factor * (dy - x * (tl.sum(dy * x, 1) * (1.0 / WIDTH))[:, None] - (tl.sum(dy, 1) * (1.0 / WIDTH))[:, None])
        if ds_ptr is not None:
            dx += _load(ds_ptr, rows, columns, inside, WIDTH).to(tl.float32)
        at = rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if partial_ptr is not None:
        at = partial_ptr + tl.program_id(0) * 2 * WIDTH + columns
        tl.store(at, tl.sum(d_weight, 0), mask=columns < WIDTH)
        tl.store(at + WIDTH, tl.sum(d_bias, 0), mask=columns < WIDTH)


def _blocks(width: int, tile: int) -> dict[str, int]:
    block_c = 1 << (width - 1).bit_length()
    return dict(BLOCK_M=max(1, tile // block_c), BLOCK_C=block_c)


def record_forward(
    record: Record, x: Tensor, add: Tensor | None, weight: Tensor, bias: Tensor, eps: float, slope: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The normalised sum, in dtype and with the slope where it is negative, and the sum, in the type of x."""
    width = x.shape[-1]
    length, blocks = x.numel() // width, _blocks(width, TILE)
    y = record.new_empty(x.shape, dtype)
    s = None if add is None else record.new_empty(x.shape, x.dtype)
    arguments = dict(
        x_ptr=record.contiguous(x), add_ptr=record.contiguous(add), sum_ptr=s, y_ptr=y,
        weight_ptr=record.contiguous(weight), bias_ptr=record.contiguous(bias), length=length, eps=float(eps),
        SLOPE=slope, WIDTH=width, **blocks,
    )  # fmt: skip
    record.launch(norm_forward_kernel, (cdiv(length, blocks["BLOCK_M"]), 1, 1), arguments)
    return y, s


def record_backward(
    record: Record, dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float,
    of_parameters: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of the sum, and of weight and bias or None."""
    width = s.shape[-1]
    length, blocks = s.numel() // width, _blocks(width, TILE // 2)
    programs = max(1, min(cdiv(length, blocks["BLOCK_M"]), 4 * multiprocessors(record.device)))
    dx = record.new_empty(s.shape, s.dtype)
    partial = record.new_empty((programs, 2, width), torch.float32) if of_parameters else None
    arguments = dict(
        dy_ptr=record.contiguous(dy), ds_ptr=record.contiguous(ds), x_ptr=record.contiguous(s),
        weight_ptr=record.contiguous(weight), bias_ptr=record.contiguous(bias), dx_ptr=dx, partial_ptr=partial,
        length=length, eps=float(eps), SLOPE=slope, WIDTH=width, **blocks,
    )  # fmt: skip
    record.launch(norm_backward_kernel, (programs, 1, 1), arguments)
    if not of_parameters:
        return dx, None, None
    d_weight, d_bias = (record.new_empty((width,), x.dtype) for x in (weight, bias))
    add_shares(record, partial, width, d_weight, d_bias)
    return dx, d_weight, d_bias
