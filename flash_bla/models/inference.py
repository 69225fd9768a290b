"""Models for inference: what is constant after training is folded into the weights."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


@torch.no_grad()
def fuse_for_inference(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of a model for inference, with fewer operations and the same outputs up to rounding.

    BatchNorm is folded into the convolution before it; then each module that has a method ``fuse`` folds what is its
    own: RAVLT its layer scale, PolaFormer's attention its scale (into the keys' projection and encoding) and powers.
    A linear layer that was replaced, by a quantised one or an adapter, stays as it is, and so does what would go into
    it. The copy cannot be trained, and the model does not load its state dict.

    Args:
        model: Any model of this package; it stays as it is.
        dtype: Type of the copy's weights, bfloat16 or float16 for speed; images must then have it, too. None leaves it.

    Example:
        >>> fused = fuse_for_inference(timm.create_model("mlla_tiny").cuda(), torch.bfloat16)
        >>> logits = fused(images.bfloat16())
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for module in list(model.modules()):
        if isinstance(module, nn.Sequential):
            _fold_batch_norms(module)
        if hasattr(module, "fuse"):
            module.fuse()
    return model if dtype is None else model.to(dtype)


def _fold_batch_norms(layers: nn.Sequential) -> None:
    names = list(layers._modules)
    for conv, norm in zip(names, names[1:], strict=False):
        pair = layers._modules[conv], layers._modules[norm]
        if isinstance(pair[0], nn.Conv2d) and isinstance(pair[1], nn.BatchNorm2d):
            layers._modules[conv] = fuse_conv_bn_eval(*pair)
            layers._modules[norm] = nn.Identity()
