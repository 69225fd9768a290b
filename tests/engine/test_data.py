"""Data: an order and augmentations that follow from the seed alone, exact shares, and errors before anything starts."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp

from flash_bla.engine.config import EvalConfig, RunError, TrainConfig
from flash_bla.engine.data import (
    Digits,
    SeededMixup,
    ToDevice,
    TrainImages,
    TrainOrder,
    check_classes,
    class_names_of,
    eval_loader,
    open_dataset,
    train_loader,
)
from flash_bla.engine.processes import Processes

CPU = torch.device("cpu")
DATA = {
    "input_size": [3, 16, 16], "mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic", "crop_pct": 0.9,
    "crop_mode": "center", "mode": "RGB",
}  # fmt: skip
GREY = DATA | {"input_size": [1, 8, 8], "mean": [0.5], "std": [0.25], "crop_pct": 1.0, "mode": "L"}


def settings(**changes) -> TrainConfig:
    return TrainConfig(**({"dataset": "digits", "epochs": 3, "batch_size": 24, "workers": 0, "seed": 5} | changes))


def batches(config: TrainConfig, data: dict, start=(0, 0), count: int = 2) -> list:
    dataset = open_dataset(config, training=True)
    order = TrainOrder(len(dataset), config, Processes(CPU, 0, 1))
    order.start = start
    return list(itertools.islice(train_loader(config, dataset, data, order, CPU), count))


# Order ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repeats", [1, 3])
def test_an_epoch_takes_every_image_once(repeats):
    config = settings(batch_size=25, repeated_aug=repeats)
    keys = [key for batch in TrainOrder(100, config, Processes(CPU, 0, 1)) for key in batch]
    assert len(keys) == 3 * 100
    for epoch in range(3):
        images = [image for e, image, _ in keys if e == epoch]
        assert len(images) == 100
        assert len(set(images)) == -(-100 // repeats)
        assert len(set(keys)) == len(keys)  # copies of an image are told apart, so they are augmented differently
    assert keys[:100] != [(0, *key[1:]) for key in keys[100:200]]
    assert keys == [key for batch in TrainOrder(100, config, Processes(CPU, 0, 1)) for key in batch]


@pytest.mark.parametrize(("count", "accum", "batch"), [(1, 3, 8), (3, 1, 8), (2, 2, 6), (2, 1, 13)])
def test_an_update_has_the_same_images_however_it_is_shared(count, accum, batch):
    total = count * accum * batch
    whole = list(TrainOrder(100, settings(batch_size=total), Processes(CPU, 0, 1)))
    shares = [
        list(TrainOrder(100, settings(batch_size=batch, grad_accum=accum), Processes(CPU, rank, count)))
        for rank in range(count)
    ]
    assert all(len(share) == accum * len(whole) for share in shares)
    for update, expected in enumerate(whole):
        passes = [share[update * accum + micro] for micro in range(accum) for share in shares]
        assert sorted(key for keys in passes for key in keys) == sorted(expected)
        if batch % 2 == 0:  # mixup's pairs, i and -1 - i, stay together
            pairs = {frozenset(pair) for pair in zip(expected, reversed(expected), strict=True)}
            assert all(frozenset(pair) in pairs for keys in passes for pair in zip(keys, reversed(keys), strict=True))


def test_the_order_can_be_taken_up_anywhere():
    whole = list(TrainOrder(100, settings(grad_accum=2), Processes(CPU, 0, 1)))
    for start, skipped in (((0, 1), 2), ((1, 0), 4), ((1, 2), 8), ((3, 0), 12)):
        order = TrainOrder(100, settings(grad_accum=2), Processes(CPU, 0, 1))
        order.start = start
        assert list(order) == whole[skipped:]


def test_a_batch_larger_than_the_data_set_is_refused():
    with pytest.raises(RunError, match="takes 48 images, but the data set has 40"):
        TrainOrder(40, settings(), Processes(CPU, 0, 2))


# Augmentation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [DATA, GREY], ids=["colour", "grey"])
def test_the_stream_does_not_depend_on_the_loader_processes(data):
    config = settings(aa="rand-m9-mstd0.5-inc1", reprob=0.5, hflip=0.5)
    alone = batches(config, data)
    shared = batches(dataclasses.replace(config, workers=2), data)
    for (images, targets, _), (others, other_targets, _) in zip(alone, shared, strict=True):
        assert images.images.dtype == torch.uint8 and len(images.places) > 5
        assert all(torch.equal(a, b) for a, b in zip(images, others, strict=True))
        assert torch.equal(targets, other_targets)
    # ... nor on what was drawn before: the second batch is the same where a run is taken up with it.
    assert torch.equal(batches(config, data, start=(0, 1), count=1)[0][0].images, alone[1][0].images)


@pytest.mark.parametrize(("mode", "count"), [("pixel", 1), ("rand", 3), ("const", 2)])
@pytest.mark.parametrize("data", [DATA, GREY], ids=["colour", "grey"])
def test_random_erasing_is_that_of_timm(data, mode, count):
    config = settings(aa="rand-m9-mstd0.5-inc1", reprob=0.5, remode=mode, recount=count)
    [(images, _, _)] = batches(config, data, count=1)
    found, _ = ToDevice(data["mean"], data["std"], CPU)(images, torch.zeros(1))
    transform = create_transform(
        data["input_size"], is_training=True, mean=data["mean"], std=data["std"], interpolation="bicubic",
        auto_augment=config.aa, re_prob=0.5, re_mode=mode, re_count=count,
    )  # fmt: skip
    dataset = TrainImages(open_dataset(config, training=True), transform, data["mode"], config.seed)
    expected = [dataset[key][0] for key in next(iter(TrainOrder(1437, config, Processes(CPU, 0, 1))))]
    assert torch.allclose(found, torch.stack(expected), atol=1e-5)
    assert len(images.places) > 5


def test_the_strongest_posterization_is_black():
    posterize = AugmentOp("PosterizeIncreasing", prob=1.0, magnitude=10)
    assert posterize(Image.new("RGB", (4, 4), (255, 90, 10))).getextrema() == ((0, 0),) * 3
    assert posterize(Image.new("L", (4, 4), 255)).getextrema() == (0, 0)


def test_epochs_and_copies_are_augmented_differently():
    config = settings(hflip=0.0)
    dataset = train_loader(config, Digits(True), GREY, TrainOrder(1437, config, Processes(CPU, 0, 1)), CPU).dataset
    views = [dataset[key][0] for key in ((0, 7, 0), (1, 7, 0), (0, 7, 1))]
    assert views[0].dtype == torch.uint8
    assert torch.equal(dataset[0, 7, 0][0], views[0])
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(views, 2))


def test_images_are_normalised_on_the_device_as_timm_does():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    raw, expected = (
        create_transform((3, 16, 16), crop_pct=1.0, mean=mean, std=std, use_prefetcher=raw)(image)
        for raw in (True, False)
    )
    assert raw.dtype == torch.uint8
    images, _ = ToDevice(mean, std, CPU)(raw[None], torch.zeros(1))
    assert torch.allclose(images[0], expected, atol=1e-6)
    assert ToDevice(mean, std, CPU)(expected, torch.zeros(1))[0] is expected


@pytest.mark.parametrize("mixing", [{"mixup": 0.8}, {"cutmix": 1.0}])
def test_mixup_is_the_same_however_an_update_is_shared(mixing):
    whole_order = TrainOrder(96, settings(batch_size=48), Processes(CPU, 0, 1))
    orders = [TrainOrder(96, settings(batch_size=24), Processes(CPU, rank, 2)) for rank in range(2)]
    generator = torch.Generator().manual_seed(0)
    images, targets = torch.rand(96, 3, 8, 8, generator=generator), torch.arange(96) % 10
    mix = SeededMixup(settings(**mixing), num_classes=10)

    def mixed(order, update):
        keys = list(order)[update]
        index = [image for _, image, _ in keys]
        return dict(zip(index, zip(*mix(images[index], targets[index], 0, update), strict=True), strict=True))

    for update in range(2):
        whole = mixed(whole_order, update)
        shares = mixed(orders[0], update) | mixed(orders[1], update)
        assert whole.keys() == shares.keys()
        for key, (image, target) in whole.items():
            assert torch.allclose(image, shares[key][0]) and torch.allclose(target, shares[key][1])
    first = mixed(whole_order, 0)
    assert any(not torch.equal(image, images[key]) for key, (image, _) in first.items())


# Data sets -----------------------------------------------------------------------------------------------------------


def test_digits_have_a_fixed_stratified_split():
    train, held_out = Digits(True), Digits(False)
    assert (len(train), len(held_out)) == (1437, 360)
    assert np.bincount(held_out.targets).tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    assert held_out.targets[:10].tolist() == Digits(False).targets[:10].tolist()
    pictures = {image.tobytes() for image in train.images}
    assert not any(image.tobytes() in pictures for image in held_out.images)
    image, target = held_out[0]
    assert (image.mode, image.size, target) == ("L", (8, 8), int(held_out.targets[0]))


@pytest.mark.parametrize("count", [1, 2, 7])
def test_every_image_is_evaluated_once(count):
    config = EvalConfig(dataset="digits", workers=0, batch_size=50)
    shares = [eval_loader(config, Digits(False), GREY, Processes(CPU, rank, count)).sampler for rank in range(count)]
    assert sorted(index for share in shares for index in share) == list(range(360))


def folder(root, **changes) -> TrainConfig:
    return settings(dataset="folder", data_dir=str(root), batch_size=12, **changes)


def test_folders(pictures):
    config = folder(pictures())
    dataset = open_dataset(config, training=True)
    assert class_names_of(dataset) == ["dark", "grey", "light"]
    assert (len(dataset), len(open_dataset(config, training=False))) == (24, 9)
    # The model's classes keep their numbers, also where the folder has fewer or sorts them otherwise.
    held_out = open_dataset(config, training=False, class_names=["light", "dark", "other", "grey"])
    assert {dataset_target for _, dataset_target in held_out.reader.samples} == {0, 1, 3}


def test_tar_files(pictures, tmp_path):
    root = pictures()
    for split, name in (("train", "train"), ("val", "validation")):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            tar.add(root / split, split)
    dataset = open_dataset(folder(tmp_path / "train.tar"), training=True)
    assert class_names_of(dataset) == ["dark", "grey", "light"]
    loader = eval_loader(folder(tmp_path / "train.tar"), dataset, DATA, Processes(CPU, 0, 1))
    assert torch.cat([targets for _, targets, _ in loader]).bincount().tolist() == [8, 8, 8]
    # A folder with a file for each split, whichever of its names that has; the order is that of a folder of pictures.
    config = folder(tmp_path, val_split="val")
    assert len(open_dataset(config, training=False, class_names=["dark", "grey", "light"])) == 9
    for batch, same in zip(batches(config, DATA, (0, 1)), batches(folder(root), DATA, (0, 1)), strict=True):
        assert torch.equal(batch[0], same[0]) and torch.equal(batch[1], same[1])


def test_a_tar_file_cut_short_is_refused_before_anything_starts(pictures, tmp_path):
    path = tmp_path / "train.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(pictures() / "train", "train")
    whole = path.read_bytes()
    for size in (*range(4096, 9 * 1024, 512), 100, 0):
        path.write_bytes(whole[:size])
        with pytest.raises(RunError, match=rf"{path}( cannot be read: | .* cut short)"):
            open_dataset(folder(path), training=True)


def test_parquet_files(pictures, tmp_path):
    datasets = pytest.importorskip("datasets")
    root = pictures()
    whole = datasets.load_dataset("imagefolder", data_dir=str(root), cache_dir=str(tmp_path / "cache"))
    (tmp_path / "parquet").mkdir()
    for split in ("train", "validation"):
        whole[split].to_parquet(tmp_path / "parquet" / f"{split}-00000-of-00001.parquet")
    config = settings(
        dataset=f"hfds/{tmp_path / 'parquet'}", data_dir=str(tmp_path / "cache"), batch_size=12, in_chans=3
    )
    assert class_names_of(open_dataset(config, training=True)) == ["dark", "grey", "light"]
    assert len(open_dataset(config, training=False)) == 9
    # Any row can be read at any time, so the order of an epoch is the very one of a folder of pictures.
    for batch, same in zip(batches(config, DATA, (0, 1)), batches(folder(root), DATA, (0, 1)), strict=True):
        assert torch.equal(batch[0], same[0]) and torch.equal(batch[1], same[1])
    damaged = tmp_path / "parquet" / "train-00000-of-00001.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    with pytest.raises(RunError, match="cannot be read"):
        open_dataset(config, training=True)


def targets_of(config: TrainConfig, **options) -> list[int]:
    loader = eval_loader(config, open_dataset(config, training=False, **options), DATA, Processes(CPU, 0, 1))
    return torch.cat([targets for _, targets, _ in loader]).tolist()


@pytest.mark.parametrize("name", ["torch/image_folder", "torch/folder"])
def test_torchvision_folders(name, pictures):
    root = pictures()
    config = settings(dataset=name, data_dir=str(root))
    assert class_names_of(open_dataset(config, training=False)) == ["dark", "grey", "light"]
    assert targets_of(config) == [0] * 3 + [1] * 3 + [2] * 3
    # The model's classes keep their numbers, also where the folder has fewer or sorts them otherwise.
    names = ["light", "dark", "other", "grey"]
    assert targets_of(config, class_names=names) == [1] * 3 + [3] * 3 + [0] * 3
    dataset = open_dataset(config, training=False, class_names=names)
    assert class_names_of(dataset) == names and dataset.class_to_idx == {"light": 0, "dark": 1, "other": 2, "grey": 3}
    assert dataset.imgs == dataset.samples and dataset.targets == [target for _, target in dataset.samples]
    with pytest.raises(RunError, match=f"the folder 'dark' in {root}/val is none of the 2 classes .*: grey, light"):
        open_dataset(config, training=False, class_names=["grey", "light"])
    (root / "val" / "empty").mkdir()
    with pytest.raises(RunError, match=f"^the class 'empty' is empty: no image in {root}/val/empty [(].jpg, "):
        open_dataset(config, training=False, class_names=[*names, "empty"])


def test_other_class_names_of_a_data_set_without_folders_are_told(capsys):
    names = [str(digit) for digit in range(10)]
    open_dataset(settings(), training=False, class_names=names)
    assert capsys.readouterr().err == ""
    open_dataset(settings(), training=False, class_names=[*names[:3], "three", *names[4:]])
    assert "'digits' has other class names: number 3 is '3', for the model it is 'three'" in capsys.readouterr().err
    open_dataset(settings(), training=False, class_names=names[:9])
    assert "number 9 is '9', for the model it is None" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["folder", "torch/folder"])
def test_hidden_folders_are_no_classes(name, pictures):
    root = pictures()
    for hidden in ("train/.ipynb_checkpoints", "train/grey/.ipynb_checkpoints", "train/.trash/new"):
        shutil.copytree(root / "train" / "dark", root / hidden)
    (root / "train" / ".cache").mkdir()
    config = settings(dataset=name, data_dir=str(root))
    for given in (None, ["dark", "grey", "light"]):
        dataset = open_dataset(config, training=True, class_names=given)
        assert class_names_of(dataset) == ["dark", "grey", "light"]
        samples = (dataset.reader if name == "folder" else dataset).samples
        assert [target for _, target in samples] == [0] * 8 + [1] * 8 + [2] * 8
    for shade in ("dark", "grey", "light"):
        shutil.rmtree(root / "train" / shade)
    with pytest.raises(RunError, match=f"no image in {root}/train"):
        open_dataset(config, training=True)


@pytest.mark.parametrize("hidden", ["", ".ipynb_checkpoints", "grey/.ipynb_checkpoints", ".trash/new"])
@pytest.mark.parametrize("name", ["train", ".", ".cache/train"])
def test_hidden_folders_of_a_tar_file_are_refused(name, hidden, pictures, tmp_path):
    """But not the one that it was packed from."""
    root = pictures() / "train"
    if hidden:
        shutil.copytree(root / "dark", root / hidden)
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        tar.add(root, name)
    if not hidden:
        assert len(open_dataset(folder(tmp_path / "train.tar"), training=True)) == 24
        return
    inside = os.path.normpath(f"{name}/{hidden}")
    with pytest.raises(RunError, match=f"train.tar holds images in the hidden folder '{inside}'"):
        open_dataset(folder(tmp_path / "train.tar"), training=True)


@pytest.mark.parametrize("name", ["folder", "torch/folder", "wds/"])
def test_pictures_of_16_and_32_bits(name, tmp_path):
    """16 bits are scaled to 8, of which Pillow keeps only 255 and what is below; of 32 bits nobody knows the range."""
    pixels = np.random.default_rng(0).integers(0, 2**16, (16, 16), dtype=np.uint16)
    place = tmp_path / "val" / "grey"
    place.mkdir(parents=True)
    Image.fromarray(pixels).save(place / "0.png")
    config = settings(dataset=name, data_dir=str(tmp_path), batch_size=1)
    if name == "wds/":
        pytest.importorskip("webdataset")
        (place / "0.cls").write_text("0")
        with tarfile.open(tmp_path / "0.tar", "w") as tar:
            tar.add(place / "0.png", "0.png")
            tar.add(place / "0.cls", "0.cls")
        config = dataclasses.replace(config, val_split="0.tar|1")
    data = DATA | {"crop_pct": 1.0}
    for mode, channels in (("RGB", 3), ("L", 1)):
        dataset = open_dataset(config, training=False)
        loader = eval_loader(config, dataset, data | {"mode": mode}, Processes(CPU, 0, 1))
        ((images, _, failures),) = loader
        assert not failures and images.shape == (1, channels, 16, 16)
        assert (images.double() * 257 - torch.tensor(pixels.astype(float))).abs().max() <= 128  # half a step of 8 bits
    if name == "torch/folder":
        (place / "0.png").unlink()
        Image.fromarray(pixels.astype(np.float32)).save(place / "0.tif")
        dataset = open_dataset(config, training=False)
        ((_, _, failures),) = eval_loader(config, dataset, data, Processes(CPU, 0, 1))
        assert failures == [
            f"cannot read {place}/0.tif: a grey picture of 32 bits (mode F), wanted are 8 or 16 bits a channel"
        ]


def test_errors_before_anything_starts(pictures, tmp_path):
    root = pictures()
    with pytest.raises(RunError, match="no such folder: .*nowhere"):
        open_dataset(folder(tmp_path / "nowhere"), training=True)
    with pytest.raises(RunError, match="needs a folder"):
        open_dataset(settings(dataset="folder"), training=True)
    with pytest.raises(RunError, match="the digits are embedded; dataset 'folder' reads .*train"):
        open_dataset(settings(dataset="digits", data_dir=str(root / "train")), training=True)
    with pytest.raises(RunError, match="neither 'folder' nor 'digits'"):
        open_dataset(settings(dataset="digit"), training=True)
    with pytest.raises(RunError, match=r"no folder for the split 'test' in .*; there is: train, val"):
        open_dataset(folder(root, val_split="test"), training=False)
    for names in (["dark", "light"], ["cats", "dogs"]):
        with pytest.raises(RunError, match=f"val/.* is none of the 2 classes of the model: {', '.join(names)}$"):
            open_dataset(folder(root), training=False, class_names=names)
    (root / "train" / "empty").mkdir()
    with pytest.raises(RunError, match="the class 'empty' is empty: no image in .*train/empty"):
        open_dataset(folder(root), training=True)
    Image.new("RGB", (8, 8)).save(root / "val" / "stray.png")
    with pytest.raises(RunError, match="images must stand in a folder of their class"):
        open_dataset(folder(root), training=False)
    with pytest.raises(RunError, match="the head has 10 classes, but the data set 'folder' has 3"):
        check_classes(10, ["a", "b", "c"], "folder")
    with pytest.raises(RunError, match="does not say how many classes"):
        check_classes(None, None, "wds/x")


def test_pictures_of_other_formats_are_left_out_with_a_warning(pictures, capsys):
    root = pictures()
    for name in ("dark/a.webp", "dark/b.BMP", "light/c.webp"):
        Image.new("RGB", (8, 8)).save(root / "train" / name)
    (root / "train" / "grey" / "notes.txt").write_text("no picture")
    assert len(open_dataset(folder(root), training=True)) == 24
    assert len(open_dataset(folder(root), training=False)) == 9
    assert capsys.readouterr().err == (
        f"warning: {root}/train: 3 pictures are left out (.bmp, .webp); read are .jpeg, .jpg, .png\n"
    )


def test_an_unreadable_image_is_replaced_in_training_and_reported_in_evaluation(pictures):
    root = pictures()
    for split in ("train", "val"):
        (root / split / "grey" / "1.png").write_bytes(b"no picture")
    config = folder(root)
    found = [batches(dataclasses.replace(config, workers=workers), DATA) for workers in (0, 2)]
    for (images, targets, failures), (others, other_targets, other_failures) in zip(*found, strict=True):
        assert torch.equal(images, others) and torch.equal(targets, other_targets)
        assert len(images) == 12 and failures == other_failures
    failures = [failure for batch in found[0] for failure in batch[2]]
    assert len(failures) == 1 and f"cannot read {root}/train/grey/1.png" in failures[0]
    # An evaluation must not put another image in its place.
    loader = eval_loader(config, open_dataset(config, training=False), DATA, Processes(CPU, 0, 1))
    _, targets, failures = next(iter(loader))
    assert len(failures) == 1 and f"cannot read {root}/val/grey/1.png" in failures[0]
    assert targets.tolist() == [0, 0, 0, 1, -1, 1, 2, 2, 2]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_set_of_unreadable_images_ends_the_run(workers, pictures):
    root = pictures()
    for file in root.glob("train/*/*.png"):
        file.write_bytes(b"")
    with pytest.raises(RunError, match="^10 images in a row cannot be read; the last: .*$"):  # in one line
        batches(folder(root, workers=workers), DATA)
