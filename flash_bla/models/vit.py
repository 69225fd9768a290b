"""Plain vision transformer whose blocks take any attention of ``flash_bla.layers``, each another if wanted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed as TimmPatchEmbed
from timm.layers import calculate_drop_path_rates, to_2tuple
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn

from flash_bla.layers import check_attention_args, resample_encoding, resample_entry
from flash_bla.layers.norm import fold_batch_norm
from flash_bla.models.block import Block
from flash_bla.models.registry import Family

__all__ = ["VisionTransformer"]


class PatchEmbed(TimmPatchEmbed):
    """timm's patch embedding, whose grid for ``img_size`` is that of the padded image."""

    def _init_img_size(self, img_size: int | tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int], int]:
        img_size = to_2tuple(img_size)
        rows, columns = (-(-side // patch) for side, patch in zip(img_size, self.patch_size, strict=True))
        return img_size, (rows, columns), rows * columns


class ConvStem(PatchEmbed):
    """Patch embedding by overlapping 3 x 3 convolutions, each with batch norm and ReLU, then one of 1 x 1.

    Each of stride 2 doubles the channels up to ``embed_dim``. One of stride 1 stands before them and one after each,
    without which a model of small images sees too little of them. ``(B, C, H, W)`` to ``(B, H/P, W/P, embed_dim)`` for
    patches of ``P`` = 2, 4, 8, ...; sides that are no multiple of P are padded.

    Reference:
        Xiao et al., "Early Convolutions Help Transformers See Better", NeurIPS 2021, whose stem has those of stride 2.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int],
        patch_size: int | tuple[int, int],
        in_chans: int,
        embed_dim: int,
        bias: bool = True,
        device=None,
        dtype=None,
        **kwargs: Any,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(img_size, patch_size, in_chans, embed_dim, bias=bias, **kwargs, **dd)
        height, width = self.patch_size
        depth = height.bit_length() - 1
        if height != width or height != 2**depth or not depth or embed_dim % 2**depth:
            raise ValueError(
                f"conv_stem halves the sides of an image to patches of 2, 4, 8, ..., and embed_dim as often; "
                f"got patch_size={patch_size} and embed_dim={embed_dim}"
            )
        width = embed_dim >> depth
        options = {"kernel_size": 3, "padding": 1, "bias": False, **dd}
        convs = [nn.Conv2d(in_chans, width, **options)]
        for _ in range(depth):
            convs += [nn.Conv2d(width, 2 * width, stride=2, **options), nn.Conv2d(2 * width, 2 * width, **options)]
            width *= 2
        layers = [layer for conv in convs for layer in (conv, nn.BatchNorm2d(conv.out_channels, **dd), nn.ReLU())]
        self.proj = layers.pop(0)
        self.convs = nn.Sequential(*layers, nn.Conv2d(embed_dim, embed_dim, 1, bias=bias, **dd))

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Changes the input size; the convolutions fix the patch size."""
        if patch_size is not None and to_2tuple(patch_size) != self.patch_size:
            raise ValueError(f"the patch_size of a conv_stem stays {self.patch_size}, got {patch_size}")
        super().set_input_size(img_size)

    def fold_constants(self) -> None:
        """Folds the first batch norm into its convolution, for ``fuse_for_inference``."""
        self.proj, self.convs[0] = fold_batch_norm(self.proj, self.convs[0])

    def forward(self, x: Tensor) -> Tensor:
        """Images to a map of patches, channels last."""
        height, width = x.shape[-2:]
        x = F.pad(x, (0, -width % self.patch_size[1], 0, -height % self.patch_size[0]))
        return self.convs(self.proj(x)).permute(0, 2, 3, 1)


class VisionTransformer(TimmVisionTransformer):
    """timm's vision transformer with the attentions of this library, on images of any size.

    Position encodings are learned for ``img_size`` and resampled in calls with another size; sides that are no multiple
    of the patch are padded.

    Args:
        img_size: Input size that the position encodings are learned for.
        patch_size: Side of the patches.
        in_chans: Input channels.
        num_classes: Classes of the head, 0 for none.
        global_pool: How the head pools the tokens: their mean, or ``"token"`` for the class token, and timm's others.
        embed_dim: Channels.
        conv_stem: Embeds the patches by overlapping convolutions (see ``ConvStem``); ``patch_size`` is a power of 2.
        depth: Number of blocks.
        num_heads: Attention heads.
        attention: Name of the attention (see ``flash_bla.layers.create_attention``), or a list of ``depth`` names.
        attention_args: Options for the attentions; each goes to the blocks whose attention has it.
        mlp_ratio: Hidden width of the MLPs over ``embed_dim``.
        qkv_bias: Whether the attentions' input projections have a bias.
        init_values: Initial layer scale; None for no layer scale.
        class_token: Whether a class token precedes the patches.
        reg_tokens: Number of register tokens.
        no_embed_class: Leaves class and register tokens without position embedding.
        fc_norm: Norm after pooling instead of before; by default where ``global_pool`` pools patches.
        drop_rate: Dropout before the head.
        pos_drop_rate: Dropout after the position embedding.
        proj_drop_rate: Dropout after output projections and in the MLPs.
        attn_drop_rate: Dropout of attention weights, in the attentions that have any.
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0.

    Raises:
        ValueError: An unknown attention, a list of them that is not ``depth`` long, an option of none of them, heads
            that do not divide the channels, pooling of a class token that is not there, or a patch that convolutions
            of stride 2 do not lead to.

    Reference:
        Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021; Touvron et al., "Training data-efficient image
        transformers & distillation through attention", ICML 2021.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Literal["", "avg", "avgmax", "max", "token", "map", "prr"] = "avg",
        embed_dim: int = 768,
        conv_stem: bool = False,
        depth: int = 12,
        num_heads: int = 12,
        attention: str | Sequence[str] = "linear",
        attention_args: dict[str, Any] | None = None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        init_values: float | None = None,
        class_token: bool = False,
        reg_tokens: int = 0,
        no_embed_class: bool = False,
        fc_norm: bool | None = None,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        if global_pool == "token" and not class_token:
            raise ValueError("global_pool='token' needs class_token=True")
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            embed_dim=embed_dim,
            embed_layer=ConvStem if conv_stem else PatchEmbed,
            depth=0,  # the blocks are this class's own
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            class_token=class_token,
            reg_tokens=reg_tokens,
            no_embed_class=no_embed_class,
            fc_norm=fc_norm,
            dynamic_img_size=True,
            dynamic_img_pad=True,
            drop_rate=drop_rate,
            pos_drop_rate=pos_drop_rate,
            weight_init="skip",
            **dd,
        )
        attentions = [attention] * depth if isinstance(attention, str) else list(attention)
        if len(attentions) != depth:
            raise ValueError(f"attention must be a name or a list of depth={depth} names, got {len(attentions)}")
        attention_args = attention_args or {}
        check_attention_args(attentions, attention_args)
        offer = {
            "qkv_bias": qkv_bias,
            "attn_drop": attn_drop_rate,
            "proj_drop": proj_drop_rate,
            "grid_size": self.patch_embed.grid_size,
            **attention_args,
        }
        drop_path_rates = calculate_drop_path_rates(drop_path_rate, depth)
        self.blocks = nn.Sequential(
            *(
                Block(
                    embed_dim,
                    num_heads,
                    attentions[i],
                    offer,
                    mlp_ratio=mlp_ratio,
                    init_values=init_values,
                    proj_drop=proj_drop_rate,
                    drop_path=drop_path_rates[i],
                    **dd,
                )
                for i in range(depth)
            )
        )
        reduction = self.patch_embed.feat_ratio()
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": reduction} for i in range(depth)
        ]
        self.weight_init_mode = ""
        self.init_weights(needs_reset=False)
        self.register_load_state_dict_pre_hook(_resample_on_load)

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Changes the input size (and patch size) that the position encodings belong to, and resamples them."""
        pos_embed, old_size = self.pos_embed, self.patch_embed.grid_size
        super().set_input_size(img_size=img_size, patch_size=patch_size)
        new_size = self.patch_embed.grid_size
        if new_size == old_size:
            return
        pos_embed_data = resample_encoding(pos_embed.detach(), new_size, old_size, self._num_embedded_prefix_tokens)
        self.pos_embed = nn.Parameter(pos_embed_data, requires_grad=pos_embed.requires_grad)
        for block in self.blocks:
            if hasattr(block.attn, "set_grid_size"):
                block.attn.set_grid_size(new_size)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(B, in_chans, H, W)`` of any size to logits ``(B, num_classes)``."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to tokens ``(B, prefix + patches, embed_dim)``, before pooling."""
        x, grid = self._embed(x)
        for block in self.blocks:
            x = self._run(block, x, grid)
        return self.norm(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """Outputs of blocks, as timm's models give them.

        Args:
            x: Images.
            indices: The last n blocks (an integer), chosen ones (a list) or all (None).
            return_prefix_tokens: Gives pairs of patch tokens and prefix tokens.
            norm: Applies the final norm to each output.
            stop_early: Leaves out the blocks after the last chosen one.
            output_fmt: ``"NCHW"`` maps or ``"NLC"`` tokens.
            intermediates_only: Leaves out the final features.
            output_dict: Gives a dict with ``image_intermediates`` and what else was asked for.

        Returns:
            Final features and a list of outputs, or that list, or a dict.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        x, grid = self._embed(x)
        outputs = []
        for i, block in enumerate(self.blocks[: max_index + 1] if stop_early else self.blocks):
            x = self._run(block, x, grid)
            if i in take_indices:
                outputs.append(self.norm(x) if norm else x)

        prefixes = [y[:, : self.num_prefix_tokens] for y in outputs]
        outputs = [y[:, self.num_prefix_tokens :] for y in outputs]
        if output_fmt == "NCHW":
            outputs = [y.unflatten(1, grid).permute(0, 3, 1, 2).contiguous() for y in outputs]
        return_prefix_tokens = return_prefix_tokens and self.num_prefix_tokens > 0
        if output_dict:
            result = {"image_intermediates": outputs}
            if return_prefix_tokens:
                result["image_intermediates_prefix"] = prefixes
            if not intermediates_only:
                result["image_features"] = self.norm(x)
            return result
        if return_prefix_tokens:
            outputs = list(zip(outputs, prefixes, strict=True))
        return outputs if intermediates_only else (self.norm(x), outputs)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | list[int] | tuple[int, ...] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list[Any]:
        """Outputs of the last n or of chosen blocks, under the name and with the arguments of DINO."""
        return self.forward_intermediates(
            x, n, return_prefix_tokens, norm, output_fmt="NCHW" if reshape else "NLC", intermediates_only=True
        )

    @property
    def _num_embedded_prefix_tokens(self) -> int:
        """How many of the prefix tokens have a position embedding."""
        return 0 if self.no_embed_class else self.num_prefix_tokens

    def _embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x = self.patch_embed(x)  # (B, H, W, C)
        grid = x.shape[1], x.shape[2]
        pos_embed = resample_encoding(
            self.pos_embed, grid, self.patch_embed.grid_size, self._num_embedded_prefix_tokens
        )
        prefix = [token.expand(x.shape[0], -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        x = x.flatten(1, 2)
        if self.no_embed_class:
            x = x + pos_embed
        if prefix:
            x = torch.cat([*prefix, x], dim=1)
        if not self.no_embed_class:
            x = x + pos_embed
        return self.pos_drop(x), grid

    def _run(self, block: nn.Module, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return checkpoint(block, x, grid) if self.grad_checkpointing else block(x, grid)


def _resample_on_load(module: VisionTransformer, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    grid_size, num_prefix_tokens = module.patch_embed.grid_size, module._num_embedded_prefix_tokens
    resample_entry(state_dict, f"{prefix}pos_embed", grid_size, num_prefix_tokens)


FAMILY = Family(
    VisionTransformer,
    pretrained_cfg={"first_conv": "patch_embed.proj", "classifier": "head", "crop_pct": 0.9},
    out_indices=3,
)
