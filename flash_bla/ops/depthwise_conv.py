"""Depthwise convolution on tokens: the public function, and the plain PyTorch that specifies it."""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_bla.ops.arguments import (
    autocast,
    check_device,
    check_dtype,
    check_tensors,
    choose_backend,
    expect,
    without_autocast,
)
from flash_bla.ops.triton_depthwise_conv import depthwise_conv_eager, depthwise_conv_forward
from flash_bla.ops.triton_support import is_eager

ACTIVATIONS = {None: lambda z: z, "relu": F.relu, "silu": F.silu, "gelu": F.gelu}
KERNEL_SIZES = (3, 5, 7)


def depthwise_conv(
    x: Tensor,
    grid: tuple[int, int],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    residual: bool = False,
    input_activation: str | None = None,
    activation: str | None = None,
    add: Tensor | None = None,
    gate: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Depthwise convolution of tokens that stand on a grid, and what often precedes and follows it.

    .. math:: y = \left(a + f\left(w ⋆ h(x) + b \;[+ h(x)]\right)\right) \odot g

    with h the ``input_activation``, f the ``activation``, a = ``add`` and g = ``gate`` where they are given, and h(x)
    added with ``residual``. The grid's border is padded with zeros. Tokens before the last H·W ones are prefix tokens:
    they have no place on the grid, and w ⋆ h(x) + b is zero there. Sums are computed in float32 (float64 for float64
    inputs); under autocast x, add and gate are cast to its type. Gradients are the same bit for bit in every run.

    Args:
        x: Tokens ``(B, N, C)``, row by row; any strides here and below.
        grid: (H, W).
        weight: w, ``(channels, 1, k, k)`` with k 3, 5 or 7; C must be a multiple of ``channels``: each head of that
            many channels has the same filters.
        bias: b, ``(channels,)``.
        stride: 1, or 2 for an output of ⌈H/2⌉ · ⌈W/2⌉ tokens, without prefix tokens.
        residual: Add h(x) to the convolution; not with ``stride`` 2.
        input_activation: h: None (identity), ``"relu"``, ``"silu"`` or ``"gelu"`` (the exact one).
        activation: f, likewise.
        add: a, shaped as the output and of the dtype of x.
        gate: g, shaped as the output and of the dtype of x.
        backend: ``"triton"`` or ``"reference"``; by default the environment variable ``FLASH_BLA_BACKEND``, else Triton
            for CUDA tensors where it is installed, and the PyTorch reference elsewhere.

    Returns:
        ``(B, N, C)`` in the dtype of x, or ``(B, ⌈H/2⌉ · ⌈W/2⌉, C)``.

    Raises:
        ValueError: A shape, device or name that does not fit.
        TypeError: Not tensors, or dtypes that differ or are not supported.
    """
    if add is None and gate is None:
        (x,) = autocast(x)
    else:
        x, add, gate = autocast(x, add, gate)
    H, W = check_grid(grid)
    arguments = x, weight, bias, add, gate, H, W, stride, residual, activation, input_activation
    if is_eager(x) and choose_backend(backend, x) == "triton":
        return depthwise_conv_eager(arguments, check_convolution)
    check_convolution(*arguments)
    function = depthwise_conv_forward if choose_backend(backend, x) == "triton" else depthwise_conv_reference
    return function(*arguments)


def depthwise_conv_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, gate: Tensor | None,
    height: int, width: int, stride: int, residual: bool, activation: str | None, input_activation: str | None,
) -> Tensor:  # fmt: skip
    """The specification: ``depthwise_conv`` on checked arguments, on any device and differentiable."""
    out_dtype = x.dtype
    dtype = torch.promote_types(out_dtype, torch.float32)
    with without_autocast(x):
        x, weight = ACTIVATIONS[input_activation](x.to(dtype)), weight.to(dtype)
        channels = x.shape[2]
        heads = channels // weight.shape[0]
        weight = weight.repeat(heads, 1, 1, 1)
        bias = None if bias is None else bias.to(dtype).repeat(heads)
        prefix = x.shape[1] - height * width
        image = x[:, prefix:].unflatten(1, (height, width)).permute(0, 3, 1, 2)
        image = F.conv2d(image, weight, bias, stride, padding=weight.shape[2] // 2, groups=channels)
        z = F.pad(image.flatten(2).transpose(1, 2), (0, 0, prefix, 0))
        y = ACTIVATIONS[activation](z + x if residual else z)
        if add is not None:
            y = add.to(dtype) + y
        if gate is not None:
            y = y * gate.to(dtype)
        return y.to(out_dtype)


def check_grid(grid: tuple[int, int]) -> tuple[int, int]:
    try:
        H, W = (n if isinstance(n, (int, torch.SymInt)) else operator.index(n) for n in grid)
    except (TypeError, ValueError) as error:
        raise ValueError(f"grid must be two integers (H, W), got {grid!r}") from error
    return H, W


def check_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, gate: Tensor | None,
    H: int, W: int, stride: int, residual: bool, activation: str | None, input_activation: str | None,
) -> None:  # fmt: skip
    others = {name: tensor for name, tensor in (("add", add), ("gate", gate)) if tensor is not None}
    check_tensors({"x": x} | others, "(B, N, C)", ndim=3)
    B, N, C = x.shape
    if H < 1 or W < 1 or H * W > N:
        raise ValueError(f"grid must be positive and have a token for each place: got {(H, W)} and {N} tokens")
    if stride not in (1, 2):
        raise ValueError(f"stride must be 1 or 2, got {stride!r}")
    if stride == 2 and N != H * W:
        raise ValueError(f"stride 2 takes no prefix tokens: grid {(H, W)} has {H * W} places, x {N} tokens")
    if stride == 2 and residual:
        raise ValueError("residual needs stride 1: the output of stride 2 has fewer tokens than x")
    for name, value in (("input_activation", input_activation), ("activation", activation)):
        if value not in ACTIVATIONS:
            raise ValueError(f"{name} must be one of {list(ACTIVATIONS)}, got {value!r}")
    _check_filters(weight, bias, x)
    out_shape = (B, N if stride == 1 else -(-H // 2) * -(-W // 2), C)
    for name, tensor in others.items():
        expect(name, tensor, out_shape, "that of the output")


def _check_filters(weight: Tensor, bias: Tensor | None, x: Tensor) -> None:
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None or name == "weight":
            check_device(name, parameter, x)
            check_dtype(name, parameter)
    if weight.ndim != 4 or weight.shape[1] != 1 or weight.shape[2] != weight.shape[3]:
        raise ValueError(f"weight must have shape (channels, 1, k, k), got {tuple(weight.shape)}")
    channels, _, k, _ = weight.shape
    if k not in KERNEL_SIZES:
        raise ValueError(f"weight must have filters of side {KERNEL_SIZES}, got {k}")
    if channels == 0 or x.shape[2] == 0 or x.shape[2] % channels:
        raise ValueError(f"weight's channels must divide those of x, {x.shape[2]}, got {channels}")
    if bias is not None:
        expect("bias", bias, (channels,), "(channels,) of weight")
