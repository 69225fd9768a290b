"""Learned positional encodings that follow the grid."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function, to_2tuple
from torch import Tensor, nn

from flash_bla.layers.tokens import at_least_float32, count_prefix_tokens
from flash_bla.tracing import is_exporting


@register_notrace_function
def resample_encoding(
    encoding: Tensor, new_size: tuple[int, int], old_size: tuple[int, int], num_prefix_tokens: int = 0
) -> Tensor:
    """Resamples a positional encoding from one grid to another, bicubic with antialiasing.

    The result is that of ``timm.layers.resample_abs_pos_embed``. Here it is a product with two small matrices, because
    PyTorch cannot differentiate that interpolation for symbolic sizes: ``torch.compile`` would fail when a model that
    is being trained meets its second image size.

    Args:
        encoding: ``(1, prefix + H·W, C)``.
        new_size: Height and width wanted.
        old_size: H and W.
        num_prefix_tokens: Tokens that have no place on the grid and stay as they are.

    Returns:
        ``(1, prefix + new H · new W, C)``.
    """
    if torch.jit.is_tracing():  # sizes are tensors then
        new_size = int(new_size[0]), int(new_size[1])
    # A program that is exported for any size must not depend on whether the example's is the encoding's own.
    if not is_exporting() and tuple(new_size) == tuple(old_size):
        return encoding
    prefix, spatial = encoding[:, :num_prefix_tokens], encoding[:, num_prefix_tokens:]
    spatial = at_least_float32(spatial).unflatten(1, old_size)
    rows, columns = (_resampling_matrix(old, new, spatial) for old, new in zip(old_size, new_size, strict=True))
    with nullcontext() if encoding.is_meta else torch.autocast(encoding.device.type, enabled=False):
        spatial = torch.einsum("yh,bhwc,xw->byxc", rows, spatial, columns)
    return torch.cat([prefix, spatial.flatten(1, 2).to(encoding.dtype)], dim=1)


def _resampling_matrix(old: int, new: int, like: Tensor) -> Tensor:
    """Weights ``(new, old)`` of bicubic interpolation along one side (Keys' kernel, a = -0.5)."""
    step = old / new
    y, x = (torch.arange(size, dtype=like.dtype, device=like.device) + 0.5 for size in (new, old))
    t = (x - y[:, None] * step).abs() / torch.sym_max(step, 1.0)  # a smaller grid takes in more: antialiasing
    near, far = (1.5 * t - 2.5) * t * t + 1, ((-0.5 * t + 2.5) * t - 4) * t + 2
    weights = torch.where(t < 1, near, torch.where(t < 2, far, 0.0))
    return weights / weights.sum(dim=1, keepdim=True)


def resample_entry(
    state_dict: dict[str, Tensor], key: str, grid_size: tuple[int, int], num_prefix_tokens: int = 0
) -> None:
    """Resamples one entry of a state dict, an encoding ``(1, prefix + M, C)`` of another grid, to ``grid_size``.

    The other grid is taken to be square, which is all that M can tell; an entry that is absent, fits already or comes
    from no square grid is left as it is. (Weights of a rectangular grid: load them into a model of that grid and call
    its ``set_input_size``.)
    """
    encoding = state_dict.get(key)
    if encoding is None or encoding.ndim != 3:
        return
    num_tokens = encoding.shape[1] - num_prefix_tokens
    side = math.isqrt(max(num_tokens, 0))
    if num_tokens != grid_size[0] * grid_size[1] and side > 0 and side * side == num_tokens:
        state_dict[key] = resample_encoding(encoding, grid_size, (side, side), num_prefix_tokens)


class KeyPositionalEncoding(nn.Module):
    """Base of the attentions whose keys carry a learned encoding of their place: ``k + positional_encoding``.

    The encoding is learned on ``grid_size`` and resampled (bicubic) in calls with another grid, and in state dicts
    that were learned on another (square) grid. Prefix tokens get none.

    Args:
        dim: Channels C.
        grid_size: Grid that the parameter ``positional_encoding (1, M, C)`` belongs to.
    """

    def __init__(self, dim: int, grid_size: int | tuple[int, int], *, device=None, dtype=None) -> None:
        super().__init__()
        self.grid_size = to_2tuple(grid_size)
        num_tokens = self.grid_size[0] * self.grid_size[1]
        self.positional_encoding = nn.Parameter(torch.empty(1, num_tokens, dim, device=device, dtype=dtype))
        self.register_load_state_dict_pre_hook(_resample_on_load)

    def encode_position(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """The encoding ``(1, N, C)`` of tokens x ``(B, N, C)``."""
        encoding = resample_encoding(self.positional_encoding, grid, self.grid_size)
        prefix = count_prefix_tokens(x, grid)
        return F.pad(encoding, (0, 0, prefix, 0)) if prefix else encoding

    def set_grid_size(self, grid_size: tuple[int, int]) -> None:
        """Resamples the parameter itself, so that calls with this grid need not."""
        if tuple(grid_size) == self.grid_size:
            return
        self.positional_encoding = nn.Parameter(
            resample_encoding(self.positional_encoding.detach(), grid_size, self.grid_size),
            requires_grad=self.positional_encoding.requires_grad,
        )
        self.grid_size = tuple(grid_size)


def _resample_on_load(module: KeyPositionalEncoding, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    resample_entry(state_dict, f"{prefix}positional_encoding", module.grid_size)
