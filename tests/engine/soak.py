"""A thousand updates with a fault every fifty: a process killed, a SIGTERM, a disk that is full for one save.

    python tests/engine/soak.py [--updates 1000] [--every 50]

Two processes (gloo, CPU) under torchrun, which starts them again. At the end the weights and the history must be those
of an undisturbed run, every start must go on from the last save, no fault may have been missed, and every evaluation
must have counted every image once. It takes some minutes, so it is no part of the test suite.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

from conftest import TRAIN_YAML, VIT_YAML  # noqa: E402
from runs import start, tensors  # noqa: E402

import train as train_script  # noqa: E402
from flash_bla.engine import data as data_module  # noqa: E402
from flash_bla.engine.checkpoint import CheckpointFolder  # noqa: E402
from flash_bla.engine.logs import LossMeter  # noqa: E402

KINDS = ("kill", "stop", "write")
PROCESSES, BATCH = 2, 60
UPDATES_PER_EPOCH = 1437 // (PROCESSES * BATCH)


def faulty_process(ledger: Path, every: int, flags: list[str]) -> int:
    """One process of the disturbed run, with what makes the faults and what keeps account."""
    rank = int(os.environ["RANK"])
    account = {"update": 0, "images": []}

    def note(name: str, **entry) -> None:
        with open(ledger / f"{name}-{rank}", "a") as file:
            file.write(json.dumps(entry) + "\n")

    def wrap(owner, name: str, around) -> None:
        inner = getattr(owner, name)
        setattr(owner, name, lambda *args, **options: around(inner, *args, **options))

    def make_fault(number: int) -> None:
        mark = ledger / f"fault-{number}"
        victim = number // len(KINDS) % PROCESSES
        kind = KINDS[number % len(KINDS)]
        if mark.exists() or rank != (0 if kind == "write" else victim):
            return
        mark.write_text(kind)
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "stop":
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            fsync = os.fsync

            def full(file):
                os.fsync = fsync
                raise OSError(errno.ENOSPC, "No space left on device")

            os.fsync = full

    def loader(inner, config, dataset, data, order, device):
        epoch, update = order.start
        account["update"] = epoch * order.updates_per_epoch + update
        return inner(config, dataset, data, order, device)

    def finished(inner, meter, *args):
        inner(meter, *args)
        account["update"] += 1
        if account["update"] % every == 0:
            make_fault(account["update"] // every - 1)

    def saved(inner, folder, checkpoint):
        worked = inner(folder, checkpoint)
        note("saves", save=worked, at=[checkpoint["epoch"], checkpoint["update"]])
        return worked

    def loaded(inner, folder):
        state = inner(folder)
        note("saves", load=True, at=state and [state["epoch"], state["update"]])
        return state

    def read(inner, images, index):
        account["images"].append(index)
        return inner(images, index)

    def evaluated(inner, *args, **options):
        account["images"] = []
        figures = inner(*args, **options)
        note("evaluations", update=account["update"], images=account["images"], counted=figures["images"])
        return figures

    wrap(train_script, "train_loader", loader)
    wrap(LossMeter, "update", finished)
    wrap(CheckpointFolder, "save_last", saved)
    wrap(CheckpointFolder, "load", loaded)
    wrap(data_module.EvalImages, "__getitem__", read)
    wrap(train_script, "evaluate", evaluated)
    return train_script.main(flags)


def entries(ledger: Path, name: str, rank: int) -> list[dict]:
    return [json.loads(line) for line in (ledger / f"{name}-{rank}").read_text().splitlines()]


def check(folder: Path, faults: int) -> dict[str, int]:
    """The claims at the head of this file; returns what happened."""
    ledger = folder / "ledger"
    whole, disturbed = (
        torch.load(folder / name / "last.pt", weights_only=True) for name in ("undisturbed", "disturbed")
    )
    a, b = tensors(whole), tensors(disturbed)
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == [], "other weights"
    for row, other in zip(whole["history"], disturbed["history"], strict=True):
        for key in ("epoch", "updates", "lr", "val_loss", "top1", "top5", "skipped_updates"):
            assert row.get(key) == other.get(key), (key, row, other)
        assert abs(row["train_loss"] - other["train_loss"]) < 1e-9

    last, starts = None, 0
    for entry in entries(ledger, "saves", 0):
        if "load" in entry:
            assert entry["at"] == last, f"a checkpoint is lost: went on from {entry['at']}, saved was {last}"
            starts += 1
        elif entry["save"]:
            last = entry["at"]
    kinds = [(ledger / f"fault-{number}").read_text() for number in range(faults)]

    evaluations = [{e["update"]: e for e in entries(ledger, "evaluations", rank)} for rank in range(PROCESSES)]
    for update in evaluations[0]:
        images = sum((share[update]["images"] for share in evaluations), [])
        assert sorted(images) == list(range(360)), f"images counted twice or not at all after update {update}"
        assert all(share[update]["counted"] == 360 for share in evaluations)
    count = {kind: kinds.count(kind) for kind in KINDS}
    return {"faults": faults, **count, "starts": starts, "evaluations": len(evaluations[0])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=1000)
    parser.add_argument("--every", type=int, default=50)
    args = parser.parse_args()
    epochs = -(-args.updates // UPDATES_PER_EPOCH)
    faults = (epochs * UPDATES_PER_EPOCH - 1) // args.every
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "ledger").mkdir()
        model = folder / "tiny_pola_vit.yaml"
        model.write_text(VIT_YAML + TRAIN_YAML)
        flags = ["--config", str(model), "--batch-size", str(BATCH), "--epochs", str(epochs), "--ema-decay", "0.99"]
        flags += ["--mixup", "0.2", "--drop-path", "0.1", "--aa", "rand-m5", "--reprob", "0.2", "--eval-every", "7"]
        flags += ["--save-updates", "20", "--workers", "0", "--threads", "1", "--output"]
        begin = time.monotonic()
        run = start("train.py", *flags, str(folder / "undisturbed"), processes=PROCESSES)
        output = run.communicate()[0]
        assert run.returncode == 0, output
        undisturbed, begin = time.monotonic() - begin, time.monotonic()
        script = Path(__file__).relative_to(Path(train_script.__file__).parent)
        command = ["--ledger", str(folder / "ledger"), str(args.every), *flags, str(folder / "disturbed")]
        run = start(str(script), *command, processes=PROCESSES, restarts=2 * faults)
        output = run.communicate()[0]
        assert run.returncode == 0, output[-20000:]
        seconds = {"seconds": round(time.monotonic() - begin), "seconds_undisturbed": round(undisturbed)}
        print(json.dumps({"updates": epochs * UPDATES_PER_EPOCH, **check(folder, faults), **seconds}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--ledger"]:
        sys.exit(faulty_process(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]))
    main()
