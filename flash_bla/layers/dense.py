"""Linear layer and MLP."""

from __future__ import annotations

import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from flash_bla.ops import linear


@register_notrace_module  # torch.fx must not trace into it: it asks for the type of tensors
class Linear(nn.Linear):
    """``nn.Linear`` whose gradients take less work in eager mixed-precision training (``flash_bla.ops.linear``)."""

    def forward(self, x: Tensor, factor: Tensor | None = None) -> Tensor:
        """``(..., C)`` to ``(..., D)``, each output times its own factor ``(D,)``, which multiplies the weights."""
        weight, bias = self.weight, self.bias
        if factor is not None:
            weight = (weight * factor[:, None]).to(weight.dtype)
            bias = None if bias is None else (bias * factor).to(bias.dtype)
        return linear(x, weight, bias)


class Mlp(nn.Module):
    """Two linear layers with a GELU between them.

    Args:
        dim: Channels.
        hidden_dim: Channels between the layers.
        drop: Dropout after each layer.
    """

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.fc1 = Linear(dim, hidden_dim, **dd)
        self.fc2 = Linear(hidden_dim, dim, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., C)`` to ``(..., C)``."""
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))
