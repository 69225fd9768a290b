#!/usr/bin/env python
"""Images/s of train.py on one GPU and on several, and whether the losses are the same, at equal total batch.

    python -m benchmarks.scaling [--processes 1 2 4] [--batch-size 128] [--output output/scaling] [flags of train.py]

It makes pictures of eight classes (gratings under noise), and trains mlla_tiny on them under torchrun with each number
of processes: --batch-size images in a pass of each, and as many passes to an update as give all runs one total batch.
The pictures are held in memory and augmented on the device, so that no loader is in the way. It prints, and writes to
scaling.csv, the median images/s over the epochs but the first (unless no other was measured), its ratio to that of the
first run, and the training loss of each epoch. A run that is complete is not repeated, and one of other flags refused.
With `--device cpu` the processes talk by gloo: enough to try it.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flash_bla.engine.logs import csv_text

ROOT = Path(__file__).resolve().parents[1]
CLASSES = 8


def make_pictures(folder: Path, count: int, size: int) -> None:
    """Writes train/CLASS/NUMBER.jpg: a grating whose direction is the class, at a random place, under noise."""
    for label in range(CLASSES):
        (folder / "train" / str(label)).mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        list(pool.map(_make_picture, repeat(folder), range(count), repeat(size), chunksize=64))


def _make_picture(folder: Path, number: int, size: int) -> None:
    rng, label = np.random.default_rng(number), number % CLASSES
    y, x = np.mgrid[:size, :size] / size
    angle, phase = np.pi * label / CLASSES, rng.uniform(0, 2 * np.pi)
    wave = 128 + 60 * np.sin(40 * (np.cos(angle) * x + np.sin(angle) * y) + phase)
    image = wave[..., None] + rng.normal(0, 40, (size, size, 3))
    path = folder / "train" / str(label) / f"{number}.jpg"
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def train(processes: int, passes: int, folder: Path, flags: Sequence[str]) -> list[dict[str, str]]:
    """Trains under torchrun and returns the rows of the log. train.py takes up, or refuses, what the folder holds."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["train.py", *flags, "--grad-accum", str(passes), "--output", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True)
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def table(logs: dict[int, list[dict[str, str]]]) -> list[dict[str, Any]]:
    """A row for each number of processes."""

    def measured(rows: list[dict[str, str]]) -> list[float]:
        return [float(row["images_per_second"]) for row in rows if row["images_per_second"]]

    speeds = {count: statistics.median(measured(rows[1:]) or measured(rows)) for count, rows in logs.items()}
    first = next(iter(speeds.values()))
    return [
        {
            "processes": count,
            "images_per_second": round(speeds[count], 1),
            "ratio": round(speeds[count] / first, 3),
            **{f"loss_{row['epoch']}": float(row["train_loss"]) for row in rows},
        }
        for count, rows in logs.items()
    ]


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="default: 1 2 4")
    parser.add_argument("--batch-size", type=int, default=128, help="in a pass of one process; default: 128")
    parser.add_argument("--pictures", type=int, default=8192, help="default: 8192")
    parser.add_argument("--size", type=int, default=224, help="of a picture; default: 224")
    parser.add_argument("--output", type=Path, default=Path("output/scaling"), help="default: output/scaling")
    args, passed_on = parser.parse_known_args(argv)
    most = max(args.processes)
    if any(most % count for count in args.processes):
        parser.error(f"--processes: each must divide the largest, got {args.processes}")
    output = args.output.resolve()
    pictures = output / f"pictures-{args.pictures}-{args.size}"
    if not (pictures / "complete").exists():
        make_pictures(pictures, args.pictures, args.size)
        (pictures / "complete").touch()
    flags = [
        "--model", "mlla_tiny", "--data-dir", str(pictures), "--val-split", "train", "--in-memory", "--img-size",
        str(args.size), "--batch-size", str(args.batch_size), "--epochs", "5", "--warmup-epochs", "1",
        "--eval-every", "99", "--no-preview", *passed_on,
    ]  # fmt: skip
    logs = {count: train(count, most // count, output / f"processes-{count}", flags) for count in args.processes}
    rows = table(logs)
    (output / "scaling.csv").write_text(csv_text(rows))
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    return rows


if __name__ == "__main__":
    main()
