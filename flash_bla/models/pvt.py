"""Pyramid vision transformer (PVT) whose stages take any attention; PolaFormer's and FLatten's PVT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from flash_bla.layers import resample_encoding, resample_entry
from flash_bla.models.block import Block
from flash_bla.models.hierarchical import (
    ConvEmbed,
    HierarchicalBackbone,
    Stage,
    plan_stages,
)
from flash_bla.models.official import join_projections, rename_entries
from flash_bla.models.registry import Family


class PatchEmbed(ConvEmbed):
    """Patch embedding with a learned encoding of the patches' places.

    Args:
        in_dim: Channels in.
        dim: Channels out.
        patch_size: Side of the patches.
        grid_size: Grid that the parameter ``pos_embed (1, M, dim)`` belongs to; calls may have any other.
        pos_drop: Dropout after the encoding.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        patch_size: int,
        grid_size: tuple[int, int],
        pos_drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(in_dim, dim, patch_size, patch_size, device=device, dtype=dtype)
        self.grid_size = grid_size
        self.pos_embed = nn.Parameter(torch.empty(1, grid_size[0] * grid_size[1], dim, device=device, dtype=dtype))
        self.pos_drop = nn.Dropout(pos_drop)
        trunc_normal_(self.pos_embed, std=0.02)
        self.register_load_state_dict_pre_hook(_resample_on_load)

    def set_grid_size(self, grid_size: tuple[int, int]) -> None:
        """Resamples the parameter itself, so that calls with this grid need not."""
        pos_embed = resample_encoding(self.pos_embed.detach(), grid_size, self.grid_size)
        self.pos_embed = nn.Parameter(pos_embed, requires_grad=self.pos_embed.requires_grad)
        self.grid_size = grid_size

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` to ``(B, H/patch, W/patch, dim)``."""
        x = super().forward(x)
        grid = x.shape[1], x.shape[2]
        pos_embed = resample_encoding(self.pos_embed, grid, self.grid_size).unflatten(1, grid)
        return self.pos_drop(x + pos_embed.to(x.dtype))


def _resample_on_load(module: PatchEmbed, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    resample_entry(state_dict, f"{prefix}pos_embed", module.grid_size)


class PyramidVisionTransformer(HierarchicalBackbone):
    """Pyramid vision transformer with the attentions of this library, on images of any size.

    Args:
        img_size: Input size that the position encodings are learned for.
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
        pos_drop_rate: Dropout after the position encodings.
        proj_drop_rate: Dropout after output projections and in the MLPs.
        attn_drop_rate: Dropout of attention weights, in the attentions that have any.
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0.

    Raises:
        ValueError: An unknown attention, a list of them of a wrong length, an option of none of them, or heads that do
            not divide the channels.

    Reference:
        Wang et al., "Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without Convolutions", ICCV
        2021; with focused attention Han et al., "FLatten Transformer", ICCV 2023; with polarity-aware attention Meng et
        al., "PolaFormer", ICLR 2025.
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
        pos_drop_rate: float = 0.0,
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
        for i, (grid, name, offer, rates) in enumerate(plan):
            in_dim, patch_size = (embed_dims[i - 1], 2) if i else (in_chans, 4)
            blocks = [
                Block(
                    embed_dims[i],
                    num_heads[i],
                    name,
                    offer,
                    mlp_ratio=mlp_ratios[i],
                    proj_drop=proj_drop_rate,
                    drop_path=rate,
                    **dd,
                )
                for rate in rates
            ]
            stages.append(Stage(PatchEmbed(in_dim, embed_dims[i], patch_size, grid, pos_drop_rate, **dd), blocks))
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


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Official entries of PVT, PolaFormer's and FLatten's, to this model's; its own pass unchanged."""
    if "pos_embed1" in state_dict:  # an official file: its final norm is never used
        state_dict = {key: value for key, value in state_dict.items() if not key.startswith("norm.")}
    rules = [
        (r"^pos_embed(\d)$", lambda match: f"stages.{int(match[1]) - 1}.downsample.pos_embed"),
        (r"^patch_embed(\d)\.", lambda match: f"stages.{int(match[1]) - 1}.downsample."),
        (r"^block(\d)\.", lambda match: f"stages.{int(match[1]) - 1}.blocks."),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
    ]
    return join_projections(rename_entries(state_dict, rules))


FAMILY = Family(
    PyramidVisionTransformer,
    pretrained_cfg={
        "first_conv": "stages.0.downsample.proj",
        "classifier": "head.fc",
        "crop_pct": 0.875,
        "crop_mode": "squash",
    },
    filter_fn=checkpoint_filter_fn,
    reduction=32,
)
