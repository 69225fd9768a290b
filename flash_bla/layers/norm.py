"""LayerNorm for the residual branches of a transformer."""

from __future__ import annotations

from timm.layers import register_notrace_module
from torch import Tensor, nn

from flash_bla.ops import add_layer_norm


@register_notrace_module  # torch.fx must not trace into it: it asks for the type of tensors
class LayerNorm(nn.LayerNorm):
    """LayerNorm that stays in half precision under autocast (``flash_bla.ops.add_layer_norm``)."""

    def forward(
        self, x: Tensor, add: Tensor | None = None, *, residual: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """``(..., C)`` to the norm of x + add; with ``residual`` also that sum, for what is added to it later."""
        y, x = add_layer_norm(x, self.weight, self.bias, self.eps, add=add)
        return (y, x) if residual else y
