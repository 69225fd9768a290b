"""Operators on tensors, as PyTorch reference and as Triton kernels: attentions and what surrounds them."""

from flash_bla.ops.depthwise_conv import depthwise_conv
from flash_bla.ops.feature_maps import FeatureMap, focusing_power, signed_power
from flash_bla.ops.layer_norm import add_layer_norm
from flash_bla.ops.linear import linear
from flash_bla.ops.linear_attention import (
    decoupled_la,
    linear_attention,
    linear_attention_dwc,
    linear_attention_qkvpacked,
    simple_la,
    varlen_linear_attention,
)
from flash_bla.ops.piecewise_sparse import piecewise_sparse_attention
from flash_bla.ops.silu_gate import silu_gate

__all__ = [
    "FeatureMap",
    "add_layer_norm",
    "decoupled_la",
    "depthwise_conv",
    "focusing_power",
    "linear",
    "linear_attention",
    "linear_attention_dwc",
    "linear_attention_qkvpacked",
    "piecewise_sparse_attention",
    "signed_power",
    "silu_gate",
    "simple_la",
    "varlen_linear_attention",
]
