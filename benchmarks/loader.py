#!/usr/bin/env python
"""What a core of the loader gives, in images/s, and what bounds it.

    python benchmarks/loader.py [--images 1000] [--size 256] [--recipe imagenet]

It makes JPEGs (gradients and noise, quality 90), and takes them through the training transforms of a recipe at 224 x
224 by one process, counting its CPU time: other processes on the machine do not disturb the figures much. "floats" is
the pipeline as timm has it without its own loader (normalised and erased by the loader processes), "bytes" what
train.py does (normalised and erased by the device). Then the time of each stage of it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform

from flash_bla.engine.augment import DeviceAugmentation
from flash_bla.engine.config import TrainConfig, read_recipe
from flash_bla.engine.data import TrainImages, TrainOrder, open_dataset, train_loader
from flash_bla.engine.processes import Processes, seed_host

CPU = torch.device("cpu")
DATA = {
    "input_size": [3, 224, 224], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
    "interpolation": "bicubic", "crop_pct": 0.875, "crop_mode": "center", "mode": "RGB",
}  # fmt: skip
BATCH = 50


def make_pictures(folder: Path, count: int, size: int) -> float:
    """Writes JPEGs of two classes into train/ and returns their mean size in KiB."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size] / size
    bytes_written = 0
    for number in range(count):
        path = folder / "train" / str(number % 2) / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        waves = [
            128 + 100 * a * np.sin(6 * (b * x + c * y)) + 40 * np.cos(20 * d * x * y)
            for a, b, c, d in rng.uniform(-1, 1, (3, 4))
        ]
        image = np.stack(waves, axis=-1) + rng.normal(0, 12, (size, size, 3))
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path, quality=90)
        bytes_written += path.stat().st_size
    return bytes_written / count / 1024


def as_floats(config: TrainConfig) -> Callable:
    """timm's transform to normalised floats."""
    return create_transform(
        DATA["input_size"], is_training=True, mean=DATA["mean"], std=DATA["std"], interpolation="bicubic",
        scale=config.scale, ratio=config.ratio, hflip=config.hflip, auto_augment=config.aa,
        re_prob=config.reprob, re_mode=config.remode, re_count=config.recount,
    )  # fmt: skip


def speed(loader) -> float:
    """Images a second of CPU time over one epoch."""
    start = time.process_time()
    images = sum(len(targets) for _, targets, _ in loader)
    return images / (time.process_time() - start)


def stages(images: TrainImages, paths: list[Path]) -> dict[str, float]:
    """Milliseconds of CPU time for an image in each stage."""
    spent = defaultdict(float)

    def timed(name: str, step: Callable, *inputs):
        start = time.thread_time()
        result = step(*inputs)
        spent[name] += time.thread_time() - start
        return result

    whole = getattr(images.transform, "transform", images.transform)  # without what goes with the bytes
    for number, path in enumerate(paths):
        seed_host(number)
        image = timed("read and decode", lambda path: Image.open(path).convert("RGB"), path)
        for step in whole.transforms:
            image = timed(type(step).__name__, step, image)
    return {name: 1000 * seconds / len(paths) for name, seconds in spent.items()}


def device_speed(config: TrainConfig, side: int, batch: int) -> float:
    """Images a second that the GPU augments and normalises."""
    augment = DeviceAugmentation(config, DATA | {"input_size": [3, side, side]}, torch.device("cuda"))
    images = torch.randint(256, (batch, 3, side, side), dtype=torch.uint8, device="cuda")
    keys = torch.arange(batch, device="cuda")
    for calls in (3, 30):  # the first ones to warm up
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            augment(images, keys)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return calls * batch / seconds


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--recipe", default="imagenet")
    args = parser.parse_args(argv)
    if args.images < BATCH:
        parser.error(f"--images: at least one batch of {BATCH}, got {args.images}")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kib = make_pictures(folder, args.images, args.size)
        values = read_recipe(args.recipe) | {"epochs": 1, "cooldown_epochs": 0, "batch_size": BATCH, "workers": 0}
        config = TrainConfig(**(values | {"dataset": "folder", "data_dir": name}))
        dataset = open_dataset(config, training=True)

        def loader(config: TrainConfig):
            return train_loader(config, dataset, DATA, TrainOrder(len(dataset), config, Processes(CPU, 0, 1)), CPU)

        on_device = replace(config, device_augment=True)
        loaders = {"floats": loader(config), "bytes": loader(config), "device": loader(on_device)}
        loaders["floats"].dataset.transform = as_floats(config)
        figures = {title: [] for title in loaders}
        for _ in range(3):
            for title, one in loaders.items():
                figures[title].append(speed(one))
        print(f"{args.images} JPEGs of {args.size} x {args.size}, {kib:.0f} KiB each, recipe {args.recipe}, one core")
        before = median(figures["floats"])
        for title, values in figures.items():
            print(f"{title:6s} {median(values):6.0f} images/s ({median(values) / before - 1:+.0%})")
        paths = sorted(folder.glob("train/*/*.jpg"))
        for title, one in loaders.items():
            print(f"stages of {title}, ms an image:")
            for stage, spent in stages(one.dataset, paths).items():
                print(f"  {stage:35s} {spent:5.2f}")
        if torch.cuda.is_available():
            print(f"{torch.cuda.get_device_name()}, images/s augmented and normalised:")
            for side, batch in ((224, 256), (32, 1024)):
                for title, graphs in (("launched one by one", False), ("as a CUDA graph", True)):
                    config = replace(on_device, compile=graphs, cuda_graphs=graphs)
                    print(f"  {batch} of {side} x {side} {title:20s} {device_speed(config, side, batch):9,.0f}")


if __name__ == "__main__":
    main()
