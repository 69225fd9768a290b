"""The linear attention of MLLA (MILA)."""

from __future__ import annotations

from torch import Tensor, nn

from flash_bla.layers.attention import register_attention
from flash_bla.layers.conv import DepthwiseConv, attend_with_conv
from flash_bla.layers.dense import Linear, apply_linear
from flash_bla.layers.rope import axial_rope
from flash_bla.layers.tokens import head_width


@register_attention("mlla")
class MambaLikeLinearAttention(nn.Module):
    r"""Linear attention whose values are the input itself, with rotary and local position encodings.

    .. math::
        o_n = \frac{R_n φ(q_n) \sum_m (R_m φ(k_m))^T x_m}{φ(q_n) \cdot \sum_m φ(k_m)} + LePE(x)_n, \quad φ = elu + 1

    R turns all C channels by the place of the token, before they are split into heads; LePE is a depthwise convolution.
    There is no projection of values and outputs: MLLA's block has its own around the attention.

    Args:
        dim: Channels C, a multiple of 4.
        num_heads: Number of heads, of an even number of channels each.
        qkv_bias: Whether the projection to q and k has a bias.
        kernel_size: Side of the depthwise convolution.

    Raises:
        ValueError: ``dim`` does not divide into such heads.

    Reference:
        Han et al., "Demystify Mamba in Vision: A Linear Attention Perspective", NeurIPS 2024.
    """

    def __init__(
        self, dim: int, num_heads: int = 8, *, qkv_bias: bool = True, kernel_size: int = 3, device=None, dtype=None
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        head_width(dim, num_heads, multiple_of=2)
        if dim % 4:
            raise ValueError(f"the rotary encoding needs dim to be a multiple of 4, got {dim}")
        self.dim, self.num_heads = dim, num_heads
        self.qk = Linear(dim, 2 * dim, bias=qkv_bias, **dd)
        self.lepe = DepthwiseConv(dim, kernel_size, **dd)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """``(B, N, C)`` to ``(B, N, C)``; the first N - H·W tokens are prefix tokens."""
        return attend_with_conv(
            self.lepe,
            apply_linear(self.qk, x, split=(2, self.num_heads, -1)),
            grid,
            v=x,
            feature_map="elu1",
            rope=self.rope(x, grid),
        )

    def rope(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """The rotary encoding of tokens of x's device and type."""
        return axial_rope(x, grid, self.dim, self.num_heads)
