#!/usr/bin/env python
"""Train one vision transformer on CIFAR-10 with each of several attentions, and show them side by side.

    python benchmarks/cifar10.py --data-dir /data/cifar10 --precision bf16 --compile

The model is as deep and wide as ViT-Lite-7 (Hassani et al., "Escaping the Big Data Paradigm with Compact Transformers",
2021), 7 blocks of width 256, with MLPs twice as wide and a convolutional stem; the recipe is that of
benchmarks/cifar10_recipes/muon.yaml. All runs differ in the attention and the seed alone, or in the recipe where
several are given, to find the best one:

    python benchmarks/cifar10.py --data-dir /data/cifar10 --precision bf16 --compile --attentions linear softmax \
        --recipes benchmarks/cifar10_recipes/*.yaml --epochs 20 --runs-per-gpu 4 --output output/cifar10-recipes

Flags that are not listed below go to train.py, such as --epochs. A GPU has --runs-per-gpu runs at a time and takes the
next when one ends. Started again, finished runs are not repeated, and interrupted ones go on.

The output folder holds a folder for each run (what train.py writes, and its log.txt), and of the runs that have
finished table.md, table.csv and curves.png. Top-1 is that of the last epoch, so that the test images choose nothing;
images/s is the median over the epochs, beside the other runs on the same GPU; the training time leaves out the start of
the process.

Exit codes: 0 all runs are complete, 1 a run failed or the flags contradict each other, 2 unknown flags, 75 it was asked
to stop (SIGTERM or Ctrl-C) and the runs have saved: start it again to go on.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from matplotlib.figure import Figure

from flash_bla.configs import config_path, load_yaml
from flash_bla.engine.checkpoint import write_atomically
from flash_bla.engine.config import RunError, TrainConfig, as_dict, differences, parse_train
from flash_bla.engine.logs import csv_text

ROOT = Path(__file__).resolve().parents[1]
RECIPES = Path(__file__).parent / "cifar10_recipes"
ATTENTIONS = ("linear", "focused", "pola", "mlla", "rala", "softmax")
MODEL = {"embed_dim": 256, "depth": 7, "num_heads": 4, "conv_stem": True}
OWN = {"--seed": "--seeds", "--recipe": "--recipes", "--config": "--attentions", "--model": "--attentions"}
STOPPED = 75  # train.py was asked to
TAIL = 20  # lines of the log of a run that failed
# Column of the table: what it shows of a row.
COLUMNS = {
    "recipe": lambda row: row["recipe"],
    "attention": lambda row: row["attention"],
    "seeds": lambda row: row["seeds"],
    "epochs": lambda row: str(row["epochs"]),
    "parameters": lambda row: f"{row['parameters'] / 1e6:.2f} M",
    "top-1, %": lambda row: f"{row['top1']:.2f}" + (f" ± {row['top1_std']:.2f}" if row["top1_std"] is not None else ""),
    "training": lambda row: f"{row['seconds'] / 60:.1f} min",
    "images/s": lambda row: f"{row['images_per_second']:,.0f}",
    "peak memory": lambda row: f"{row['memory_gib']:.1f} GiB",
}


@dataclass
class Run:
    """A run of train.py: one recipe, one attention and one seed."""

    recipe: str
    attention: str
    seed: int
    flags: list[str]
    config: TrainConfig

    def __str__(self) -> str:
        return f"{self.recipe}, {self.attention}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        return Path(self.config.output)

    def summary(self) -> dict[str, Any] | None:
        """What train.py wrote at the end of the run, or None if it has not come there.

        Raises:
            RunError: That run had other settings.
        """
        path = self.folder / "summary.json"  # written in one piece, after all else
        if not path.is_file():
            return None
        summary = json.loads(path.read_text())
        old = summary["settings"]
        new = as_dict(self.config) | {"total_batch": self.config.batch_size * self.config.grad_accum}
        if changed := differences(old, old | new):
            lines = "\n  ".join(changed)
            raise RunError(f"{self.folder} holds another run; choose another --output, or take back:\n  {lines}")
        return summary

    def history(self) -> list[dict[str, str]]:
        """The rows of the log, one for each epoch."""
        with open(self.folder / "log.csv", newline="") as file:
            return list(csv.DictReader(file))

    def start(self, device: str | None) -> subprocess.Popen:
        """Starts the run, or goes on with it, on a GPU; None leaves the device to train.py."""
        self.folder.mkdir(parents=True, exist_ok=True)
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": device} if device else {})
        with open(self.folder / "log.txt", "ab") as log:
            command = [sys.executable, ROOT / "train.py", *self.flags]
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def plan(args: argparse.Namespace, passed_on: Sequence[str]) -> list[Run]:
    """The runs, their flags checked. Writes the YAML of each attention's model to the output folder.

    Raises:
        RunError: Flags are not valid, a model cannot be built, or the output folder holds runs of other models.
    """
    for flag in passed_on:
        if (name := flag.partition("=")[0]) in OWN:
            raise RunError(f"{name}: is set here for each run, give {OWN[name]}")
    recipes = {}
    for recipe in dict.fromkeys(args.recipes):
        name = Path(recipe).stem
        if name in recipes:
            raise RunError(f"--recipes: {recipes[name]} and {recipe} would share a folder, since both are {name!r}")
        recipes[name] = recipe
    runs = []
    for attention in dict.fromkeys(args.attentions):
        content = load_yaml(config_path("examples/pola_vit_tiny_cifar10"))
        content["model"] |= MODEL | {"attention": attention}
        text, path = yaml.safe_dump(content), args.output / f"{attention}_conv_vit_tiny_cifar10.yaml"
        if path.exists() and path.read_text() != text:
            raise RunError(f"{path} is of another model; choose another --output")
        args.output.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        for (name, recipe), seed in itertools.product(recipes.items(), dict.fromkeys(args.seeds)):
            folder = args.output / f"{name}-{attention}-seed{seed}"
            flags = ["--config", str(path), "--recipe", recipe, "--data-dir", str(args.data_dir), "--seed", str(seed)]
            flags = [*passed_on, *flags, "--output", str(folder)]
            runs.append(Run(name, attention, seed, flags, parse_train(flags)))
    return runs


def visible_gpus() -> list[str]:
    """The GPUs that this process sees, by the names that CUDA_VISIBLE_DEVICES has for them."""
    count = torch.cuda.device_count()
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    return names.split(",")[:count] if names else [str(number) for number in range(count)]


def run_all(runs: Sequence[Run], places: Sequence[str], finished: Callable[[], None]) -> int:
    """Brings all runs to their end, one at a time in each place, and returns how many failed.

    A place is a GPU, which may be there several times. `finished` is called after each run that comes to its end.
    Whatever ends this function earlier, the runs are asked to stop, and have saved when it returns.
    """
    waiting, free = list(runs), list(places) or [None]
    running: dict[subprocess.Popen, tuple[Run, str | None]] = {}
    failures = 0
    try:
        while waiting or running:
            while waiting and free:
                run, device = waiting.pop(0), free.pop(0)
                running[run.start(device)] = run, device
                say(f"{run}: started on {f'GPU {device}' if device else 'the CPU'}, log in {run.folder / 'log.txt'}")
            time.sleep(0.2)
            for process in [process for process in running if process.poll() is not None]:
                run, device = running.pop(process)
                free.append(device)
                if process.returncode == STOPPED:  # so must this be
                    raise KeyboardInterrupt
                if process.returncode == 0 and (summary := run.summary()):
                    say(f"{run}: top-1 {summary['last']['top1']:.2f} after {summary['last']['seconds'] / 60:.1f} min")
                    finished()
                else:
                    failures += 1
                    lines = (run.folder / "log.txt").read_text(errors="replace").splitlines()[-TAIL:]
                    say("\n  | ".join([f"{run}: FAILED with exit code {process.returncode}", *lines]))
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
    return failures


def table_row(runs: Sequence[Run]) -> dict[str, Any]:
    """The figures of a recipe and an attention, the means over its runs in train.py's units; of the memory the maximum.

    `top1_std` is the sample standard deviation, None of a single run.
    """
    histories = [run.history() for run in runs]
    top1 = [float(rows[-1]["top1"]) for rows in histories]
    speeds = [
        statistics.median(float(row["images_per_second"]) for row in rows if row["images_per_second"])
        for rows in histories
    ]
    return {
        "recipe": runs[0].recipe,
        "attention": runs[0].attention,
        "seeds": " ".join(str(run.seed) for run in runs),
        "epochs": int(histories[0][-1]["epoch"]),
        "parameters": runs[0].summary()["parameters"],
        "top1": statistics.mean(top1),
        "top1_std": statistics.stdev(top1) if len(top1) > 1 else None,
        "seconds": statistics.mean(float(rows[-1]["seconds"]) for rows in histories),
        "images_per_second": statistics.mean(speeds),
        "memory_gib": max(float(row["memory_gib"]) for rows in histories for row in rows),
    }


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    aligned = ["---" if name in ("recipe", "attention", "seeds") else "---:" for name in COLUMNS]
    table = [list(COLUMNS), aligned, *([show(row) for show in COLUMNS.values()] for row in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in table)


def mean_curve(runs: Sequence[Run]) -> dict[int, float]:
    """Top-1 by epoch, the mean over an attention's runs, at the epochs that all of them have evaluated."""
    curves = [{int(row["epoch"]): float(row["top1"]) for row in run.history() if row["top1"]} for run in runs]
    epochs = sorted(set.intersection(*map(set, curves)))
    return {epoch: statistics.mean(curve[epoch] for curve in curves) for epoch in epochs}


def draw_curves(curves: dict[str, dict[int, float]]) -> bytes:
    """Top-1 by epoch as PNG, a line for each label."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for label, curve in curves.items():
        axes.plot(curve.keys(), curve.values(), label=label)
    # From a quarter of the epochs on: the steep rise before it would press the lines together.
    axes.set_ylim(bottom=min([*curve.values()][len(curve) // 4] for curve in curves.values()) - 1)
    axes.set(xlabel="epoch", ylabel="top-1 on the test images, %")
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()


def write_results(runs: Sequence[Run], output: Path) -> str:
    """Writes table.md, table.csv and curves.png of the runs that have finished, and returns the table."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        if run.summary():
            groups.setdefault((run.recipe, run.attention), []).append(run)
    if not groups:
        return ""
    rows = [table_row(done) for done in groups.values()]
    several = len({run.recipe for run in runs}) > 1
    curves = {
        f"{attention}, {recipe}" if several else attention: mean_curve(done)
        for (recipe, attention), done in groups.items()
    }
    table = markdown(rows)
    write_atomically(output / "table.md", table.encode())
    write_atomically(output / "table.csv", csv_text(rows).encode())
    write_atomically(output / "curves.png", draw_curves(curves))
    return table


def say(line: str) -> None:
    print(line, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Flags, runs, table and plot; returns the exit code."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    parser.add_argument("--data-dir", type=Path, required=True, help="has train/CLASS/*.jpg and test/CLASS/*.jpg")
    parser.add_argument("--attentions", nargs="+", default=ATTENTIONS, help=f"default: {' '.join(ATTENTIONS)}")
    parser.add_argument(
        "--recipes", nargs="+", default=[str(RECIPES / "muon.yaml")], help="names or files; default: muon.yaml"
    )
    parser.add_argument("--runs-per-gpu", type=int, default=1, help="at a time; default: 1")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="default: 0")
    parser.add_argument("--output", type=Path, default=Path("output/cifar10"), help="default: output/cifar10")
    args, passed_on = parser.parse_known_args(argv)

    if args.runs_per_gpu < 1:
        parser.error(f"--runs-per-gpu: at least 1, got {args.runs_per_gpu}")
    runs = plan(args, passed_on)
    gpus = visible_gpus()
    unfinished = [run for run in runs if run.summary() is None]
    say(f"{len(runs)} runs, {len(runs) - len(unfinished)} of them complete; {len(gpus)} GPUs")
    failures = run_all(unfinished, gpus * args.runs_per_gpu, lambda: write_results(runs, args.output))
    if table := write_results(runs, args.output):
        say(f"\n{table}\nwritten to {args.output}: table.md, table.csv, curves.png")
    if failures:
        say(f"{failures} of {len(runs)} runs FAILED; started again, they go on where they were")
    return 1 if failures else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main())
    except RunError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        say("stopped: start it again to go on")
        sys.exit(STOPPED)
