"""CSWin Transformer whose stages take any attention; FLatten's CSWin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash_bla.layers import DepthwiseConv, FocusedLinearAttention, LayerNorm, register_attention
from flash_bla.layers.hooks import is_untouched
from flash_bla.models.block import Block
from flash_bla.models.hierarchical import (
    ConvEmbed,
    HierarchicalBackbone,
    Stage,
    plan_stages,
)
from flash_bla.models.official import rename_entries
from flash_bla.models.registry import Family
from flash_bla.ops import linear_attention_dwc

NORM_EPS = 1e-5


@register_attention("focused_lepe")
class FocusedLePE(FocusedLinearAttention):
    """Focused linear attention with CSWin's locally enhanced positional encoding: a 3x3 depthwise convolution of the
    values, added to the output.

    Args:
        dim: Channels C.
        num_heads: Number of heads; must divide ``dim``.
        qkv_bias: Whether the projection to q, k and v has a bias.
        proj_drop: Dropout after the output projection.
        grid_size: Grid of the positional encoding; calls may have any other.
        focusing_factor: As in ``FocusedLinearAttention``.
        kernel_size: Side of that attention's own depthwise convolution.

    Raises:
        ValueError: ``dim`` does not divide into such heads.

    Reference:
        Han et al., "FLatten Transformer: Vision Transformer using Focused Linear Attention", ICCV 2023.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        grid_size: int | tuple[int, int] = 14,
        focusing_factor: int = 3,
        kernel_size: int = 5,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            qkv_bias=qkv_bias,
            proj_drop=proj_drop,
            grid_size=grid_size,
            focusing_factor=focusing_factor,
            kernel_size=kernel_size,
            device=device,
            dtype=dtype,
        )
        self.get_v = DepthwiseConv(dim, 3, device=device, dtype=dtype)

    def attend(self, qkv: Tensor, grid: tuple[int, int], **options: Any) -> Tensor:
        """Attention and both convolutions, which are linear: one with the sum of their filters does."""
        if not (is_untouched(self.dwc, DepthwiseConv) and is_untouched(self.get_v, DepthwiseConv)):
            v = qkv[:, :, 2].flatten(2)
            return super().attend(qkv, grid, **options) + self.get_v(v, grid)
        border = (self.dwc.weight.shape[2] - self.get_v.weight.shape[2]) // 2
        weight = self.dwc.weight.repeat(self.num_heads, 1, 1, 1) + F.pad(self.get_v.weight, [border] * 4)
        bias = self.dwc.bias.repeat(self.num_heads) + self.get_v.bias
        return linear_attention_dwc(qkv, grid, weight, bias, **options)


class CSwinTransformer(HierarchicalBackbone):
    """CSWin Transformer with the attentions of this library, on images of any size.

    Args:
        img_size: Input size that position encodings are learned for.
        in_chans: Input channels.
        num_classes: Classes of the head, 0 for none.
        global_pool: How the head pools: ``"avg"``, or ``""`` for not at all, and timm's others.
        embed_dim: Channels of the first stage; each further one has twice as many.
        depths: Blocks of each stage.
        num_heads: Attention heads of each stage.
        mlp_ratio: Hidden width of the MLPs over the channels.
        split_size: Width of the stripes, or a list of one for each stage.
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
        Dong et al., "CSWin Transformer: A General Vision Transformer Backbone with Cross-Shaped Windows", CVPR 2022;
        with focused attention Han et al., "FLatten Transformer", ICCV 2023.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 4, 18, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratio: float = 4.0,
        split_size: int | Sequence[int] = 7,
        attention: str | Sequence[str] = "cross_window",
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
        split_sizes = _split_by_stage(split_size, len(depths))
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
            in_dim, kernel_size, stride, padding = (dims[i - 1], 3, 2, 1) if i else (in_chans, 7, 4, 2)
            downsample = ConvEmbed(in_dim, dims[i], kernel_size, stride, padding, norm_eps=NORM_EPS, **dd)
            blocks = [
                Block(
                    dims[i],
                    num_heads[i],
                    name,
                    {"split_size": split_sizes[i], **offer},
                    mlp_ratio=mlp_ratio,
                    proj_drop=proj_drop_rate,
                    drop_path=rate,
                    norm_eps=NORM_EPS,
                    **dd,
                )
                for rate in rates
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
        self, img_size: int | tuple[int, int] | None = None, split_size: int | Sequence[int] | None = None
    ) -> None:
        """Changes the image size that position encodings belong to, the width of the stripes, or both.

        Encodings are resampled. An image size alone leaves the stripes as they are.
        """
        if img_size is not None:
            super().set_input_size(img_size)
        if split_size is not None:
            for stage, size in zip(self.stages, _split_by_stage(split_size, len(self.stages)), strict=True):
                for module in stage.modules():
                    if hasattr(module, "set_split_size"):
                        module.set_split_size(size)


def _split_by_stage(split_size: int | Sequence[int], num_stages: int) -> list[int]:
    split_sizes = [split_size] * num_stages if isinstance(split_size, int) else list(split_size)
    if len(split_sizes) != num_stages:
        raise ValueError(f"split_size must be a number or a list of {num_stages} numbers, got {split_size}")
    return split_sizes


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Official entries of CSWin, and FLatten's, to this model's; its own pass unchanged."""
    rules = [
        (r"^stage1_conv_embed\.0\.", "stages.0.downsample.proj."),
        (r"^stage1_conv_embed\.2\.", "stages.0.downsample.norm."),
        (r"^merge(\d)\.conv\.", r"stages.\1.downsample.proj."),
        (r"^merge(\d)\.norm\.", r"stages.\1.downsample.norm."),
        (r"^(stage\d\.\d+\.)(qkv|proj|attns\.0)\.", r"\1attn.\2."),
        (r"\.attn\.attns\.0\.", ".attn."),
        (r"^stage(\d)\.", lambda match: f"stages.{int(match[1]) - 1}.blocks."),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
    ]
    entries = rename_entries(state_dict, rules)
    # The official attention has a module for the vertical stripes and one for the horizontal: half the channels each.
    for key in list(entries):
        if ".attns.1." in key:
            vertical = key.replace(".attns.1.", ".attn.")
            entries[vertical] = torch.cat([entries[vertical], entries.pop(key)])
    return entries


FAMILY = Family(
    CSwinTransformer,
    pretrained_cfg={
        "first_conv": "stages.0.downsample.proj",
        "classifier": "head.fc",
        "crop_pct": 0.875,
        "crop_mode": "squash",
    },
    filter_fn=checkpoint_filter_fn,
    reduction=32,
)
