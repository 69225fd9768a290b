"""The model of a run, from its name and the settings."""

from __future__ import annotations

from typing import Any

import timm
from torch import nn

from flash_bla.engine.config import CommonConfig, RunError
from flash_bla.models import build_model, describe_model


def create_model(config: CommonConfig, num_classes: int | None, **arguments: Any) -> tuple[nn.Module, dict[str, Any]]:
    """Creates the model that the settings name.

    Args:
        config: The settings; `model_kwargs` and the model's own settings go to its constructor where they are given.
        num_classes: Classes of its head; None leaves the model's own.
        **arguments: Further arguments of the constructor; those that are None are left out.

    Returns:
        The model, and the description that rebuilds it in any process.

    Raises:
        RunError: There is no such model, or it does not take the arguments.
    """
    arguments |= {"num_classes": num_classes, "in_chans": config.in_chans} | _image_size(config)
    arguments = {key: value for key, value in arguments.items() if value is not None} | config.model_kwargs
    try:
        try:
            model = timm.create_model(config.model, pretrained=config.pretrained, **arguments)
        except TypeError as error:
            # Convolutional families of timm take any size and have no argument for it.
            if "img_size" not in str(error) or "img_size" in config.model_kwargs:
                raise
            del arguments["img_size"]
            model = timm.create_model(config.model, pretrained=config.pretrained, **arguments)
        return model, describe_model(config.model, **arguments)
    except (RuntimeError, TypeError, ValueError) as error:
        raise RunError(f"model {config.model!r}: {error}") from error


def rebuild_model(config: CommonConfig, description: dict[str, Any]) -> nn.Module:
    """Builds the model of a checkpoint, without its weights, at the image size that the settings ask for.

    Raises:
        RunError: The description does not fit this version of the package.
    """
    size = _image_size(config) if "img_size" in description["args"] or description["family"] else {}
    try:
        return build_model(description, **size, **config.model_kwargs)
    except (RuntimeError, TypeError, ValueError) as error:
        raise RunError(f"the checkpoint's model {description.get('name')!r} cannot be rebuilt: {error}") from error


def _image_size(config: CommonConfig) -> dict[str, Any]:
    if config.img_size is None:
        return {}
    height, width = config.img_size[0], config.img_size[-1]
    return {"img_size": height if height == width else (height, width)}
