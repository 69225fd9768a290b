"""Command line flags from the dataclasses of settings, and the types that settings have."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import MISSING, Field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

# The types of settings are few: int, float, str, bool, dict, a Literal of words, a list of these, any of them or None.


def parts(hint: Any) -> tuple[Any, bool, bool]:
    """A type hint as (the type of one value, whether it is a list of these, whether it may be None)."""
    kinds = [hint] if get_origin(hint) in (None, list, Literal) else list(get_args(hint))
    optional = type(None) in kinds
    many = next((kind for kind in kinds if get_origin(kind) is list), None)
    return (get_args(many)[0] if many else kinds[0]), many is not None, optional


def yaml_hint(hint: Any) -> Any:
    """What a YAML may hold for a setting: a list of one may stand there without its brackets."""
    kind, many, _ = parts(hint)
    return hint | kind if many else hint


def converted(value: Any, hint: Any) -> Any:
    """The value of a YAML in a setting's own type: lists for single values, floats for whole numbers."""
    kind, many, _ = parts(hint)
    if value is None:
        return None
    if many:
        return [converted(item, kind) for item in (value if isinstance(value, list) else [value])]
    return float(value) if kind is float else value


def parse_flags(kind: type, usage: str, description: str, argv: Sequence[str] | None) -> dict[str, Any]:
    """The settings that stand on the command line, and no others."""
    # With SUPPRESS a flag that is not given leaves no trace, so that it cannot hide what a YAML says.
    parser = argparse.ArgumentParser(
        usage=usage, description=description, argument_default=argparse.SUPPRESS, allow_abbrev=False
    )
    hints = get_type_hints(kind)
    groups: dict[str, Any] = {}
    for item in fields(kind):
        heading = item.metadata["group"]
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        _add_flag(groups[heading], item, hints[item.name])
    given = {}
    for key, value in vars(parser.parse_args(argv)).items():
        given[key] = dict(value) if hints[key] is dict else None if value in ([None], "none") else value
    return given


def _add_flag(group: Any, item: Field, hint: Any) -> None:
    kind, many, optional = parts(hint)
    default = item.default if item.default is not MISSING else item.default_factory()
    shown = " ".join(f"{value:g}" for value in default) if isinstance(default, list) else default
    text = f"{item.metadata['help']} (default: {'none' if shown in (None, {}) else shown})".replace("%", "%%")
    if kind is bool:
        options = {"action": argparse.BooleanOptionalAction}
    elif kind is dict:
        options = {"nargs": "+", "type": _key_value, "metavar": "KEY=VALUE"}
    elif get_origin(kind) is Literal:
        options = {"choices": [*get_args(kind), *(["none"] if optional else [])]}
    else:
        options = {"type": _reader(kind, optional), "metavar": item.name.upper()} | ({"nargs": "+"} if many else {})
    group.add_argument("--" + item.name.replace("_", "-"), help=text, **options)


def _reader(kind: type, optional: bool) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        return None if optional and text == "none" else kind(text)

    read.__name__ = kind.__name__  # argparse names it in its errors
    return read


def _key_value(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not (key and separator):
        raise argparse.ArgumentTypeError(f"expected key=value, got {text!r}")
    value = yaml.safe_load(value)
    if isinstance(value, str):
        with suppress(ValueError):  # YAML reads 5e-4 as text
            value = float(value)
    return key, value
