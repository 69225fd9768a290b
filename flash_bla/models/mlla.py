"""MLLA (MILA in the final paper): the macro design of Mamba around linear attention, or any other."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from timm.layers import register_notrace_module
from torch import Tensor, nn

from flash_bla.layers import (
    DepthwiseConv,
    LayerNorm,
    Linear,
    MambaLikeLinearAttention,
    Mlp,
    apply_linear,
    convolve_and_norm,
)
from flash_bla.layers.hooks import is_plain
from flash_bla.models.block import Block
from flash_bla.models.hierarchical import HierarchicalBackbone, Stage, plan_stages
from flash_bla.models.official import rename_entries
from flash_bla.models.registry import Family
from flash_bla.ops import linear
from flash_bla.ops.mamba_like import mamba_like_mixer, mamba_like_mlp

NORM_EPS = 1e-5
LAYERS = DepthwiseConv, LayerNorm, Linear


class ConvLayer(nn.Sequential):
    """Convolution that keeps the size, or halves it rounding up, with BatchNorm and ReLU if wanted.

    Args:
        in_dim: Channels in.
        dim: Channels out.
        kernel_size: Odd side of the filters.
        stride: Step of the filters.
        norm: Whether BatchNorm follows.
        act: Whether ReLU follows.
        bias: Whether the convolution has a bias.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        kernel_size: int,
        stride: int = 1,
        norm: bool = True,
        act: bool = True,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        layers = OrderedDict(conv=nn.Conv2d(in_dim, dim, kernel_size, stride, kernel_size // 2, bias=bias, **dd))
        if norm:
            layers["norm"] = nn.BatchNorm2d(dim, **dd)
        if act:
            layers["act"] = nn.ReLU()
        super().__init__(layers)


class Stem(nn.Module):
    """Images to the first tokens: convolutions with BatchNorm, two of which halve the size, two a residual branch.

    Args:
        in_chans: Input channels.
        dim: Channels out.
    """

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        options = {"bias": False, "device": device, "dtype": dtype}
        self.conv1 = ConvLayer(in_chans, dim // 2, 3, stride=2, **options)
        self.conv2 = nn.Sequential(
            ConvLayer(dim // 2, dim // 2, 3, **options), ConvLayer(dim // 2, dim // 2, 3, act=False, **options)
        )
        self.conv3 = nn.Sequential(
            ConvLayer(dim // 2, 4 * dim, 3, stride=2, **options), ConvLayer(4 * dim, dim, 1, act=False, **options)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, in_chans)`` to ``(B, H/4, W/4, dim)``."""
        x = self.conv1(x.contiguous().permute(0, 3, 1, 2))  # the layout of all that follows
        x = self.conv3(x + self.conv2(x))
        return x.permute(0, 2, 3, 1)


@register_notrace_module  # torch.fx must not trace into it: it asks for the type of tensors
class PointwiseConv(nn.Conv2d):
    """1x1 convolution of tokens, which is a linear layer with the entries of a convolution."""

    def __init__(self, in_dim: int, dim: int, device=None, dtype=None) -> None:
        super().__init__(in_dim, dim, 1, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, N, in_dim)`` to ``(B, N, dim)``."""
        return linear(x, self.weight.flatten(1), self.bias)


class Downsample(nn.Sequential):
    r"""A stage's map to the next, coarser one: a depthwise convolution of four times as many channels halves the size.

    .. math:: y = BatchNorm(W_2 \, relu(DWC(relu(W_1 x))))

    Args:
        in_dim: Channels in.
        dim: Channels out.
    """

    def __init__(self, in_dim: int, dim: int, device=None, dtype=None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(
            nn.Sequential(OrderedDict(conv=PointwiseConv(in_dim, 4 * dim, **dd))),
            nn.Sequential(OrderedDict(conv=DepthwiseConv(4 * dim, 3, stride=2, **dd))),
            nn.Sequential(OrderedDict(conv=PointwiseConv(4 * dim, dim, **dd), norm=nn.BatchNorm2d(dim, **dd))),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, in_dim)`` to ``(B, H/2, W/2, dim)``."""
        expand, halve, reduce = self
        grid = x.shape[1], x.shape[2]
        x = expand.conv(x.flatten(1, 2))
        x = halve.conv(x, grid, input_activation="relu", activation="relu")
        x = reduce.conv(x).unflatten(1, ((grid[0] + 1) // 2, (grid[1] + 1) // 2))
        return reduce.norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class MambaLikeBlock(Block):
    r"""Attention between a convolution and a gate, as Mamba has its scan, then an MLP; a convolution precedes each.

    .. math::
        x \leftarrow x + CPE_1(x), \quad y = Norm(x), \quad
        x \leftarrow x + W_o \left(Attn(silu(DWC(W_i y))) \odot silu(W_a y)\right)

        x \leftarrow x + CPE_2(x), \quad x \leftarrow x + MLP(Norm(x))

    with depthwise 3x3 convolutions CPE and DWC. The arguments are those of ``Block``.
    """

    def __init__(self, dim: int, *args: Any, device=None, dtype=None, **kwargs: Any) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, *args, norm_eps=NORM_EPS, **kwargs, **dd)
        self.cpe1 = DepthwiseConv(dim, 3, **dd)
        self.act_proj = Linear(dim, dim, **dd)
        self.in_proj = Linear(dim, dim, **dd)
        self.dwc = DepthwiseConv(dim, 3, **dd)
        self.out_proj = Linear(dim, dim, **dd)
        self.cpe2 = DepthwiseConv(dim, 3, **dd)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """``(B, N, C)`` to ``(B, N, C)``."""
        y, x = self._mix(x, grid)
        y, x = self._feed_forward(x, self.drop_path1(y), grid)
        return x + self.drop_path2(y)

    def _mix(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """What is added to x + CPE(x), and that."""
        attn = self.attn
        if is_plain(attn, MambaLikeLinearAttention):
            parameters = _read(
                x, self.cpe1, self.norm1, self.act_proj, self.in_proj, self.dwc, attn.qk, attn.lepe, self.out_proj
            )
            if parameters is not None:
                return mamba_like_mixer(x, grid, self.norm1.eps, attn.num_heads, attn.rope(x, grid), *parameters)
        y, x = convolve_and_norm(self.cpe1, self.norm1, x, grid)
        v = self.dwc(self.in_proj(y), grid, activation="silu")
        return apply_linear(self.out_proj, attn(v, grid), gate=self.act_proj(y)), x

    def _feed_forward(self, x: Tensor, add: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        mlp = self.mlp
        if is_plain(mlp, Mlp) and not (mlp.drop.p and mlp.training):
            parameters = _read(x, self.cpe2, self.norm2, mlp.fc1, mlp.fc2)
            if parameters is not None:
                y, x = mamba_like_mlp(x, add, grid, self.norm2.eps, *parameters)
                return mlp.drop(y), x
        y, x = convolve_and_norm(self.cpe2, self.norm2, x, grid, add=add)
        return mlp(y), x


def _read(x: Tensor, *layers: nn.Module) -> list[Tensor | None] | None:
    """The layers' weights and biases; None where the layers themselves are to be called."""
    if not isinstance(x, Tensor):  # torch.fx sees the layers
        return None
    if all([type(layer) in LAYERS and is_plain(layer, type(layer)) for layer in layers]):
        return [parameter for layer in layers for parameter in (layer.weight, layer.bias)]
    return None


class MLLA(HierarchicalBackbone):
    """Mamba-like linear attention, with the attentions of this library, on images of any size.

    Args:
        img_size: Input size that learned encodings of the attentions belong to; the backbone itself has none.
        in_chans: Input channels.
        num_classes: Classes of the head, 0 for none.
        global_pool: How the head pools: ``"avg"``, or ``""`` for not at all, and timm's others.
        embed_dim: Channels of the first stage; each further one has twice as many.
        depths: Blocks of each stage.
        num_heads: Attention heads of each stage.
        mlp_ratio: Hidden width of the MLPs over the channels.
        attention: Name of the attention (see ``flash_bla.layers.create_attention``), or a list of one for each stage.
        attention_args: Options for the attentions; each goes to the stages whose attention has it.
        qkv_bias: Whether the attentions' input projections have a bias.
        drop_rate: Dropout before the head.
        proj_drop_rate: Dropout after the attentions' output projections and in the MLPs.
        attn_drop_rate: Dropout of attention weights, in the attentions that have any.
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0.

    Raises:
        ValueError: An unknown attention, a list of them of a wrong length, an option of none of them, or heads that do
            not divide the channels.

    Reference:
        Han et al., "Demystify Mamba in Vision: A Linear Attention Perspective", NeurIPS 2024.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 4, 8, 4),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratio: float = 4.0,
        attention: str | Sequence[str] = "mlla",
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
                MambaLikeBlock(
                    dims[i],
                    num_heads[i],
                    name,
                    offer,
                    mlp_ratio=mlp_ratio,
                    proj_drop=proj_drop_rate,
                    drop_path=rate,
                    **dd,
                )
                for rate in rates
            ]
            downsample = Downsample(dims[i - 1], dims[i], **dd) if i else Stem(in_chans, dims[0], **dd)
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


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Official entries of MLLA to this model's; its own pass unchanged."""
    rules = [
        (r"^patch_embed\.", "stages.0.downsample."),
        (r"^layers\.(\d+)\.blocks\.", r"stages.\1.blocks."),
        (r"^layers\.(\d+)\.downsample\.conv\.", lambda match: f"stages.{int(match[1]) + 1}.downsample."),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
    ]
    return rename_entries(state_dict, rules)


FAMILY = Family(
    MLLA,
    pretrained_cfg={
        "first_conv": "stages.0.downsample.conv1.conv",
        "classifier": "head.fc",
        "crop_pct": 0.875,
    },
    filter_fn=checkpoint_filter_fn,
    reduction=32,
)
