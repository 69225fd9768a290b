"""Tokens (B, N, C): their heads, their prefix, their precision."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def head_width(dim: int, num_heads: int, multiple_of: int = 1) -> int:
    """Channels of one head; a ValueError if the heads do not share ``dim`` evenly."""
    width, rest = divmod(dim, num_heads)
    if rest or width % multiple_of:
        wanted = f"{num_heads} heads" + (f", each of a multiple of {multiple_of} channels" if multiple_of > 1 else "")
        raise ValueError(f"dim={dim} cannot be divided into {wanted}")
    return width


def count_prefix_tokens(x: Tensor, grid: tuple[int, int]) -> int:
    """How many of the tokens ``(B, N, C)`` stand before those of the grid, as class and register tokens do."""
    height, width = grid
    count = x.shape[1] - height * width
    if count < 0:
        raise ValueError(f"grid {height}x{width} needs {height * width} tokens, got {x.shape[1]}")
    return count


def scale_outputs(linear: nn.Linear, factor: Tensor) -> None:
    """Multiplies the outputs of a linear layer, each by its own factor, in its weights."""
    linear.weight.mul_(factor[:, None])
    if linear.bias is not None:
        linear.bias.mul_(factor)


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32 if its type is narrower."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
