"""The model of a run, from its name and the settings, and its optimizer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
from timm.optim import create_optimizer_v2
from torch import nn
from torch.optim import Optimizer

from flash_bla.engine.config import CommonConfig, RunError, TrainConfig
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
    arguments |= {"num_classes": num_classes, "in_chans": config.in_chans}
    arguments = {key: value for key, value in arguments.items() if value is not None} | config.model_kwargs
    create = partial(timm.create_model, config.model, pretrained=config.pretrained)
    try:
        model, arguments = _sized(create, config.img_size, arguments)
        return model, describe_model(config.model, **arguments)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise RunError(f"model {config.model!r}: {error}") from error


def rebuild_model(config: CommonConfig, description: dict[str, Any]) -> nn.Module:
    """Builds the model of a checkpoint, without its weights, at the image size that the settings ask for.

    Raises:
        RunError: The description does not fit this version of the package.
    """
    try:
        return _sized(partial(build_model, description), config.img_size, config.model_kwargs)[0]
    except (RuntimeError, TypeError, ValueError) as error:
        raise RunError(f"the checkpoint's model cannot be rebuilt: {error}") from error


def set_grad_checkpointing(model: nn.Module, config: CommonConfig) -> None:
    """Lets a model recompute its activations in the backward pass.

    Raises:
        RunError: It cannot.
    """
    try:
        model.set_grad_checkpointing(True)
    except AssertionError as error:  # of timm's models that cannot
        raise RunError(f"grad_checkpointing: not with model {config.model!r}: {error}") from error


def create_optimizer(model: nn.Module, config: TrainConfig, lr: float) -> Optimizer:
    """The optimizer of what is trained of a model, at a learning rate."""
    return create_optimizer_v2(
        model,
        opt=config.opt,
        lr=lr,
        weight_decay=config.weight_decay,
        betas=tuple(config.betas),
        eps=config.eps,
        layer_decay=config.layer_decay,
        **({"fused": True} if config.opt in ("adam", "adamw") else {}),
    )


def _sized(
    build: Callable[..., nn.Module], size: list[int] | None, arguments: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    """Builds a model for an image size, and returns the arguments that it took."""
    if size is not None and "img_size" not in arguments:
        sized = arguments | {"img_size": size[0] if len(set(size)) == 1 else tuple(size)}
        try:
            return build(**sized), sized
        except TypeError as error:  # convolutional families of timm take any size and have no argument for it
            if "img_size" not in str(error):
                raise
    return build(**arguments), arguments
