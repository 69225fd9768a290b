"""Attention modules: tokens ``(B, N, C)`` and a grid (H, W) in, tokens ``(B, N, C)`` out."""

from flash_bla.layers.attention import (
    attention_options,
    check_attention_args,
    create_attention,
    register_attention,
)
from flash_bla.layers.conv import DepthwiseConv, convolve_and_norm
from flash_bla.layers.cross_window import CrossShapedWindowAttention
from flash_bla.layers.dense import Linear, Mlp, apply_linear
from flash_bla.layers.focused import FocusedLinearAttention
from flash_bla.layers.generalized_linear import GeneralizedLinearAttention
from flash_bla.layers.linear import LinearAttention
from flash_bla.layers.mamba_like import MambaLikeLinearAttention
from flash_bla.layers.norm import LayerNorm
from flash_bla.layers.pola import PolaLinearAttention
from flash_bla.layers.position import KeyPositionalEncoding, resample_encoding, resample_entry
from flash_bla.layers.rank_augmented import GatedSoftmaxAttention, RankAugmentedLinearAttention
from flash_bla.layers.rope import axial_rope
from flash_bla.layers.softmax import SoftmaxAttention
from flash_bla.layers.window import WindowAttention

__all__ = [
    "CrossShapedWindowAttention",
    "DepthwiseConv",
    "FocusedLinearAttention",
    "GatedSoftmaxAttention",
    "GeneralizedLinearAttention",
    "KeyPositionalEncoding",
    "LayerNorm",
    "Linear",
    "LinearAttention",
    "MambaLikeLinearAttention",
    "Mlp",
    "PolaLinearAttention",
    "RankAugmentedLinearAttention",
    "SoftmaxAttention",
    "WindowAttention",
    "apply_linear",
    "attention_options",
    "axial_rope",
    "check_attention_args",
    "convolve_and_norm",
    "create_attention",
    "register_attention",
    "resample_encoding",
    "resample_entry",
]
