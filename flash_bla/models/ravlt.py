"""Rank-augmented vision linear transformer (RAVLT) whose stages take any attention."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from flash_bla.layers import DepthwiseConv, Linear, RankAugmentedLinearAttention, apply_linear, convolve_and_norm
from flash_bla.layers.hooks import is_plain
from flash_bla.layers.tokens import scale_outputs
from flash_bla.models.block import Block
from flash_bla.models.hierarchical import HierarchicalBackbone, Stage, plan_stages
from flash_bla.models.official import rename_entries
from flash_bla.models.registry import Family


class MapLayers(nn.Sequential):
    """Layers for NCHW maps, such as convolutions and BatchNorm, on a channels-last map."""

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` to ``(B, H', W', C')``."""
        # A copy is made of images alone: maps have that layout in memory, and all layers keep it.
        return super().forward(x.contiguous().permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def stem(in_chans: int, dim: int, device=None, dtype=None) -> MapLayers:
    """Images ``(B, H, W, in_chans)`` to the first tokens ``(B, H/4, W/4, dim)``: four convolutions with BatchNorm."""
    dd = {"device": device, "dtype": dtype}
    layers = []
    dims = [in_chans, dim // 2, dim // 2, dim // 2, dim]
    for i, stride in enumerate((2, 1, 1, 2)):
        layers += [nn.Conv2d(dims[i], dims[i + 1], 3, stride, 1, **dd), nn.BatchNorm2d(dims[i + 1], **dd), nn.GELU()]
    return MapLayers(*layers[:-1])


def downsample(in_dim: int, dim: int, device=None, dtype=None) -> MapLayers:
    """A stage's map to the next, coarser one ``(B, H/2, W/2, dim)``: one convolution with BatchNorm."""
    dd = {"device": device, "dtype": dtype}
    return MapLayers(nn.Conv2d(in_dim, dim, 3, 2, 1, **dd), nn.BatchNorm2d(dim, **dd))


class ConvFeedForward(nn.Module):
    """MLP with a depthwise convolution, added to its hidden channels.

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

    def forward(self, x: Tensor, grid: tuple[int, int], *, factor: Tensor | None = None) -> Tensor:
        """``(B, N, C)`` to ``(B, N, C)``, each channel times a factor."""
        x = self.fc1(x)
        if self.drop.p and self.training:  # between the activation and the convolution
            x = self.dwconv(self.drop(F.gelu(x)), grid, residual=True)
        else:
            x = self.dwconv(x, grid, residual=True, input_activation="gelu")
        return self.drop(apply_linear(self.fc2, x, factor=factor))


class RavltBlock(Block):
    """Depthwise convolution for the tokens' places, then a pre-norm block with layer scale whose MLP knows the grid.

    The arguments are those of ``Block``. The layer scale is a parameter ``(1, 1, C)``, as in the official model, whose
    weight decay it thereby shares.
    """

    def __init__(self, dim: int, *args: Any, init_values: float, device=None, dtype=None, **kwargs: Any) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, *args, mlp_layer=ConvFeedForward, **kwargs, **dd)
        self.pos = DepthwiseConv(dim, 3, **dd)
        self.gamma_1 = nn.Parameter(torch.full((1, 1, dim), init_values, **dd))
        self.gamma_2 = nn.Parameter(torch.full((1, 1, dim), init_values, **dd))

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """``(B, N, C)`` to ``(B, N, C)``."""
        y, x = convolve_and_norm(self.pos, self.norm1, x, grid)
        if isinstance(self.attn, RankAugmentedLinearAttention):
            y = self.attn(y, grid, factor=self.gamma_1)
        else:
            y = self.attn(y, grid) if self.gamma_1 is None else self.attn(y, grid) * self.gamma_1.to(y.dtype)
        y, x = self.norm2(x, self.drop_path1(y), residual=True)
        return x + self.drop_path2(self.mlp(y, grid, factor=self.gamma_2))

    def fold_constants(self) -> None:
        """Folds the layer scales into the layers before them, for ``fuse_for_inference``."""
        is_ours = isinstance(self.attn, RankAugmentedLinearAttention)
        if self.gamma_1 is not None and is_ours and is_plain(self.attn.proj, Linear):
            scale_outputs(self.attn.proj, self.gamma_1.flatten())
            self.gamma_1 = None
        if self.gamma_2 is not None and is_plain(self.mlp.fc2, Linear):
            scale_outputs(self.mlp.fc2, self.gamma_2.flatten())
            self.gamma_2 = None


class RAVLT(HierarchicalBackbone):
    """Rank-augmented vision linear transformer, with the attentions of this library, on images of any size.

    Args:
        img_size: Input size that learned encodings of the attentions belong to; the backbone itself has none.
        in_chans: Input channels.
        num_classes: Classes of the head, 0 for none.
        global_pool: How the head pools: ``"avg"``, or ``""`` for not at all, and timm's others.
        embed_dims: Channels of each stage.
        depths: Blocks of each stage.
        num_heads: Attention heads of each stage.
        mlp_ratio: Hidden width of the MLPs over the channels.
        init_values: Initial layer scale of each stage.
        head_hidden_size: Channels that the last map is projected to before it is pooled.
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
        Fan et al., "Breaking the Low-Rank Dilemma of Linear Attention", CVPR 2025.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        mlp_ratio: float = 3.5,
        init_values: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
        head_hidden_size: int = 1024,
        attention: str | Sequence[str] = ("rala", "rala", "rala_softmax", "rala_softmax"),
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
            blocks = [
                RavltBlock(
                    embed_dims[i],
                    num_heads[i],
                    name,
                    offer,
                    mlp_ratio=mlp_ratio,
                    init_values=init_values[i],
                    proj_drop=proj_drop_rate,
                    drop_path=rate,
                    **dd,
                )
                for rate in rates
            ]
            to_grid = downsample(embed_dims[i - 1], embed_dims[i], **dd) if i else stem(in_chans, embed_dims[0], **dd)
            stages.append(Stage(to_grid, blocks))
        super().__init__(
            stages,
            embed_dims,
            norm=MapLayers(
                nn.Conv2d(embed_dims[-1], head_hidden_size, 1, **dd), nn.BatchNorm2d(head_hidden_size, **dd), nn.SiLU()
            ),
            checkpoint_filter_fn=checkpoint_filter_fn,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            num_features=head_hidden_size,
            **dd,
        )
        self.apply(_init_convolutions)


def _init_convolutions(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):  # those in the attentions too, as in the official model
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Official entries of RAVLT to this model's; its own pass unchanged."""
    rules = [
        (r"^patch_embed\.proj\.", "stages.0.downsample."),
        (r"^layers\.(\d+)\.blocks\.", r"stages.\1.blocks."),
        (r"^layers\.(\d+)\.downsample\.reduction\.", lambda match: f"stages.{int(match[1]) + 1}.downsample.0."),
        (r"^layers\.(\d+)\.downsample\.norm\.", lambda match: f"stages.{int(match[1]) + 1}.downsample.1."),
        (r"\.(norm[12])\.norm\.", r".\1."),
        (r"\.ffn\.", ".mlp."),
        (r"^norm\.(\w+)$", r"norm.1.\1"),
        (r"^proj\.", "norm.0."),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
    ]
    renamed = rename_entries(state_dict, rules)
    for key, value in renamed.items():
        if re.search(r"\.(qkvo|proj|fc\d?)\.weight$", key):  # 1x1 convolutions: here linear
            renamed[key] = value.flatten(1)
        elif re.search(r"\.gamma_[12]$", key):
            renamed[key] = value.reshape(1, 1, -1)
    return renamed


FAMILY = Family(
    RAVLT,
    pretrained_cfg={
        "first_conv": "stages.0.downsample.0",
        "classifier": "head.fc",
        "crop_pct": 0.875,
    },
    filter_fn=checkpoint_filter_fn,
    reduction=32,
)
