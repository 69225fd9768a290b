"""What PyTorch is tracing for; it stands under all floors."""

from __future__ import annotations

import torch


def is_exporting() -> bool:
    """Whether ``torch.export`` is tracing, and not ``torch.compile``.

    ``torch.compiler.is_exporting`` alone does not tell: under ``torch.compile``, PyTorch 2.11 lets it be True.
    """
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
