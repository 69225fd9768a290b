"""LayerNorm for the residual branches of a transformer, and BatchNorm for inference."""

from __future__ import annotations

from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from flash_bla.layers.hooks import is_plain
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


def fold_batch_norm(conv: nn.Module, norm: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A convolution with the BatchNorm after it folded into its weights, and an identity; other modules as they are."""
    # pruned and parametrized convolutions compute their weight from other parameters
    has_weight = isinstance(conv, nn.Conv2d) and is_plain(conv, type(conv)) and "weight" in conv._parameters
    if has_weight and is_plain(norm, nn.BatchNorm2d):
        return fuse_conv_bn_eval(conv, norm), nn.Identity()
    return conv, norm
