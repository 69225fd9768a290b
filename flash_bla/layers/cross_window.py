"""Softmax attention within cross-shaped windows, of CSWin Transformer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash_bla.layers.attention import register_attention
from flash_bla.layers.conv import DepthwiseConv
from flash_bla.layers.dense import Linear
from flash_bla.layers.hooks import is_untouched
from flash_bla.layers.tokens import head_width
from flash_bla.layers.window import merge_windows, split_windows, whole_grid
from flash_bla.ops.arguments import merge_heads, split_heads


@register_attention("cross_window")
class CrossShapedWindowAttention(nn.Module):
    r"""Softmax attention within stripes: half of the heads in vertical ones, half in horizontal ones.

    .. math::
        O_S = softmax(d^{-1/2} Q_S K_S^T) V_S + DWC(V_S)

    for each stripe S, ``split_size`` columns or rows of the map; the convolution sees zeros beyond the stripe. The last
    stripe has what remains: fewer, if the map's side is no multiple of ``split_size``. A map that is no larger than
    ``split_size`` is one window for all heads.

    Args:
        dim: Channels C.
        num_heads: Number of heads, an even one; must divide ``dim``.
        qkv_bias: Whether the projection to q, k and v has a bias.
        attn_drop: Dropout of the attention weights.
        proj_drop: Dropout after the output projection.
        split_size: Width of the stripes.

    Raises:
        ValueError: ``dim`` does not divide into such heads, their number is odd, or the stripes are empty.

    Reference:
        Dong et al., "CSWin Transformer: A General Vision Transformer Backbone with Cross-Shaped Windows", CVPR 2022.
    """

    static_grid = True  # how a map falls into windows cannot be compiled for any size

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        split_size: int = 7,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        head_width(dim, num_heads)
        if num_heads % 2:
            raise ValueError(f"cross-shaped windows need an even number of heads, got {num_heads}")
        self.num_heads = num_heads
        self.set_split_size(split_size)
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.attn_drop = nn.Dropout(attn_drop)
        self.get_v = DepthwiseConv(dim, 3, **dd)
        self.proj = Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def set_split_size(self, split_size: int) -> None:
        """Changes the width of the stripes."""
        if split_size < 1:
            raise ValueError(f"split_size must be positive, got {split_size}")
        self.split_size = split_size

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """``(B, N, C)`` to ``(B, N, C)``; N must be H·W."""
        grid = whole_grid(x, grid)
        vertical, horizontal = self.qkv(x).unflatten(1, grid).unflatten(-1, (3, 2, -1)).unbind(-2)
        x = torch.cat([self._attend_in_stripes(vertical, 2), self._attend_in_stripes(horizontal, 1)], dim=-1)
        return self.proj_drop(self.proj(x.flatten(1, 2)))

    def _attend_in_stripes(self, qkv: Tensor, side: int) -> Tensor:
        """``(B, H, W, 3, C/2)`` to ``(B, H, W, C/2)``; stripes of a number of rows (``side`` 1) or columns (2)."""
        grid = [qkv.shape[1], qkv.shape[2]]
        length = grid[side - 1]
        stripe = min(self.split_size, length)
        rest = length % stripe
        if rest:
            parts = qkv.split([length - rest, rest], side)
            return torch.cat([self._attend_in_stripes(part, side) for part in parts], side)

        window = (stripe, grid[1]) if side == 1 else (grid[0], stripe)
        q, k, v = (split_windows(y, window) for y in qkv.unbind(-2))
        x = F.scaled_dot_product_attention(
            *(split_heads(y, self.num_heads // 2) for y in (q, k, v)),
            dropout_p=self.attn_drop.p if self.training else 0.0,
        )
        return merge_windows(merge_heads(x) + self._convolve(v, window, side), window, grid)

    def _convolve(self, v: Tensor, window: tuple[int, int], side: int) -> Tensor:
        """The convolution of windows' values, with the first half of the filters for vertical stripes."""
        channels, half = v.shape[-1], 0 if side == 2 else 1
        if not is_untouched(self.get_v, DepthwiseConv):  # called on all channels, half of them zeros
            return self.get_v(F.pad(v, (half * channels, (1 - half) * channels)), window).chunk(2, -1)[half]
        weight, bias = (x.chunk(2)[half] for x in (self.get_v.weight, self.get_v.bias))
        image = v.unflatten(1, window).permute(0, 3, 1, 2)
        image = F.conv2d(image, weight, bias, padding=self.get_v.padding, groups=channels)
        return image.permute(0, 2, 3, 1).flatten(1, 2)
