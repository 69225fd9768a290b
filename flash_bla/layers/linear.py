"""Linear attention with φ = elu + 1."""

from __future__ import annotations

from torch import Tensor, nn

from flash_bla.layers.attention import register_attention
from flash_bla.layers.dense import Linear, apply_linear
from flash_bla.layers.tokens import head_width
from flash_bla.ops import linear_attention_qkvpacked


@register_attention("linear")
class LinearAttention(nn.Module):
    r"""Linear attention, O(N).

    .. math:: o_n = \frac{φ(q_n) \sum_m φ(k_m)^T v_m}{φ(q_n) \cdot \sum_m φ(k_m)}, \quad φ = elu + 1

    Args:
        dim: Channels C.
        num_heads: Number of heads; must divide ``dim``.
        qkv_bias: Whether the projection to q, k and v has a bias.
        proj_drop: Dropout after the output projection.

    Raises:
        ValueError: ``dim`` does not divide into such heads.

    Reference:
        Katharopoulos et al., "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
        ICML 2020.
    """

    def __init__(
        self, dim: int, num_heads: int = 8, *, qkv_bias: bool = True, proj_drop: float = 0.0, device=None, dtype=None
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        head_width(dim, num_heads)
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """``(B, N, C)`` to ``(B, N, C)``; the grid plays no part."""
        qkv = apply_linear(self.qkv, x, split=(3, self.num_heads, -1))
        x = linear_attention_qkvpacked(qkv, feature_map="elu1").flatten(2)
        return self.proj_drop(self.proj(x))
