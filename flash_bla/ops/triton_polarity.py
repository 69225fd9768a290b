"""What PolaFormer's attention makes of its parameters, in Triton: one launch a direction in the place of some ten."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_bla.ops.triton_support import NOT_SPECIALIZED, Record, cdiv, jit, tl, wait_for_inputs


@jit
def _factor(scale):
    """softplus(scale)⁻², and its derivative."""
    e = tl.exp(-tl.abs(scale))
    log1p = tl.where(e < 1e-2, e * (1.0 - e * (0.5 - e * (1.0 / 3.0))), tl.log(1.0 + e))
    softplus = tl.maximum(scale, 0.0) + log1p
    factor = 1.0 / (softplus * softplus)
    return factor, -2.0 * factor / (softplus * (1.0 + tl.exp(-scale)))


@jit(do_not_specialize=NOT_SPECIALIZED)
def polarity_kernel(
    scale_ptr, power_ptr, encoding_ptr, factor_ptr, exponent_ptr, scaled_ptr, length, channels, alpha,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Blocks of rows (axis 0) and channels (axis 1) of the encoding, and with the first rows all else."""
    wait_for_inputs()
    n, c = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    factor, _ = _factor(tl.load(scale_ptr + c, mask=inside, other=0.0).to(tl.float32))
    if tl.program_id(0) == 0:
        for part in tl.static_range(4):
            tl.store(factor_ptr + part * channels + c, factor if part == 1 else factor * 0.0 + 1.0, mask=inside)
        power = tl.load(power_ptr + c, mask=inside, other=0.0).to(tl.float32)
        tl.store(exponent_ptr + c, 1.0 + alpha / (1.0 + tl.exp(-power)), mask=inside)
    at = n.to(tl.int64)[:, None] * channels + c[None, :]
    mask = (n < length)[:, None] & inside[None, :]
    scaled = tl.load(encoding_ptr + at, mask=mask, other=0.0).to(tl.float32) * factor[None, :]
    tl.store(scaled_ptr + at, scaled.to(scaled_ptr.dtype.element_ty), mask=mask)


@jit(do_not_specialize=NOT_SPECIALIZED)
def polarity_gradient_kernel(
    d_factor_ptr, d_exponent_ptr, d_scaled_ptr, d_scaled_strides, scale_ptr, power_ptr, encoding_ptr, d_scale_ptr,
    d_power_ptr, d_encoding_ptr, length, channels, width, alpha, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Blocks of channels (axis 0), each with all rows of the encoding."""
    wait_for_inputs()
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    factor, derivative = _factor(tl.load(scale_ptr + c, mask=inside, other=0.0).to(tl.float32))
    d_scaled_ptr += (c // width) * d_scaled_strides[0] + (c % width) * d_scaled_strides[2]
    total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for start in range(0, length, BLOCK_N):
        n = (start + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
        mask = (n < length) & inside[None, :]
        gradient = tl.load(d_scaled_ptr[None, :] + n * d_scaled_strides[1], mask=mask, other=0.0).to(tl.float32)
        total += gradient * tl.load(encoding_ptr + n * channels + c[None, :], mask=mask, other=0.0)
        gradient *= factor[None, :]
        pointers = d_encoding_ptr + n * channels + c[None, :]
        tl.store(pointers, gradient.to(d_encoding_ptr.dtype.element_ty), mask=mask)
    d_factor = tl.sum(total, 0) + tl.load(d_factor_ptr + channels + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(d_scale_ptr + c, (d_factor * derivative).to(d_scale_ptr.dtype.element_ty), mask=inside)
    s = 1.0 / (1.0 + tl.exp(-tl.load(power_ptr + c, mask=inside, other=0.0).to(tl.float32)))
    d_power = tl.load(d_exponent_ptr + c, mask=inside, other=0.0).to(tl.float32) * alpha * s * (1.0 - s)
    tl.store(d_power_ptr + c, d_power.to(d_power_ptr.dtype.element_ty), mask=inside)


def record_parameters(
    record: Record, scale: Tensor, power: Tensor, encoding: Tensor, alpha: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Factors ``(4 C,)``, exponents ``(H, D)`` and the scaled encoding ``(N, C)``."""
    N, C = encoding.shape[-2:]
    factor, exponent = record.new_empty((4 * C,), torch.float32), record.new_empty(_heads(power), torch.float32)
    scaled = record.new_empty((N, C), encoding.dtype)
    arguments = dict(
        scale_ptr=record.contiguous(scale), power_ptr=record.contiguous(power),
        encoding_ptr=record.contiguous(encoding), factor_ptr=factor, exponent_ptr=exponent, scaled_ptr=scaled,
        length=N, channels=C, alpha=float(alpha), BLOCK_N=32, BLOCK_C=64,
    )  # fmt: skip
    record.launch(polarity_kernel, (cdiv(N, 32), cdiv(C, 64), 1), arguments)
    return factor, exponent, scaled


def record_parameter_gradients(
    record: Record, d_factor: Tensor, d_exponent: Tensor, d_scaled: Tensor, scale: Tensor, power: Tensor,
    encoding: Tensor, alpha: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of scale, power and encoding from those of what ``polarity_parameters`` gives."""
    N, C = encoding.shape[-2:]
    gradients = d_scale, d_power, d_encoding = [record.new_empty(x.shape, x.dtype) for x in (scale, power, encoding)]
    arguments = dict(
        d_factor_ptr=record.contiguous(d_factor), d_exponent_ptr=record.contiguous(d_exponent), d_scaled_ptr=d_scaled,
        d_scaled_strides=d_scaled.stride(), scale_ptr=record.contiguous(scale), power_ptr=record.contiguous(power),
        encoding_ptr=record.contiguous(encoding), d_scale_ptr=d_scale, d_power_ptr=d_power, d_encoding_ptr=d_encoding,
        length=N, channels=C, width=d_scaled.shape[2], alpha=float(alpha), BLOCK_N=128, BLOCK_C=16,
    )  # fmt: skip
    record.launch(polarity_gradient_kernel, (cdiv(C, 16), 1, 1), arguments)
    return tuple(gradients)


def _heads(power: Tensor) -> tuple[int, int]:
    """(H, D) of ``(1, H, 1, D)``."""
    return power.shape[1], power.shape[3]
