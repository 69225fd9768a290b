"""Logs of a run: a line and a CSV row for each epoch, TensorBoard, and at the end a curve and a summary."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import resource
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from flash_bla.engine.checkpoint import LOGS, write_atomically
from flash_bla.engine.config import RunError
from flash_bla.engine.processes import Processes


class LossMeter:
    """Sums of losses and counts of skipped updates, kept on the device: the host waits for it only to read them."""

    def __init__(self, processes: Processes, max_nonfinite: int):
        self._processes, self._max_nonfinite = processes, max_nonfinite
        # Sum of finite losses, updates that had one, updates skipped; since the epoch's start and up to the last look.
        self._sums = torch.zeros(3, dtype=torch.float64, device=processes.device)
        self._seen = [0.0, 0.0]
        self._row = torch.zeros((), device=processes.device)
        self._longest_row = torch.zeros((), device=processes.device)

    def start_epoch(self, state: list[float] = (0.0, 0.0, 0.0)) -> None:
        """Begins an epoch, or takes one up from its `state()`."""
        self._sums.copy_(torch.tensor(state, dtype=torch.float64))
        self._seen = list(state[:2])

    def state(self) -> list[float]:
        """The epoch's sums, averaged over the processes: each of them takes the epoch up from these."""
        return self._processes.mean(self._sums).tolist()

    def update(self, loss: torch.Tensor, grad_norm: torch.Tensor) -> None:
        """Counts an update; it was skipped if the gradient's norm is not finite."""
        good = torch.isfinite(grad_norm)
        self._row = (self._row + 1) * ~good
        self._longest_row = torch.maximum(self._longest_row, self._row)
        self._sums += torch.stack([torch.where(good, loss, 0.0), good.float(), (~good).float()])

    def read(self) -> tuple[float, float, int]:
        """Mean loss since the last look, mean loss of the epoch, and updates skipped in the epoch.

        Waits for the device and for the other processes.

        Raises:
            RunError: `max_nonfinite` updates in a row were skipped. They did not touch the weights, so the last
                checkpoint is good.
        """
        longest = int(self._longest_row)
        if longest >= self._max_nonfinite:
            raise RunError(
                f"stopped: {longest} updates in a row had no finite loss and gradient. They were skipped, so the last "
                "checkpoint is good; a lower learning rate, --clip-grad or --precision fp32 may help"
            )
        total, count, skipped = self._processes.mean(self._sums).tolist()
        window, window_count = total - self._seen[0], count - self._seen[1]
        self._seen = [total, count]
        nan = float("nan")
        window, mean = window / window_count if window_count else nan, total / count if count else nan
        return window, mean, round(skipped)


def warn(text: str) -> None:
    """Prints a warning above the progress bar, from whichever process has one."""
    tqdm.write(f"warning: {text}", file=sys.stderr)


class RunLog:
    """The files that tell how a run goes. A log that cannot be written is a warning: it must not end the run."""

    def __init__(self, folder: str | Path, history: list[dict[str, Any]], update: int, *, enabled: bool):
        """Opens the logs of a run.

        Args:
            folder: The run's folder.
            history: The rows of the epochs done before.
            update: Updates done before: TensorBoard drops what an interrupted run wrote beyond them.
            enabled: Whether this process writes and prints.
        """
        self.folder, self.history, self.enabled = Path(folder), history, enabled
        self._board: SummaryWriter | None = None
        if enabled:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=update + 1)
            except OSError as error:
                raise RunError(f"output: cannot write to {folder}: {error}") from error

    def _try(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except OSError as error:
            self._board = None
            warn(f"could not write the log: {error}")

    def say(self, text: str) -> None:
        """Prints a line above the progress bar, from the first process."""
        if self.enabled:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def start(self, facts: dict[str, Any], settings: dict[str, Any]) -> None:
        """Prints what the run is, and keeps all its settings in config.yaml."""
        for key, value in facts.items():
            if isinstance(value, dict):
                value = ", ".join(f"{k} {v:.6g}" if isinstance(v, float) else f"{k} {v}" for k, v in value.items())
            self.say(f"{key:8s} {value}")
        if self.enabled:
            self._try(lambda: write_atomically(self.folder / "config.yaml", yaml.safe_dump(settings).encode()))

    def window(self, update: int, bar: tqdm, **values: float) -> None:
        """Figures of the last few updates, for the progress bar and TensorBoard."""
        bar.set_postfix_str(
            f"loss {values['loss']:.3f} lr {values['lr']:.2e} {values['images_per_second']:.0f} images/s "
            f"{values['memory_gib']:.1f} GiB"
        )
        self.scalars(update, **values)

    def scalars(self, update: int, **values: float) -> None:
        """Figures for TensorBoard."""
        if self._board is not None:
            self._try(lambda: [self._board.add_scalar(key, value, update) for key, value in values.items()])

    def epoch(self, row: dict[str, Any]) -> None:
        """Adds an epoch's row to the history, the CSV and TensorBoard, and prints it."""
        self.history.append(row)
        if not self.enabled:
            return
        figures = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())
        self.say("  ".join(figures))
        self.scalars(row["updates"], **{f"epoch/{key}": value for key, value in row.items()})
        self._try(lambda: write_atomically(self.folder / "log.csv", csv_text(self.history).encode()))

    def finish(self, settings: dict[str, Any], processes: Processes, best_checkpoint: Path, **more: Any) -> None:
        """Writes the curve and the summary, and says how the run ended."""
        if not self.enabled:
            return
        best = max((row for row in self.history if "top1" in row), key=lambda row: row["top1"])
        cuda = processes.device.type == "cuda"
        summary = {
            "best": best,
            "last": self.history[-1],
            "best_checkpoint": str(best_checkpoint),
            "skipped_updates": sum(row["skipped_updates"] for row in self.history),
            **more,
            "device": torch.cuda.get_device_name(processes.device) if cuda else "cpu",
            "processes": processes.count,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "settings": settings,
        }
        self.say(f"best     top1 {best['top1']:.2f}, top5 {best['top5']:.2f} after epoch {best['epoch']}")
        self.say(f"saved    {best_checkpoint}")
        self.say(f"curve    {self.folder / 'curve.png'}")
        self._try(lambda: write_atomically(self.folder / "curve.png", draw_curve(self.history, settings["model"])))
        self._try(lambda: write_atomically(self.folder / "summary.json", json.dumps(summary, indent=2).encode()))

    def close(self) -> None:
        """Flushes TensorBoard."""
        if self._board is not None:
            self._try(self._board.close)


def prepare_output(output: str, endings: Sequence[str]) -> None:
    """Makes the folder for the files OUTPUT.ENDING of results, before any work goes into them.

    Raises:
        RunError: OUTPUT ends in no name, one of the files is of a training run, or they cannot be written there.
    """
    if os.path.basename(output) in ("", ".", ".."):
        place, names = os.path.join(output, "NAME"), ", NAME".join(endings)
        raise RunError(f"output: {output!r} ends in no name for files; give {place}, which writes NAME{names}")
    path = Path(output)
    own = [path.name + ending for ending in endings if path.name + ending in LOGS]
    if own and (path.parent / "config.yaml").exists():
        raise RunError(f"output: {own[0]} belongs to the training run in {path.parent}, choose another name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise RunError(f"output: cannot write to {path.parent}: {error.strerror}") from error


def write_output(output: str, contents: dict[str, bytes]) -> None:
    """Writes the files OUTPUT.ENDING, whose contents are given by ending.

    Raises:
        RunError: One of them cannot be written.
    """
    try:
        for ending, content in contents.items():
            write_atomically(output + ending, content)
    except OSError as error:
        raise RunError(f"output: cannot write {output}{ending}: {error.strerror}") from error


def csv_text(rows: list[dict[str, Any]]) -> str:
    """Rows of figures as CSV; the columns are those of all rows, in their order."""
    text = io.StringIO()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def draw_curve(history: list[dict[str, Any]], title: str) -> bytes:
    """The learning curve as PNG: losses on the left, accuracies on the right."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    curves = (left, ("train_loss", "val_loss"), "loss"), (right, ("top1", "top5"), "accuracy on held-out images, %")
    for axes, keys, label in curves:
        for key in keys:
            rows = [row for row in history if key in row]
            axes.plot([row["epoch"] for row in rows], [row[key] for row in rows], label=key)
        axes.set(xlabel="epoch", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()


def memory_used(device: torch.device) -> float:
    """Peak memory in GiB: the device's, or on the CPU the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
