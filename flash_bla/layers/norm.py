"""LayerNorm that keeps half precision."""

from __future__ import annotations

import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from flash_bla.ops.arguments import without_autocast


@register_notrace_module  # torch.fx must not trace into it: it asks for the type of tensors
class LayerNorm(nn.LayerNorm):
    """LayerNorm, whose output has the input's type under autocast, too.

    PyTorch's gives float32 there, which the next linear layer rounds again: twelve more bytes moved for an element.
    Statistics are float32 in both. An input that is wider than autocast's type stays so.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``(..., C)`` to ``(..., C)``."""
        weight, bias = (None if p is None else p.to(x.dtype) for p in (self.weight, self.bias))
        with without_autocast(x):
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)
