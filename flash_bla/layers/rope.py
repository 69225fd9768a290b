"""Rotary position embedding over a grid."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_bla.layers.tokens import count_prefix_tokens
from flash_bla.ops.arguments import autocast_dtype
from flash_bla.tracing import is_traced

BASE = 10000.0


def axial_rope(x: Tensor, grid: tuple[int, int], dim: int, num_heads: int = 1, *, endpoint: bool = False) -> Tensor:
    """Cosines and sines of the angles by which the pairs of adjacent channels turn, for the ``rope`` of the operator.

    Token (y, x) turns the first half of the pairs by y·θ and the second by x·θ, with θ_j = 10000^(-j/n) for j < n and
    n = dim/4, or with n frequencies from 1 to 1/10000, both included (``endpoint``). Prefix tokens do not turn.

    The table is float32, and float16 for bfloat16 activations, whose own rounding is larger. It is kept for the grids
    of the last calls, but under ``torch.compile`` and ``torch.export``, where it becomes part of the graph.

    Args:
        x: Tokens ``(B, N, C)``, prefix tokens first; for their number, device and type, or autocast's.
        grid: Height and width.
        dim: Channels that the angles run over: one head's, or all channels'.
        num_heads: Heads that those channels are split into.
        endpoint: Whether the lowest frequency is 1/10000 itself.

    Returns:
        ``(num_heads, N, dim / num_heads / 2, 2)``.
    """
    dtype = torch.float16 if autocast_dtype(x) == torch.bfloat16 else torch.float32
    arguments = (*grid, count_prefix_tokens(x, grid), dim, num_heads, endpoint, x.device, dtype)
    if is_traced(x):
        return _axial_rope(*arguments)
    return _cached_axial_rope(*arguments)


def _axial_rope(height, width, prefix, dim, num_heads, endpoint, device, dtype) -> Tensor:
    n = dim // 4
    like = {"device": device, "dtype": torch.float32}
    exponents = torch.linspace(0, 1, n, **like) if endpoint else torch.arange(n, **like) / n
    theta = 1 / BASE**exponents
    y, x = (torch.arange(size, **like)[:, None] * theta for size in (height, width))
    angles = torch.cat([y[:, None].expand(-1, width, -1), x.expand(height, -1, -1)], dim=-1).flatten(0, 1)
    angles = F.pad(angles, (0, 0, prefix, 0)).unflatten(-1, (num_heads, -1)).transpose(0, 1)
    return torch.stack([angles.cos(), angles.sin()], dim=-1).to(dtype)


@lru_cache(maxsize=32)
def _cached_axial_rope(*arguments) -> Tensor:
    with torch.inference_mode(False):  # a table first made for inference must serve training too
        return _axial_rope(*arguments)
