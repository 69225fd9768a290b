#!/usr/bin/env python
"""Evaluate an image classifier, or name what is on single pictures.

    python eval.py --checkpoint runs/pola_vit_tiny-folder/best.pt --data-dir /data/imagenet
    python eval.py --checkpoint best.pt --data-dir /data/imagenet --img-size 336 448 --crop-pct 1.0
    python eval.py --checkpoint official.pth --model mlla_tiny --data-dir /data/imagenet
    python eval.py --model vit_small_patch16_224 --pretrained --data-dir /data/imagenet
    torchrun --nproc-per-node 8 eval.py --checkpoint best.pt --data-dir /data/imagenet --output results/imagenet
    python eval.py --checkpoint best.pt --image cat.jpg dog.jpg

A checkpoint of train.py says which model, classes and input it was trained with, and on which data set, so that it can
be evaluated by its name alone; every flag wins over it. Under torchrun every image is counted exactly once.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset
from torch import nn
from tqdm import tqdm

from flash_bla.engine.checkpoint import AVERAGED, is_own, load_weights, read_checkpoint, write_atomically
from flash_bla.engine.config import EvalConfig, RunError, parse_eval
from flash_bla.engine.data import ToDevice, check_classes, class_names_of, eval_loader, open_dataset, resolve_data
from flash_bla.engine.evaluation import autocast, evaluate
from flash_bla.engine.logs import csv_text
from flash_bla.engine.model import create_model, rebuild_model
from flash_bla.engine.processes import Processes, start_processes


def load_model(config: EvalConfig) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """The model with its weights, what its images go through (see `resolve_data`), and what its file says."""
    content = read_checkpoint(config.checkpoint) if config.checkpoint else {}
    if config.model:  # the file may then be of any kind
        model, description = create_model(config, config.num_classes)
    elif is_own(content):
        description = content["model"]
        model = rebuild_model(config, description)
    else:
        raise RunError(f"{config.checkpoint} does not say which model it is of: name it with --model")
    if content and (notes := load_weights(model, content, config.checkpoint, use_ema=config.use_ema)):
        raise RunError(f"{notes[0]}, which has learned nothing; --num-classes sets how many it has")
    if not is_own(content):  # the settings of other projects mean nothing here
        content = {key: content[key] for key in AVERAGED if key in content}
    return model, resolve_data(config, model, description, content.get("data")), content


def evaluate_dataset(config: EvalConfig, processes: Processes) -> dict[str, Any]:
    """Top-1, top-5, loss and speed on a data set; also written to OUTPUT.json and OUTPUT.csv."""
    model, data, content = load_model(config)
    trained = content.get("config", {"dataset": "folder", "val_split": "validation"})
    for key in ("dataset", "data_dir", "val_split"):
        if getattr(config, key) is None:
            setattr(config, key, trained.get(key))
    # The classes' numbers are the checkpoint's, even if the folder lacks some of them.
    dataset = open_dataset(config, training=False, class_names=content.get("class_names"), batch_size=config.batch_size)
    check_classes(model.num_classes, class_names_of(dataset), config.dataset)

    model.to(processes.device)
    loader = eval_loader(config, dataset, data, processes)
    to_device = ToDevice(data["mean"], data["std"], processes.device)
    bar = tqdm(loader, unit="batch", disable=None if processes.first else True)
    figures = evaluate(model, bar, to_device, processes, config.precision)

    weights = "ema" if config.use_ema and any(content.get(key) for key in AVERAGED) else "model"
    result = {"model": config.model or content["model"]["name"], "checkpoint": config.checkpoint, "weights": weights}
    result |= {key: getattr(config, key) for key in ("dataset", "data_dir", "val_split")}
    result |= {key: data[key] for key in ("input_size", "crop_pct", "crop_mode", "interpolation")}
    result |= figures | {"precision": config.precision, "device": processes.device.type, "processes": processes.count}
    if processes.first:
        print(
            f"{result['model']} on {config.dataset}, {figures['images']} images at {data['input_size'][1:]}: "
            f"top-1 {figures['top1']:.2f} %, top-{min(5, model.num_classes)} {figures['top5']:.2f} %, "
            f"loss {figures['loss']:.4f}, {figures['images_per_second']:.0f} images/s"
        )
        if config.output:
            Path(config.output).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(f"{config.output}.json", json.dumps(result, indent=2).encode())
            write_atomically(f"{config.output}.csv", csv_text([result]).encode())
            print(f"written to {config.output}.json and {config.output}.csv")
    return result


@torch.no_grad()
def classify_images(config: EvalConfig, processes: Processes) -> dict[str, list[tuple[str, float]]]:
    """Prints the five best classes of single pictures, with their names and probabilities."""
    model, data, content = load_model(config)
    model.to(processes.device).eval()
    names = content.get("class_names") or [f"class {index}" for index in range(model.num_classes)]
    if subset := infer_imagenet_subset(model):
        info = ImageNetInfo(subset)
        words = info.label_descriptions(as_dict=True)
        names = [words.get(name, name) for name in content.get("class_names") or info.label_names()]
    transform = create_transform(
        data["input_size"], interpolation=data["interpolation"], mean=data["mean"], std=data["std"],
        crop_pct=data["crop_pct"], crop_mode=data["crop_mode"],
    )  # fmt: skip
    answers = {}
    for file in config.image:
        try:
            image = transform(Image.open(file).convert(data["mode"]))
        except Exception as error:  # decoders raise whatever a damaged file leads them to
            raise RunError(f"cannot read {file}: {error}") from error
        with autocast(processes.device, config.precision):
            logits = model(image[None].to(processes.device))
        best = logits.float().softmax(dim=1).topk(min(5, logits.shape[1]))
        answers[file] = [(names[i], p) for i, p in zip(best.indices[0].tolist(), best.values[0].tolist(), strict=True)]
        print(file)
        for name, probability in answers[file]:
            print(f"  {100 * probability:6.2f} %  {name}")
    return answers


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Settings, processes, evaluation."""
    config = parse_eval(argv)
    processes = start_processes(config.device, config.threads)
    try:
        return (classify_images if config.image else evaluate_dataset)(config, processes)
    finally:
        processes.close()


if __name__ == "__main__":
    try:
        main()
    except RunError as error:
        sys.exit(f"error: {error}")
