"""The wheel: what it holds, and that it works where there is no repository, and no Triton."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import flash_bla

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of a copy of the sources: an earlier build in the repository must not get into it."""
    folder = tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "flash_bla", folder / "source" / "flash_bla", ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    options = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(folder), str(folder / "source")]
    subprocess.run(command, check=True)
    (file,) = folder.glob("*.whl")
    return file


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = (ROOT / "flash_bla").rglob("*")
    assert names == {path.relative_to(ROOT).as_posix() for path in sources if path.suffix in (".py", ".yaml")}
    assert any(name.startswith("flash_bla/configs/recipes/") for name in names)
    assert wheel.name == f"flash_bla-{flash_bla.__version__}-py3-none-any.whl"
    metadata = zipfile.ZipFile(wheel).read(f"flash_bla-{flash_bla.__version__}.dist-info/METADATA").decode()
    assert "License-Expression: MIT" in metadata and "Requires-Python: >=3.10" in metadata


def test_the_wheel_works_where_neither_triton_nor_diffusers_is_installed(wheel, tmp_path):
    """In a folder that has packages of the repository's names."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    for name in ("models", "configs"):
        (tmp_path / "project" / name).mkdir(parents=True)
        (tmp_path / "project" / name / "__init__.py").write_text("raise ImportError('not this one')")
    script = (
        "import sys\n"
        "sys.modules['triton'] = sys.modules['diffusers'] = None\n"
        "import flash_bla, timm, torch\n"
        "from flash_bla.configs import config_path\n"
        "from flash_bla.engine.config import read_recipe\n"
        "from flash_bla.models import read_config\n"
        "print(flash_bla.__file__, flash_bla.__version__)\n"
        "for name in ('pola_vit_tiny', 'rala_vit_tiny'):\n"
        "    print(tuple(timm.create_model(name, depth=1, num_classes=3)(torch.zeros(1, 3, 64, 48)).shape))\n"
        "print(read_recipe(read_config(config_path('pola_vit_tiny')).recipe)['epochs'])\n"
        "q, k, v = torch.randn(3, 1, 2, 5, 8, dtype=torch.float64)\n"
        "o = flash_bla.linear_attention(q, k, v, feature_map='elu1')\n"
        "phi = lambda x: torch.nn.functional.elu(x) + 1\n"
        "weights = phi(q) @ phi(k).mT\n"
        "expected = weights / weights.sum(-1, keepdim=True) @ v\n"
        "print(torch.allclose(o, expected, atol=1e-5))\n"
        "try:\n"
        "    flash_bla.linear_attention(q, k, v, backend='triton')\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("FLASH_BLA_BACKEND", "TRITON_INTERPRET")}
    environment |= {"PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path / "project", env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        f"{tmp_path}/site/flash_bla/__init__.py {flash_bla.__version__}", "(1, 3)", "(1, 3)", "300", "True",
        "backend 'triton' was asked for, but Triton is not installed",
    ]  # fmt: skip
