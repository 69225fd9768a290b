"""Linear layer and MLP."""

from __future__ import annotations

import torch.nn.functional as F
from timm.layers import register_notrace_function, register_notrace_module
from torch import Tensor, nn

from flash_bla.ops import linear, silu_gate

register_notrace_function(silu_gate)  # torch.fx must not trace into it: it asks for the type of tensors


@register_notrace_module  # likewise
class Linear(nn.Linear):
    """``nn.Linear`` whose gradients take less work in eager mixed-precision training (``flash_bla.ops.linear``)."""

    def forward(
        self, x: Tensor, *, factor: Tensor | None = None, gelu: bool = False, gate: Tensor | None = None
    ) -> Tensor:
        """``(..., C)`` to ``(..., D)``, each output times its own ``factor (D,)``; for the rest ``activate_linear``."""
        weight, bias = self.weight, self.bias
        if factor is not None:
            weight = (weight * factor[:, None]).to(weight.dtype)
            bias = None if bias is None else (bias * factor).to(bias.dtype)
        return linear(x, weight, bias, gelu=gelu, gate=gate)


def activate_linear(layer: nn.Module, x: Tensor, *, gelu: bool = False, gate: Tensor | None = None) -> Tensor:
    """layer(gelu(x)), or layer(x · silu(gate)), of which a ``Linear`` keeps less for the backward pass."""
    # not what another library has put in its place, nor where a hook wants to see the layer's input
    if type(layer) is Linear and not layer._forward_pre_hooks and not layer._forward_hooks:
        return layer(x, gelu=gelu, gate=gate)
    return layer(F.gelu(x) if gelu else silu_gate(x, gate))


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
        x = self.fc1(x)
        if self.drop.p and self.training:  # between the activation and the layer
            x = self.fc2(self.drop(F.gelu(x)))
        else:
            x = activate_linear(self.fc2, x, gelu=True)
        return self.drop(x)
