"""The depthwise convolution beside an attention."""

from __future__ import annotations

from timm.layers import register_notrace_module
from torch import Tensor, nn

from flash_bla.ops import depthwise_conv


@register_notrace_module  # torch.fx must not trace into it: it branches on shapes
class DepthwiseConv(nn.Conv2d):
    """Depthwise convolution of tokens that stand on a grid, and what follows it (``flash_bla.ops.depthwise_conv``).

    Linear attention mixes tokens through a matrix of low rank; this local branch gives back what that loses. Prefix
    tokens have no place on the grid and give zero.

    Args:
        channels: Number of filters. Tokens may have a multiple of it: the filters are then shared by all heads.
        kernel_size: Odd side of the filters.
        stride: 1, or 2 to halve the grid, rounding up.
    """

    def __init__(self, channels: int, kernel_size: int, stride: int = 1, *, device=None, dtype=None) -> None:
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
