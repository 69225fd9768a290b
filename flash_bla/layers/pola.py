"""Polarity-aware linear attention of PolaFormer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flash_bla.layers.attention import register_attention
from flash_bla.layers.conv import DepthwiseConv, attend_with_conv
from flash_bla.layers.dense import Linear, apply_linear
from flash_bla.layers.hooks import is_plain
from flash_bla.layers.position import KeyPositionalEncoding
from flash_bla.layers.tokens import head_width, scale_outputs
from flash_bla.ops import signed_power
from flash_bla.ops.polarity import polarity_parameters


@register_attention("pola")
class PolaLinearAttention(KeyPositionalEncoding):
    r"""Polarity-aware linear attention: products of equal and of opposite signs, each with its half of the values.

    .. math::
        p = 1 + α\, sigmoid(power), \quad x^± = relu(±x)^p, \quad
        \hat Q = \frac{Q}{softplus(scale)}, \quad \hat K = \frac{K + E}{softplus(scale)}

        O = \left([LA([\hat Q^+, \hat Q^-], [\hat K^+, \hat K^-], V_1),\;
                   LA([\hat Q^-, \hat Q^+], [\hat K^+, \hat K^-], V_2)] + DWC(V)\right) \odot G

    with E the positional encoding, V₁ and V₂ the halves of each head's channels, G a gate projected from the input, and
    one set of filters for all heads.

    Args:
        dim: Channels C.
        num_heads: Number of heads, of an even number of channels each.
        qkv_bias: Whether the projection to q, k, v and the gate has a bias.
        proj_drop: Dropout after the output projection.
        grid_size: Grid of the positional encoding; calls may have any other.
        alpha: α, so that the learned powers lie between 1 and 1 + α.
        kernel_size: Side of the depthwise convolution.

    Raises:
        ValueError: ``dim`` does not divide into such heads.

    Reference:
        Meng et al., "PolaFormer: Polarity-aware Linear Attention for Vision Transformers", ICLR 2025.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        grid_size: int | tuple[int, int] = 14,
        alpha: float = 4.0,
        kernel_size: int = 5,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, grid_size, **dd)
        width = head_width(dim, num_heads, multiple_of=2)
        self.num_heads = num_heads
        self.alpha = alpha
        self.qkvg = Linear(dim, 4 * dim, bias=qkv_bias, **dd)
        self.scale = nn.Parameter(torch.empty(1, 1, dim, **dd))
        self.power = nn.Parameter(torch.empty(1, num_heads, 1, width, **dd))
        self.dwc = DepthwiseConv(width, kernel_size, **dd)
        self.proj = Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initializes what is not a layer of its own."""
        nn.init.zeros_(self.positional_encoding)
        nn.init.zeros_(self.scale)
        nn.init.zeros_(self.power)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """``(B, N, C)`` to ``(B, N, C)``; the first N - H·W tokens are prefix tokens."""
        encoding = self.encode_position(x, grid)
        factor, power, encoding = polarity_parameters(self.scale, self.power, encoding, self.alpha)
        x = attend_with_conv(
            self.dwc,
            apply_linear(self.qkvg, x, factor=factor, split=(4, self.num_heads, -1)),
            grid,
            feature_map=signed_power(power),
            key_encoding=encoding,
        )
        return self.proj_drop(self.proj(x))

    def fold_constants(self) -> None:
        """Folds the scale into the keys' projection and encoding, for ``fuse_for_inference``."""
        if self.scale is not None and is_plain(self.qkvg, Linear):
            factor, *_ = polarity_parameters(self.scale, self.power, self.positional_encoding, self.alpha)
            scale_outputs(self.qkvg, factor)
            self.positional_encoding.mul_(factor.chunk(4)[1])
            self.scale = None
