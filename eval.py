#!/usr/bin/env python
"""Evaluate an image classifier, or name what is on single pictures.

    python eval.py --checkpoint runs/pola_vit_tiny-folder/best.pt --data-dir /data/imagenet
    python eval.py --checkpoint best.pt --data-dir /data/imagenet --img-size 336 448 --crop-pct 1.0
    python eval.py --checkpoint official.pth --model mlla_tiny --data-dir /data/imagenet
    python eval.py --model vit_small_patch16_224 --pretrained --data-dir /data/imagenet
    torchrun --nproc-per-node 8 eval.py --checkpoint best.pt --data-dir /data/imagenet --output results/pola_tiny
    python eval.py --checkpoint best.pt --suite imagenet=/data/imagenet imagenet-a=/data/imagenet-a --sizes 224 288
    python eval.py --compare results/*.json --output comparison
    python eval.py --checkpoint best.pt --image cat.jpg dog.jpg

A checkpoint of train.py says which model, classes and input it was trained with, and on which data set, so that it can
be evaluated by its name alone; every flag wins over it. Under torchrun every image is counted exactly once.

OUTPUT.json and OUTPUT.csv hold a row for each size and data set, OUTPUT.classes.csv the accuracy of each class.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset
from torch import nn
from tqdm import tqdm

from flash_bla.engine.checkpoint import AVERAGED, is_own, load_weights, read_checkpoint
from flash_bla.engine.comparison import compare
from flash_bla.engine.config import EvalConfig, RunError, parse_eval
from flash_bla.engine.data import ToDevice, check_classes, class_names_of, eval_loader, open_dataset, resolve_data
from flash_bla.engine.evaluation import autocast, evaluate, throughput
from flash_bla.engine.images import read_picture
from flash_bla.engine.logs import csv_text, prepare_output, write_output
from flash_bla.engine.model import create_model, rebuild_model
from flash_bla.engine.processes import Processes, start_processes
from flash_bla.engine.suites import EvalSet, open_suites

ENDINGS = (".json", ".csv", ".classes.csv")  # of the files of results


def load_model(config: EvalConfig) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """The model with its weights, what its images go through (see `resolve_data`), and what its file says."""
    content = read_checkpoint(config.checkpoint) if config.checkpoint else {}
    if config.model:  # the file may then be of any kind
        model, description = create_model(config, config.num_classes)
    elif is_own(content):
        description = content["model"]
        model = rebuild_model(config, description)
        own = {"num_classes": model.num_classes}
        if "data" in content:
            own["in_chans"] = content["data"]["input_size"][0]
        for name, value in own.items():
            if getattr(config, name) not in (None, value):
                raise RunError(f"{name}: the model of {config.checkpoint} has {value}, got {getattr(config, name)}")
    else:
        raise RunError(f"{config.checkpoint} does not say which model it is of: name it with --model")
    if content and (notes := load_weights(model, content, config.checkpoint, use_ema=config.use_ema)):
        raise RunError(f"{notes[0]}, which has learned nothing; --num-classes sets how many it has")
    if not is_own(content):  # the settings of other projects mean nothing here
        content = {key: content[key] for key in AVERAGED if key in content}
    return model, resolve_data(config, model, description, content.get("data")), content


def open_datasets(config: EvalConfig, model: nn.Module, content: dict[str, Any]) -> list[EvalSet]:
    """The suites of the settings; without any, the data set that they name or that the checkpoint was trained with."""
    class_names = content.get("class_names")
    if config.suite:
        return open_suites(config, model.num_classes, class_names)
    trained = content.get("config", {"dataset": "folder", "val_split": "validation"})
    given = {key: getattr(config, key) for key in ("dataset", "data_dir", "val_split")}
    if (config.dataset or trained.get("dataset")) == "digits":  # in no folder, whatever the run named
        trained = trained | {"data_dir": None}
    config = replace(config, **{key: trained.get(key) if value is None else value for key, value in given.items()})
    # The classes' numbers are the checkpoint's, even if the folder lacks some of them.
    dataset = open_dataset(config, training=False, class_names=class_names, batch_size=config.batch_size)
    class_names = class_names_of(dataset)
    check_classes(model.num_classes, class_names, config.dataset)
    return [EvalSet(config.dataset, config.data_dir, config.val_split, dataset, class_names)]


def evaluate_datasets(config: EvalConfig, processes: Processes) -> list[dict[str, Any]]:
    """Accuracies, loss, calibration and speed, a row for each size and data set; also written to files of OUTPUT."""
    if processes.first and config.output is not None:
        prepare_output(config.output, ENDINGS)
    rows, class_rows, datasets = [], [], None
    for size in config.sizes or [None]:
        if size:
            config.img_size = [size]
        model, data, content = load_model(config)
        datasets = datasets or open_datasets(config, model, content)  # all of them, before hours go into the first
        model.to(processes.device)
        to_device = ToDevice(data["mean"], data["std"], processes.device)
        speed = throughput(model, data["input_size"], config.batch_size, processes.device, config.precision)

        has_average = any(content.get(key) for key in AVERAGED)
        facts = {
            "model": config.model or content["model"]["name"],
            "checkpoint": config.checkpoint,
            "weights": "ema" if config.use_ema and has_average else "model",
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        }
        run = {key: data[key] for key in ("input_size", "crop_pct", "crop_mode", "interpolation")}
        run |= {"precision": config.precision, "batch_size": config.batch_size}
        run |= {"device": processes.device.type, "processes": processes.count, "throughput": speed}
        for entry in datasets:
            loader = eval_loader(config, entry.dataset, data, processes)
            bar = tqdm(loader, unit="batch", disable=None if processes.first else True)
            figures = evaluate(model, bar, to_device, processes, config.precision, entry.classes, entry.labels)
            classes = figures.pop("classes")
            place = {"dataset": entry.name, "data_dir": entry.folder, "val_split": entry.split}
            rows.append(facts | place | run | figures)
            class_rows += rows_of_classes(rows[-1], classes, entry.class_names)
            if processes.first:
                report(rows, class_rows, config.output)
    if processes.first and config.output:
        print(f"written to {config.output}.json, {config.output}.csv and {config.output}.classes.csv")
    return rows


def rows_of_classes(
    row: dict[str, Any], classes: list[list[int]], class_names: Sequence[str] | None
) -> list[dict[str, Any]]:
    """A row for each class that has images: how many, and the part of them that is recognised, in per cent."""
    words = ImageNetInfo().label_descriptions(as_dict=True)
    names = class_names or [str(number) for number in range(len(classes))]
    place = {key: row[key] for key in ("dataset", "data_dir", "input_size")}
    return [
        place | {"class": name, "name": words.get(name, name), "images": images, "top1": 100 * right / images}
        for name, (images, right) in zip(names, classes, strict=True)
        if images
    ]


def report(rows: list[dict[str, Any]], class_rows: list[dict[str, Any]], output: str | None) -> None:
    """Prints the last row, and writes all so far: what is done is kept if a later data set fails."""
    row = rows[-1]
    print(
        f"{row['model']} on {row['dataset']}, {row['images']} images at {row['input_size'][1:]}: "
        f"top-1 {row['top1']:.2f} %, top-5 {row['top5']:.2f} %, loss {row['loss']:.4f}, ECE {row['ece']:.2f} %, "
        f"{row['images_per_second']:.0f} images/s, {row['throughput']:.0f} without reading them"
    )
    if output:
        contents = json.dumps(rows, indent=2), csv_text(rows), csv_text(class_rows)
        write_output(output, {end: text.encode() for end, text in zip(ENDINGS, contents, strict=True)})


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
        image = transform(read_picture(file, data["mode"]))
        with autocast(processes.device, config.precision):
            logits = model(image[None].to(processes.device))
        best = logits.float().softmax(dim=1).topk(min(5, logits.shape[1]))
        answers[file] = [(names[i], p) for i, p in zip(best.indices[0].tolist(), best.values[0].tolist(), strict=True)]
        print(file)
        for name, probability in answers[file]:
            print(f"  {100 * probability:6.2f} %  {name}")
    return answers


def main(argv: list[str] | None = None) -> list[dict[str, Any]] | dict[str, list[tuple[str, float]]]:
    """Settings, processes, evaluation: its rows of figures, or the best classes of pictures by their file."""
    config = parse_eval(argv)
    if config.compare:
        return compare(config.compare, config.output)
    processes = start_processes(config.device, config.threads)
    try:
        return (classify_images if config.image else evaluate_datasets)(config, processes)
    finally:
        processes.close()


if __name__ == "__main__":
    try:
        main()
    except RunError as error:
        sys.exit(f"error: {error}")
