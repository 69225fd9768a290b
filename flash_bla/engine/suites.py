"""ImageNet and its relatives: the folders of their classes, and which classes of a model count on them.

| suite             | classes                | images                                                        |
| ----------------- | ---------------------- | ------------------------------------------------------------- |
| `imagenet`        | 1000                   | ILSVRC 2012, validation (arXiv:1409.0575)                     |
| `imagenet-real`   | 1000, several an image | the same, labels of "Are we done with ImageNet?" (2006.07159) |
| `imagenet-v2`     | 1000, folders 0 to 999 | a new test set (1902.10811), any of its three variants        |
| `imagenet-a`      | 200                    | photographs that a ResNet-50 gets wrong (1907.07174)          |
| `imagenet-r`      | 200                    | art, cartoons, toys and other renditions (2006.16241)         |
| `imagenet-sketch` | 1000                   | black and white sketches (1905.13549)                         |

Where there are 200 classes the model chooses among these alone: the other 800 logits are left out, as in the papers.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import torch
from timm.data import ImageNetInfo, RealLabelsImagenet
from timm.data.readers.reader_image_folder import ReaderImageFolder

from flash_bla.engine.config import EvalConfig, RunError
from flash_bla.engine.data import open_dataset
from flash_bla.suggest import did_you_mean

SUITES = ("imagenet", "imagenet-real", "imagenet-v2", "imagenet-a", "imagenet-r", "imagenet-sketch")
REAL_IMAGES = 50_000


@dataclass
class EvalSet:
    """A data set and how the logits of a model are scored on it."""

    name: str
    folder: str | None
    split: str | None
    dataset: Any
    class_names: Sequence[str] | None  # by the class that is counted; None: nobody knows them
    classes: list[int] | None = None  # the model's classes to choose among, in the order of the data's; None: all
    labels: torch.Tensor | None = None  # what is right for a target, see `evaluate`; None: the target itself


def open_suites(config: EvalConfig, num_classes: int, class_names: Sequence[str] | None) -> list[EvalSet]:
    """Opens the suites that the settings name.

    Args:
        config: For `suite`, entries `NAME=FOLDER` or `NAME` alone for the folder `data_dir`, and for `val_split`.
        num_classes: Classes of the model.
        class_names: Their names, where its checkpoint has them.

    Raises:
        RunError: There is no such suite, a folder's classes are not those of its suite, or the model's classes are not
            ImageNet's.
    """
    imagenet = ImageNetInfo().label_names()
    if num_classes != len(imagenet):
        raise RunError(f"suite: wants a model of ImageNet's 1000 classes, but this one has {num_classes}")
    # Names of another kind, as the words that Hugging Face's copy has, say nothing of the order.
    if class_names and set(class_names) & set(imagenet) and list(class_names) != imagenet:
        raise RunError("suite: wants a model of ImageNet's 1000 classes, but those of the checkpoint are others")
    folders = {}  # by suite and place, in their order: X, X/ and a link to it are evaluated once
    for entry in config.suite:
        name, _, folder = entry.partition("=")
        if name not in SUITES:
            raise RunError(f"suite: unknown {name!r}{did_you_mean(name, SUITES)}")
        folder = os.path.expanduser(folder) or config.data_dir
        if not folder:
            raise RunError(f"suite: where is {name}? {name}=FOLDER, or --data-dir FOLDER")
        folders.setdefault((name, os.path.realpath(folder)), folder)
    counts = Counter(name for name, _ in folders)
    sets = []
    for (name, _), folder in folders.items():
        title = name if counts[name] == 1 else f"{name}={folder}"
        try:
            sets.append(replace(_open_suite(config, name, folder, imagenet), name=title))
        except RunError as error:
            raise RunError(f"suite {title}: {error}") from error
    return sets


def _open_suite(config: EvalConfig, name: str, folder: str, imagenet: list[str]) -> EvalSet:
    names, classes, labels = imagenet, None, None
    if name in ("imagenet-a", "imagenet-r"):
        table = f"_info/{name.replace('-', '_')}_synsets.txt"
        names = resources.files("timm.data").joinpath(table).read_text(encoding="utf-8").split()
        classes = [imagenet.index(wnid) for wnid in names]
    folders = [str(number) for number in range(len(names))] if name == "imagenet-v2" else names
    if not os.path.isdir(folder):
        raise RunError(f"no such folder: {folder}")
    config = replace(config, dataset="folder", data_dir=folder, val_split=config.val_split or "validation")
    try:
        dataset = open_dataset(config, training=False, class_names=folders)
    except RunError as error:
        raise RunError(f"{error}; its classes are {len(names)} folders {folders[0]}, {folders[1]}, ...") from error
    if not isinstance(dataset.reader, ReaderImageFolder):
        raise RunError(f"it is read from folders of images, not from {dataset.reader.root}")
    missing = set(range(len(names))) - {target for _, target in dataset.reader.samples}
    if missing:
        raise RunError(
            f"{folder} lacks {len(missing)} of its {len(names)} classes, for one the folder {folders[min(missing)]!r}"
        )
    if name == "imagenet-real":
        labels = _relabel(dataset)
    return EvalSet(name, folder, config.val_split, dataset, names, classes, labels)


def _relabel(dataset: Any) -> torch.Tensor:
    """Makes an image's target its row in the returned table of Real labels; those without any are taken out."""
    real = RealLabelsImagenet(range(REAL_IMAGES)).real_labels  # by file name
    samples, rows = [], []
    for path, _ in dataset.reader.samples:
        file = os.path.basename(path)
        if file not in real:
            raise RunError(f"labels go by the original names of the files, as {next(iter(real))}, but there is {path}")
        if real[file]:
            samples.append((path, len(rows)))
            rows.append(torch.tensor(real[file]))
    dataset.reader.samples = samples
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=1000)
