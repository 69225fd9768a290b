"""Evaluation: the same loop for train.py and eval.py."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from flash_bla.engine.config import RunError
from flash_bla.engine.data import ToDevice
from flash_bla.engine.processes import Processes, StopRequest

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CALIBRATION_BINS = 15
THROUGHPUT_SECONDS = 0.5


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Autocast of a precision; without effect in fp32."""
    return torch.autocast(device.type, dtype=PRECISIONS[precision], enabled=precision != "fp32")


class Scores:
    """Sums over images, from which accuracies, loss and calibration error follow.

    An image counts as right if its prediction is one of its classes; its loss is -log of the sum of their
    probabilities. With one class this is the cross entropy.

    The expected calibration error (Guo et al., arXiv:1706.04599) puts an image into one of 15 bins by its confidence,
    the probability of its prediction: bin m holds those in ((m - 1)/15, m/15]. With n images, n_m of them in bin m,

        ECE = sum_m  n_m/n |accuracy of bin m - mean confidence of bin m|
    """

    def __init__(self, num_classes: int, device: torch.device):
        # Integers and float64, summed on the device: exact for any share and without waiting for each batch.
        self.hits = torch.zeros(2, dtype=torch.int64, device=device)  # top-1 and top-5
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        # Images, their confidences and the right ones, by bin.
        self.bins = torch.zeros(CALIBRATION_BINS, 3, dtype=torch.float64, device=device)
        # Images and the right ones, by class; a last row for what fills up the lists of an image's classes.
        self.classes = torch.zeros(num_classes + 1, 2, dtype=torch.int64, device=device)

    def update(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Adds a batch.

        Args:
            logits: (B, classes), floating.
            labels: (B, L) the classes of each image, filled up with the number of classes.
        """
        logits = logits.float()
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        correct = (best[:, :, None] == labels[:, None, :]).any(dim=2)
        first = correct[:, 0]
        self.hits += torch.stack([first.sum(), correct.any(dim=1).sum()])

        log_probabilities = F.pad(logits.log_softmax(dim=1), (0, 1), value=float("-inf"))
        self.loss -= log_probabilities.gather(1, labels).logsumexp(dim=1).sum(dtype=torch.float64)

        confidence = log_probabilities.amax(dim=1).exp()
        bins = (confidence * CALIBRATION_BINS).ceil().long().clamp(1, CALIBRATION_BINS) - 1
        sums = torch.stack([torch.ones_like(confidence), confidence, first], dim=1).double()
        self.bins += F.one_hot(bins, CALIBRATION_BINS).double().T @ sums

        counts = torch.stack([torch.ones_like(first), first], dim=1).long()
        self.classes.index_add_(0, labels.flatten(), counts.repeat_interleave(labels.shape[1], dim=0))

    def figures(self, processes: Processes) -> dict[str, Any]:
        """The figures over the images of all processes, as `evaluate` returns them."""
        top1, top5 = processes.sum(self.hits).tolist()
        counts, confidences, right = processes.sum(self.bins).cpu().unbind(dim=1)
        images = int(counts.sum())
        return {
            "top1": 100 * top1 / images,
            "top5": 100 * top5 / images,
            "loss": processes.sum(self.loss).item() / images,
            "ece": 100 * (right - confidences).abs().sum().item() / images,
            "images": images,
            "classes": processes.sum(self.classes)[:-1].tolist(),
        }


@torch.no_grad()  # not inference_mode: tables that a model caches here must serve the next training step too
def evaluate(
    model: nn.Module,
    loader: Iterable,
    to_device: ToDevice,
    processes: Processes,
    precision: str,
    classes: Sequence[int] | None = None,
    labels: torch.Tensor | None = None,
    stop: StopRequest | None = None,
) -> dict[str, Any] | None:
    """Accuracies, loss and calibration over a data set that the processes share out, every image counted once.

    Args:
        model: The model.
        loader: Batches of this process's share.
        to_device: What moves them to the device.
        processes: Who shares the data set.
        precision: Arithmetic of the forward pass.
        classes: The model's classes to choose among, in the order of the data's; None: all of them.
        labels: (targets, L) the classes that are right for a target, filled up with the number of classes. None: the
            target is the one.
        stop: A wish to stop, which ends the evaluation of the process that received it.

    Returns:
        `top1` and `top5` in per cent (top-5 is top-k where there are k < 5 classes), `loss`, `ece` (the expected
        calibration error, in per cent, see `Scores`), `images`, `classes` (for each class its images and the right
        ones of them; an image with several classes counts for each) and `images_per_second`. None if a process was
        asked to stop and has not seen all of its share.

    Raises:
        RunError: An image cannot be read.
    """
    model.eval()
    scores = Scores(len(classes) if classes else model.num_classes, processes.device)
    classes = None if classes is None else torch.tensor(classes, device=processes.device)
    labels = None if labels is None else labels.to(processes.device)
    start = time.perf_counter()
    unreadable, stopped = [], False
    for images, targets, unreadable in loader:
        stopped = stop is not None and stop.received
        if unreadable or stopped:
            break
        images, targets = to_device(images, targets)
        with autocast(processes.device, precision):
            logits = model(images)
        scores.update(
            logits if classes is None else logits[:, classes], targets[:, None] if labels is None else labels[targets]
        )
    # All processes hear of it, whosever share it was: they can save and end together.
    unreadable, stopped = zip(*processes.gather((unreadable, stopped)), strict=True)
    if failures := sum(unreadable, []):
        raise RunError(f"evaluation: {failures[0]}")
    if any(stopped):
        return None
    figures = scores.figures(processes)
    return figures | {"images_per_second": figures["images"] / (time.perf_counter() - start)}


@torch.no_grad()
def throughput(
    model: nn.Module, input_size: Sequence[int], batch_size: int, device: torch.device, precision: str
) -> float:
    """Images a second of one process's forward pass alone, without reading and decoding: the median of half a second.

    The first pass, which may compile, is not counted.
    """
    model.eval()
    images = torch.rand(batch_size, *input_size, device=device)
    seconds = []
    while sum(seconds[1:]) < THROUGHPUT_SECONDS:
        start = time.perf_counter()
        with autocast(device, precision):
            model(images)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return batch_size / statistics.median(seconds[1:])
