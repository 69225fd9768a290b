"""Learned positional encodings that follow the grid."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed, to_2tuple
from torch import Tensor, nn

from flash_bla.layers.tokens import count_prefix_tokens


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
        state_dict[key] = resample_abs_pos_embed(encoding, grid_size, (side, side), num_prefix_tokens)


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

    def encode_position(self, k: Tensor, grid: tuple[int, int]) -> Tensor:
        """Adds the encoding to keys ``(B, N, C)``."""
        encoding = resample_abs_pos_embed(self.positional_encoding, grid, self.grid_size, num_prefix_tokens=0)
        return k + F.pad(encoding, (0, 0, count_prefix_tokens(k, grid), 0)).to(k.dtype)

    def set_grid_size(self, grid_size: tuple[int, int]) -> None:
        """Resamples the parameter itself, so that calls with this grid need not."""
        self.positional_encoding = nn.Parameter(
            resample_abs_pos_embed(self.positional_encoding.detach(), grid_size, self.grid_size, num_prefix_tokens=0),
            requires_grad=self.positional_encoding.requires_grad,
        )
        self.grid_size = tuple(grid_size)


def _resample_on_load(module: KeyPositionalEncoding, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    resample_entry(state_dict, f"{prefix}positional_encoding", module.grid_size)
