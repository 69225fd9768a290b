"""Prints the table of the package's models, in Markdown: ``python -m flash_bla.models``."""

from __future__ import annotations

import timm

from flash_bla.configs import FOLDER
from flash_bla.models.registry import ModelConfig, read_config


def model_table() -> str:
    """The models that the YAML files of the package define, by attention and size."""
    lines = [
        "| model | attention | parameters (M) | input | weights |",
        "|---|---|---:|---|---|",
    ]
    rows = sorted(_row(read_config(path)) for path in FOLDER.glob("*.yaml"))
    for attention, parameters, name, size, weights in rows:
        lines.append(f"| `{name}` | {attention} | {parameters / 1e6:.1f} | {size} | {weights} |")
    return "\n".join(lines)


def _row(config: ModelConfig) -> tuple[str, int, str, str, str]:
    model = timm.create_model(config.name, device="meta")  # shapes without memory
    attention = config.args["attention"]
    if not isinstance(attention, str):
        attention = ", ".join(dict.fromkeys(attention))
    _, height, width = model.default_cfg["input_size"]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return attention, parameters, config.name, f"{height} × {width}", ", ".join(config.pretrained) or "none"


if __name__ == "__main__":
    print(model_table())
