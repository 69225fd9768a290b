"""The package's YAML files, one a model and the shared recipes under ``recipes/``, and how YAML files are read."""

from __future__ import annotations

import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from flash_bla.suggest import did_you_mean

FOLDER = Path(__file__).parent


class _Loader(yaml.SafeLoader):
    """The safe loader, for which numbers such as ``5e-4`` are numbers (PyYAML wants ``5.0e-4``)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a YAML file that holds a mapping.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not YAML (the line is named), or holds no mapping.
    """
    with open(path, encoding="utf-8") as file:
        try:
            content = yaml.load(file, Loader=_Loader)
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: not a YAML file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected keys and values, found {type(content).__name__}")
    return content


def config_path(name: str) -> Path:
    """Path of a YAML of the package by its name: ``pola_vit_small``, or ``recipes/deit`` for a recipe."""
    path = FOLDER / f"{name}.yaml"
    if not path.is_file():
        names = [file.relative_to(FOLDER).with_suffix("").as_posix() for file in FOLDER.rglob("*.yaml")]
        raise ValueError(f"no config is called {name!r}{did_you_mean(name, names)}")
    return path


def check_entries(entries: Mapping[str, Any], hints: Mapping[str, Any], where: str) -> None:
    """Checks keys and values against type hints, as YAML writes them: lists pass for tuples, integers for floats.

    Args:
        entries: What was read.
        hints: The type hint of each valid key.
        where: File and section, for the message.

    Raises:
        ValueError: An unknown key, with the nearest valid one, or a value of another type.
    """
    for key, value in entries.items():
        if key not in hints:
            raise ValueError(f"{where}: unknown key {key!r}{did_you_mean(key, hints)}")
        hint = hints[key]
        if not _fits(value, hint):
            expected = str(hint).replace("typing.", "") if get_args(hint) else hint.__name__
            raise ValueError(f"{where}: {key} must be {expected}, got {value!r}")


def _fits(value: Any, hint: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if hint is None:
        return value is None
    if origin in (Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is Literal:
        return value in args
    if origin is dict:
        return isinstance(value, dict)
    if origin is tuple and args[-1] is not Ellipsis:
        return (
            isinstance(value, (list, tuple))
            and len(value) == len(args)
            and all(_fits(item, arg) for item, arg in zip(value, args, strict=True))
        )
    if origin in (list, tuple, Sequence):
        return isinstance(value, (list, tuple)) and all(_fits(item, args[0]) for item in value)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, origin or hint)
