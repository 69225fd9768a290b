"""The depthwise convolution beside an attention."""

from __future__ import annotations

from timm.layers import register_notrace_module
from torch import Tensor, nn

from flash_bla.layers.hooks import is_plain
from flash_bla.layers.norm import LayerNorm
from flash_bla.ops import depthwise_conv, linear_attention, linear_attention_dwc
from flash_bla.ops.conv_norm import depthwise_conv_norm
from flash_bla.ops.depthwise_conv import KERNEL_SIZES


@register_notrace_module  # torch.fx must not trace into it: it branches on shapes
class DepthwiseConv(nn.Conv2d):
    """Depthwise convolution of tokens that stand on a grid, and what follows it (``flash_bla.ops.depthwise_conv``).

    Linear attention mixes tokens through a matrix of low rank; this local branch gives back what that loses. Prefix
    tokens have no place on the grid and give zero.

    Args:
        channels: Number of filters. Tokens may have a multiple of it: the filters are then shared by all heads.
        kernel_size: Side of the filters, 3, 5 or 7.
        stride: 1, or 2 to halve the grid, rounding up.

    Raises:
        ValueError: Another ``kernel_size``.
    """

    def __init__(self, channels: int, kernel_size: int, stride: int = 1, *, device=None, dtype=None) -> None:
        if kernel_size not in KERNEL_SIZES:
            raise ValueError(f"kernel_size must be one of {KERNEL_SIZES}, got {kernel_size!r}")
        super().__init__(
            channels, channels, kernel_size, stride, kernel_size // 2, groups=channels, device=device, dtype=dtype
        )

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int],
        *,
        residual: bool = False,
        input_activation: str | None = None,
        activation: str | None = None,
        add: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> Tensor:
        """``(B, N, C)`` to (add + activation(w ⋆ h(x) + b [+ h(x)])) · gate, with h the activation of the input."""
        return depthwise_conv(
            x,
            grid,
            self.weight,
            self.bias,
            stride=self.stride[0],
            residual=residual,
            input_activation=input_activation,
            activation=activation,
            add=add,
            gate=gate,
        )


def attend_with_conv(
    conv: nn.Module, qkv: Tensor, grid: tuple[int, int], *, v: Tensor | None = None, **options
) -> Tensor:
    """``linear_attention_dwc`` with a ``DepthwiseConv``, or what another library has put in its place.

    That, and a module with hooks, is called on the values, after the attention.
    """
    if is_plain(conv, DepthwiseConv):
        return linear_attention_dwc(qkv, grid, conv.weight, conv.bias, v=v, **options)
    q, k, *others = qkv.unbind(2)
    v = others.pop(0) if v is None else v.unflatten(2, (q.shape[2], -1))
    o = linear_attention(*(x.transpose(1, 2) for x in (q, k, v)), **options)
    gate = others[0].flatten(2) if others else None
    return conv(v.flatten(2), grid, add=o.transpose(1, 2).flatten(2), gate=gate)


def convolve_and_norm(
    conv: nn.Module, norm: nn.Module, x: Tensor, grid: tuple[int, int], add: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The norm of s = z + conv(z), of tokens z = x [+ add], and s."""
    # torch.fx, whose x is no tensor, sees the modules
    if isinstance(x, Tensor) and is_plain(conv, DepthwiseConv) and is_plain(norm, LayerNorm):
        return depthwise_conv_norm(x, grid, conv.weight, conv.bias, norm.weight, norm.bias, norm.eps, add=add)
    return norm(conv(x if add is None else x + add, grid, residual=True), residual=True)
