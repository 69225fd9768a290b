"""Focused linear attention of FLatten Transformer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash_bla.layers.attention import register_attention
from flash_bla.layers.conv import DepthwiseConv, attend_with_conv
from flash_bla.layers.dense import Linear, apply_linear
from flash_bla.layers.position import KeyPositionalEncoding
from flash_bla.layers.tokens import at_least_float32, head_width
from flash_bla.ops import focusing_power


@register_attention("focused")
class FocusedLinearAttention(KeyPositionalEncoding):
    r"""Focused linear attention: a power sharpens the features, a depthwise convolution restores their rank.

    .. math::
        u(x) = \frac{relu(x) + 10^{-6}}{softplus(scale)}, \quad φ(x) = \frac{\|u\|}{\|u^p\|} u^p, \quad
        O = LA(φ(Q), φ(K + E), V) + DWC(V)

    with the norms over all C channels of a token, E the positional encoding and one set of filters for all heads.

    Args:
        dim: Channels C.
        num_heads: Number of heads; must divide ``dim``.
        qkv_bias: Whether the projection to q, k and v has a bias.
        proj_drop: Dropout after the output projection.
        grid_size: Grid of the positional encoding; calls may have any other.
        focusing_factor: p.
        kernel_size: Side of the depthwise convolution.

    Raises:
        ValueError: ``dim`` does not divide into such heads.

    Reference:
        Han et al., "FLatten Transformer: Vision Transformer using Focused Linear Attention", ICCV 2023.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        grid_size: int | tuple[int, int] = 14,
        focusing_factor: int = 3,
        kernel_size: int = 5,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, grid_size, **dd)
        self.num_heads = num_heads
        self.focusing_factor = focusing_factor
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.scale = nn.Parameter(torch.empty(1, 1, dim, **dd))
        self.dwc = DepthwiseConv(head_width(dim, num_heads), kernel_size, **dd)
        self.proj = Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initializes what is not a layer of its own."""
        nn.init.zeros_(self.positional_encoding)
        nn.init.zeros_(self.scale)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """``(B, N, C)`` to ``(B, N, C)``; the first N - H·W tokens are prefix tokens."""
        scale = F.softplus(at_least_float32(self.scale)).view(self.num_heads, -1)
        x = self.attend(
            apply_linear(self.qkv, x, split=(3, self.num_heads, -1)),
            grid,
            feature_map=focusing_power(scale, self.focusing_factor),
            key_encoding=self.encode_position(x, grid).reshape(-1, *scale.shape).transpose(0, 1),
        )
        return self.proj_drop(self.proj(x))

    def attend(self, qkv: Tensor, grid: tuple[int, int], **options: Any) -> Tensor:
        """Attention and convolution: from ``(B, N, 3, H, D)`` what is projected, ``(B, N, C)``."""
        return attend_with_conv(self.dwc, qkv, grid, **options)
