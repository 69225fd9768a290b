"""Augmentation on the device: timm's operations, drawn from each image's key alone."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from runs import UPDATES, assert_same_run, interrupt
from timm.data import RandomResizedCropAndInterpolation, auto_augment
from timm.data.random_erasing import RandomErasing

from flash_bla.engine.augment import (
    OPERATIONS,
    DeviceAugmentation,
    Draws,
    KeyedImages,
    apply_operations,
    arguments,
    image_keys,
)
from flash_bla.engine.config import RunError, TrainConfig
from flash_bla.engine.data import ToDevice, TrainOrder, open_dataset, train_loader
from flash_bla.engine.processes import Processes, seed_host

CPU = torch.device("cpu")
DATA = {"input_size": [3, 20, 24], "mean": [0.5, 0.4, 0.3], "std": [0.25] * 3, "interpolation": "bilinear"}
FULL = {"aa": "rand-m9-mstd0.5-inc1", "reprob": 0.5, "recount": 2, "vflip": 0.2, "scale": [0.3, 1.0]}


def pictures() -> list[np.ndarray]:
    """Noise, a few shades, one shade, and slopes: 20 x 24, uint8."""
    rng = np.random.default_rng(0)
    shape = 20, 24, 3
    noise, shades = rng.integers(0, 256, shape), rng.normal(120, 20, shape)
    slopes = 100 + np.cumsum(rng.integers(-3, 4, shape), axis=1)
    return [image.clip(0, 255).astype(np.uint8) for image in (noise, shades, np.full(shape, 77), slopes)]


def as_batch(images: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


# Operations ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_that_of_timm(monkeypatch, name, interpolation):
    geometric = name in ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
    images, fill = pictures(), (124, 116, 104)
    operations = torch.full((len(images),), OPERATIONS.index(name))
    for magnitude, negative in itertools.product((0.0, 3.0, 9.7, 10.0), (False, True)):
        monkeypatch.setattr(
            auto_augment, "_randomly_negate", lambda value, negative=negative: -value if negative else value
        )
        level = auto_augment.LEVEL_TO_ARG[name]
        expected = level(magnitude, {}) if level else ()
        values = arguments(operations, torch.full((len(images),), magnitude), torch.tensor([negative] * len(images)))
        torch.testing.assert_close(values, torch.full_like(values, *(expected or (0.0,))))

        found = apply_operations(
            as_batch(images).float(),
            operations,
            values,
            fill=torch.tensor(fill).view(3, 1, 1),
            interpolation=interpolation,
        )
        resample = getattr(Image.Resampling, interpolation.upper())
        theirs = [
            auto_augment.NAME_TO_OP[name](Image.fromarray(image), *expected, fillcolor=fill, resample=resample)
            for image in images
        ]
        difference = (found - as_batch([np.asarray(image) for image in theirs])).abs()
        # One step where the last bit of a product decides what is cut off. Pillow's bicubic kernel is another one: on
        # noise it differs visibly, on slopes by a step or two.
        noise, rest = difference[0], difference[1:]
        if geometric and interpolation == "bicubic":
            assert noise.mean() < 4 and rest[1:].max() <= 3
        else:
            assert difference.max() <= 1 and difference.mean() < 0.06


def test_each_image_has_its_own_operation():
    images = as_batch(pictures() * 4).float()
    operations = torch.arange(-1, 15)
    values = arguments(operations, torch.full((16,), 8.0), torch.tensor([True, False] * 8))
    options = {"fill": torch.zeros(3, 1, 1), "interpolation": "bicubic"}
    together = apply_operations(images, operations, values, **options)
    alone = [
        apply_operations(images[i : i + 1], operations[i : i + 1], values[i : i + 1], **options) for i in range(16)
    ]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(together[0], images[0])


@pytest.mark.parametrize("scale", [[0.3, 0.3], [1.0, 1.0]])
def test_the_crop_is_a_part_of_the_image_enlarged(scale):
    # Values that say where they come from.
    y, x = torch.meshgrid(torch.arange(20.0), torch.arange(24.0), indexing="ij")
    images = torch.stack([10 * y, 10 * x, 0 * x]).expand(64, -1, -1, -1).to(torch.uint8)
    config = TrainConfig(in_memory=True, scale=scale, ratio=[0.8, 1.25], hflip=0.0)
    found = DeviceAugmentation(config, DATA, CPU)(images, torch.arange(64)) * 0.25 + torch.tensor(DATA["mean"]).view(
        3, 1, 1
    )
    found = found * 25.5  # places in pixels
    middle = found[:, :, 5:15, 6:18]  # the outermost pixels look past the edge and find its value again
    rows, columns = (
        (middle[:, 0, -1] - middle[:, 0, 0]).mean(1) / 9 * 20,
        (middle[:, 1, :, -1] - middle[:, 1, :, 0]).mean(1) / 11 * 24,
    )
    assert (rows * columns / (20 * 24) - scale[0]).abs().max() < 0.05
    assert rows.std() > 0.5 or scale == [1.0, 1.0]
    centre = found[:, :2].mean((2, 3))
    boxes = [
        RandomResizedCropAndInterpolation.get_params(Image.new("L", (24, 20)), scale, [0.8, 1.25]) for _ in range(500)
    ]
    expected = torch.tensor([[top + (height - 1) / 2, left + (width - 1) / 2] for top, left, height, width in boxes])
    assert (centre.mean(0) - expected.mean(0)).abs().max() < 1 and (centre.std(0) - expected.std(0)).abs().max() < 0.8


@pytest.mark.parametrize(("mode", "count"), [("pixel", 1), ("rand", 3), ("const", 2)])
def test_erasing_takes_as_much_as_timm(mode, count):
    config = TrainConfig(reprob=0.5, remode=mode, recount=count, hflip=0.0)
    images = torch.full((3000, 3, 20, 24), 128, dtype=torch.uint8)
    found = DeviceAugmentation(config, DATA, CPU)(images, image_keys(1, torch.arange(3000)[:, None]))
    value = (128 / 255 - torch.tensor(DATA["mean"]).view(3, 1, 1)) / 0.25
    erased = ((found - value).abs() > 1e-5).any(1)
    if mode == "const":
        assert not found.movedim(1, 3)[erased].any()
    else:
        assert found.movedim(1, 3)[erased].mean().abs() < 0.1 and (found.movedim(1, 3)[erased].std() - 1).abs() < 0.1
    seed_host(0)
    theirs = RandomErasing(0.5, mode="const", max_count=count, device="cpu")(torch.ones(3000, 1, 20, 24))[:, 0] == 0
    for share in (lambda mask: mask.float().mean(), lambda mask: mask.flatten(1).any(1).float().mean()):
        assert (share(erased) - share(theirs)).abs() < 0.05
    assert (erased.float().mean(0) - theirs.float().mean(0)).abs().max() < 0.05  # ... and everywhere


# Draws ---------------------------------------------------------------------------------------------------------------


def test_draws_are_uniform_normal_and_independent():
    keys = image_keys(7, torch.cartesian_prod(torch.arange(20), torch.arange(100), torch.arange(2)))
    assert len(keys.unique()) == 4000
    draws = Draws(keys)
    uniform, normal = draws.uniform(50), draws.normal(50)
    assert 0 <= uniform.min() and uniform.max() < 1
    counts = torch.histc(uniform, 64, 0, 1)
    assert ((counts - 3125) ** 2 / 3125).sum() < 120  # chi squared with 63 degrees of freedom: 1 in 10^5
    assert normal.mean().abs() < 0.01 and (normal.std() - 1).abs() < 0.01
    assert (normal.abs() < 1).float().mean().sub(0.6827).abs() < 0.005
    both = torch.cat([uniform - 0.5, normal], 1)
    correlations = torch.corrcoef(both.T).fill_diagonal_(0)  # between draws, over the images
    assert correlations.abs().max() < 0.09
    assert torch.corrcoef(both[:200]).fill_diagonal_(0).abs().max() < 0.55  # between images, over 100 draws


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("grey", [False, True])
def test_an_image_does_not_depend_on_its_batch(grey, in_memory):
    data = DATA | ({"input_size": [1, 20, 24], "mean": [0.4], "std": [0.25]} if grey else {})
    augment = DeviceAugmentation(TrainConfig(in_memory=in_memory, **FULL), data, CPU)
    images, keys = as_batch(pictures()[:2] * 16)[:, : data["input_size"][0]], torch.arange(32)
    whole = augment(images, keys)
    assert whole.shape == images.shape and len(whole.flatten(1).unique(dim=0)) > 20
    assert torch.equal(torch.cat([augment(images[:5], keys[:5]), augment(images[5:], keys[5:])]), whole)


def batches(config: TrainConfig, start=(0, 0), count: int = 2, processes: Processes | None = None) -> list:
    data = {"input_size": [1, 8, 8], "mean": [0.5], "std": [0.25], "interpolation": "bicubic", "mode": "L"}
    dataset = open_dataset(config, training=True)
    order = TrainOrder(len(dataset), config, processes or Processes(CPU, 0, 1))
    order.start = start
    to_device = ToDevice(data["mean"], data["std"], CPU, DeviceAugmentation(config, data, CPU))
    loaded = itertools.islice(train_loader(config, dataset, data, order, CPU), count)
    return [to_device(images, targets) for images, targets, _ in loaded]


@pytest.mark.parametrize("where", ["device_augment", "in_memory"])
def test_the_stream_depends_on_seed_epoch_and_image_alone(where):
    config = TrainConfig(dataset="digits", epochs=3, batch_size=24, workers=0, repeated_aug=2, **{where: True}, **FULL)
    whole = batches(config)
    assert not torch.equal(whole[0][0][0], whole[0][0][1])  # two copies of one image
    for same in (
        batches(config, start=(0, 1), count=1),
        batches(dataclasses.replace(config, workers=2), start=(0, 1), count=1),
    ):
        assert all(torch.equal(a, b) for a, b in zip(same[0], whole[1], strict=True))
    shares = [
        batches(dataclasses.replace(config, batch_size=12), count=1, processes=Processes(CPU, rank, 2))
        for rank in (0, 1)
    ]
    shared = torch.cat([images for [(images, _)] in shares])
    assert sorted(shared.flatten(1).tolist()) == sorted(whole[0][0].flatten(1).tolist())
    for other in (batches(config, start=(1, 0), count=1), batches(dataclasses.replace(config, seed=1), count=1)):
        assert not torch.equal(other[0][0], whole[0][0])


def test_images_in_memory_are_those_of_the_data_set():
    config = TrainConfig(dataset="digits", epochs=1, batch_size=100, workers=2, in_memory=True, scale=[1, 1], hflip=0.0)
    config.ratio = [1, 1]
    dataset = open_dataset(config, training=True)
    [(images, targets)] = batches(config, count=1)
    order = next(iter(TrainOrder(len(dataset), config, Processes(CPU, 0, 1))))
    indices = [index for _, index, _ in order]
    assert targets.tolist() == dataset.targets[indices].tolist()
    torch.testing.assert_close((images[:, 0] * 0.25 + 0.5) * 255, torch.from_numpy(dataset.images[indices]).float())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"aa": "original"}, "rand-m9-mstd0.5-inc1 alone, got 'original'"),
        ({"aa": "rand-m9-mstd0.5"}, "rand-m9-mstd0.5-inc1 alone"),
        ({"aa": "rand-m9-tweights-inc1"}, "rand-m9-mstd0.5-inc1 alone"),
        ({"color_jitter": 0.4}, "color_jitter"),
        ({"interpolation": "lanczos"}, "bilinear or bicubic, got 'lanczos'"),
    ],
)
def test_what_the_device_does_not_have_is_refused(changes, message):
    data = DATA | {key: value for key, value in changes.items() if key == "interpolation"}
    with pytest.raises(RunError, match=message):
        DeviceAugmentation(TrainConfig(**changes), data, CPU)


def test_pictures_that_do_not_fit_into_one_array_are_refused(pictures):
    config = TrainConfig(data_dir=str(pictures()), in_memory=True, batch_size=4, workers=0, val_split="val")
    dataset = open_dataset(config, training=True)
    order = TrainOrder(len(dataset), config, Processes(CPU, 0, 1))
    for size in (32, 16):
        data = {"input_size": [3, size, size], "mode": "RGB"}
        with pytest.raises(
            RunError, match=f"one size, {size} x {size} or smaller, but there are some of 16 x 20 and 23 x 20"
        ):
            train_loader(config, dataset, data, order, CPU)


def test_the_loader_sends_keyed_bytes():
    config = TrainConfig(dataset="digits", epochs=1, batch_size=24, workers=0, device_augment=True, **FULL)
    dataset = open_dataset(config, training=True)
    data = {"input_size": [1, 8, 8], "mean": [0.5], "std": [0.25], "interpolation": "bicubic", "mode": "L"}
    images, targets, unreadable = next(
        iter(train_loader(config, dataset, data, TrainOrder(1437, config, Processes(CPU, 0, 1)), CPU))
    )
    assert isinstance(images, KeyedImages) and images.images.dtype == torch.uint8 and images.keys.shape == (24,)
    assert targets.shape == (24,) and unreadable == []


@pytest.mark.parametrize("where", ["--device-augment", "--in-memory"])
def test_a_run_goes_on_bit_for_bit(train, load, on_loss, where):
    flags = (where, "--aa", "rand-m5-mstd0.5-inc1", "--reprob", "0.3", "--mixup", "0.5", "--scale", "0.6", "1")
    assert train("whole", *flags) == 0
    on_loss(interrupt(UPDATES + 1))
    assert train("stopped", *flags) == 75
    assert train("stopped", *flags, "--workers", "1") == 0
    assert_same_run(load("whole"), load("stopped"))
    with pytest.raises(RunError, match="holds another run(.|\n)*" + where[2:].replace("-", "_") + ": True -> False"):
        train("whole", *flags[1:])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="records a CUDA graph")
def test_a_cuda_graph_augments_as_the_kernels_do():
    device = torch.device("cuda")
    config = TrainConfig(dataset="folder", data_dir="", compile=True, cuda_graphs=True, in_memory=True, reprob=0.5)
    augment = DeviceAugmentation(config, DATA, device)
    for seed in range(3):
        torch.manual_seed(seed)
        images = torch.randint(256, (8, 3, 20, 24), dtype=torch.uint8, device=device)
        keys = torch.randint(2**62, (8,), device=device)
        assert torch.equal(augment(images, keys), augment._augmented(images, keys))
    with pytest.raises(ValueError, match=r"batches of \(8, 3, 20, 24\), got \(4, "):
        augment(images[:4], keys[:4])
