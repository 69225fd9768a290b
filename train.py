#!/usr/bin/env python
"""Train an image classifier.

    python train.py --config configs/examples/pola_vit_digits.yaml
    python train.py --model pola_vit_tiny --data-dir /data/imagenet --precision bf16 --compile
    torchrun --nproc-per-node 8 train.py --model pola_vit_small --data-dir /data/imagenet

Started again with the same output folder, a run goes on where it was, also after `kill -9`. All that is random is a
function of (seed, epoch, update, process): on the CPU an interrupted run ends with the very bits of one that was not.

The output folder holds last.pt, previous.pt and best.pt (see flash_bla/engine/checkpoint.py), log.csv, tensorboard/,
config.yaml, and at the end curve.png and summary.json. It must be the same folder for all processes.

Exit codes: 0 the run is complete, 1 it failed, 2 wrong flags, 75 it was asked to stop (SIGTERM or Ctrl-C), finished its
update and saved: start it again to go on.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from flash_bla.engine.checkpoint import CheckpointFolder, load_weights, read_checkpoint
from flash_bla.engine.config import RunError, TrainConfig, as_dict, differences, parse_train
from flash_bla.engine.data import (
    SeededMixup,
    ToDevice,
    TrainOrder,
    class_names_of,
    eval_loader,
    open_dataset,
    resolve_data,
    train_loader,
)  # fmt: skip
from flash_bla.engine.evaluation import autocast, evaluate
from flash_bla.engine.logs import LossMeter, RunLog, memory_used, warn
from flash_bla.engine.model import create_model
from flash_bla.engine.processes import Processes, StopRequest, mixed_seed, start_processes

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: "try again"


def train(config: TrainConfig, processes: Processes) -> int:
    """Runs the training that the settings describe, from wherever it stands, and returns the exit code."""
    device = processes.device
    torch.backends.cudnn.benchmark = True  # the shapes never change

    # --- Data. Before the model, because they say how many classes there are; and checked before anything starts.
    reading = {"batch_size": config.batch_size, "seed": config.seed}
    train_set = open_dataset(config, training=True, **reading)
    class_names = class_names_of(train_set)
    val_set = open_dataset(config, training=False, class_names=class_names, **reading)
    num_classes = check_classes(config.num_classes, class_names, config.dataset)

    # --- Model.
    torch.manual_seed(config.seed)
    model, description = create_model(config, num_classes, drop_path_rate=config.drop_path)
    data = resolve_data(config, model, description)
    notes = load_weights(model, read_checkpoint(config.weights), config.weights) if config.weights else []
    if config.freeze_backbone:
        model.requires_grad_(False)
        model.get_classifier().requires_grad_(True)
    if config.grad_checkpointing:
        model.set_grad_checkpointing(True)
    model.to(device)
    ema = ModelEmaV3(model, decay=config.ema_decay, use_warmup=config.ema_warmup) if config.ema_decay else None

    # --- Optimisation. One update is `total_batch` images, however many passes and processes share it.
    order = TrainOrder(
        len(train_set), batch_size=config.batch_size, accum=config.grad_accum, rank=processes.rank, count=processes.count,
        seed=config.seed, epochs=config.epochs + config.cooldown_epochs, repeats=config.repeated_aug,
    )  # fmt: skip
    updates = order.updates_per_epoch
    if not updates:
        raise RunError(f"batch_size: one update takes {order.total_batch} images, the data set has {len(train_set)}")
    rates = config.learning_rates(order.total_batch)
    optimizer = create_optimizer_v2(
        model, opt=config.opt, lr=rates["lr"], weight_decay=config.weight_decay, betas=tuple(config.betas), eps=config.eps,
        layer_decay=config.layer_decay, **({"fused": True} if config.opt in ("adam", "adamw") else {}),
    )  # fmt: skip
    schedule, epochs = create_scheduler_v2(
        optimizer, num_epochs=config.epochs, warmup_epochs=config.warmup_epochs, warmup_lr=rates["warmup_lr"],
        min_lr=rates["min_lr"], cooldown_epochs=config.cooldown_epochs, step_on_epochs=False, updates_per_epoch=updates,
    )  # fmt: skip
    # The scaler serves all precisions: it leaves an update out if a gradient is not finite, and with a fused optimizer
    # decides so on the device. Only fp16 needs its scale; the others keep it at 1.
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**16 if config.precision == "fp16" else 1.0)
    mixup = SeededMixup(config, num_classes) if config.mixup or config.cutmix else None
    parameters = [p for p in model.parameters() if p.requires_grad]
    max_norm = config.clip_grad or torch.finfo(torch.float32).max  # the norm is wanted in any case, to see if it is finite

    # --- Where the run stands. The folder's checkpoint is taken up if its settings are these.
    settings = as_dict(config) | {
        "total_batch": order.total_batch, "train_images": len(train_set), "val_images": len(val_set), "data": data,
    }  # fmt: skip
    folder = CheckpointFolder(config.output, warn)
    meter = LossMeter(processes)
    epoch, update, history, best, unreadable, seconds = 0, 0, [], -1.0, set(), 0.0
    state = folder.load()
    if state is not None:
        check_same_run(config.output, state, settings, description, class_names)
        model.load_state_dict(state["state_dict"])
        if ema:
            ema.module.load_state_dict(state["state_dict_ema"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        meter.start_epoch(state["meter"])
        epoch, update, history, best = state["epoch"], state["update"], state["history"], state["best"]
        unreadable, seconds = set(state["unreadable"]), state["seconds"]
    if len(set(processes.gather((epoch, update)))) > 1:
        raise RunError(f"the processes see different checkpoints: {config.output} must be one folder for all of them")
    schedule.step_update(epoch * updates + update)
    started = time.perf_counter() - seconds

    def snapshot() -> dict[str, Any]:
        """All that the run needs to go on from here, and all that others need to use its model."""
        return {
            "model": description, "state_dict": model.state_dict(),
            "state_dict_ema": ema.module.state_dict() if ema else None, "class_names": class_names, "data": data,
            "config": settings, "epoch": epoch, "update": update, "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(), "meter": meter.state(), "history": history, "best": best,
            "unreadable": sorted(unreadable), "seconds": time.perf_counter() - started,
        }  # fmt: skip

    log = RunLog(config.output, history, epoch * updates + update, enabled=processes.first)
    log.start({
        "model": f"{config.model}, {count_parameters(model.parameters())}, {count_parameters(parameters)} to train",
        "data": f"{config.dataset}, {len(train_set)} images to train on, {len(val_set)} held out, {num_classes} classes",
        "input": data,
        "update": f"{order.total_batch} images ({config.batch_size} in a pass, {config.grad_accum} passes, "
                  f"{processes.count} processes), {updates} updates an epoch",
        "rates": rates,
        "weights": "; ".join(notes) or config.weights or ("pretrained" if config.pretrained else "random"),
        "output": config.output + (f", goes on from epoch {epoch}, update {update}" if state else ""),
    }, settings | {"rates": rates})  # fmt: skip

    # --- Training.
    train_model = model
    if processes.count > 1:
        train_model = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    if config.compile:
        train_model = torch.compile(train_model)
    to_device = ToDevice(data["mean"], data["std"], device)
    order.start = (epoch, update)
    batches = iter(train_loader(config, train_set, data, order, pin=device.type == "cuda")) if epoch < epochs else None
    val_batches = eval_loader(config, val_set, data, processes, pin=device.type == "cuda")
    bar = tqdm(total=epochs * updates, initial=epoch * updates + update, unit="update", dynamic_ncols=True,
               disable=None if processes.first else True)  # fmt: skip
    stop = StopRequest(processes)
    saved, save_time = True, time.perf_counter()
    try:
        while epoch < epochs:
            model.train()
            if config.freeze_backbone:  # fixed means fixed: no drop path, no running statistics
                model.eval()
                model.get_classifier().train()
            epoch_clock = clock = time.perf_counter()
            epoch_start = window_start = update
            while update < updates:
                # One update: forward and backward passes over its share of images, then one step.
                loss = torch.zeros((), device=device)
                for micro in range(config.grad_accum):
                    images, targets, failures = next(batches)
                    for failure in set(failures) - unreadable:
                        warn(f"skipped: {failure}")
                        unreadable.add(failure)
                    images, targets = to_device(images, targets)
                    if mixup:
                        images, targets = mixup(images, targets, epoch, update)
                    # Dropout and drop path are a function of the place in the run, not of what was drawn before it.
                    torch.manual_seed(mixed_seed(config.seed, epoch, update, micro, processes.rank))
                    # DDP averages the gradients over the processes in the last backward pass of the update.
                    shared = processes.count > 1 and micro < config.grad_accum - 1
                    with train_model.no_sync() if shared else contextlib.nullcontext():
                        with autocast(device, config.precision):
                            logits = train_model(images)
                        smoothing = 0.0 if mixup else config.smoothing  # mixed targets are smooth already
                        part = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing) / config.grad_accum
                        loss += part.detach()
                        # The factor is 1, or NaN where the loss is not finite: then no gradient is finite either, after
                        # DDP on any process, and all of them leave the update out together.
                        scaler.scale(part * (1 + 0 * part.detach())).backward()
                scaler.unscale_(optimizer)
                grad_norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
                scaler.step(optimizer)
                scaler.update(None if config.precision == "fp16" else 1.0)
                optimizer.zero_grad()
                meter.update(loss, grad_norm)
                update += 1
                done = epoch * updates + update
                if ema:
                    ema.update(model, step=done)
                lr = max(group["lr"] for group in optimizer.param_groups)
                schedule.step_update(done)
                bar.update()

                # Reading figures waits for the device, so that is done now and then.
                if done % config.log_every == 0:
                    mean_loss, _, _, longest_row = meter.read()
                    speed = (update - window_start) * order.total_batch / (time.perf_counter() - clock)
                    log.window(done, bar, loss=mean_loss, lr=lr, images_per_second=speed, memory_gib=memory_used(device),
                               grad_norm=float(grad_norm))  # fmt: skip
                    check_finite(longest_row, config, epoch, update)
                    clock, window_start = time.perf_counter(), update
                if stop.agreed():
                    saved = not processes.first or folder.save_last(snapshot())
                    log.say(f"asked to stop in epoch {epoch + 1} after update {update}; {'saved' if saved else 'NOT saved'}")
                    return STOPPED if saved else 1
                minutes = (time.perf_counter() - save_time) / 60
                if 0 < config.save_minutes <= minutes or (config.save_updates and done % config.save_updates == 0):
                    saved = not processes.first or folder.save_last(snapshot())
                    save_time = time.perf_counter()

            # --- The end of an epoch: evaluation, logs, checkpoints.
            _, train_loss, skipped, longest_row = meter.read()
            speed = (update - epoch_start) * order.total_batch / (time.perf_counter() - epoch_clock)
            check_finite(longest_row, config, epoch, update)
            row = {"epoch": epoch + 1, "updates": (epoch + 1) * updates, "lr": lr, "train_loss": train_loss}
            if (epoch + 1) % config.eval_every == 0 or epoch + 1 == epochs:
                try:
                    result = evaluate(ema.module if ema else model, val_batches, to_device, processes, config.precision)
                except RunError:
                    folder.save_last(snapshot())
                    raise
                row |= {"val_loss": result["loss"], "top1": result["top1"], "top5": result["top5"]}
            unreadable.update(*processes.gather(unreadable))
            row |= {"images_per_second": speed, "skipped_updates": skipped, "unreadable_images": len(unreadable),
                    "seconds": time.perf_counter() - started}  # fmt: skip
            log.epoch(row)
            epoch, update = epoch + 1, 0
            meter.start_epoch()
            better = row.get("top1", -1.0) > best
            best = max(best, row.get("top1", -1.0))
            if processes.first:
                if better:
                    folder.save_best(snapshot())
                saved, save_time = folder.save_last(snapshot()), time.perf_counter()
    finally:
        batches = val_batches = None  # ends the loader processes
        bar.close()
        stop.close()
        log.close()

    # --- The end of the run.
    if not saved:
        raise RunError(f"the run is complete, but its end could not be saved in {config.output}")
    best_row = max((row for row in history if "top1" in row), key=lambda row: row["top1"])
    log.finish({
        "model": config.model, "parameters": sum(p.numel() for p in model.parameters()), "dataset": config.dataset,
        "train_images": len(train_set), "val_images": len(val_set), "total_batch": order.total_batch, "rates": rates,
        "best": best_row, "last": history[-1], "best_checkpoint": str(folder.best),
        "skipped_updates": sum(row["skipped_updates"] for row in history), "unreadable_images": sorted(unreadable),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": processes.count, "torch": torch.__version__, "timm": timm.__version__,
    })  # fmt: skip
    return 0


def check_classes(wanted: int | None, class_names: list[str] | None, dataset: str) -> int:
    """The number of classes of the head, which must be that of the data."""
    if not (wanted or class_names):
        raise RunError(f"num_classes: the data set {dataset!r} does not say how many classes it has")
    if wanted and class_names and wanted != len(class_names):
        raise RunError(f"num_classes: the head would have {wanted}, but the data have {len(class_names)} classes")
    return wanted or len(class_names)


def check_same_run(output: str, state: dict, settings: dict, description: dict, class_names: list[str] | None) -> None:
    """Refuses to go on with, or to overwrite, a run of other settings, and says what differs."""
    changed = differences(state["config"], settings)
    if state["model"] != description:
        changed.append(f"model: {state['model']} -> {description}")
    if state["class_names"] != class_names:
        changed.append("class_names: the data set has other classes")
    if changed:
        lines = "\n  ".join(changed)
        raise RunError(f"{output} holds a run of other settings; choose another --output, or take back:\n  {lines}")


def check_finite(longest_row: int, config: TrainConfig, epoch: int, update: int) -> None:
    """Ends a run that has gone astray. The updates in question were left out, so its last checkpoint is good."""
    if longest_row >= config.max_nonfinite:
        raise RunError(
            f"{longest_row} updates in a row had no finite loss and gradient, and were left out: stopped in epoch "
            f"{epoch + 1} after update {update}; the last checkpoint in {config.output} is good"
        )


def count_parameters(parameters: Iterable[torch.nn.Parameter]) -> str:
    """The number of parameters, in words."""
    return f"{sum(p.numel() for p in parameters) / 1e6:.2f} M parameters"


def main(argv: list[str] | None = None) -> int:
    """Settings, processes, training."""
    config = parse_train(argv)
    processes = start_processes(config.device)
    try:
        return train(config, processes)
    finally:
        processes.close()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RunError as error:
        sys.exit(f"error: {error}")
