"""The scripts as processes: killed, stopped, and several at once."""

from __future__ import annotations

import csv
import json
import os
import random
import runpy
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import ROOT, assert_same_run, start

from eval import main as evaluate
from flash_bla.engine.checkpoint import CheckpointFolder
from flash_bla.engine.config import RunError
from flash_bla.engine.processes import Processes, mixed_seed, start_processes

CPU = torch.device("cpu")


def wait_for(condition, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def time_of(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:  # not yet there, or between the two renames of a save
        return None


def test_a_killed_and_a_stopped_run_end_as_one_that_was_not(train, load, model_yaml, tmp_path):
    flags = ["--epochs", "4", "--batch-size", "60", "--ema-decay", "0.9", "--mixup", "0.2", "--drop-path", "0.1"]
    flags += ["--aa", "rand-m5", "--save-updates", "1"]
    assert train("whole", *flags) == 0  # 92 updates, a few seconds
    command = ["--config", str(model_yaml), "--output", str(tmp_path / "run"), "--workers", "1", *flags]
    last = tmp_path / "run" / "last.pt"

    # kill -9 at a random moment, most likely in the middle of an epoch and not unlikely in the middle of a save.
    run = start("train.py", *command, start_new_session=True)
    seen, target = set(), random.randint(2, 30)
    wait_for(lambda: seen.add(time_of(last)) or len(seen) >= target)
    time.sleep(random.uniform(0, 0.02))
    run.kill()
    os.killpg(run.pid, signal.SIGKILL)  # a loader process that was just starting would not notice, and wait for ever
    run.communicate()
    stands = CheckpointFolder(tmp_path / "run", print).load()
    killed_at = stands["epoch"], stands["update"]
    assert killed_at < (4, 0)

    # SIGTERM to the whole group, as torchrun and Slurm send it: the loader processes must not die of it first.
    run = start("train.py", *command, start_new_session=True)
    seen = {None, time_of(last)}
    wait_for(lambda: time_of(last) not in seen)
    os.killpg(run.pid, signal.SIGTERM)
    output = run.communicate()[0]
    assert run.returncode == 75, output
    assert f"goes on from epoch {killed_at[0]}, update {killed_at[1]}" in output
    assert "asked to stop after update" in output
    assert killed_at < (load("run")["epoch"], load("run")["update"]) < (4, 0)

    assert train("run", *flags) == 0
    assert_same_run(load("whole"), load("run"))


def test_two_processes_follow_one(train, load, model_yaml, tmp_path):
    flags = ["--epochs", "3", "--ema-decay", "0.9", "--mixup", "0.8", "--cutmix", "1.0", "--clip-grad", "1.0"]
    flags += ["--aa", "rand-m5", "--reprob", "0.25", "--save-updates", "3", "--mesa", "1"]
    assert train("one", *flags, "--batch-size", "240") == 0
    command = ["--config", str(model_yaml), "--output", str(tmp_path / "two"), *flags]
    run = start("train.py", *command, "--batch-size", "60", "--grad-accum", "2", processes=2)
    output = run.communicate()[0]
    assert run.returncode == 0, output
    one, two = load("one"), load("two")
    for a, b in zip(one["history"], two["history"], strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)
        assert a["val_loss"] == pytest.approx(b["val_loss"], rel=1e-4)
        assert a["top1"] == pytest.approx(b["top1"], abs=0.6)  # two pictures of 360
    for key, value in one["state_dict"].items():
        assert torch.allclose(value, two["state_dict"][key], atol=2e-3), key
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["processes"] == 2


def test_batch_norms_of_two_processes_keep_one_and_the_same_statistics(load, batch_norm_yaml, tmp_path):
    flags = ["--config", str(batch_norm_yaml), "--output", str(tmp_path / "run"), "--batch-size", "120", "--sync-bn"]
    run = start("train.py", *flags, "--ema-decay", "0.7", "--mesa", "1", processes=2)
    output = run.communicate()[0]
    assert run.returncode == 0, output
    assert output.count("sync_bn: not on the cpu") == 1
    # Each process evaluated its half of the images with its own copy: together they are what the file holds.
    (result,) = evaluate(["--checkpoint", str(tmp_path / "run" / "last.pt"), "--device", "cpu", "--workers", "0"])
    assert result["loss"] == pytest.approx(load("run")["history"][-1]["val_loss"], rel=1e-6)


def test_an_evaluation_shared_by_processes_counts_every_image_once(train, pictures, tmp_path):
    root = pictures(val=5)  # 15 pictures
    flags = ["--dataset", "folder", "--data-dir", str(root), "--batch-size", "12", "--in-chans", "1", "--epochs", "2"]
    assert train("run", *flags) == 0
    command = ["--checkpoint", str(tmp_path / "run" / "best.pt"), "--workers", "0", "--batch-size", "4"]
    run = start("eval.py", *command, "--output", str(tmp_path / "results" / "pictures"), processes=2)
    output = run.communicate()[0]
    assert run.returncode == 0, output
    (result,) = json.loads((tmp_path / "results" / "pictures.json").read_text())
    row = next(csv.DictReader((tmp_path / "results" / "pictures.csv").open()))
    best = torch.load(tmp_path / "run" / "best.pt", weights_only=True)["history"][-1]
    assert (result["images"], result["processes"], int(row["images"])) == (15, 2, 15)
    assert result["top1"] == pytest.approx(best["top1"])
    assert result["loss"] == pytest.approx(best["val_loss"], rel=1e-5)
    # The sums over images are exact: whoever has which image, and however many there are.
    (alone,) = evaluate([*command, "--device", "cpu", "--output", str(tmp_path / "alone")])
    assert [result[key] for key in ("top1", "top5")] == [alone[key] for key in ("top1", "top5")]
    assert result["ece"] == pytest.approx(alone["ece"], abs=1e-3)  # confidences of other batches, in their last bits
    classes = (tmp_path / "results" / "pictures.classes.csv").read_text()
    assert classes == (tmp_path / "alone.classes.csv").read_text() and classes.count("folder,") == 3


def test_errors_come_without_a_traceback(monkeypatch, tmp_path):
    flags = ["--model", "pola_vit_tiny", "--data-dir", str(tmp_path / "nowhere"), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert end.value.code == f"error: data_dir: no such folder: {tmp_path / 'nowhere'}"  # printed, and 1 is returned


def test_one_process_needs_no_group():
    processes = start_processes("cpu")
    assert processes == Processes(CPU, 0, 1)
    assert processes.gather("x") == ["x"] and processes.mean(torch.ones(2)).tolist() == [1, 1]
    processes.close()


@pytest.mark.parametrize(
    ("device", "gpus", "local_rank", "message"),
    [
        ("gpu", 0, None, "this PyTorch has no 'gpu': Expected one of cpu, cuda"),
        ("xla", 0, None, "this PyTorch has no 'xla'"),
        ("hpu", 0, None, "this PyTorch has no 'hpu'"),
        ("cuda", 0, None, "cuda was asked for, but this PyTorch sees no CUDA devices$"),
        ("cuda:2", 1, None, "cuda:2 was asked for, but this PyTorch sees 1 CUDA device$"),
        ("cuda", 2, 2, "process 3 on this host, of 4 in all, takes a GPU of its own, but .* sees 2 CUDA devices$"),
    ],
)
def test_a_device_that_is_not_there(device, gpus, local_rank, message, monkeypatch):
    if local_rank is not None:
        monkeypatch.setenv("WORLD_SIZE", "4")
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(RunError, match=f"^device: {message}"):
        start_processes(device)


def test_seeds():
    seeds = {mixed_seed(a, b) for a in range(50) for b in range(50)}
    assert len(seeds) == 2500 and all(0 <= seed < 2**63 for seed in seeds)
    assert mixed_seed(1, 2, 3) == mixed_seed(1, 2, 3) == 2904650318439132554
