"""The depthwise convolution beside an attention."""

from __future__ import annotations

import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from flash_bla.layers.tokens import count_prefix_tokens


@register_notrace_module  # torch.fx must not trace into it: it branches on shapes
class DepthwiseConv(nn.Conv2d):
    """Depthwise convolution of tokens that stand on a grid; prefix tokens have no place on it and give zero.

    Linear attention mixes tokens through a matrix of low rank; this local branch gives back what that loses. It works
    on the tokens' own memory layout (channels last), without a copy.

    Args:
        channels: Number of filters. Tokens may have a multiple of it: the filters are then shared by all heads.
        kernel_size: Odd side of the filters.
    """

    def __init__(self, channels: int, kernel_size: int, *, device=None, dtype=None) -> None:
        super().__init__(
            channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, device=device, dtype=dtype
        )

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """``(B, N, C)`` to ``(B, N, C)``."""
        channels = x.shape[2]
        heads = channels // self.out_channels
        weight, bias = self.weight, self.bias
        if heads > 1:
            weight, bias = weight.repeat(heads, 1, 1, 1), bias.repeat(heads)
        prefix = count_prefix_tokens(x, grid)
        image = x[:, prefix:].unflatten(1, grid).permute(0, 3, 1, 2)
        image = F.conv2d(image, weight, bias, padding=self.padding, groups=channels)
        tokens = image.permute(0, 2, 3, 1).flatten(1, 2)
        return F.pad(tokens, (0, 0, prefix, 0)) if prefix else tokens
