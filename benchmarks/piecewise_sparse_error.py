"""Draws the error of piecewise sparse attention against softmax attention over its density, on smooth tokens.

    python -m benchmarks.piecewise_sparse_error error.png

Tokens of images vary smoothly from neighbour to neighbour; here they are sums of a few waves along the sequence.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from flash_bla import piecewise_sparse_attention

DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0)


def smooth_tokens(shape: tuple[int, int, int, int], waves: int, generator: torch.Generator) -> Tensor:
    """Tokens ``(B, H, N, D)`` of unit variance, whose shortest wave is N / waves tokens long."""
    B, H, N, D = shape
    frequency = torch.arange(1, waves + 1, dtype=torch.float64)
    phase = 2 * torch.pi * torch.linspace(0, 1, N, dtype=torch.float64)[:, None] * frequency
    amplitudes = torch.randn(B, H, 2 * waves, D, generator=generator, dtype=torch.float64)
    return torch.cat([phase.cos(), phase.sin()], dim=-1) @ amplitudes / waves**0.5


def errors(densities, use_bias: bool = False, tokens: int = 4096, waves: int = 16) -> list[float]:
    """Relative errors in the Frobenius norm, in float64, with logits of a standard deviation of about 2."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (smooth_tokens((1, 2, tokens, 64), waves, generator) for _ in range(3))
    q = 2 * q
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    outputs = (piecewise_sparse_attention(q, k, v, density, use_bias=use_bias) for density in densities)
    return [((o - exact).norm() / exact.norm()).item() for o in outputs]


def main(path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for use_bias in (False, True):
        axes.plot(DENSITIES[:-1], errors(DENSITIES[:-1], use_bias), marker="o", label=f"use_bias={use_bias}")
    axes.set(xlabel="density", ylabel="relative error", yscale="log", title="4096 smooth tokens, blocks of 64")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main(*sys.argv[1:])
