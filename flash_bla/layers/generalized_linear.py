"""The linear attention of LinFusion, in the place of a diffusion UNet's self-attention."""

from __future__ import annotations

from torch import Tensor, nn

from flash_bla.layers.hooks import is_plain
from flash_bla.layers.tokens import head_width
from flash_bla.ops import add_layer_norm, linear_attention
from flash_bla.ops.arguments import merge_heads, split_heads


class GeneralizedLinearAttention(nn.Module):
    r"""Linear attention whose queries and keys get a learned, non-linear residual before their projection.

    .. math::
        q = W_q (x + f_q(x)), \quad k = W_k (y + f_k(y)), \quad v = W_v y

        o_n = \frac{φ(q_n) \; \frac{1}{M} \sum_m φ(k_m)^T v_m}
                   {φ(q_n) \cdot \frac{1}{M} \sum_m φ(k_m) + 10^{-4}}, \quad φ = elu + 1

    with f = Linear, LayerNorm, LeakyReLU, Linear, and y = x unless a context is given. Its modules are named as in the
    official weights, and as in the attention of diffusers, so that LoRA finds them.

    Args:
        dim: Channels C.
        num_heads: Number of heads; must divide ``dim``.
        projection_mid_dim: Width inside of f; C by default, and with -1 f is the identity: q = W_q (2x).

    Raises:
        ValueError: ``dim`` does not divide into such heads.

    Reference:
        Liu et al., "LinFusion: 1 GPU, 1 Minute, 16K Image", 2024.
    """

    def __init__(
        self, dim: int, num_heads: int = 8, *, projection_mid_dim: int | None = None, device=None, dtype=None
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        head_width(dim, num_heads)
        self.num_heads = num_heads
        self.to_q = nn.Linear(dim, dim, bias=False, **dd)
        self.to_k = nn.Linear(dim, dim, bias=False, **dd)
        self.to_v = nn.Linear(dim, dim, bias=False, **dd)
        self.to_out = nn.Sequential(nn.Linear(dim, dim, **dd))
        self.to_q_ = _residual(dim, projection_mid_dim, **dd)
        self.to_k_ = _residual(dim, projection_mid_dim, **dd)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
        **cross_attention_kwargs,
    ) -> Tensor:
        """Takes the call of diffusers' ``Attention``.

        Args:
            hidden_states: x, ``(B, N, C)``.
            encoder_hidden_states: y, ``(B, M, C)``, where some pipelines let images attend to others.
            attention_mask: Not possible.
            **cross_attention_kwargs: Meant for the UNet's cross-attentions, and ignored.

        Returns:
            ``(B, N, C)``.

        Raises:
            ValueError: A mask is given.
        """
        if attention_mask is not None:
            raise ValueError("GeneralizedLinearAttention attends to all tokens: it takes no attention_mask")
        x = hidden_states
        y = x if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = self.to_q(x + self.to_q_(x)), self.to_k(y + self.to_k_(y)), self.to_v(y)
        o = linear_attention(*(split_heads(z, self.num_heads) for z in (q, k, v)), feature_map="elu1", eps=1e-4)
        return self.to_out(merge_heads(o))


def _residual(dim: int, mid_dim: int | None, **dd) -> nn.Module:
    return nn.Identity() if mid_dim == -1 else _Residual(dim, mid_dim or dim, **dd)


class _Residual(nn.Sequential):
    """f, whose two modules in the middle run as one operator."""

    def __init__(self, dim: int, mid_dim: int, **dd) -> None:
        super().__init__(
            nn.Linear(dim, mid_dim, **dd), nn.LayerNorm(mid_dim, **dd), nn.LeakyReLU(), nn.Linear(mid_dim, dim, **dd)
        )

    def forward(self, x: Tensor) -> Tensor:
        first, norm, activation, last = self
        if not (is_plain(norm, nn.LayerNorm) and is_plain(activation, nn.LeakyReLU)):
            return super().forward(x)
        x, _ = add_layer_norm(first(x), norm.weight, norm.bias, norm.eps, negative_slope=activation.negative_slope)
        return last(x)
