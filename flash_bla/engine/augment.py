"""Augmentation on the device: the crop, the flips, RandAugment and the erasing of timm, for a whole batch at once.

Loader processes then only decode and crop; where the images are in memory, nothing is left for them. Every image draws
its own operations, as on the host, so all are computed for the whole batch and each image takes its own. No step waits
for the device.

The draws of an image follow from its key alone (see `Draws`): they are the same in any batch, on any number of
processes, after any interruption, and on any device but for its rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.auto_augment import RandAugment, rand_augment_transform
from torch import Tensor

from flash_bla.engine.config import RunError, TrainConfig

ATTEMPTS = 10  # at a rectangle that fits, as timm has it
MIN_ERASED, MAX_ERASED, ERASED_RATIO = 0.02, 1 / 3, 0.3  # timm's RandomErasing
LUMA = (19595, 38470, 7471)  # Pillow's weights of red, green and blue, in 65536ths

# RandAugment's operations, as timm orders those that grow stronger with the magnitude.
OPERATIONS = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "PosterizeIncreasing", "SolarizeIncreasing", "SolarizeAdd",
    "ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing", "ShearX", "ShearY",
    "TranslateXRel", "TranslateYRel",
)  # fmt: skip


class KeyedImages(NamedTuple):
    """A batch of images, or one image, with what its draws follow from."""

    images: Tensor  # (B, C, H, W) uint8, or (C, H, W) of one
    keys: Tensor  # (B,) int64, or a scalar


class KeyedTransform:
    """A transform to uint8, and a key from the host's generator, which the loader seeds for each image."""

    def __init__(self, transform: Callable[[Image.Image], Tensor]):
        self.transform = transform

    def __call__(self, image: Image.Image) -> KeyedImages:
        return KeyedImages(self.transform(image), torch.randint(2**63 - 1, ()))


def _mixed(bits: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele et al., OOPSLA 2014): neighbouring integers to unrelated 64 bits."""
    bits = (bits ^ (bits >> 30 & 2**34 - 1)) * (0xBF58476D1CE4E5B9 - 2**64)
    bits = (bits ^ (bits >> 27 & 2**37 - 1)) * (0x94D049BB133111EB - 2**64)
    return bits ^ (bits >> 31 & 2**33 - 1)


_GAMMA = 0x9E3779B97F4A7C15 - 2**64


def image_keys(seed: int, places: Tensor) -> Tensor:
    """The keys of images from a seed and their places (B, n), such as epoch, index and copy."""
    keys = torch.full_like(places[:, 0], seed)
    for column in places.unbind(1):
        keys = _mixed(keys + (column + 1) * _GAMMA)
    return keys


class Draws:
    """Random numbers for images: number n of an image is a hash (SplitMix64) of its key + n."""

    def __init__(self, keys: Tensor):
        self.keys, self.drawn = keys, 0

    def _bits(self, count: int) -> Tensor:
        places = torch.arange(self.drawn + 1, self.drawn + count + 1, device=self.keys.device)
        self.drawn += count
        return _mixed(self.keys[:, None] + places)

    def uniform(self, count: int) -> Tensor:
        """(B, count) numbers in [0, 1)."""
        return (self._bits(count) >> 40 & 2**24 - 1).float() * 2**-24

    def normal(self, count: int) -> Tensor:
        """(B, count) numbers of the standard normal distribution, by Box and Muller's transform."""
        bits = self._bits(count)
        radius, angle = ((bits >> shift & 2**24 - 1).float() * 2**-24 for shift in (40, 16))
        return (-2 * torch.log(radius + 2**-24)).sqrt() * torch.cos(2 * math.pi * angle)


class DeviceAugmentation:
    """timm's training augmentation of a batch.

    It is that of the host but for the interpolation: bicubic is PyTorch's, whose kernel differs a little from Pillow's,
    and a crop that is enlarged here looks past its edge.
    """

    def __init__(self, config: TrainConfig, data: dict[str, Any], device: torch.device):
        """Reads the settings.

        Args:
            config: For the augmentations. With `in_memory` the random crop is one of them.
            data: What `resolve_data` returns.
            device: Where the batches will be.

        Raises:
            RunError: A policy, colour jitter or interpolation that there is on the host alone.
        """
        self.config, self.size, self.interpolation = config, data["input_size"][1:], data["interpolation"]
        if self.interpolation not in ("bilinear", "bicubic"):
            raise RunError(f"interpolation: on the device bilinear or bicubic, got {self.interpolation!r}")
        if config.color_jitter and not config.aa:
            raise RunError("color_jitter: not on the device (--device-augment, --in-memory)")
        self.mean, self.std = (torch.tensor(data[name], device=device).view(-1, 1, 1) * 255 for name in ("mean", "std"))
        self.policy = _read_policy(config.aa) if config.aa else None
        self.graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def __call__(self, images: Tensor, keys: Tensor) -> Tensor:
        """Images (B, C, H, W) of uint8 and their keys (B,) to augmented and normalised float32 images.

        With `cuda_graphs` on a GPU all calls must have one shape, and write their result to the same memory: these are
        hundreds of small kernels, whose launching takes longer than they do, and a graph launches them at once.
        """
        if not (self.config.cuda_graphs and images.is_cuda):
            return self._augmented(images, keys)
        if self.graph is None:
            self._augmented(images, keys)  # what PyTorch sets up at its first calls cannot be recorded
            self.inputs, graph = (images.clone(), keys.clone()), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # the loader's thread may go on
                self.result = self._augmented(*self.inputs)
            self.graph = graph
        if images.shape != self.inputs[0].shape:
            raise ValueError(f"as a CUDA graph, batches of {tuple(self.inputs[0].shape)}, got {tuple(images.shape)}")
        for recorded, given in zip(self.inputs, (images, keys), strict=True):
            recorded.copy_(given)
        self.graph.replay()
        return self.result

    def _augmented(self, images: Tensor, keys: Tensor) -> Tensor:
        draws, images = Draws(keys), images.float()
        left_right, up_down = draws.uniform(2).unbind(1)
        flips = (left_right < self.config.hflip, up_down < self.config.vflip)
        if self.config.in_memory:
            images = self._cropped(images, flips, draws)
        else:
            for flip, side in zip(flips, (3, 2), strict=True):
                images = torch.where(_wide(flip), images.flip(side), images)
        for _ in range(self.policy.num_layers if self.policy else 0):
            images = self._rand_augmented(images, draws)
        images = (images - self.mean) / self.std
        return self._erased(images, draws) if self.config.reprob else images

    def _cropped(self, images: Tensor, flips: tuple[Tensor, Tensor], draws: Draws) -> Tensor:
        """A random part of each image, mirrored and enlarged to the model's size: RandomResizedCrop."""
        height, width = images.shape[2:]
        area = _between(draws.uniform(ATTEMPTS), *self.config.scale) * height * width
        ratio = _between(draws.uniform(ATTEMPTS), *map(math.log, self.config.ratio)).exp()
        rows, columns, fits = _first((area / ratio).sqrt().round(), (area * ratio).sqrt().round(), height, width)
        rows, columns = torch.where(fits, rows, height), torch.where(fits, columns, width)
        place = draws.uniform(2)
        top = (place[:, 0] * (height - rows + 1)).floor()
        left = (place[:, 1] * (width - columns + 1)).floor()
        y, x = rows / self.size[0], columns / self.size[1]
        left, x = torch.where(flips[0], left + columns, left), torch.where(flips[0], -x, x)
        top, y = torch.where(flips[1], top + rows, top), torch.where(flips[1], -y, y)
        none = torch.zeros_like(x)
        sampled, _ = _sampled(images, (x, none, left, none, y, top), self.size, self.interpolation)
        return sampled.round()

    def _rand_augmented(self, images: Tensor, draws: Draws) -> Tensor:
        """One operation of RandAugment on each image, or none."""
        policy = self.policy.ops[0]
        choice, applied, sign, level = draws.uniform(4).unbind(1)
        if policy.magnitude_std == math.inf:
            magnitude = level * policy.magnitude
        else:
            magnitude = policy.magnitude + policy.magnitude_std * draws.normal(1)[:, 0]
        magnitude = magnitude.clamp(0, policy.magnitude_max or 10)
        operations = (choice * len(OPERATIONS)).long()
        operations = torch.where(applied < policy.prob, operations, -1)
        return apply_operations(
            images, operations, arguments(operations, magnitude, sign < 0.5),
            fill=self.mean.round().clamp(max=255), interpolation=self.interpolation,
        )  # fmt: skip

    def _erased(self, images: Tensor, draws: Draws) -> Tensor:
        """Random erasing of normalised images."""
        batch, channels, height, width = images.shape
        erased, count = draws.uniform(2).unbind(1)
        count = (count * self.config.recount).floor() + 1
        noise = {"const": (), "rand": (channels, 1, 1), "pixel": (channels, height, width)}[self.config.remode]
        y, x = (torch.arange(side, device=images.device) for side in (height, width))
        for number in range(self.config.recount):
            area = _between(draws.uniform(ATTEMPTS), MIN_ERASED, MAX_ERASED) * height * width / count[:, None]
            ratio = _between(draws.uniform(ATTEMPTS), math.log(ERASED_RATIO), -math.log(ERASED_RATIO)).exp()
            rows, columns, fits = _first(
                (area * ratio).sqrt().round(), (area / ratio).sqrt().round(), height - 1, width - 1
            )
            place = draws.uniform(2)
            top = _wide((place[:, 0] * (height - rows + 1)).floor())
            left = _wide((place[:, 1] * (width - columns + 1)).floor())
            inside = (y[:, None] >= top) & (y[:, None] < top + _wide(rows)) & (x >= left) & (x < left + _wide(columns))
            inside &= _wide(fits & (erased < self.config.reprob) & (number < count))
            filled = draws.normal(math.prod(noise)).view(batch, *noise) if noise else 0
            images = torch.where(inside, filled, images)
        return images


def device_augmentation(config: TrainConfig, data: dict[str, Any], device: torch.device) -> DeviceAugmentation | None:
    """What a run augments on the device; None where it augments on the host."""
    if not (config.device_augment or config.in_memory):
        return None
    return DeviceAugmentation(config, data, device)


def _read_policy(text: str) -> RandAugment:
    """timm's reading of a policy string.

    Raises:
        RunError: It is none that the device has.
    """
    if text.startswith("rand"):
        policy = rand_augment_transform(text, {})
        if tuple(operation.name for operation in policy.ops) == OPERATIONS and policy.choice_weights is None:
            return policy
    raise RunError(f"aa: on the device policies like rand-m9-mstd0.5-inc1 alone, got {text!r}")


def arguments(operations: Tensor, magnitudes: Tensor, negative: Tensor) -> Tensor:
    """timm's arguments of operations.

    Args:
        operations: (B,) places in `OPERATIONS`.
        magnitudes: (B,) their magnitudes, 10 for the full effect.
        negative: (B,) whether an operation that has two directions takes the other.

    Returns:
        (B,) degrees, factors, shares of a side, bits or thresholds, as the operation has it.
    """
    level = magnitudes / 10
    signed = torch.where(negative, -level, level)
    factor = (1 + 0.9 * signed).clamp(min=0.1)
    shift, shear = 0.45 * signed, 0.3 * signed
    of_operation = {
        "Rotate": 30 * signed, "PosterizeIncreasing": 4 - (4 * level).trunc(),
        "SolarizeIncreasing": 256 - (256 * level).trunc().clamp(max=256),
        "SolarizeAdd": (110 * level).trunc().clamp(max=128), "ColorIncreasing": factor, "ContrastIncreasing": factor,
        "BrightnessIncreasing": factor, "SharpnessIncreasing": factor, "ShearX": shear, "ShearY": shear,
        "TranslateXRel": shift, "TranslateYRel": shift,
    }  # fmt: skip
    none = torch.zeros_like(level)
    table = torch.stack([of_operation.get(name, none) for name in OPERATIONS], dim=1)
    return table.gather(1, operations.clamp(min=0)[:, None])[:, 0]


def apply_operations(images: Tensor, operations: Tensor, values: Tensor, *, fill: Tensor, interpolation: str) -> Tensor:
    """Applies an operation of RandAugment to each image.

    Args:
        images: (B, C, H, W) float32 of the whole numbers from 0 to 255.
        operations: (B,) places in `OPERATIONS`, or -1 for images that stay.
        values: (B,) their arguments, see `arguments`.
        fill: (C, 1, 1) what moves in from outside.
        interpolation: "bilinear" or "bicubic".

    Returns:
        Images like those that came.
    """

    def chosen(*names: str) -> Tensor:
        return _wide(sum(operations == OPERATIONS.index(name) for name in names).bool())

    # Two of the three steps leave an image as it is.
    moved = chosen("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
    sampled, inside = _sampled(images, _maps(operations, values, images.shape), images.shape[2:], interpolation)
    sampled = (sampled + 1e-3).floor().clamp(0, 255)  # Pillow cuts off the fraction; the rounding here must not decide
    images = torch.where(moved, torch.where(inside, sampled, fill), images)

    # An enhancement goes from the image towards what lacks contrast, colour, light or sharpness, or away from it.
    grey = _grey(images)
    dull = torch.where(chosen("SharpnessIncreasing"), _smoothed(images), 0)
    dull = torch.where(chosen("ColorIncreasing"), grey, dull)
    dull = torch.where(chosen("ContrastIncreasing"), (grey.mean((1, 2, 3), keepdim=True) + 0.5).floor(), dull)
    enhanced = (dull + _wide(values) * (images - dull)).clamp(0, 255).floor()
    names = ("SharpnessIncreasing", "ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing")
    images = torch.where(chosen(*names), enhanced, images)

    # The others map each value of a channel to another, by tables (B, C, 256).
    counts = torch.zeros(*images.shape[:2], 256, dtype=torch.int64, device=images.device)
    pixels = images.long().flatten(2)
    counts.scatter_add_(2, pixels, torch.ones_like(pixels))
    before = torch.arange(256, device=images.device)
    table, value = before.expand_as(counts), values.long()[:, None, None]
    tables = {
        "AutoContrast": _stretched(counts),
        "Equalize": _equalized(counts),
        "Invert": 255 - before,
        "PosterizeIncreasing": before >> 8 - value << 8 - value,
        "SolarizeIncreasing": torch.where(before < value, before, 255 - before),
        "SolarizeAdd": torch.where(before < 128, (before + value).clamp(max=255), before),
    }
    for name, after in tables.items():
        table = torch.where(chosen(name)[..., 0], after, table)
    return table.gather(2, pixels).view(images.shape).float()


def _wide(values: Tensor) -> Tensor:
    """(B,) values as (B, 1, 1, 1)."""
    return values.view(-1, 1, 1, 1)


def _between(uniform: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * uniform


def _first(rows: Tensor, columns: Tensor, max_rows: int, max_columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each image's attempts (B, ATTEMPTS) at a rectangle the first that fits, and whether any does."""
    fit = (rows <= max_rows) & (columns <= max_columns)
    first = fit.byte().argmax(1, keepdim=True)
    return rows.gather(1, first)[:, 0], columns.gather(1, first)[:, 0], fit.any(1)


def _maps(operations: Tensor, values: Tensor, shape: torch.Size) -> tuple[Tensor, ...]:
    """The six numbers of the affine map, from places in the result to places in the image, as Pillow has them."""
    height, width = shape[2:]

    def only(name: str, of: Tensor = values) -> Tensor:
        return torch.where(operations == OPERATIONS.index(name), of, 0)

    angle = only("Rotate", torch.deg2rad(values))
    cos, sin = angle.cos(), angle.sin()
    x, y = width / 2, height / 2  # the centre of the rotation
    return (
        cos, only("ShearX") - sin, x - x * cos + y * sin + only("TranslateXRel", values * width),
        only("ShearY") + sin, cos, y - x * sin - y * cos + only("TranslateYRel", values * height),
    )  # fmt: skip


def _sampled(
    images: Tensor, maps: tuple[Tensor, ...], size: Sequence[int], interpolation: str
) -> tuple[Tensor, Tensor]:
    """Images (B, C, *size) that are sampled at affine maps' places, and whether these are inside (B, 1, *size)."""
    height, width = images.shape[2:]
    a, b, c, d, e, f = (number[:, None, None] for number in maps)
    y, x = (torch.arange(side, device=images.device) + 0.5 for side in size)
    x, y = a * x + b * y[:, None] + c, d * x + e * y[:, None] + f
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    places = torch.stack([x * (2 / width) - 1, y * (2 / height) - 1], dim=3)
    sampled = F.grid_sample(images, places, interpolation, "border", align_corners=False)
    return sampled.clamp(0, 255), inside[:, None]


def _grey(images: Tensor) -> Tensor:
    """Luma as Pillow computes it, in whole numbers; all of it is exact in float32."""
    if images.shape[1] == 1:
        return images
    luma = sum(weight * channel for weight, channel in zip(LUMA, images.split(1, dim=1), strict=True))
    return ((luma + 32768) / 65536).floor()


def _smoothed(images: Tensor) -> Tensor:
    """Pillow's SMOOTH filter: a 3 x 3 mean in which the pixel counts five times; the outermost pixels stay."""
    inner = images[:, :, 1:-1, 1:-1]
    smoothed = ((9 * F.avg_pool2d(images, 3, 1) + 4 * inner) / 13 + 0.5).floor()
    result = images.clone()
    result[:, :, 1:-1, 1:-1] = smoothed
    return result


def _stretched(counts: Tensor) -> Tensor:
    """Tables (B, C, 256) that stretch the values of a channel over all of 0 to 255, from their counts: autocontrast."""
    values = torch.arange(256, device=counts.device)
    low = torch.where(counts > 0, values, 255).amin(2, keepdim=True)
    high = torch.where(counts > 0, values, 0).amax(2, keepdim=True)
    scale = 255 / (high - low).double()  # in Pillow's order and precision: the fraction is cut off
    table = (values * scale - low * scale).clamp(0, 255).long()
    return torch.where(high > low, table, values)


def _equalized(counts: Tensor) -> Tensor:
    """Tables (B, C, 256) under which the values of a channel become about equally frequent, from their counts."""
    values = torch.arange(256, device=counts.device)
    high = torch.where(counts > 0, values, 0).amax(2, keepdim=True)
    step = (counts.sum(2, keepdim=True) - counts.gather(2, high)) // 255
    table = (step // 2 + counts.cumsum(2) - counts) // step.clamp(min=1)
    return torch.where(step > 0, table.clamp(max=255), values)
