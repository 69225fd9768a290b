"""From YAML files to models registered with timm, and from models to descriptions that rebuild them elsewhere.

A YAML file defines a model:

    family: vit                  # a module of flash_bla.models
    model: {embed_dim: 384, depth: 12, num_heads: 6, attention: pola}      # arguments of the family's class
    pretrained: {}               # tag: entries of timm's pretrained_cfg, and reported_top1: the paper's accuracy in %
    recipe: deit                 # training settings by name, flash_bla/configs/recipes/deit.yaml
    train: {}                    # training settings that differ from the recipe

Its name is that of the file, or the value of a further key ``name``.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    generate_default_cfgs,
    get_arch_name,
    is_model,
    list_models,
    register_model,
    resolve_pretrained_cfg,
)
from torch import Tensor, nn

from flash_bla.configs import FOLDER, check_entries, load_yaml
from flash_bla.models.weights import check_weights, read_weights
from flash_bla.suggest import did_you_mean

FAMILIES = ("vit", "pvt", "pvtv2", "mlla", "ravlt", "swin", "cswin")


@dataclass(frozen=True)
class Family:
    """What the registry must know of a family: its module holds one, called ``FAMILY``.

    Attributes:
        model_cls: Its class; ``img_size``, ``in_chans`` and ``num_classes`` are among the arguments.
        pretrained_cfg: Entries of timm's pretrained_cfg that all its models share, besides those that all families do.
        filter_fn: Maps a pretrained state dict to the model's names, ``(state_dict, model) -> state_dict``.
        out_indices: What ``features_only`` gives by default: a list of indices, or how many of the last.
        reduction: Stride of the map that the head pools; None where it pools tokens.
    """

    model_cls: type[nn.Module]
    pretrained_cfg: dict[str, Any]
    filter_fn: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]] | None = None
    out_indices: int | tuple[int, ...] = (0, 1, 2, 3)
    reduction: int | None = None


@dataclass(frozen=True)
class ModelConfig:
    """A model as its YAML file defines it."""

    name: str
    family: str
    args: dict[str, Any]
    pretrained: dict[str, dict[str, Any]]
    recipe: str | None
    train: dict[str, Any]
    path: Path

    @property
    def definition(self) -> tuple[Any, ...]:
        """What tells it from other models: not its name, its training and where it was read."""
        return self.family, self.args, self.pretrained


_CONFIGS: dict[str, ModelConfig] = {}


def read_config(path: str | Path) -> ModelConfig:
    """Reads and checks a model's YAML file.

    The training settings (``train``) are for the trainer to check.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not YAML, or has an unknown key or a value of a wrong type; it names file and key.
    """
    path = Path(path)
    content = load_yaml(path)
    section = dict[str, Any] | None
    hints = {
        "name": str,
        "family": str,
        "model": section,
        "pretrained": section,
        "recipe": str | None,
        "train": section,
    }
    check_entries(content, hints, str(path))
    name = content.get("name", path.stem)
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"{path}: {name!r} is no name for a model, use letters, digits, '_' and '-' (key 'name')")
    if "family" not in content:
        raise ValueError(f"{path}: the key 'family' is missing; valid are {', '.join(FAMILIES)}")
    config = ModelConfig(
        name=name,
        family=content["family"],
        args=content.get("model") or {},
        pretrained=content.get("pretrained") or {},
        recipe=content.get("recipe"),
        train=content.get("train") or {},
        path=path,
    )
    if config.family not in FAMILIES:
        raise ValueError(f"{path}: no family is called {config.family!r}{did_you_mean(config.family, FAMILIES)}")
    check_entries(config.args, _argument_hints(config.family), f"{path}: model")
    check_entries(config.pretrained, dict.fromkeys(config.pretrained, dict[str, Any]), f"{path}: pretrained")
    for tag, entries in config.pretrained.items():
        check_entries(entries, get_type_hints(PretrainedCfg) | {"reported_top1": float}, f"{path}: pretrained: {tag}")
    return config


def register_config(path: str | Path) -> str:
    """Registers the model of a YAML file with timm, so that ``timm.create_model`` knows it.

    A file may be registered again, as long as it defines the same model.

    Returns:
        The model's name.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file does not define a model that can be built, or its name belongs to another one.
    """
    config = read_config(path)
    known = _CONFIGS.get(config.name)
    if known is None:
        try:
            _family(config.family).model_cls(**config.args, device="meta")
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: the model cannot be built: {error}") from error
        _register(config)
    elif config.definition != known.definition:
        raise ValueError(f"{path}: {known.path} defines another model {config.name!r}; choose a new name (key 'name')")
    return config.name


def register_packaged_configs() -> None:
    """Registers the models of the package."""
    for path in sorted(FOLDER.glob("*.yaml")):
        config = read_config(path)
        if config.name not in _CONFIGS:
            _register(config)


def check_name(name: str) -> None:
    """Raises a ValueError that says what is near, if neither this library nor timm has a model of that name."""
    if ":" not in name and not is_model(name):  # hf-hub:... and local-dir:... are timm's to resolve
        raise ValueError(f"no model is called {name!r}{did_you_mean(name, list_models())}")


def describe_model(name: str, **model_kwargs: Any) -> dict[str, Any]:
    """Describes a model so that ``build_model`` rebuilds it in another process, even one that lacks its YAML file.

    Args:
        name: A model of this library or of timm.
        **model_kwargs: As for ``timm.create_model``.

    Returns:
        ``{"name": ..., "family": ... or None for a model of timm, "args": ...}``, plain values that JSON and
        ``torch.load(weights_only=True)`` read.

    Raises:
        ValueError: No model has that name, or an argument is no plain value.
    """
    check_name(name)
    args = {key: value for key, value in model_kwargs.items() if value is not None}
    config = _CONFIGS.get(get_arch_name(name))
    if config is not None:
        args = {**config.args, **args}
    for key, value in args.items():
        try:
            json.dumps(value)
        except TypeError as error:
            raise ValueError(f"{name}: argument {key}={value!r} cannot be written into a description") from error
    return {"name": name, "family": None if config is None else config.family, "args": copy.deepcopy(args)}


def build_model(description: dict[str, Any], **overrides: Any) -> nn.Module:
    """Builds the model of a description, without weights.

    Args:
        description: What ``describe_model`` gave.
        **overrides: Arguments that replace or join the described ones, such as ``num_classes`` or ``device``.

    Raises:
        ValueError: It is no description.
    """
    if not isinstance(description, dict) or not {"name", "family", "args"} <= description.keys():
        raise ValueError(f"a model's description has the keys name, family and args, got {description!r}")
    name, family = description["name"], description["family"]
    args = {**copy.deepcopy(description["args"]), **overrides}
    if family is None:
        return timm.create_model(name, **args)
    if family not in FAMILIES:
        raise ValueError(f"{name}: no family is called {family!r}{did_you_mean(family, FAMILIES)}")
    return _build(get_arch_name(name), family, pretrained_cfg=_pretrained_cfg(family, args), **args)


def _register(config: ModelConfig) -> None:
    """Gives timm an entry point, a function in the family's module, and its pretrained configurations."""
    module = importlib.import_module(f"flash_bla.models.{config.family}")
    if is_model(config.name) or hasattr(module, config.name):
        raise ValueError(f"{config.path}: {config.name!r} exists already; choose a new name (key 'name')")

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        given = kwargs.get("pretrained_cfg")
        if given and not isinstance(given, str):  # a tag; else entries, and what they lack is the model's own
            entries = given if isinstance(given, dict) else vars(given)
            kwargs["pretrained_cfg"] = cfg | {key: value for key, value in entries.items() if value is not None}
        return _build(config.name, config.family, pretrained, **{**copy.deepcopy(config.args), **kwargs})

    create.__name__ = create.__qualname__ = config.name
    create.__module__ = module.__name__
    create.__doc__ = f"{config.name}, as {config.path.name} defines it."
    cfg = _pretrained_cfg(config.family, config.args)
    tagged = {f"{config.name}.{tag}": {**cfg, **_timm_entries(entries)} for tag, entries in config.pretrained.items()}
    vars(module).setdefault("default_cfgs", {}).update(generate_default_cfgs(tagged or {config.name: cfg}))
    setattr(module, config.name, create)
    register_model(create)
    _CONFIGS[config.name] = config


def _build(name: str, family_name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    family = _family(family_name)
    if pretrained:
        overlay = kwargs.get("pretrained_cfg_overlay") or {}
        cfg = resolve_pretrained_cfg(name, kwargs.get("pretrained_cfg"), overlay)
        state_dict = read_weights(cfg, kwargs.get("cache_dir"))
        if state_dict is not None:
            kwargs["pretrained_cfg_overlay"] = {**overlay, "state_dict": state_dict}

    def filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        model.pretrained_cfg.pop("state_dict", None)  # or it would stay with the model
        state_dict = family.filter_fn(state_dict, model) if family.filter_fn else state_dict
        check_weights(name, state_dict, model)
        return state_dict

    return build_model_with_cfg(
        family.model_cls,
        name,
        pretrained,
        pretrained_filter_fn=filter_fn,
        feature_cfg={"out_indices": family.out_indices, "feature_cls": "getter"},
        **kwargs,
    )


def _family(name: str) -> Family:
    return importlib.import_module(f"flash_bla.models.{name}").FAMILY


def _argument_hints(family: str) -> dict[str, Any]:
    hints = get_type_hints(_family(family).model_cls.__init__)
    hints.pop("return", None)
    return hints


def _pretrained_cfg(family_name: str, args: dict[str, Any]) -> dict[str, Any]:
    """timm's pretrained_cfg of a model without weights."""
    family = _family(family_name)
    parameters = inspect.signature(family.model_cls).parameters
    img_size, in_chans, num_classes = (
        args.get(key, parameters[key].default) for key in ("img_size", "in_chans", "num_classes")
    )
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    cfg = {
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "input_size": (in_chans, height, width),
        "num_classes": num_classes,
        **family.pretrained_cfg,
    }
    if family.reduction:
        cfg["pool_size"] = (-(-height // family.reduction), -(-width // family.reduction))
    return cfg


def _timm_entries(entries: dict[str, Any]) -> dict[str, Any]:
    """A tag's entries as timm knows them: the reported accuracy is a note."""
    entries = dict(entries)
    top1 = entries.pop("reported_top1", None)
    if top1 is not None:
        entries["notes"] = (*(entries.get("notes") or ()), f"top-1 accuracy reported by the paper: {top1} %")
    return entries
