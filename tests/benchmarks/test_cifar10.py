"""The CIFAR-10 benchmark: runs of train.py side by side, what it makes of them, and how it goes on."""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import cifar10
from flash_bla.engine.config import RunError, TrainConfig, as_dict

TINY = "--epochs 2 --warmup-epochs 1 --batch-size 20 --workers 0 --device cpu --threads 1 --eval-every 1".split()
TINY += ["--model-kwargs", "embed_dim=24", "depth=1"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two images to train on and one to test on for each of ten classes, as CIFAR-10 has them."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 2), ("test", 1)):
        for label in range(10):
            folder = tmp_path / "data" / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = 20 * label + rng.integers(0, 50, (32, 32, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.jpg")
    return tmp_path / "data"


def test_runs_table_and_plot(data, tmp_path, monkeypatch, capsys):
    output = tmp_path / "output"
    monkeypatch.setattr(cifar10, "visible_gpus", lambda: ["5", "7"])

    def benchmark(*attentions: str, flags: Sequence[str] = ()) -> int:
        flags = ["--data-dir", str(data), "--output", str(output), *TINY, *flags]
        return cifar10.main([*flags, "--attentions", *attentions])

    assert benchmark("linear", "pola", "linear") == 0
    rows = list(csv.DictReader((output / "table.csv").open()))
    for row, attention in zip(rows, ("linear", "pola"), strict=True):
        folder = output / f"muon-{attention}-seed0"
        summary = json.loads((folder / "summary.json").read_text())
        log = list(csv.DictReader((folder / "log.csv").open()))
        assert (row["recipe"], row["attention"], row["seeds"], row["top1_std"]) == ("muon", attention, "0", "")
        assert (int(row["parameters"]), float(row["top1"])) == (summary["parameters"], summary["last"]["top1"])
        assert float(row["seconds"]) == float(log[1]["seconds"]) > float(log[0]["seconds"])
        assert summary["settings"]["model"] == f"{attention}_conv_vit_tiny_cifar10"
        assert (summary["settings"]["in_memory"], summary["settings"]["opt"]) == (True, "nmuon")
        assert summary["settings"]["model_kwargs"] == {"embed_dim": 24, "depth": 1}
    assert int(rows[1]["parameters"]) > int(rows[0]["parameters"])  # pola has more than projections
    said = capsys.readouterr().out
    assert "muon, linear, seed 0: started on GPU 5" in said and "muon, pola, seed 0: started on GPU 7" in said
    table = (output / "table.md").read_text()
    assert table in said and len(table.splitlines()) == 4
    with Image.open(output / "curves.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(10**6)}
    assert {(31, 119, 180), (255, 127, 14)} <= colours  # of the first and the second line

    # The next call runs what is new alone. That fails, which is said with the end of its log, and is not in the table.
    written = {file: file.read_bytes() for file in output.glob("*-seed0/*.*")}
    (tmp_path / "train.py").write_text("import sys; sys.exit('error: it went wrong')")
    monkeypatch.setattr(cifar10, "ROOT", tmp_path)
    assert benchmark("softmax", "pola") == 1
    said = capsys.readouterr().out
    assert "2 runs, 1 of them complete" in said and "pola, seed 0" not in said
    assert "muon, softmax, seed 0: FAILED with exit code 1\n  | error: it went wrong" in said
    assert [row["attention"] for row in csv.DictReader((output / "table.csv").open())] == ["pola"]

    # A run of other settings is not taken for one of these, and what cannot run is noticed before anything starts.
    with pytest.raises(RunError, match=r"pola-seed0 holds another run(.|\n)*lr: 0.006 -> 0.1"):
        benchmark("pola", flags=["--lr", "0.1"])
    with pytest.raises(RunError, match="total_batch: 20 -> 10"):
        benchmark("pola", flags=["--batch-size", "10"])
    with pytest.raises(RunError, match="no attention is called 'polar'"):
        benchmark("pola", "polar")
    for flag in ("--seed", "--recipe", "--config", "--model"):
        for given in ([flag, "7"], [f"{flag}=7"]):
            with pytest.raises(RunError, match=f"{flag}: is set here for each run, give --[a-z]+s$"):
                benchmark("pola", flags=given)
    with pytest.raises(RunError, match="--recipes: a/muon.yaml and b/muon.yaml would share a folder"):
        benchmark("pola", flags=["--recipes", "a/muon.yaml", "b/muon.yaml"])
    with pytest.raises(RunError, match=r"pola_conv_vit_tiny_cifar10.yaml is of another model"):
        (output / "pola_conv_vit_tiny_cifar10.yaml").write_text("family: vit")
        benchmark("pola")
    assert capsys.readouterr().out == ""
    assert written == {file: file.read_bytes() for file in output.glob("*[!x]-seed0/*.*")}


@dataclass
class Job:
    """What stands for a run of train.py: a line of shell, and whether it comes to its end."""

    script: str
    folder: Path
    ends: bool = True
    gpu: str | None = None
    process: subprocess.Popen | None = None

    def start(self, gpu: str | None) -> subprocess.Popen:
        self.gpu = gpu
        self.process = subprocess.Popen(["sh", "-c", self.script])
        return self.process

    def summary(self) -> dict[str, Any] | None:
        return {"last": {"top1": 90.0, "seconds": 1.0}} if self.ends else None


def test_a_free_gpu_takes_the_next_run(tmp_path, capsys):
    done = tmp_path / "done"
    (tmp_path / "log.txt").write_text("\n".join(f"line {number}" for number in range(100)))
    wait = f"for i in $(seq 100); do [ -e {done} ] && exit 0; sleep 0.1; done; exit 1"
    jobs = [Job(script, tmp_path) for script in (wait, "exit 0", "exit 3", f"touch {done}")]
    finished = []
    assert (
        cifar10.run_all(jobs, ["a", "b"], lambda: finished.append(done.exists())) == 1
    )  # the first one ends after the last one only
    assert [job.process.returncode for job in jobs] == [0, 0, 3, 0]
    assert [job.gpu for job in jobs] == ["a", "b", "b", "b"]
    assert finished == [False, True, True]
    said = capsys.readouterr().out
    assert "FAILED with exit code 3\n  | line 80\n" in said and "\n  | line 99\n" in said
    unfinished = Job("exit 0", tmp_path, ends=False)
    assert cifar10.run_all([unfinished], [], pytest.fail) == 1
    assert unfinished.gpu is None


def test_a_run_that_was_asked_to_stop_ends_the_others(tmp_path):
    jobs = [Job(script, tmp_path) for script in ("exec sleep 60", "exit 75", "exit 0")]
    with pytest.raises(KeyboardInterrupt):
        cifar10.run_all(jobs, ["a", "b"], pytest.fail)
    assert [job.process and job.process.returncode for job in jobs] == [-15, 75, None]


def test_a_stop_ends_the_runs(tmp_path, monkeypatch):
    jobs = [Job("exec sleep 60", tmp_path) for _ in range(3)]

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cifar10.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cifar10.run_all(jobs, ["a", "b"], pytest.fail)
    assert [job.process and job.process.returncode for job in jobs] == [-15, -15, None]


@pytest.mark.parametrize(
    "count, variable, names",
    [(0, None, []), (2, None, ["0", "1"]), (2, "3,5", ["3", "5"]), (1, "2,9,4", ["2"]), (0, "", [])],
)
def test_visible_gpus(monkeypatch, count, variable, names):
    monkeypatch.setattr(cifar10.torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert cifar10.visible_gpus() == names


def test_a_run_starts_on_its_gpu(tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text("import os, sys; print(os.environ.get('CUDA_VISIBLE_DEVICES'), sys.argv[1:])")
    monkeypatch.setattr(cifar10, "ROOT", tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "none yet")
    run = cifar10.Run("adamw", "pola", 0, ["--seed", "0"], TrainConfig(output=str(tmp_path / "run")))
    for gpu in ("7", None):  # the log of what came before stays
        assert run.start(gpu).wait() == 0
    assert (run.folder / "log.txt").read_text() == "7 ['--seed', '0']\nnone yet ['--seed', '0']\n"


def test_figures_over_seeds(tmp_path):
    logs = {0: [(1, 30, ""), (2, 10, 94.0), (3, 21, 90.0)], 1: [(1, 40, 50.0), (2, 90, 62.0), (3, 60, 93.0)]}
    runs = []
    for seed, log in logs.items():
        run = cifar10.Run(
            "adamw", "pola", seed, [], TrainConfig(model="m", seed=seed, output=str(tmp_path / str(seed)))
        )
        run.folder.mkdir()
        settings = as_dict(run.config) | {"total_batch": run.config.batch_size, "train_images": 50_000}
        (run.folder / "summary.json").write_text(json.dumps({"parameters": 6_012_345, "settings": settings}))
        lines = ["epoch,images_per_second,top1,seconds,memory_gib"]
        lines += [f"{epoch},{speed},{top1},{60 * epoch + 30 * seed},{6 - epoch + seed}" for epoch, speed, top1 in log]
        (run.folder / "log.csv").write_text("\n".join(lines))
        runs.append(run)
    row = cifar10.table_row(runs)
    assert row == {
        "recipe": "adamw", "attention": "pola", "seeds": "0 1", "epochs": 3, "parameters": 6_012_345, "top1": 91.5,
        "top1_std": pytest.approx(4.5**0.5), "seconds": 195.0, "images_per_second": 40.5, "memory_gib": 6.0,
    }  # fmt: skip
    last = cifar10.markdown([row]).splitlines()[-1]
    assert last == "| adamw | pola | 0 1 | 3 | 6.01 M | 91.50 ± 2.12 | 3.2 min | 40 | 6.0 GiB |"
    assert cifar10.mean_curve(runs) == {2: 78.0, 3: 91.5}
    assert cifar10.table_row(runs[:1])["top1_std"] is None


def test_every_candidate_can_be_run(data, tmp_path):
    recipes = sorted(map(str, cifar10.RECIPES.glob("*.yaml")))
    args = argparse.Namespace(attentions=["linear"], recipes=recipes, seeds=[0], data_dir=data, output=tmp_path)
    runs = cifar10.plan(args, TINY)
    assert len({str(run.config) for run in runs}) == len(recipes) > 1
    assert all(run.config.in_memory and run.config.epochs == 2 for run in runs)
    assert [run.folder.name for run in runs] == ["adamw-linear-seed0", "muon-linear-seed0"]
