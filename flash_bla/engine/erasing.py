"""Random erasing that leaves images as bytes: loader processes draw the rectangles, the device fills them in.

It fills with noise of the normalised range, so by itself it asks for normalised floats from the loader processes: four
times the memory to collate and to send, and the normalisation on the host. Here an image stays uint8 and what is erased
comes beside it. The draws are those of timm's RandomErasing, and so is the result, but for the rounding of the
normalisation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing


class ErasedImages(NamedTuple):
    """A batch of images, or one image, with what is to be written into it once it is normalised."""

    images: torch.Tensor  # (B, C, H, W), or (C, H, W) of one
    places: torch.Tensor  # (K, 5): image, top, left, height and width of each rectangle
    values: torch.Tensor  # the values of all rectangles, one after the other

    def write(self, images: torch.Tensor) -> None:
        """Writes the rectangles into the normalised images, on their device."""
        values, end = self.values.to(images.device, non_blocking=True), 0
        for image, top, left, height, width in self.places.tolist():
            area = images[image, :, top : top + height, left : left + width]
            begin, end = end, end + area.numel()
            area.copy_(values[begin:end].view(area.shape))


class ErasingTransform:
    """A transform to uint8, and then random erasing."""

    def __init__(self, transform: Callable[[Image.Image], torch.Tensor], erasing: RandomErasing):
        self.transform, self.erasing = transform, erasing

    def __call__(self, image: Image.Image) -> ErasedImages:
        image = self.transform(image)
        drawn = _Drawn(image)
        self.erasing(drawn)
        places = torch.tensor([place for place, _ in drawn.rectangles], dtype=torch.int64).view(-1, 5)
        return ErasedImages(image, places, torch.cat([torch.empty(0), *(values for _, values in drawn.rectangles)]))


class _Drawn:
    """Stands for a normalised image, and keeps what is written into it."""

    dtype = torch.float32

    def __init__(self, image: torch.Tensor):
        self.size = image.size
        self.rectangles: list[tuple[list[int], torch.Tensor]] = []

    def __setitem__(self, area: tuple[slice, slice, slice], values: torch.Tensor) -> None:
        _, rows, columns = area
        shape = len(values), rows.stop - rows.start, columns.stop - columns.start
        self.rectangles.append(([0, rows.start, columns.start, *shape[1:]], values.expand(shape).reshape(-1)))


def collate_erased(items: Sequence[ErasedImages]) -> ErasedImages:
    """One batch of single images."""
    for number, item in enumerate(items):
        item.places[:, 0] = number
    images, places, values = zip(*items, strict=True)
    return ErasedImages(torch.stack(images), torch.cat(places), torch.cat(values))
