"""Evaluation: the same loop for train.py and eval.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from flash_bla.engine.config import RunError
from flash_bla.engine.data import ToDevice
from flash_bla.engine.processes import Processes

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Autocast of a precision; without effect in fp32."""
    return torch.autocast(device.type, dtype=PRECISIONS[precision], enabled=precision != "fp32")


@torch.no_grad()  # not inference_mode: tables that a model caches here must serve the next training step too
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    to_device: ToDevice,
    processes: Processes,
    precision: str,
    progress: Callable[[DataLoader], Any] = lambda batches: batches,
) -> dict[str, float]:
    """Top-1, top-5 and loss over a data set that the processes share out, every image counted once.

    Returns:
        `top1` and `top5` in per cent (top-5 is top-k where there are k < 5 classes), `loss`, `images` and
        `images_per_second`.

    Raises:
        RunError: An image cannot be read.
    """
    model.eval()
    # Integers and float64, summed on the device: exact for any share and without waiting for each batch.
    hits = torch.zeros(2, dtype=torch.int64, device=processes.device)
    loss = torch.zeros((), dtype=torch.float64, device=processes.device)
    count = 0
    start = time.perf_counter()
    for images, targets, unreadable in progress(loader):
        if unreadable:
            raise RunError(f"evaluation: {unreadable[0]}")
        images, targets = to_device(images, targets)
        with autocast(processes.device, precision):
            logits = model(images)
        logits = logits.float()
        loss += F.cross_entropy(logits, targets, reduction="sum")
        correct = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
        hits += torch.stack([correct[:, 0].sum(), correct.sum()])
        count += len(targets)
    top1, top5 = processes.sum(hits).tolist()
    images = sum(processes.gather(count))
    seconds = time.perf_counter() - start
    return {
        "top1": 100 * top1 / images,
        "top5": 100 * top5 / images,
        "loss": processes.sum(loss).item() / images,
        "images": images,
        "images_per_second": images / seconds,
    }
