"""Swin Transformer whose stages take any attention; PolaFormer's and FLatten's Swin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.layers import to_2tuple
from torch import Tensor, nn

from flash_bla.layers import LayerNorm, Linear
from flash_bla.models.block import Block
from flash_bla.models.hierarchical import (
    ConvEmbed,
    HierarchicalBackbone,
    Stage,
    pad_to_multiple,
    plan_stages,
)
from flash_bla.models.official import rename_entries
from flash_bla.models.registry import Family

NORM_EPS = 1e-5


class PatchMerging(nn.Module):
    """Joins the channels of 2x2 tokens, and halves what that gives.

    Args:
        in_dim: Channels in.
        dim: Channels out.
    """

    def __init__(self, in_dim: int, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm = LayerNorm(4 * in_dim, eps=NORM_EPS, **dd)
        self.reduction = Linear(4 * in_dim, dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` to ``(B, H/2, W/2, dim)``, with odd sides padded."""
        x = pad_to_multiple(x, 2).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # B, H/2, y, W/2, x, C
        return self.reduction(self.norm(x.permute(0, 1, 3, 4, 2, 5).flatten(3)))  # official order: x, y, C


class SwinTransformer(HierarchicalBackbone):
    """Swin Transformer with the attentions of this library, on images of any size.

    Every second block shifts its windows; attentions other than ``"window"`` see the whole map.

    Args:
        img_size: Input size that position encodings are learned for.
        in_chans: Input channels.
        num_classes: Classes of the head, 0 for none.
        global_pool: How the head pools: ``"avg"``, or ``""`` for not at all, and timm's others.
        embed_dim: Channels of the first stage; each further one has twice as many.
        depths: Blocks of each stage.
        num_heads: Attention heads of each stage.
        mlp_ratio: Hidden width of the MLPs over the channels.
        window_size: Side of the windows, or height and width, or a list of one of these for each stage.
        attention: Name of the attention (see ``flash_bla.layers.create_attention``), or a list of one for each stage.
        attention_args: Options for the attentions; each goes to the stages whose attention has it.
        qkv_bias: Whether the attentions' input projections have a bias.
        drop_rate: Dropout before the head.
        proj_drop_rate: Dropout after output projections and in the MLPs.
        attn_drop_rate: Dropout of attention weights, in the attentions that have any.
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0.

    Raises:
        ValueError: An unknown attention, a list of a wrong length, an option of none of the attentions, or heads that
            do not divide the channels.

    Reference:
        Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", ICCV 2021; with focused
        attention Han et al., "FLatten Transformer", ICCV 2023; with polarity-aware attention Meng et al.,
        "PolaFormer", ICLR 2025.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        mlp_ratio: float = 4.0,
        window_size: int | Sequence[int | Sequence[int]] = 7,
        attention: str | Sequence[str] = "window",
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
        dims = [embed_dim * 2**i for i in range(len(depths))]
        window_sizes = _window_by_stage(window_size, len(depths))
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
            downsample = PatchMerging(dims[i - 1], dims[i], **dd) if i else ConvEmbed(in_chans, embed_dim, 4, 4, **dd)
            blocks = [
                Block(
                    dims[i],
                    num_heads[i],
                    name,
                    {"window_size": window_sizes[i], "shift": j % 2 == 1, **offer},
                    mlp_ratio=mlp_ratio,
                    proj_drop=proj_drop_rate,
                    drop_path=rate,
                    norm_eps=NORM_EPS,
                    **dd,
                )
                for j, rate in enumerate(rates)
            ]
            stages.append(Stage(downsample, blocks))
        super().__init__(
            stages,
            dims,
            norm=LayerNorm(dims[-1], eps=NORM_EPS, **dd),
            checkpoint_filter_fn=checkpoint_filter_fn,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        window_size: int | Sequence[int | Sequence[int]] | None = None,
    ) -> None:
        """Changes the image size that position encodings belong to, the size of the windows, or both.

        Encodings and tables of relative positions are resampled. An image size alone leaves the windows as they are.
        """
        if img_size is not None:
            super().set_input_size(img_size)
        if window_size is not None:
            for stage, size in zip(self.stages, _window_by_stage(window_size, len(self.stages)), strict=True):
                for module in stage.modules():
                    if hasattr(module, "set_window_size"):
                        module.set_window_size(size)


def _window_by_stage(window_size: int | Sequence[int | Sequence[int]], num_stages: int) -> list[tuple[int, int]]:
    """Height and width of each stage's windows; two numbers are a height and a width, not two stages."""
    if isinstance(window_size, int) or (len(window_size) == 2 and all(isinstance(side, int) for side in window_size)):
        window_size = [window_size] * num_stages
    if len(window_size) != num_stages:
        raise ValueError(
            f"window_size must be a number, a height and a width, or a list of {num_stages} of these, got {window_size}"
        )
    return [to_2tuple(size) for size in window_size]


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Official entries of Swin, PolaFormer's and FLatten's, to this model's; its own pass unchanged."""
    rules = [
        (r"^patch_embed\.", "stages.0.downsample."),
        (r"^layers\.(\d)\.downsample\.", lambda match: f"stages.{int(match[1]) + 1}.downsample."),
        (r"^layers\.", "stages."),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
    ]
    return rename_entries(state_dict, rules)


FAMILY = Family(
    SwinTransformer,
    pretrained_cfg={
        "first_conv": "stages.0.downsample.proj",
        "classifier": "head.fc",
        "crop_pct": 0.875,
        "crop_mode": "squash",
    },
    filter_fn=checkpoint_filter_fn,
    reduction=32,
)
