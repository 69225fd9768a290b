"""The pre-norm transformer block that the backbones share."""

from __future__ import annotations

from typing import Any

from timm.layers import DropPath, LayerScale
from torch import Tensor, nn

from flash_bla.layers import LayerNorm, Mlp, create_attention


class Block(nn.Module):
    """Pre-norm transformer block around an attention that knows the grid.

    Args:
        dim: Channels.
        num_heads: Attention heads.
        attention: Name of the attention.
        attention_args: Options for it; those that it lacks are left out.
        mlp_ratio: Hidden width of the MLP over ``dim``.
        mlp_layer: Class of the MLP.
        init_values: Initial layer scale; None for no layer scale.
        proj_drop: Dropout in the MLP.
        drop_path: Rate of stochastic depth.
        norm_eps: ε of the norms.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        attention: str,
        attention_args: dict[str, Any],
        mlp_ratio: float = 4.0,
        mlp_layer: type[nn.Module] = Mlp,
        init_values: float | None = None,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-6,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = LayerNorm(dim, eps=norm_eps, **dd)
        self.attn = create_attention(attention, dim, num_heads, offer=attention_args, **dd)
        self.ls1 = LayerScale(dim, init_values, **dd) if init_values else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = LayerNorm(dim, eps=norm_eps, **dd)
        self.mlp = mlp_layer(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.ls2 = LayerScale(dim, init_values, **dd) if init_values else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """``(B, N, C)`` to ``(B, N, C)``."""
        y, x = self.norm1(x, residual=True)
        y, x = self.norm2(x, self.drop_path1(self.ls1(self.attn(y, grid))), residual=True)
        return x + self.drop_path2(self.ls2(self.mlp(y)))
