"""Starting the scripts, and comparing what they leave."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

import train as train_script

ROOT = Path(train_script.__file__).parent
UPDATES = 5  # of an epoch of the tiny models


def start(script: str, *flags: str, processes: int = 1, restarts: int = 0, **options) -> subprocess.Popen:
    """Starts a script by python, or by torchrun on several processes, which it forks: they need not import so much."""
    runner = ["-c", "import eval, train; from torch.distributed.run import main; main()", "--standalone"]
    runner += ["--nproc-per-node", str(processes), "--max-restarts", str(restarts), "--start-method", "fork"]
    runner += ["--run-path"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *(runner if processes > 1 else []), str(ROOT / script), *flags, "--device", "cpu"],
        env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options,
    )  # fmt: skip


def interrupt(number: int):
    """Sends this process a SIGTERM at one of the losses."""

    def act(call, loss):
        if call == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    return act


class Crash(Exception):
    """What ends a run as a killed process ends."""


def crash(number: int):
    """Raises at one of the losses."""

    def act(call, loss):
        if call == number:
            raise Crash
        return loss

    return act


def tensors(content, prefix: str = "") -> dict[str, torch.Tensor]:
    """All tensors of nested containers, by their place."""
    if isinstance(content, torch.Tensor):
        return {prefix: content}
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return {key: tensor for name, item in items for key, tensor in tensors(item, f"{prefix}/{name}").items()}


def assert_same_run(first: dict, second: dict) -> None:
    """Two checkpoints stand at the same place with equal bits and equal figures."""
    a, b = tensors(first), tensors(second)
    assert a.keys() == b.keys()
    differing = [key for key in a if not torch.equal(a[key], b[key])]
    assert not differing
    costs = ("seconds", "images_per_second", "memory_gib")
    rows = [[{k: v for k, v in row.items() if k not in costs} for row in run["history"]] for run in (first, second)]
    assert rows[0] == rows[1]
    assert (first["epoch"], first["update"], first["meter"]) == (second["epoch"], second["update"], second["meter"])
