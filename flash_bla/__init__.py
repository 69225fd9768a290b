"""flash_bla: linear-attention vision backbones and the Triton kernels beneath them.

Importing the package registers its models with timm:

    import flash_bla, timm
    model = timm.create_model("pola_vit_small")
"""

from flash_bla.models import register_config
from flash_bla.ops import (
    decoupled_la,
    linear_attention,
    linear_attention_dwc,
    linear_attention_qkvpacked,
    piecewise_sparse_attention,
    simple_la,
    varlen_linear_attention,
)

__version__ = "0.1.0"
__all__ = [
    "decoupled_la",
    "linear_attention",
    "linear_attention_dwc",
    "linear_attention_qkvpacked",
    "piecewise_sparse_attention",
    "register_config",
    "simple_la",
    "varlen_linear_attention",
]
