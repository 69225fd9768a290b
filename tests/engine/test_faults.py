"""What happens to long runs: each fault is made to happen, and the run goes on or ends with a reason.

Elsewhere: kill -9 of a single process (test_processes), SIGTERM, a full disk and losses that are not finite
(test_train), damaged checkpoints (test_checkpoint), pictures and tar files that cannot be read (test_data), damaged
shards of streams (test_loaders). soak.py makes a thousand updates with a fault every fifty.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from runs import assert_same_run, start, tensors

from flash_bla.engine import data as data_module
from flash_bla.engine.config import RunError


def wait_for(condition, run, seconds: float = 180.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.005)


def children(process) -> list[int]:
    """The processes that a torchrun has forked, by rank: they have its command line."""
    pids = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    command = Path(f"/proc/{process.pid}/cmdline").read_bytes()
    return [int(pid) for pid in pids if Path(f"/proc/{pid}/cmdline").read_bytes() == command]


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the processes in /proc")
def test_a_killed_process_of_two_comes_back_by_itself(load, model_yaml, tmp_path):
    flags = ["--epochs", "4", "--batch-size", "60", "--ema-decay", "0.9", "--mixup", "0.2", "--drop-path", "0.1"]
    # A checkpoint whenever a clock says so, which is at once; all processes save together, whosever clock it is.
    flags += ["--workers", "0", "--save-minutes", "1e-5", "--config", str(model_yaml), "--output"]
    last, whole = tmp_path / "run" / "last.pt", tmp_path / "whole"
    undisturbed = start("train.py", *flags, str(whole), processes=2)
    run = start("train.py", *flags, str(last.parent), processes=2, restarts=1)
    seen = set()

    def saved_often():
        if last.exists():
            seen.add(last.stat().st_mtime_ns)
        return len(seen) >= 4

    wait_for(saved_often, run)
    os.kill(children(run)[1], signal.SIGKILL)
    output = run.communicate()[0]
    assert run.returncode == 0, output
    assert output.count("goes on from epoch") == 1
    assert undisturbed.wait() == 0
    first, second = load("whole"), load("run")
    a, b = tensors(first), tensors(second)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    for row, other in zip(first["history"], second["history"], strict=True):
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=1e-9)  # over all updates, of both processes
        assert (row["val_loss"], row["top1"], row["updates"]) == (other["val_loss"], other["top1"], other["updates"])


def test_a_picture_that_another_process_cannot_read_costs_no_epoch(load, pictures, model_yaml, tmp_path):
    root = pictures()
    (root / "val" / "dark" / "1.png").write_bytes(b"no picture")  # in the share of the second process
    flags = ["--dataset", "folder", "--data-dir", str(root), "--batch-size", "6", "--in-chans", "1", "--epochs", "2"]
    run = start("train.py", "--config", str(model_yaml), "--output", str(tmp_path / "run"), *flags, processes=2)
    output = run.communicate()[0]
    assert run.returncode == 1
    assert f"error: evaluation: cannot read {root}/val/dark/1.png" in output
    assert (load("run")["epoch"], load("run")["update"]) == (0, 2)


def test_a_loader_process_that_hangs(train, load, monkeypatch):
    flags = ("--workers", "2", "--loader-timeout", "5", "--save-updates", "1", "--log-every", "10")
    assert train("whole", *flags) == 0
    get, main_process = data_module.TrainImages.__getitem__, os.getpid()

    def hanging(images, key):
        if key[:2] == (1, 7) and os.getpid() != main_process:
            time.sleep(1000)
        return get(images, key)

    with monkeypatch.context() as patch:
        patch.setattr(data_module.TrainImages, "__getitem__", hanging)
        begin = time.monotonic()
        with pytest.raises(RunError, match="loading the data failed: no batch came for 5 s"):
            train("run", *flags)
    assert time.monotonic() - begin < 60
    assert load("run")["epoch"] == 1
    assert train("run", *flags) == 0
    assert_same_run(load("whole"), load("run"))


@pytest.mark.parametrize("jump", [-(10**6), 10**6])
def test_a_clock_that_jumps(train, load, monkeypatch, jump):
    """Neither the times in the log nor what is saved when follow the calendar."""
    clock, calls = time.time, iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: clock() + jump * (next(calls) % 3))
    saves = []
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda content, file: saves.append(content["update"]) or save(content, file))
    assert train("run", "--save-minutes", "60") == 0
    assert set(saves) == {0}  # at the ends of epochs alone
    history = load("run")["history"]
    assert all(row["images_per_second"] > 0 for row in history)
    assert 0 < load("run")["seconds"] < 600
