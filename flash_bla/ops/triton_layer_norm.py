"""Layer normalisation in Triton.

A tile holds whole rows, so that each element is read once. The backward pass computes the statistics again rather than
keeping them; a program sums its share of the parameters' gradients, and PyTorch adds up the shares, in a fixed order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_bla.ops.triton_support import cdiv, jit, launch, multiprocessors, tl

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


def layer_norm_forward(
    x: Tensor, add: Tensor | None, weight: Tensor, bias: Tensor, eps: float, slope: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The normalised sum, in dtype and with the slope where it is negative, and the sum, in the type of x."""
    x, add = x.contiguous(), None if add is None else add.contiguous()
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    s = x if add is None else torch.empty_like(x)

    def describe() -> tuple:
        width = x.shape[-1]
        blocks, length = _blocks(width, TILE), x.numel() // width
        return (
            (cdiv(length, blocks["BLOCK_M"]), 1, 1),
            None,
            dict(length=length, eps=eps, SLOPE=slope, WIDTH=width, **blocks),
        )

    pointers = dict(x_ptr=x, add_ptr=add, sum_ptr=None if add is None else s, y_ptr=y, weight_ptr=weight, bias_ptr=bias)
    launch(norm_forward_kernel, pointers, (eps, slope), describe)
    return y, s


def layer_norm_backward(
    dy: Tensor,
    ds: Tensor | None,
    s: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    slope: float,
    of_parameters: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of the sum, of weight and of bias, the last two in float32 or None."""
    dy, ds = dy.contiguous(), None if ds is None else ds.contiguous()
    dx = torch.empty_like(s)
    width = s.shape[-1]
    length, blocks = s.numel() // width, _blocks(width, TILE // 2)
    programs = max(1, min(cdiv(length, blocks["BLOCK_M"]), 4 * multiprocessors(s.device)))
    partial = torch.empty((programs, 2, width), dtype=torch.float32, device=s.device) if of_parameters else None

    def describe() -> tuple:
        return (programs, 1, 1), None, dict(length=length, eps=eps, SLOPE=slope, WIDTH=width, **blocks)

    pointers = dict(dy_ptr=dy, ds_ptr=ds, x_ptr=s, weight_ptr=weight, bias_ptr=bias, dx_ptr=dx, partial_ptr=partial)
    launch(norm_backward_kernel, pointers, (eps, slope), describe)
    return dx, *(partial.sum(0).unbind(0) if of_parameters else (None, None))
