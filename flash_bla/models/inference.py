"""Models for inference: what is constant after training is folded into the weights."""

from __future__ import annotations

import copy

import torch
from torch import nn

from flash_bla.layers.norm import fold_batch_norm


@torch.no_grad()
def fuse_for_inference(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of a model for inference, with fewer operations and the same outputs up to rounding.

    BatchNorm is folded into the convolution before it; then each module that has a method ``fold_constants`` folds what
    is its own: RAVLT its layer scale, PolaFormer's attention its scale (into the keys' projection and encoding) and
    powers. A layer that was replaced, by a quantised one or an adapter, or that has hooks, as pruned ones do, stays as
    it is, and so does what would go into it. The copy cannot be trained, and the model does not load its state dict.

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
        if hasattr(module, "fold_constants"):
            module.fold_constants()
    return model if dtype is None else model.to(dtype)


def _fold_batch_norms(layers: nn.Sequential) -> None:
    names = list(layers._modules)
    for conv, norm in zip(names, names[1:], strict=False):
        layers._modules[conv], layers._modules[norm] = fold_batch_norm(layers._modules[conv], layers._modules[norm])
