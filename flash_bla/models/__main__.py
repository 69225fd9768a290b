"""Prints the table of the package's models, in Markdown: ``python -m flash_bla.models``."""

from __future__ import annotations

import math
from typing import Any
from urllib.parse import urlparse

import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from flash_bla.configs import FOLDER
from flash_bla.models.registry import ModelConfig, read_config

COLUMNS = "| model | attention | parameters (M) | GMACs | activations (M) | input | top-1, reported | weights |"


class ActivationCounter(TorchDispatchMode):
    """Counts the elements that convolutions and matrix products give out, attention's included."""

    COUNTED = {torch.ops.aten.convolution, torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm}

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in self.COUNTED:
            self.elements += out.numel()
        return out


def measure(model: torch.nn.Module, image: torch.Tensor) -> tuple[int, int, int]:
    """Parameters, multiply-adds and activations of a model on an image, which may be on the meta device."""
    with torch.no_grad(), FlopCounterMode(display=False) as flops, ActivationCounter() as activations:
        model.eval()(image)
    return sum(p.numel() for p in model.parameters()), flops.get_total_flops() // 2, activations.elements


def model_table() -> str:
    """The models that the YAML files of the package define, by family, attention and size."""
    rows = sorted((model_row(read_config(path)) for path in FOLDER.glob("*.yaml")), key=lambda row: row[0])
    return "\n".join([COLUMNS, "|---|---|---:|---:|---:|---|---|---|", *(line for _, line in rows)])


def model_row(config: ModelConfig) -> tuple[tuple, str]:
    """A model's place in the table, and its line."""
    model = timm.create_model(config.name, device="meta")  # shapes without memory
    size = model.default_cfg["input_size"]
    parameters, macs, activations = measure(model, torch.empty(1, *size, device="meta"))
    attention = config.args["attention"]
    attention = attention if isinstance(attention, str) else ", ".join(dict.fromkeys(attention))
    tag = config.pretrained.get("in1k", {})
    line = (
        f"| `{config.name}` | {attention} | {parameters / 1e6:.1f} | {macs / 1e9:.1f} | {activations / 1e6:.0f} "
        f"| {size[1]} × {size[2]} | {tag.get('reported_top1', '')} | {_source(tag)} |"
    )
    return (config.family, attention, math.prod(size), macs), line


def _source(tag: dict[str, Any]) -> str:
    """Where the weights are, and under which licence."""
    hub = tag.get("hf_hub_id")
    address = tag.get("url") or tag.get("origin_url") or (hub and f"https://huggingface.co/{hub}")
    if not address:
        return "none"
    licence = {"mit": "MIT"}.get(tag["license"], tag["license"])
    return f"[{urlparse(address).netloc}]({address}), licence: {licence}"


if __name__ == "__main__":
    print(model_table())
