"""Linear layer and MLP."""

from __future__ import annotations

import torch.nn.functional as F
from timm.layers import register_notrace_function, register_notrace_module
from torch import Tensor, nn

from flash_bla.layers.hooks import is_plain
from flash_bla.ops import linear, silu_gate
from flash_bla.ops.linear import mlp

register_notrace_function(silu_gate)  # torch.fx must not trace into it: it asks for the type of tensors


@register_notrace_module  # likewise
class Linear(nn.Linear):
    """``nn.Linear`` whose gradients take less work in eager mixed-precision training (``flash_bla.ops.linear``)."""

    def forward(self, x: Tensor, **options) -> Tensor:
        """``(..., C)`` to ``(..., D)``; options are those of ``flash_bla.ops.linear``."""
        return linear(x, self.weight, self.bias, **options)


def apply_linear(
    layer: nn.Module, x: Tensor, *, gelu: bool = False, gate: Tensor | None = None, factor: Tensor | None = None,
    split: tuple[int, ...] = (),
) -> Tensor:  # fmt: skip
    """layer(gelu(x)) or layer(x · silu(gate)), each output times its own factor, split as by ``unflatten``.

    A ``Linear`` does all of it in one; not what another library has put in its place, nor where a hook wants to see the
    layer's input and output.
    """
    if is_plain(layer, Linear) and (factor is None or type(layer.weight) is nn.Parameter):  # and not quantised
        return layer(x, gelu=gelu, gate=gate, factor=factor, split=split)
    if gelu or gate is not None:
        x = F.gelu(x) if gelu else silu_gate(x, gate)
    x = layer(x)
    if factor is not None:
        x = x * factor.to(x.dtype)
    return x.unflatten(-1, split) if split else x


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
        fc1, fc2 = self.fc1, self.fc2
        if self.drop.p and self.training:  # between the activation and the layer
            x = fc2(self.drop(F.gelu(fc1(x))))
        elif is_plain(fc1, Linear) and is_plain(fc2, Linear) and isinstance(x, Tensor):  # torch.fx sees the layers
            x = mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        else:
            x = apply_linear(fc2, fc1(x), gelu=True)
        return self.drop(x)
