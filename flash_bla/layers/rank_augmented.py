"""Rank-augmented linear attention (RALA), and softmax attention with the same surroundings."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from flash_bla.layers.attention import register_attention
from flash_bla.layers.conv import DepthwiseConv, attend_with_conv
from flash_bla.layers.dense import Linear, apply_linear
from flash_bla.layers.rope import axial_rope
from flash_bla.layers.tokens import head_width
from flash_bla.ops.arguments import merge_heads
from flash_bla.ops.rotary import rotate_packed


@register_attention("rala")
class RankAugmentedLinearAttention(nn.Module):
    r"""Linear attention with a weight for each key and a gate for each output, which raise the rank of both.

    .. math::
        w = N\, softmax_m\left(d^{-1/2}\, \bar q \cdot φ(k_m)\right), \quad
        \bar q = \frac{1}{N} \sum_n φ(q_n), \quad φ = elu + 1

        o_n = \left(\frac{R_n φ(q_n) \sum_m w_m (R_m φ(k_m))^T v_m}{φ(q_n) \cdot \sum_m w_m φ(k_m)}
              + LePE(v)_n\right) \odot g_n

    R turns each head's channels by the place of the token, LePE is a depthwise convolution, g a gate projected from the
    input.

    Args:
        dim: Channels C.
        num_heads: Number of heads, of a multiple of 4 channels each.
        qkv_bias: Whether the projection to q, k, v and the gate has a bias.
        proj_drop: Dropout after the output projection.
        kernel_size: Side of the depthwise convolution.

    Raises:
        ValueError: ``dim`` does not divide into such heads.

    Reference:
        Fan et al., "Breaking the Low-Rank Dilemma of Linear Attention", CVPR 2025.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        kernel_size: int = 5,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.head_dim = head_width(dim, num_heads, multiple_of=4)
        self.num_heads = num_heads
        self.qkvo = Linear(dim, 4 * dim, bias=qkv_bias, **dd)
        self.lepe = DepthwiseConv(dim, kernel_size, **dd)
        self.proj = Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, grid: tuple[int, int], *, factor: Tensor | None = None) -> Tensor:
        """``(B, N, C)`` to ``(B, N, C)``, each channel times a factor; the first N - H·W tokens are prefix tokens."""
        qkvg = apply_linear(self.qkvo, x, split=(4, self.num_heads, -1))
        x = self.attend(qkvg, grid, axial_rope(x, grid, self.head_dim, endpoint=True))
        return self.proj_drop(apply_linear(self.proj, x, factor=factor))

    def attend(self, qkvg: Tensor, grid: tuple[int, int], rope: Tensor) -> Tensor:
        """Attention, LePE and gate: from ``(B, N, 4, H, D)`` what is projected, ``(B, N, C)``."""
        return attend_with_conv(self.lepe, qkvg, grid, feature_map="elu1", key_weight="softmax", rope=rope)


@register_attention("rala_softmax")
class GatedSoftmaxAttention(RankAugmentedLinearAttention):
    r"""Softmax attention with the encodings and the gate of RALA, which takes its place where maps are small.

    .. math:: o_n = \left(\sum_m softmax_m\left(d^{-1/2}\, R_n q_n \cdot R_m k_m\right) v_m + LePE(v)_n\right) \odot g_n

    The arguments, the rotation R, LePE and the gate g are those of ``RankAugmentedLinearAttention``.

    Reference:
        Fan et al., "Breaking the Low-Rank Dilemma of Linear Attention", CVPR 2025.
    """

    def attend(self, qkvg: Tensor, grid: tuple[int, int], rope: Tensor) -> Tensor:
        """Attention, LePE and gate: from ``(B, N, 4, H, D)`` what is projected, ``(B, N, C)``."""
        q, k, v, values, gate = rotate_packed(qkvg, rope)
        o = F.scaled_dot_product_attention(q, k, v)
        return self.lepe(values, grid, add=merge_heads(o), gate=gate)
