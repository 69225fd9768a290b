#!/usr/bin/env python
"""Train an image classifier.

    python train.py --config configs/examples/pola_vit_digits.yaml
    python train.py --model pola_vit_tiny --data-dir /data/imagenet --precision bf16 --compile
    torchrun --nproc-per-node 8 train.py --model pola_vit_small --data-dir /data/imagenet
    python train.py --model pola_vit_small --weights deit_small.pth --replace-attention --data-dir /data/flowers

Started again with the same output folder, a run goes on where it was, also after `kill -9`. All that is random is a
function of (seed, epoch, update, process): on the CPU an interrupted run ends with the very bits of one that was not.

The output folder holds last.pt, previous.pt and best.pt (see flash_bla/engine/checkpoint.py), log.csv, tensorboard/,
config.yaml, preview.png (the first batch), and at the end curve.png and summary.json. It must be the same folder for
all processes.

Exit codes: 0 the run is complete, 1 it failed, 2 unknown flags, 75 it was asked to stop (SIGTERM or Ctrl-C), finished
its update and saved: start it again to go on.
"""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from flash_bla.engine.augment import device_augmentation
from flash_bla.engine.checkpoint import CheckpointFolder, load_weights, read_checkpoint
from flash_bla.engine.config import RunError, TrainConfig, as_dict, parse_train
from flash_bla.engine.data import (
    SeededMixup,
    ToDevice,
    TrainOrder,
    check_classes,
    class_names_of,
    eval_loader,
    image_count,
    open_dataset,
    resolve_data,
    train_loader,
)  # fmt: skip
from flash_bla.engine.distillation import Teacher, distillation_loss
from flash_bla.engine.evaluation import autocast, evaluate
from flash_bla.engine.finetune import choose_trained, replace_attention, start_training
from flash_bla.engine.logs import LossMeter, RunLog, memory_used, warn
from flash_bla.engine.model import create_model, create_optimizer, set_grad_checkpointing
from flash_bla.engine.norms import RunningStatistics, sync_batch_norms
from flash_bla.engine.pictures import save_preview
from flash_bla.engine.processes import Processes, StopRequest, mixed_seed, start_processes

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: "try again"


def train(config: TrainConfig, processes: Processes) -> int:
    """Runs the training that the settings describe, from wherever it stands, and returns the exit code."""
    device = processes.device
    torch.backends.cudnn.benchmark = True  # the shapes never change

    # Data. Before the model, because they say how many classes there are; and checked before anything starts.
    reading = {"batch_size": config.batch_size, "seed": config.seed}
    train_set = open_dataset(config, training=True, **reading)
    class_names = class_names_of(train_set)
    val_set = open_dataset(config, training=False, class_names=class_names, **reading)
    num_classes = check_classes(config.num_classes, class_names, config.dataset)

    # What the output folder holds is taken up, if it is of this very run.
    folder = CheckpointFolder(config.output, warn, writes=processes.first)
    state = folder.load()
    if len(set(processes.gather(state and (state["epoch"], state["update"])))) > 1:
        raise RunError(f"the processes see different checkpoints: {config.output} must be one folder for all of them")

    # Model. Where there is a state, its weights take the place of those that the run began with.
    torch.manual_seed(config.seed)
    start = config if state is None else replace(config, pretrained=False, weights=None)
    model, description = create_model(start, num_classes, drop_path_rate=config.drop_path)
    data = resolve_data(config, model, description)
    take_over = replace_attention if config.replace_attention else load_weights
    notes = take_over(model, read_checkpoint(start.weights), start.weights) if start.weights else []
    choose_trained(model, config)
    if config.grad_checkpointing:
        set_grad_checkpointing(model, config)
    if config.sync_bn:
        model = sync_batch_norms(model, processes)
    model.to(device)
    statistics = RunningStatistics(model, processes)
    parameters = [p for p in model.parameters() if p.requires_grad]
    teacher = Teacher(config, num_classes, data, device) if config.teacher or config.teacher_weights else None

    # Optimisation. An update is `total_batch` images, however many passes and processes share them.
    order = TrainOrder(image_count(train_set), config, processes)
    updates = order.updates_per_epoch
    rates, averaging = config.learning_rates(order.total_batch), config.averaging(order.total_batch)
    optimizer = create_optimizer(model, config, rates["lr"])
    schedule, epochs = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=config.epochs,
        cooldown_epochs=config.cooldown_epochs,
        warmup_epochs=config.warmup_epochs,
        warmup_lr=rates["warmup_lr"],
        min_lr=rates["min_lr"],
        step_on_epochs=config.sched_on_epochs,
        updates_per_epoch=updates,
    )
    # timm averages the running statistics of batch norms together with the weights.
    ema = ModelEmaV3(model, decay=averaging["ema_decay"], use_warmup=config.ema_warmup) if averaging else None
    # The scaler serves all precisions: it leaves an update out if a gradient is not finite, and with a fused optimizer
    # decides so on the device. Only fp16 needs its scale; the others keep it at 1.
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**16 if config.precision == "fp16" else 1.0)
    mixup = SeededMixup(config, num_classes) if config.mixup or config.cutmix else None

    # Where the run stands.
    settings = as_dict(config) | {"total_batch": order.total_batch, "data": data}
    settings |= {"train_images": image_count(train_set), "val_images": image_count(val_set)}
    meter = LossMeter(processes, config.max_nonfinite)
    epoch, update, history, best, unreadable, started = 0, 0, [], -1.0, set(), time.monotonic()

    def learning_rate() -> float:
        return max(group["lr"] for group in optimizer.param_groups)  # layer decay lowers the others

    def snapshot() -> dict[str, Any]:
        """All that the run needs to go on from here, and all that others need to use its model.

        To be called by all processes together.
        """
        return {
            "model": description,
            "state_dict": model.state_dict(),
            "state_dict_ema": ema.module.state_dict() if ema else None,
            "class_names": class_names,
            "data": data,
            "config": settings,
            "epoch": epoch,
            "update": update,
            "history": history,
            "best": best,
            "unreadable": sorted(unreadable),
            "seconds": time.monotonic() - started,
            "meter": meter.state(),
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
        }

    def save_and_stop() -> int:
        saved = folder.save_last(snapshot())
        log.say(f"asked to stop after update {update} of epoch {epoch + 1}{'' if saved else ', NOT saved'}")
        return STOPPED if saved else 1

    if state is not None:
        folder.check_same_run(state, snapshot())
        model.load_state_dict(state["state_dict"])
        if ema:
            ema.module.load_state_dict(state["state_dict_ema"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        meter.start_epoch(state["meter"])
        epoch, update, history, best = state["epoch"], state["update"], state["history"], state["best"]
        unreadable, started = set(state["unreadable"]), time.monotonic() - state["seconds"]
    schedule.step(epoch)  # of these two calls the one does nothing that is not `sched_on_epochs`
    schedule.step_update(epoch * updates + update)

    log = RunLog(config.output, history, epoch * updates + update, enabled=processes.first)
    total, trained = (sum(p.numel() for p in group) for group in (model.parameters(), parameters))
    passes = f"{config.batch_size} in a pass x {config.grad_accum} passes x {processes.count} processes"
    facts = {
        "model": f"{config.model}, {total / 1e6:.2f} M parameters, {trained / 1e6:.2f} M to train",
        "data": f"{config.dataset}, {settings['train_images']} images, {settings['val_images']} held out, "
        f"{num_classes} classes",
        "input": data,
        "update": f"{order.total_batch} images ({passes}), {updates} updates an epoch",
        "rates": rates | averaging,
        "weights": "; ".join(notes) or config.weights or ("pretrained" if config.pretrained else "random"),
        "output": config.output + (f", goes on from epoch {epoch}, update {update}" if state else ""),
    }
    log.start(facts, settings | {"rates": rates | averaging})
    if state is None:
        folder.save_last(snapshot())  # or a run that is killed early may leave a best.pt and nothing to go on from

    # Training.
    train_model, eval_model = model, ema.module if ema else model
    average = ema.module if config.mesa else None
    if processes.count > 1:
        devices = [device] if device.type == "cuda" else None
        train_model = DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)  # see `statistics`
    if config.compile:
        train_model = torch.compile(train_model, mode=config.compile_mode)
        average = torch.compile(average, mode=config.compile_mode) if config.mesa else None
    to_device = ToDevice(data["mean"], data["std"], device, device_augmentation(config, data, device))
    order.start = (epoch, update)
    batches = iter(train_loader(config, train_set, data, order, device)) if epoch < epochs else None
    val_batches = eval_loader(config, val_set, data, processes)
    if config.in_memory:
        val_batches = [(images.to(device), targets, unreadable) for images, targets, unreadable in val_batches]
    done = epoch * updates + update
    quiet = None if processes.first else True  # None: unless it goes to a terminal
    bar = tqdm(total=epochs * updates, initial=done, unit="update", dynamic_ncols=True, disable=quiet)
    stop = StopRequest(processes)
    saved, save_time = True, time.monotonic()
    try:
        while epoch < epochs:
            start_training(model, config)
            epoch_clock = clock = time.monotonic()
            epoch_start = window_start = update
            while update < updates:
                # One update: forward and backward over its images, then one step.
                loss = torch.zeros((), device=device)
                statistics.start_update()
                for micro in range(config.grad_accum):
                    images, targets, failures = next(batches)
                    for failure in set(failures) - unreadable:
                        warn(f"skipped: {failure}")
                        unreadable.add(failure)
                    images, targets = to_device(images, targets)
                    if mixup:
                        images, targets = mixup(images, targets, epoch, update)
                    if config.preview and processes.first and done == micro == 0:
                        save_preview(config.output, images, targets, data, class_names, config.smoothing)
                    # Dropout and drop path are a function of the place in the run, not of what was drawn before it.
                    torch.manual_seed(mixed_seed(config.seed, epoch, update, micro, processes.rank))
                    # DDP averages the gradients over the processes in the last backward pass of the update.
                    more = processes.count > 1 and micro < config.grad_accum - 1
                    with train_model.no_sync() if more else contextlib.nullcontext():
                        with autocast(device, config.precision):
                            logits = train_model(images)
                        smoothing = 0.0 if mixup else config.smoothing  # mixed targets are smooth already
                        part = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
                        if teacher:
                            lesson = distillation_loss(
                                logits.float(), teacher(images), config.distill, config.distill_tau
                            )
                            part = (1 - config.distill_alpha) * part + config.distill_alpha * lesson
                        if config.mesa and 4 * epoch >= config.epochs:
                            with torch.no_grad(), autocast(device, config.precision):
                                taught = average(images).float().softmax(dim=1)
                            part = part + config.mesa * F.cross_entropy(logits.float(), taught)
                        part = part / config.grad_accum
                        loss += part.detach()
                        # The factor is 1, or NaN where the loss is not finite: then no gradient is finite either, after
                        # DDP on any process, and all of them leave the update out together.
                        scaler.scale(part * (1 + 0 * part.detach())).backward()
                scaler.unscale_(optimizer)
                # The norm is taken in any case: it tells, without a wait for the device, if the update counts.
                max_norm = config.clip_grad or torch.finfo(torch.float32).max
                grad_norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
                scaler.step(optimizer)
                scaler.update(None if config.precision == "fp16" else 1.0)
                optimizer.zero_grad()
                statistics.finish_update(grad_norm)
                meter.update(loss, grad_norm)
                update, done = update + 1, done + 1
                if ema:
                    ema.update(model, step=done)
                schedule.step_update(done)
                bar.update()

                if done % config.log_every == 0:  # reading figures waits for the device: now and then is enough
                    window_loss, _, _ = meter.read()
                    speed = (update - window_start) * order.total_batch / (time.monotonic() - clock)
                    figures = {"loss": window_loss, "lr": learning_rate(), "images_per_second": speed}
                    log.window(done, bar, **figures, memory_gib=memory_used(device), grad_norm=float(grad_norm))
                    clock, window_start = time.monotonic(), update
                minutes = (time.monotonic() - save_time) / 60
                asked_to_stop, due = stop.agreed(save=0 < config.save_minutes <= minutes)
                if asked_to_stop:
                    return save_and_stop()
                if due or (config.save_updates and done % config.save_updates == 0):
                    saved, save_time = folder.save_last(snapshot()), time.monotonic()

            # The end of an epoch: evaluation, logs, checkpoints.
            _, train_loss, skipped = meter.read()
            speed = (update - epoch_start) * order.total_batch / (time.monotonic() - epoch_clock)
            row = {"epoch": epoch + 1, "updates": done, "lr": learning_rate(), "train_loss": train_loss}
            if (epoch + 1) % config.eval_every == 0 or epoch + 1 == epochs:
                try:
                    figures = evaluate(eval_model, val_batches, to_device, processes, config.precision, stop=stop)
                except RunError:
                    folder.save_last(snapshot())  # a picture that cannot be read costs an evaluation, not an epoch
                    raise
                if figures is None:
                    return save_and_stop()
                row |= {"val_loss": figures["loss"], "top1": figures["top1"], "top5": figures["top5"]}
            unreadable.update(*processes.gather(unreadable))
            if update > epoch_start:  # and not stopped between an epoch's last update and its evaluation
                row["images_per_second"] = speed
            row |= {"skipped_updates": skipped, "unreadable_images": len(unreadable)}
            log.epoch(row | {"seconds": time.monotonic() - started, "memory_gib": memory_used(device)})
            epoch, update = epoch + 1, 0
            schedule.step(epoch)
            meter.start_epoch()
            top1 = row.get("top1", -1.0)
            if top1 > best and all(processes.gather(folder.save_best(snapshot() | {"best": top1}))):
                best = top1
            if epoch % config.save_epochs == 0 or epoch == epochs:
                saved, save_time = folder.save_last(snapshot()), time.monotonic()
    finally:
        batches = val_batches = None  # ends the loader processes
        bar.close()
        stop.close()
        log.close()

    if not saved or best < 0:
        lost = "best weights" if saved else "end"
        raise RunError(f"the run is complete, but its {lost} could not be saved in {config.output}")
    log.finish(settings, processes, folder.best, parameters=total, unreadable_images=sorted(unreadable))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Settings, processes, training."""
    config = parse_train(argv)
    processes = start_processes(config.device, config.threads)
    try:
        return train(config, processes)
    finally:
        processes.close()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RunError as error:
        sys.exit(f"error: {error}")
