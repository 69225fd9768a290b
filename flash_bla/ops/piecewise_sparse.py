"""Piecewise sparse attention: the public function, and the plain PyTorch that specifies it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flash_bla.ops import triton_piecewise_sparse
from flash_bla.ops.arguments import autocast, check_tensors, choose_backend, expect, without_autocast


def piecewise_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    density: float = 0.1,
    block_size: int = 64,
    scale: float | None = None,
    use_bias: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""Softmax self-attention, exact on the blocks of keys that matter most and expanded around their means elsewhere.

    Queries and keys are cut into blocks of ``block_size`` tokens. Each block of queries keeps the
    ``max(1, int(density * blocks))`` blocks of keys with the highest :math:`s \bar q_i \cdot \bar k_j`; then

    .. math:: o_n = \frac{\sum_{m ∈ kept} e^{s q_n \cdot k_m} v_m
                          + \sum_{j ∉ kept} |j| e^{s q_n \cdot \bar k_j} \bar v_j
                          + \frac{s}{N} \left( \sum_{j ∉ kept} |j| e^{s q_n \cdot \bar k_j} \right) q_n H}
                         {\sum_{m ∈ kept} e^{s q_n \cdot k_m} + \sum_{j ∉ kept} |j| e^{s q_n \cdot \bar k_j}},
              \qquad H = \sum_j \sum_{m ∈ j} (k_m - \bar k_j)^T v_m

    with bars for the means over a block's tokens, \|j\| the number of them (the last block may be shorter) and
    s = ``scale``. With ``density`` 1 this is softmax attention. Sums and exponentials are computed in float32 (float64
    for float64 inputs); under autocast q, k and v are cast to its type.

    Meant for inference: the kernels have no backward pass. The reference has one (through the values, not through the
    choice of blocks), but its memory grows with N², so it never takes the kernels' place unasked.

    Args:
        q: Queries ``(B, H, N, D)``; any strides here and below.
        k: Keys, shaped as q.
        v: Values, shaped as q, of the dtype of q and k: float16, bfloat16, float32 or float64.
        density: Share of the blocks of keys that each block of queries keeps, in (0, 1].
        block_size: Tokens in a block. The kernels take 16, 32, 64 and 128, and head widths D up to 128; the reference
            takes any.
        scale: D^-0.5 by default.
        use_bias: Rank blocks by their scores plus :math:`\log(\|H_j\|_2 + 10^{-5})`, H_j being a block's part of H: how
            much is lost where the block is not kept.
        backend: ``"triton"`` or ``"reference"``; by default the environment variable ``FLASH_BLA_BACKEND``, else Triton
            for CUDA tensors where it is installed, and the PyTorch reference elsewhere.

    Returns:
        ``(B, H, N, D)`` in the dtype of v, laid out so that ``.transpose(1, 2).flatten(2)`` copies nothing on CUDA.

    Raises:
        ValueError: A shape, device, density, block size or name that does not fit.
        TypeError: Not tensors, or dtypes that differ or are not supported.
        RuntimeError: A backward pass through the kernels.

    Reference:
        Li et al., "PISA: Piecewise Sparse Attention Is Wiser for Efficient Diffusion Transformers", 2026.
    """
    q, k, v = autocast(q, k, v)
    check_tensors({"q": q, "k": k, "v": v}, "(B, H, N, D)", ndim=4)
    for name, x in (("k", k), ("v", v)):
        expect(name, x, tuple(q.shape), "the shape of q")
    if q.shape[2] == 0:
        raise ValueError(f"q must have at least one token, got shape {tuple(q.shape)}")
    check_options(density, block_size)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with without_autocast(q):
        if choose_backend(backend, q) == "reference":
            inputs = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v)]
            statistics = block_statistics(*inputs, block_size)
            chosen = choose_blocks(statistics, density, scale, use_bias)
            return attend(*inputs, statistics, chosen, block_size, scale).to(v.dtype)
        triton_piecewise_sparse.check_limits(q, block_size)
        detached = q.detach(), k.detach(), v.detach()
        statistics = triton_piecewise_sparse.block_statistics(*detached, block_size, use_bias)
        statistics = BlockStatistics(*statistics)
        scores = score_blocks(statistics, scale, use_bias)
        choice = triton_piecewise_sparse.choose(scores, count_kept(scores, density), q.shape[2], block_size)
        means = statistics.k_mean, statistics.v_mean
        return triton_piecewise_sparse.attend(q, k, v, *means, statistics.slope, *choice, block_size, scale)


def check_options(density: float, block_size: int) -> None:
    """Raises what ``piecewise_sparse_attention`` raises for these two."""
    if not isinstance(density, (int, float)) or not 0 < density <= 1:
        raise ValueError(f"density must be a number in (0, 1], got {density!r}")
    if not isinstance(block_size, int) or block_size < 1:
        raise ValueError(f"block_size must be a positive integer, got {block_size!r}")


class BlockStatistics(NamedTuple):
    """What is known of the blocks, in float32 at least."""

    q_mean: Tensor
    """``(B, H, blocks, D)``."""
    k_mean: Tensor
    """``(B, H, blocks, D)``."""
    v_mean: Tensor
    """``(B, H, blocks, D)``; the means rather than the sums, which half-precision types may not hold."""
    slope: Tensor
    """H, ``(B, H, D, D)``."""
    slope_norm: Tensor
    """‖H_j‖₂ of each block's part of it, ``(B, H, blocks)``; may be empty if nobody needs it."""


def choose_blocks(statistics: BlockStatistics, density: float, scale: float, use_bias: bool) -> Tensor:
    """Indices of the blocks of keys that each block of queries keeps, ``(B, H, blocks, kept)``."""
    scores = score_blocks(statistics, scale, use_bias)
    return scores.topk(count_kept(scores, density), dim=-1).indices


def score_blocks(statistics: BlockStatistics, scale: float, use_bias: bool) -> Tensor:
    """What blocks are chosen by: for each block of queries and each of keys, ``(B, H, blocks, blocks)``."""
    scores = (scale * statistics.q_mean) @ statistics.k_mean.mT
    if use_bias:  # published with a softmax around it, which does not change the order
        scores = scores + torch.log(statistics.slope_norm + 1e-5).unsqueeze(-2)
    return scores


def count_kept(scores: Tensor, density: float) -> int:
    return max(1, int(density * scores.shape[-1]))


def block_statistics(q: Tensor, k: Tensor, v: Tensor, block_size: int) -> BlockStatistics:
    """The statistics by their definition."""
    N = q.shape[2]
    blocks = -(-N // block_size)
    sizes = _block_sizes(q, block_size).unsqueeze(-1)
    padding = (0, 0, 0, blocks * block_size - N)
    q, k, v = (torch.nn.functional.pad(x, padding).unflatten(2, (blocks, block_size)) for x in (q, k, v))
    q_mean, k_mean, v_mean = (x.sum(3) / sizes for x in (q, k, v))
    slopes = (k - k_mean.unsqueeze(3)).mT @ v  # padded rows of v are zero, so those of k do not count
    return BlockStatistics(q_mean, k_mean, v_mean, slopes.sum(2), torch.linalg.matrix_norm(slopes))


def attend(
    q: Tensor, k: Tensor, v: Tensor, statistics: BlockStatistics, chosen: Tensor, block_size: int, scale: float
) -> Tensor:
    """The attention with the blocks given, by its definition: N² logits of tokens beside N · blocks of means."""
    N, blocks = q.shape[2], chosen.shape[2]
    kept = q.new_zeros((*chosen.shape[:3], blocks), dtype=torch.bool).scatter(-1, chosen, True)
    kept = kept.repeat_interleave(block_size, dim=2)[:, :, :N]  # for each query
    exact = (q @ k.mT * scale).masked_fill(~kept.repeat_interleave(block_size, dim=3)[..., :N], -torch.inf)
    expanded = q @ statistics.k_mean.mT * scale + _block_sizes(q, block_size).log()
    weights = torch.cat([exact, expanded.masked_fill(kept, -torch.inf)], dim=-1).softmax(dim=-1)
    exact, expanded = weights.split([N, blocks], dim=-1)
    first_order = expanded.sum(-1, keepdim=True) * (scale / N) * (q @ statistics.slope)
    return exact @ v + expanded @ statistics.v_mean + first_order


def _block_sizes(like: Tensor, block_size: int) -> Tensor:
    N = like.shape[2]
    starts = torch.arange(0, N, block_size, device=like.device, dtype=like.dtype)
    return (N - starts).clamp(max=block_size)
