"""Softmax attention, to mix with the linear ones."""

from __future__ import annotations

from timm.layers import Attention
from torch import Tensor

from flash_bla.layers.attention import register_attention
from flash_bla.layers.tokens import head_width


@register_attention("softmax")
class SoftmaxAttention(Attention):
    r"""Softmax attention, :math:`O = softmax(d^{-1/2} Q K^T) V`, through ``scaled_dot_product_attention``.

    It is timm's ``Attention`` with the signature of the others.

    Args:
        dim: Channels C.
        num_heads: Number of heads; must divide ``dim``.
        qkv_bias: Whether the projection to q, k and v has a bias.
        attn_drop: Dropout of the attention weights.
        proj_drop: Dropout after the output projection.

    Raises:
        ValueError: ``dim`` does not divide into such heads.

    Reference:
        Vaswani et al., "Attention Is All You Need", NeurIPS 2017.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        head_width(dim, num_heads)
        super().__init__(
            dim, num_heads, qkv_bias=qkv_bias, attn_drop=attn_drop, proj_drop=proj_drop, device=device, dtype=dtype
        )

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """``(B, N, C)`` to ``(B, N, C)``; the grid plays no part."""
        return super().forward(x)
