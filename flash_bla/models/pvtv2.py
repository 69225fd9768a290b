"""Pyramid vision transformer v2 (PVTv2) whose stages take any attention; FLatten's PVTv2."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from flash_bla.layers import DepthwiseConv, LayerNorm, Linear
from flash_bla.models.block import Block
from flash_bla.models.hierarchical import (
    ConvEmbed,
    HierarchicalBackbone,
    Stage,
    plan_stages,
)
from flash_bla.models.official import join_projections, rename_entries
from flash_bla.models.registry import Family

NORM_EPS = 1e-6  # of blocks and stages; the patch embeddings have 1e-5


class ConvMlp(nn.Module):
    """MLP with a depthwise convolution before its activation, which lets tokens know their place.

    Args:
        dim: Channels.
        hidden_dim: Channels of the convolution.
        drop: Dropout after the activation and after the output.
    """

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.fc1 = Linear(dim, hidden_dim, **dd)
        self.dwconv = DepthwiseConv(hidden_dim, 3, **dd)
        self.fc2 = Linear(hidden_dim, dim, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """``(B, N, C)`` to ``(B, N, C)``."""
        x = self.drop(self.dwconv(self.fc1(x), grid, activation="gelu"))
        return self.drop(self.fc2(x))


class ConvMlpBlock(Block):
    """Pre-norm transformer block whose MLP, a ``ConvMlp``, knows the grid too."""

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """``(B, N, C)`` to ``(B, N, C)``."""
        y, x = self.norm1(x, residual=True)
        y, x = self.norm2(x, self.drop_path1(self.ls1(self.attn(y, grid))), residual=True)
        return x + self.drop_path2(self.ls2(self.mlp(y, grid)))


class PyramidVisionTransformerV2(HierarchicalBackbone):
    """Pyramid vision transformer v2 with the attentions of this library, on images of any size.

    Args:
        img_size: Input size that learned encodings of the attentions belong to; the backbone itself has none.
        in_chans: Input channels.
        num_classes: Classes of the head, 0 for none.
        global_pool: How the head pools: ``"avg"``, or ``""`` for not at all, and timm's others.
        embed_dims: Channels of each stage.
        depths: Blocks of each stage.
        num_heads: Attention heads of each stage.
        mlp_ratios: Hidden width of the MLPs over the channels, of each stage.
        attention: Name of the attention (see ``flash_bla.layers.create_attention``), or a list of one for each stage.
        attention_args: Options for the attentions; each goes to the stages whose attention has it.
        qkv_bias: Whether the attentions' input projections have a bias.
        drop_rate: Dropout before the head.
        proj_drop_rate: Dropout after output projections and in the MLPs.
        attn_drop_rate: Dropout of attention weights, in the attentions that have any.
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0.

    Raises:
        ValueError: An unknown attention, a list of them of a wrong length, an option of none of them, or heads that do
            not divide the channels.

    Reference:
        Wang et al., "PVT v2: Improved Baselines with Pyramid Vision Transformer", Computational Visual Media 2022; with
        focused attention Han et al., "FLatten Transformer", ICCV 2023.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        attention: str | Sequence[str] = "linear",
        attention_args: dict[str, Any] | None = None,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        stages = []
        plan = plan_stages(
            img_size,
            depths,
            attention,
            attention_args,
            drop_path_rate,
            qkv_bias=qkv_bias,
            attn_drop=attn_drop_rate,
            proj_drop=proj_drop_rate,
        )
        for i, (_, name, offer, rates) in enumerate(plan):
            in_dim, kernel_size, stride = (embed_dims[i - 1], 3, 2) if i else (in_chans, 7, 4)
            embed = ConvEmbed(in_dim, embed_dims[i], kernel_size, stride, padding=kernel_size // 2, **dd)
            blocks = [
                ConvMlpBlock(
                    embed_dims[i],
                    num_heads[i],
                    name,
                    offer,
                    mlp_ratio=mlp_ratios[i],
                    mlp_layer=ConvMlp,
                    proj_drop=proj_drop_rate,
                    drop_path=rate,
                    norm_eps=NORM_EPS,
                    **dd,
                )
                for rate in rates
            ]
            stages.append(Stage(embed, blocks, norm=LayerNorm(embed_dims[i], eps=NORM_EPS, **dd)))
        super().__init__(
            stages,
            embed_dims,
            norm=nn.Identity(),
            checkpoint_filter_fn=checkpoint_filter_fn,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )
        self.apply(_init_convolutions)


def _init_convolutions(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):  # those in the attentions too, as in the official model
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        nn.init.zeros_(module.bias)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Official entries of PVTv2 and FLatten's to this model's; its own pass unchanged."""
    rules = [
        (r"^patch_embed(\d)\.", lambda match: f"stages.{int(match[1]) - 1}.downsample."),
        (r"^block(\d)\.", lambda match: f"stages.{int(match[1]) - 1}.blocks."),
        (r"^norm(\d)\.", lambda match: f"stages.{int(match[1]) - 1}.norm."),
        (r"\.dwconv\.dwconv\.", ".dwconv."),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
    ]
    return join_projections(rename_entries(state_dict, rules))


FAMILY = Family(
    PyramidVisionTransformerV2,
    pretrained_cfg={
        "first_conv": "stages.0.downsample.proj",
        "classifier": "head.fc",
        "crop_pct": 0.875,
        "crop_mode": "squash",
    },
    filter_fn=checkpoint_filter_fn,
    reduction=32,
)
