"""The frame of the hierarchical backbones: stages on ever coarser grids, and timm's interface around them.

A family's file builds its stages and hands them to ``HierarchicalBackbone``. Maps are channels-last, ``(B, H, W, C)``,
from the image to the head: the tokens ``(B, H·W, C)`` of a stage are the same memory.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import (
    ClassifierHead,
    calculate_drop_path_rates,
    register_notrace_function,
    to_2tuple,
    trunc_normal_,
)
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from flash_bla.layers import LayerNorm, check_attention_args
from flash_bla.tracing import is_exporting

STRIDE = 4  # of the first stage; each further stage halves the grid


class ConvEmbed(nn.Module):
    """Convolution and LayerNorm: images to the first tokens, or a stage's tokens to the next, coarser ones.

    Sides that are no multiple of the stride are padded with zeros, so that the grid is H/stride x W/stride, rounded up.

    Args:
        in_dim: Channels in.
        dim: Channels out.
        kernel_size: Side of the filters.
        stride: Step of the filters.
        padding: Zeros around the map.
        norm_eps: ε of the norm.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        kernel_size: int,
        stride: int,
        padding: int = 0,
        norm_eps: float = 1e-5,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.stride = stride
        self.proj = nn.Conv2d(in_dim, dim, kernel_size, stride, padding, **dd)
        self.norm = LayerNorm(dim, eps=norm_eps, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` to ``(B, H/stride, W/stride, dim)``."""
        x = pad_to_multiple(x, self.stride).permute(0, 3, 1, 2)
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class Stage(nn.Module):
    """Downsampling, then blocks on one grid, then a norm if the family has one.

    Args:
        downsample: Maps ``(B, H, W, C)`` of the stage before, or images, to this stage's.
        blocks: Modules that map tokens ``(B, N, C)`` and their grid (H, W) to tokens.
        norm: Norm of the tokens that leave the stage.
    """

    def __init__(self, downsample: nn.Module, blocks: Iterable[nn.Module], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm or nn.Identity()
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` to ``(B, H', W', C')``."""
        x = self.downsample(x)
        grid = x.shape[1], x.shape[2]
        x = x.flatten(1, 2)
        for block in self.blocks:
            x = checkpoint(block, x, grid) if self.grad_checkpointing else block(x, grid)
        return self.norm(x).unflatten(1, grid)


class HierarchicalBackbone(nn.Module):
    """Four stages, a final norm and a classifier, for images of any size, with the interface of timm's models.

    Position encodings are learned for ``img_size`` and resampled in calls with another size.

    Args:
        stages: The stages, finest first; stage i has the stride 4·2^i.
        dims: Channels of each stage.
        norm: What the last stage's map goes through before it is pooled.
        checkpoint_filter_fn: Maps a state dict with official entry names to this model's; must leave its own alone.
        in_chans: Input channels.
        num_classes: Classes of the head, 0 for none.
        global_pool: How the head pools: ``"avg"``, or ``""`` for not at all, and timm's others.
        drop_rate: Dropout before the head.
        num_features: Channels after ``norm``, where it projects to others than the last stage's.
    """

    output_fmt = "NHWC"  # of forward_features, in timm's words

    def __init__(
        self,
        stages: Sequence[Stage],
        dims: Sequence[int],
        norm: nn.Module,
        checkpoint_filter_fn: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]],
        in_chans: int,
        num_classes: int,
        global_pool: str,
        drop_rate: float,
        num_features: int | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.stages = nn.Sequential(*stages)
        self.norm = norm
        self.num_features = num_features or dims[-1]
        self.feature_info = [
            {"module": f"stages.{i}", "num_chs": dim, "reduction": STRIDE * 2**i} for i, dim in enumerate(dims)
        ]
        self.head = ClassifierHead(
            self.num_features, num_classes, global_pool, drop_rate, input_fmt="NHWC", device=device, dtype=dtype
        )
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()
        self._static = any(getattr(module, "static_grid", False) for module in self.modules())
        self.apply(_init_weights)
        self._checkpoint_filter_fn = checkpoint_filter_fn
        self.register_load_state_dict_pre_hook(_translate_on_load)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Changes the image size that the position encodings belong to, and resamples them."""
        for stage, grid in zip(self.stages, stage_grids(img_size), strict=False):
            for module in stage.modules():
                if hasattr(module, "set_grid_size"):
                    module.set_grid_size(grid)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes the blocks' activations in the backward pass instead of keeping them."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameters by depth, for layer decay: by stage (``coarse``), or by block."""
        blocks = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^stages\.(\d+)\.norm", (99999,)),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^stages\.0\.downsample", "blocks": r"^stages\.(\d+)" if coarse else blocks}

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay leaves out besides those of one dimension: tables of relative positions."""
        return {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the last layer, and the pooling if one is named; no classes leave the pooled features."""
        parameter = next(self.parameters())
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, device=parameter.device, dtype=parameter.dtype)
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(B, in_chans, H, W)`` of any size to logits ``(B, num_classes)``."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to the last map ``(B, H/32, W/32, num_features)``, before pooling."""
        return self.norm(self.stages(self._to_channels_last(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map to logits, or to what the last layer reads (``pre_logits``)."""
        return self.head(x, pre_logits=pre_logits)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Outputs of stages, as timm's models give them.

        Args:
            x: Images.
            indices: The last n stages (an integer), chosen ones (a list) or all (None).
            norm: Applies the final norm to the last stage's output.
            stop_early: Leaves out the stages after the last chosen one.
            output_fmt: ``"NCHW"`` or ``"NHWC"`` maps.
            intermediates_only: Leaves out the final features.

        Returns:
            Final features and a list of outputs, or that list.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}")
        last = len(self.stages) - 1
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        x = self._to_channels_last(x)
        outputs = []
        for i, stage in enumerate(self.stages[: max_index + 1] if stop_early else self.stages):
            x = stage(x)
            if i in take_indices:
                outputs.append(self.norm(x) if norm and i == last else x)
        if output_fmt == "NCHW":
            outputs = [y.permute(0, 3, 1, 2).contiguous() for y in outputs]
        if intermediates_only:
            return outputs
        return (x if stop_early and max_index < last else self.norm(x)), outputs

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes what follows the last chosen stage, the head too, and returns the chosen indices."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        num_chs = self.feature_info[max_index]["num_chs"]
        pruned = max_index < len(self.stages) - 1
        self.stages = self.stages[: max_index + 1]
        if prune_norm or pruned:
            self.norm = nn.Identity()
            prune_head = prune_head or pruned or num_chs != self.num_features
            self.num_features = self.head.in_features = num_chs
        if prune_head:
            self.reset_classifier(0, "")
        return take_indices

    def _to_channels_last(self, x: Tensor) -> Tensor:
        return check_image(x, STRIDE * 2 ** (len(self.stages) - 1), self._static).permute(0, 2, 3, 1)


def plan_stages(
    img_size: int | tuple[int, int],
    depths: Sequence[int],
    attention: str | Sequence[str],
    attention_args: dict[str, Any] | None,
    drop_path_rate: float,
    **options: Any,
) -> list[tuple[tuple[int, int], str, dict[str, Any], list[float]]]:
    """What the blocks of each stage are made from.

    Args:
        img_size: Image size.
        depths: Blocks of each stage.
        attention: Name of the attention, or a list of one for each stage.
        attention_args: Options that some of the attentions have.
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0.
        **options: What the backbone offers to any attention, besides the grid.

    Returns:
        For each stage its grid, the name of its attention, the options to offer to it, and the drop path of each block.

    Raises:
        ValueError: The list has another length, a name is unknown, or none of them has one of the options.
    """
    names = [attention] * len(depths) if isinstance(attention, str) else list(attention)
    if len(names) != len(depths):
        raise ValueError(f"attention must be a name or a list of {len(depths)} names, got {len(names)}")
    check_attention_args(names, attention_args or {})
    grids = stage_grids(img_size, len(depths))
    offers = [{**options, "grid_size": grid, **(attention_args or {})} for grid in grids]
    return list(
        zip(grids, names, offers, calculate_drop_path_rates(drop_path_rate, depths, stagewise=True), strict=True)
    )


def stage_grids(img_size: int | tuple[int, int], num_stages: int = 4) -> list[tuple[int, int]]:
    """The grid of each stage for an image size; padding rounds up."""
    height, width = to_2tuple(img_size)
    return [(-(-height // stride), -(-width // stride)) for stride in (STRIDE * 2**i for i in range(num_stages))]


@register_notrace_function  # torch.fx must not trace into it: it branches on shapes
def pad_to_multiple(x: Tensor, height: int, width: int | None = None) -> Tensor:
    """Pads maps ``(B, H, W, C)`` with zeros, below and on the right, to multiples of a height and a width."""
    width = width or height
    rows = (x.shape[1] + height - 1) // height * height - x.shape[1]
    columns = (x.shape[2] + width - 1) // width * width - x.shape[2]
    # Padding by nothing is a copy; for sizes in general a graph pads, since asking would bind it to some of them. In
    # torch.jit.trace sizes are tensors, of which nothing is known.
    if not torch.jit.is_tracing() and statically_known_true(rows == 0) and statically_known_true(columns == 0):
        return x
    return F.pad(x, (0, 0, 0, columns, 0, rows))


@register_notrace_function
def check_image(x: Tensor, stride: int, static: bool) -> Tensor:
    """Gives the images back, or raises a ValueError if they are smaller than the coarsest stride.

    With ``static``, ``torch.compile`` makes a graph for each image size instead of one for all but the first.
    """
    if x.ndim != 4:
        raise ValueError(f"images must have the shape (B, C, H, W), got {tuple(x.shape)}")
    if not is_exporting() and min(x.shape[2:]) < stride:
        raise ValueError(
            f"images must be at least {stride}x{stride}, the stride of the model, got {tuple(x.shape[2:])}"
        )
    if static and not is_exporting():
        for side in x.shape[2:]:
            operator.index(side)
    return x


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _translate_on_load(model: HierarchicalBackbone, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Lets ``load_state_dict`` take official files, also where the model is a part of another one."""
    own = {key[len(prefix) :]: state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
    own = model._checkpoint_filter_fn(own, model)
    state_dict.update({prefix + key: value for key, value in own.items()})
