"""The floors of the package: each imports only what is below it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import flash_bla

PACKAGE = Path(flash_bla.__file__).parent
GROUND = ("suggest", "tracing")  # single files that every floor may import; in order, for tests have names
SCRIPTS = ("train", "eval", "attention_map", "distill_linfusion")
BELOW = {
    "configs": {*GROUND},
    "ops": {*GROUND},
    "layers": {*GROUND, "ops"},
    "models": {*GROUND, "configs", "layers", "ops"},
    "engine": {*GROUND, "configs", "layers", "models", "ops"},
    **{name: set() for name in GROUND},
}


def imports(path):
    """Dotted names that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files(floor):
    return [PACKAGE / f"{floor}.py"] if floor in GROUND else sorted((PACKAGE / floor).rglob("*.py"))


@pytest.mark.parametrize("floor", BELOW)
def test_imports_point_downwards(floor):
    assert files(floor)
    for path in files(floor):
        for name in imports(path):
            package, *rest = name.split(".")
            assert package not in SCRIPTS, f"{path} imports {name}"
            if package == "flash_bla":
                assert rest[0] in BELOW[floor] | {floor}, f"{path} imports {name}"


def test_ops_know_no_modules():
    for path in files("ops"):
        assert not any(name.startswith(("timm", "torch.nn.Module", "torch.nn.Parameter")) for name in imports(path)), (
            path
        )
        assert "nn.Module" not in path.read_text(encoding="utf-8"), path


def test_no_floor_is_forgotten():
    assert {path.stem for path in PACKAGE.iterdir() if not path.name.startswith("__")} == set(BELOW)
