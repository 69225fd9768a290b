"""A model small enough to train in a test, and folders of pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train as train_script
from flash_bla.engine.processes import Processes

torch.set_num_threads(1)

TRAIN_YAML = """\
train:
  dataset: digits
  epochs: 2
  warmup_epochs: 1
  batch_size: 240
  workers: 0
  lr: 1e-2
  lr_batch: 0
  hflip: 0.0
  log_every: 1
"""
VIT_YAML = """\
family: vit
model: {img_size: 8, patch_size: 4, in_chans: 1, embed_dim: 16, depth: 2, num_heads: 2, attention: pola}
"""
MLLA_YAML = """\
family: mlla
model: {img_size: 32, in_chans: 1, embed_dim: 8, depths: [1, 1, 1, 1], num_heads: [1, 1, 2, 2]}
"""


@pytest.fixture(scope="session")
def model_yaml(tmp_path_factory) -> Path:
    """The YAML of a tiny model that trains on the digits, five updates an epoch."""
    path = tmp_path_factory.mktemp("model") / "tiny_pola_vit.yaml"
    path.write_text(VIT_YAML + TRAIN_YAML)
    return path


@pytest.fixture
def batch_norm_yaml(tmp_path: Path) -> Path:
    """The same of a model with batch norms."""
    path = tmp_path / "tiny_mlla.yaml"
    path.write_text(MLLA_YAML + TRAIN_YAML)
    return path


@pytest.fixture
def train(model_yaml: Path, tmp_path: Path):
    """Trains the tiny model in this process: `train("run", "--lr", "1e-3")` returns the exit code."""

    def run(folder: str, *flags: str) -> int:
        model = [] if {"--model", "--config"} & set(flags) else ["--config", str(model_yaml)]
        return train_script.main([*model, "--output", str(tmp_path / folder), "--device", "cpu", *flags])

    return run


@pytest.fixture
def on_loss(monkeypatch):
    """Lets a test act on the losses of training: `on_loss(lambda number, loss: ...)` returns the loss to use."""

    def install(act):
        cross_entropy, calls = train_script.F.cross_entropy, iter(range(10**6))

        def wrapped(logits, targets, **options):
            loss = cross_entropy(logits, targets, **options)
            return act(next(calls), loss) if logits.requires_grad else loss

        monkeypatch.setattr(train_script.F, "cross_entropy", wrapped)

    return install


@pytest.fixture
def load(tmp_path: Path):
    """Reads a checkpoint of a run: `load("run")`, `load("run", "best")`."""
    return lambda folder, name="last": torch.load(tmp_path / folder / f"{name}.pt", weights_only=True)


@pytest.fixture
def one_process() -> Processes:
    return Processes(torch.device("cpu"), rank=0, count=1)


@pytest.fixture
def pictures(tmp_path: Path):
    """Makes a data set of folders: three classes of grey shades, distinct sizes, in train/ and val/."""

    def make(name: str = "pictures", train: int = 8, val: int = 3) -> Path:
        root = tmp_path / name
        rng = np.random.default_rng(0)
        for split, count in (("train", train), ("val", val)):
            for shade, label in ((40, "dark"), (128, "grey"), (215, "light")):
                folder = root / split / label
                folder.mkdir(parents=True)
                for number in range(count):
                    noise = rng.integers(-30, 30, (16 + number, 20, 3))
                    Image.fromarray((shade + noise).astype(np.uint8)).save(folder / f"{number}.png")
        return root

    return make
