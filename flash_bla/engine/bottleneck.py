"""Whether the input or the model bounds a training run on one device.

    python -m flash_bla.engine.bottleneck --config FILE --data-dir DIR [any setting of train.py]

It measures images/s of the loader alone, of updates alone on one batch that stays on the device, and of both together
as in training, and says in a sentence which of them is in the way. It writes nothing. What of a run is not in the
updates that it measures (a teacher, mixup, the weights' average, ...) it names.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from flash_bla.engine.augment import KeyedImages, device_augmentation
from flash_bla.engine.config import RunError, TrainConfig, parse_train
from flash_bla.engine.data import (
    ToDevice,
    TrainOrder,
    check_classes,
    class_names_of,
    image_count,
    open_dataset,
    resolve_data,
    train_loader,
)
from flash_bla.engine.evaluation import autocast
from flash_bla.engine.finetune import choose_trained, start_training
from flash_bla.engine.model import create_model, create_optimizer, set_grad_checkpointing
from flash_bla.engine.processes import Processes, start_processes

SECONDS = 10.0  # of each measurement
WARM_UP = 3  # steps before it: compilation, allocations
LEFT_OUT = ("teacher", "teacher_weights", "mixup", "cutmix", "ema_decay", "mesa", "clip_grad")  # of the updates


def rate(step: Callable[[], int], device: torch.device, warm_up: int, seconds: float = SECONDS) -> float:
    """Images a second of a step that returns how many it took."""

    def wait() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    for _ in range(warm_up):
        step()
    wait()
    start, images = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        images += step()
    wait()
    return images / (time.perf_counter() - start)


def measure(config: TrainConfig, processes: Processes, seconds: float = SECONDS) -> dict[str, float]:
    """Images a second of the loader (`input`), of updates without it (`model`), and of `both`, and what gives them."""
    device = processes.device
    config.epochs = sys.maxsize  # the data must not end
    train_set = open_dataset(config, training=True, batch_size=config.batch_size, seed=config.seed)
    num_classes = check_classes(config.num_classes, class_names_of(train_set), config.dataset)
    model, description = create_model(config, num_classes, drop_path_rate=config.drop_path)
    data = resolve_data(config, model, description)
    choose_trained(model, config)
    if config.grad_checkpointing:
        set_grad_checkpointing(model, config)
    model.to(device)
    start_training(model, config)
    optimizer = create_optimizer(model, config, config.lr)  # not scaled to the total batch: no rate changes the speed
    run = torch.compile(model, mode=config.compile_mode) if config.compile else model
    to_device = ToDevice(data["mean"], data["std"], device, device_augmentation(config, data, device))

    def update(images, targets) -> int:
        images, targets = to_device(images, targets)
        with autocast(device, config.precision):
            logits = run(images)
        F.cross_entropy(logits.float(), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        return len(targets)

    order = TrainOrder(image_count(train_set), config, processes)
    loader = train_loader(config, train_set, data, order, device)
    batches = iter(loader)
    # What the loader processes had prepared before the clock started must not count.
    ahead = loader.num_workers * (loader.prefetch_factor or 0)
    figures = {"input": rate(lambda: len(next(batches)[1]), device, 1 + ahead, seconds)}
    images, targets = next(batches)[:2]
    if isinstance(images, KeyedImages):  # what the device augments belongs to its side
        batch = KeyedImages(*(part.to(device) for part in images)), targets.to(device)
    else:
        batch = to_device(images, targets)
    figures["model"] = rate(lambda: update(*batch), device, WARM_UP, seconds)
    figures["both"] = rate(lambda: update(*next(batches)[:2]), device, 1 + ahead, seconds)
    return figures | {"workers": loader.num_workers, "host_augments": not (config.device_augment or config.in_memory)}


def verdict(figures: dict[str, float]) -> str:
    """The sentence."""
    given, taken, workers = figures["input"], figures["model"], figures["workers"]
    if given < taken:
        advice = (
            f"about {-(-workers * taken // given):.0f} loader processes (--workers, now {workers}) would keep up"
            if workers
            else "loader processes (--workers) would run beside it"
        )
        if figures["host_augments"]:
            advice += ", and --device-augment would take work from them"
        return f"The input is the bottleneck: it gives {given:.0f} images/s, the model takes {taken:.0f}; {advice}."
    text = f"The model is the bottleneck: it takes {taken:.0f} images/s, the input gives {given:.0f}."
    if figures["both"] < 0.8 * taken:
        text += f" Together they reach only {figures['both']:.0f}: they compete for the same CPU cores."
    return text


def main(argv: list[str] | None = None) -> None:
    """Settings, measurement, verdict."""
    config = parse_train(argv)
    processes = start_processes(config.device, config.threads)
    if processes.count > 1:
        raise RunError("measure with a single process, one device: no torchrun")
    figures = measure(config, processes)
    print("images/s  " + "  ".join(f"{name} {figures[name]:.0f}" for name in ("input", "model", "both")))
    print(verdict(figures))
    if left_out := [f"{name} {getattr(config, name)}" for name in LEFT_OUT if getattr(config, name)]:
        print(f"Not in these updates, which train.py takes longer for: {', '.join(left_out)}.")


if __name__ == "__main__":
    try:
        main()
    except RunError as error:
        sys.exit(f"error: {error}")
