"""Softmax attention within windows, of Swin Transformer."""

from __future__ import annotations

import operator
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple, trunc_normal_
from torch import Tensor, nn

from flash_bla.layers.attention import register_attention
from flash_bla.layers.dense import Linear
from flash_bla.layers.position import resample_encoding, resample_entry
from flash_bla.layers.tokens import count_prefix_tokens, head_width
from flash_bla.ops.arguments import autocast_dtype, merge_heads, split_heads
from flash_bla.ops.triton_support import is_eager
from flash_bla.tracing import is_exporting, is_traced


@register_attention("window")
class WindowAttention(nn.Module):
    r"""Softmax attention within windows, with a learned bias for each relative position.

    .. math::
        O_i = \sum_{j ∈ W(i)} softmax_j(d^{-1/2} q_i · k_j + b_{p(i) - p(j)})\, v_j

    with W(i) the window of token i and p its place. With ``shift``, the windows lie half a window further down and to
    the right, so that neighbours of different windows meet. The map is rolled for that, and a window at the seam falls
    into parts that ignore each other.

    A side of the map that is no longer than the window's is one window, which is not shifted and uses the middle of
    the table. A side that is no multiple of the window's is padded with zeros, as timm's Swin does it: after the roll,
    with the seam where a map of the padded size has it, and the padding takes part as keys.

    Args:
        dim: Channels C.
        num_heads: Number of heads; must divide ``dim``.
        qkv_bias: Whether the projection to q, k and v has a bias.
        attn_drop: Dropout of the attention weights.
        proj_drop: Dropout after the output projection.
        window_size: Height and width of the windows (h, w), or one number for both; the parameter
            ``relative_position_bias_table ((2h - 1)(2w - 1), num_heads)`` belongs to it. State dicts with the table of
            another (square) window are resampled.
        shift: Whether the windows are shifted.

    Raises:
        ValueError: ``dim`` does not divide into such heads, or the window is empty.

    Reference:
        Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", ICCV 2021.
    """

    static_grid = True  # how a map falls into windows cannot be compiled for any size

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        window_size: int | tuple[int, int] = 7,
        shift: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        head_width(dim, num_heads)
        self.num_heads = num_heads
        self.window_size = to_2tuple(window_size)
        self.shift = shift
        if min(self.window_size) < 1:
            raise ValueError(f"window_size must be positive, got {window_size}")
        height, width = _table_size(self.window_size)
        self.relative_position_bias_table = nn.Parameter(torch.empty(height * width, num_heads, **dd))
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()
        self.register_load_state_dict_pre_hook(_resample_on_load)

    def reset_parameters(self) -> None:
        """Initializes what is not a layer of its own."""
        trunc_normal_(self.relative_position_bias_table, std=0.02)

    def set_window_size(self, window_size: int | tuple[int, int]) -> None:
        """Changes the size of the windows and resamples the table (bicubic)."""
        old, new = self.window_size, to_2tuple(window_size)
        if new == old:
            return
        if min(new) < 1:
            raise ValueError(f"window_size must be positive, got {window_size}")
        table = self.relative_position_bias_table
        self.relative_position_bias_table = nn.Parameter(
            resample_encoding(table.detach()[None], _table_size(new), _table_size(old))[0],
            requires_grad=table.requires_grad,
        )
        self.window_size = new

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """``(B, N, C)`` to ``(B, N, C)``; N must be H·W."""
        height, width = grid = whole_grid(x, grid)
        window = min(self.window_size[0], height), min(self.window_size[1], width)
        shift = (0, 0)
        if self.shift:
            shift = tuple(
                side // 2 if side < length else 0 for side, length in zip(self.window_size, grid, strict=True)
            )
        padded = tuple(length + -length % side for length, side in zip(grid, window, strict=True))
        order, inverse, index, seam = _window_tables(x, grid, padded, window, shift, self.window_size)

        x = _take(x, order, inverse).unflatten(1, (-1, window[0] * window[1])).flatten(0, 1)
        q, k, v = (split_heads(y, self.num_heads) for y in self.qkv(x).chunk(3, dim=-1))
        bias = self.relative_position_bias_table.to(q.dtype)[index].permute(2, 0, 1)[None]
        if seam is not None:  # for each image the windows' own
            bias = (bias + seam.to(bias.dtype).expand(q.shape[0] // seam.shape[0], *seam.shape)).flatten(0, 1)
        x = F.scaled_dot_product_attention(q, k, v, bias, dropout_p=self.attn_drop.p if self.training else 0.0)
        x = merge_heads(x).unflatten(0, (-1, padded[0] * padded[1] // x.shape[2])).flatten(1, 2)
        return self.proj_drop(self.proj(_take(x, inverse, order)))


def whole_grid(x: Tensor, grid: tuple[int, int]) -> tuple[int, int]:
    """The grid of the tokens ``(B, N, C)``, in constants; a ValueError if they are not as many as it has places."""
    if count_prefix_tokens(x, grid):
        raise ValueError(
            f"attention within windows takes no class or register tokens: grid {grid[0]}x{grid[1]} has "
            f"{grid[0] * grid[1]} places, got {x.shape[1]} tokens"
        )
    return tuple(grid) if is_exporting() else (operator.index(grid[0]), operator.index(grid[1]))


def split_windows(x: Tensor, window: tuple[int, int]) -> Tensor:
    """Maps ``(B, H, W, ...)`` to the tokens of their windows ``(B·windows, h·w, ...)``."""
    x = x.unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0]))
    return x.transpose(2, 3).flatten(0, 2).flatten(1, 2)


def merge_windows(x: Tensor, window: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The inverse of ``split_windows``: ``(B·windows, h·w, ...)`` to ``(B, H, W, ...)``."""
    x = x.unflatten(1, window).unflatten(0, (-1, grid[0] // window[0], grid[1] // window[1]))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _table_size(window: tuple[int, int]) -> tuple[int, int]:
    return 2 * window[0] - 1, 2 * window[1] - 1


def _resample_on_load(module: WindowAttention, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    key = f"{prefix}relative_position_bias_table"
    if key in state_dict:
        entry = {key: state_dict[key][None]}
        resample_entry(entry, key, _table_size(module.window_size))
        state_dict[key] = entry[key][0]


def _window_tables(
    x: Tensor,
    grid: tuple[int, int],
    padded: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int],
    table_window: tuple[int, int],
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """How the tokens of a grid fall into windows, on x's device.

    They are kept for the arguments of the last calls, but while PyTorch traces, where they become part of the graph.

    Returns:
        The tokens in the order of the windows of the shifted and padded map, with the number of tokens in the place of
        the padding; the place of each token in it; None for both where they stay in their places. The rows of the table
        for pairs of a window's tokens ``(N, N)``. What is added to the scores of each window ``(windows, 1, N, N)``,
        -inf for pairs that do not belong together; None without a shift.
    """
    arguments = tuple(grid), padded, window, shift, table_window, x.device, autocast_dtype(x)
    if is_traced(x):
        return _make_window_tables(*arguments)
    return _cached_window_tables(*arguments)


def _make_window_tables(grid, padded, window, shift, table_window, device, dtype):
    # Offsets (h, h) and (w, w) of two tokens' rows and columns, counted from the table's first entry.
    dy, dx = (
        torch.arange(side, device=device)[:, None] - torch.arange(side, device=device) + table_side - 1
        for side, table_side in zip(window, table_window, strict=True)
    )
    index = dy[:, None, :, None] * _table_size(table_window)[1] + dx[:, None]
    index = index.flatten(2, 3).flatten(0, 1)
    if window == grid:
        return None, None, index, None
    height, width = grid
    token = torch.arange(height * width, device=device).unflatten(0, grid).roll((-shift[0], -shift[1]), dims=(0, 1))
    token = F.pad(token, (0, padded[1] - width, 0, padded[0] - height), value=height * width)
    place = torch.arange(padded[0] * padded[1], device=device).unflatten(0, (-1, window[0] * window[1]))
    place = merge_windows(place, window, padded)[0, :height, :width].roll(shift, dims=(0, 1))
    order, inverse = split_windows(token[None], window).flatten(), place.flatten()
    if not any(shift):
        return order, inverse, index, None
    # The seam: behind it are the rows and columns that came from the other end.
    behind = [torch.arange(length, device=device) >= length - s for length, s in zip(padded, shift, strict=True)]
    region = split_windows((2 * behind[0][:, None] + behind[1])[None], window)[:, None]
    apart = region[..., None] != region[..., None, :]
    return order, inverse, index, torch.zeros(apart.shape, dtype=dtype, device=device).masked_fill(apart, -torch.inf)


@lru_cache(maxsize=32)
def _cached_window_tables(*arguments):
    with torch.inference_mode(False):  # tables first made for inference must serve training too
        return _make_window_tables(*arguments)


def _take(x: Tensor, order: Tensor | None, inverse: Tensor | None) -> Tensor:
    """Tokens ``(B, N, C)`` in another order, with zeros where that names token N."""
    if order is None:
        return x
    if torch.compiler.is_compiling() or is_eager(x):
        return _Take.apply(x, order, inverse)
    return _select(x, order)


class _Take(torch.autograd.Function):
    """``_take``, whose gradient takes the tokens back; that of indexing would add up what comes to each place."""

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(order, inverse)
        return _select(x, order)

    @staticmethod
    def backward(ctx, dy):
        order, inverse = ctx.saved_tensors
        return _Take.apply(dy, inverse, order), None, None


def _select(x: Tensor, order: Tensor) -> Tensor:
    return (F.pad(x, (0, 0, 0, 1)) if order.shape[0] > x.shape[1] else x).index_select(1, order)
