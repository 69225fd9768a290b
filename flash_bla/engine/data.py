"""Data: what timm's factory reads and the embedded digits, in an order and with augmentations that are functions of the
seed alone.

Nothing here depends on history. The order of an epoch follows from (seed, epoch), the augmentation of an image from
(seed, epoch, image): so the stream is the same for any number of loader processes, can be taken up at any update, and
is the same whether one process takes the total batch or several share it.
"""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from timm.data import Mixup, auto_augment, create_dataset, create_transform
from timm.data.dataset_factory import _search_split
from timm.data.random_erasing import RandomErasing
from timm.data.readers.img_extensions import get_img_extensions
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.utils.misc import natural_key
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, v2

from flash_bla.engine.augment import KeyedImages, KeyedTransform, image_keys
from flash_bla.engine.config import CommonConfig, RunError, TrainConfig
from flash_bla.engine.erasing import ErasedImages, ErasingTransform
from flash_bla.engine.images import in_mode
from flash_bla.engine.loaders import EvalStream, Item, Loader, StreamLoader, TrainStream, loader_options
from flash_bla.engine.logs import warn
from flash_bla.engine.processes import Processes, mixed_seed, seed_host

# Folder names that are splits and not classes, to notice a root folder that was given in place of one of them.
TRAIN_NAMES = ("train", "training")  # one split by either name, as timm has it
EVAL_NAMES = ("val", "valid", "validation", "eval", "evaluation")
SPLIT_NAMES = {*TRAIN_NAMES, *EVAL_NAMES, "test"}
REPLACEMENTS = 10  # images tried, one after the other, before a training run gives up on unreadable ones


def _posterize(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    # timm's policies come down to 0 bits at their strongest. That gave a black image, until Pillow 13 refused it.
    return auto_augment.posterize(image, bits, **options) if bits > 0 else image.point(lambda value: 0)


for _name, _op in auto_augment.NAME_TO_OP.items():
    if _op is auto_augment.posterize:
        auto_augment.NAME_TO_OP[_name] = _posterize


class Digits(Dataset):
    """Scikit-learn's 1,797 handwritten digits, 8x8 grey: 1,437 to train on and a fixed, stratified fifth held out."""

    classes = [str(digit) for digit in range(10)]

    def __init__(self, training: bool):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        images = (digits.images * (255 / 16)).round().astype(np.uint8)
        split = train_test_split(images, digits.target, test_size=360, stratify=digits.target, random_state=0)
        self.images, self.targets = (split[0], split[2]) if training else (split[1], split[3])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.targets[index])


def open_dataset(config: CommonConfig, *, training: bool, class_names: Sequence[str] | None = None, **reading) -> Any:
    """Opens a split without transforms.

    Args:
        config: The settings.
        training: The training split, else the one to evaluate on.
        class_names: The classes by index, as the model knows them: folders take these indices, and another data set
            with other names is a warning. None numbers the folders in their natural order.
        reading: Further arguments for timm's readers of streams (`batch_size`, `seed`).

    Raises:
        RunError: There is no such data set, folder or split, a class has no image, or a folder is none of the classes.
    """
    split = config.train_split if training else config.val_split
    if config.dataset == "digits":
        if config.data_dir is not None:
            raise RunError(f"data_dir: the digits are embedded; dataset 'folder' reads {config.data_dir}")
        return _numbered(Digits(training), class_names, config.dataset)
    name = "" if config.dataset == "folder" else config.dataset
    if not name or name.startswith("torch/"):
        if config.data_dir is None:
            raise RunError(f"data_dir: the data set {config.dataset!r} needs a folder")
        if not os.path.exists(config.data_dir) and not config.download:
            raise RunError(f"data_dir: no such folder: {config.data_dir}")
    elif "/" not in name:
        raise RunError(
            f"dataset: {name!r} is neither 'folder' nor 'digits' nor a name of timm's factory "
            "(torch/NAME, hfds/NAME, hfids/NAME, tfds/NAME, wds/NAME)"
        )
    root = config.data_dir if name else _tar_of(config.data_dir, split) or config.data_dir
    labels = None if name else class_names
    if not name and os.path.isdir(root):
        found = _check_folder(root, _search_split(root, split), split, class_names)
        labels = class_names or sorted(sorted(found), key=natural_key)  # for which "a" and "A" are the same
    class_map = {label: index for index, label in enumerate(labels)} if labels else None
    reading = reading if name.startswith(("tfds/", "wds/", "hfids/")) else {}
    if name.startswith(("wds/", "hfids/")):
        reading["input_img_mode"] = ""  # as the file has it, for `in_mode`
    if name in ("torch/folder", "torch/image_folder"):
        reading["allow_empty"] = True  # hidden ones may be; `_numbered` refuses the others
    try:
        dataset = create_dataset(
            name, root=root, split=split, class_map=class_map, is_training=training, download=config.download, **reading
        )
    except (RuntimeError, AssertionError, ImportError, OSError, ValueError, tarfile.TarError) as error:
        raise RunError(f"the data set {config.dataset!r} in {root} cannot be read: {error}") from error
    if not name and os.path.isfile(root):
        _check_tar(root, dataset.reader.samples)
    return _numbered(dataset, class_names, config.dataset)


def _tar_of(root: str, split: str) -> str | None:
    """The file `root/SPLIT.tar`, if there is one and no folder of the split."""
    same = next((names for names in (TRAIN_NAMES, EVAL_NAMES) if split in names), ())
    paths = [os.path.join(root, name) for name in (split, *same)]
    return next((f"{path}.tar" for path in paths if os.path.isfile(f"{path}.tar") and not os.path.isdir(path)), None)


def _check_tar(path: str, samples: Sequence[tuple[tarfile.TarInfo, str | None, tarfile.TarInfo | None]]) -> None:
    """Refuses a file that was cut off between two of its members, which reads as if it had no more of them.

    And one with images in hidden folders, which would be images of a class.
    """
    folders = {  # of the file, or of a tar file in it
        os.path.normpath(os.path.join(inner.path if inner else "", os.path.dirname(member.path)))
        for member, _, inner in samples
    }
    common = os.path.dirname(os.path.commonprefix([f"{folder}{os.sep}" for folder in folders]))  # which may be hidden
    for folder in sorted(folders):
        if _is_hidden(folder[len(common) :]):
            raise RunError(f"{path} holds images in the hidden folder {folder!r}, which would be read: leave it out")
    with open(path, "rb") as file:
        file.seek(-min(1024, os.path.getsize(path)), os.SEEK_END)
        if any(file.read()):  # two blocks of zeros
            raise RunError(f"{path} does not end as a tar file does: it was cut short")


def _numbered(dataset: Any, class_names: Sequence[str] | None, name: str) -> Any:
    """Gives the classes of folders the indices of the model's, and leaves out what stands in hidden folders.

    Other data sets have indices of their own: where their names are not the model's, it warns.
    """
    folders = getattr(dataset, "reader", dataset)
    if type(folders) in (ReaderImageFolder, ImageFolder):
        start = len(folders.root)  # which may itself be hidden
        folders.samples = [sample for sample in folders.samples if not _is_hidden(os.path.dirname(sample[0])[start:])]
    if type(dataset) is ImageFolder:  # those derived from it have a fixed list of classes
        dataset.loader = Image.open  # its own makes it RGB at once, and so clips what has 16 bits
        labels = [dataset.classes[target] for _, target in dataset.samples]
        found = dict.fromkeys(labels)  # in their order
        if empty := [label for label in dataset.classes if label not in found and not _is_hidden(label)]:
            read = ", ".join(dataset.extensions)
            raise RunError(f"the class {empty[0]!r} is empty: no image in {dataset.root}/{empty[0]} ({read})")
        if not found:
            raise RunError(f"no image in {dataset.root} but in hidden folders")
        numbers = {label: number for number, label in enumerate(class_names or found)}
        if unknown := found.keys() - numbers.keys():
            raise RunError(f"the folder {min(unknown)!r} in {dataset.root} {_none_of(class_names)}")
        dataset.targets = [numbers[label] for label in labels]
        paths = [path for path, _ in dataset.samples]
        dataset.samples = dataset.imgs = list(zip(paths, dataset.targets, strict=True))
        dataset.classes, dataset.class_to_idx = list(numbers), numbers
    names = class_names_of(dataset)
    if class_names and names and list(class_names) != names and _is_first():
        pairs = enumerate(zip_longest(class_names, names))
        number, own, other = next((number, *pair) for number, pair in pairs if pair[0] != pair[1])
        warn(f"the data set {name!r} has other class names: number {number} is {other!r}, for the model it is {own!r}")
    return dataset


def _is_hidden(folder: str) -> bool:
    """Whether a folder is hidden, as Jupyter's .ipynb_checkpoints, or in a hidden one."""
    return any(part.startswith(".") and part.strip(".") for part in folder.split(os.sep))  # not "." and ".."


def _none_of(class_names: Sequence[str]) -> str:
    some = ", ".join(class_names[:5]) + (", ..." if len(class_names) > 5 else "")
    return f"is none of the {len(class_names)} classes of the model: {some}"


def _is_first() -> bool:
    return not (dist.is_initialized() and dist.get_rank())


def _check_folder(root: str, folder: str, split: str, class_names: Sequence[str] | None) -> set[str]:
    """Refuses a folder that timm would read in another way than the user means; warns of pictures left out.

    Returns:
        The classes that have images.
    """
    if os.path.samefile(root, folder):  # timm found no folder for the split and would take all of them
        splits = sorted(SPLIT_NAMES & {entry.name for entry in os.scandir(root) if entry.is_dir()})
        if splits:
            raise RunError(f"no folder for the split {split!r} in {root}; there is: {', '.join(splits)}")
    kinds = get_img_extensions(as_set=True)
    read = ", ".join(sorted(kinds))
    pictures = {ending for ending, name in Image.registered_extensions().items() if name in Image.OPEN} - kinds
    known, found, left_out = set(class_names or ()), set(), Counter()
    for path, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        endings = [os.path.splitext(name)[1].lower() for name in files]
        has_images = any(ending in kinds for ending in endings)
        left_out.update(ending for ending in endings if ending in pictures)
        if not folders and not has_images:
            raise RunError(f"the class {os.path.basename(path)!r} is empty: no image in {path} ({read})")
        if has_images and os.path.samefile(path, folder):
            raise RunError(f"images must stand in a folder of their class, but there are some in {path} itself")
        if has_images and known and os.path.basename(path) not in known:
            raise RunError(f"the folder {path} {_none_of(class_names)}")
        if has_images:
            found.add(os.path.basename(path))
    if left_out and _is_first():
        warn(f"{folder}: {left_out.total()} pictures are left out ({', '.join(sorted(left_out))}); read are {read}")
    return found


def image_count(dataset: Any) -> int:
    """The number of images; of a stream in all its shards, whichever of them this process will read."""
    return dataset.reader.num_samples if isinstance(dataset, IterableDataset) else len(dataset)


def class_names_of(dataset: Any) -> list[str] | None:
    """The class names by index, where the data set knows them."""
    reader = getattr(dataset, "reader", None)
    mapping = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)  # folder, tar
    if mapping:
        return [str(name) for name, _ in sorted(mapping.items(), key=lambda item: item[1])]
    names = getattr(dataset, "classes", None)
    return [str(name) for name in names] if names else None


def check_classes(head: int | None, class_names: Sequence[str] | None, dataset: str) -> int:
    """The number of classes, on which head and data must agree.

    Args:
        head: What the head has, or None if it is made for the data.
        class_names: What the data have, or None if they do not say.
        dataset: The data set's name, for the message.

    Raises:
        RunError: They differ, or neither says.
    """
    if not (head or class_names):
        raise RunError(f"num_classes: the data set {dataset!r} does not say how many classes it has")
    if head and class_names and head != len(class_names):
        raise RunError(f"num_classes: the head has {head} classes, but the data set {dataset!r} has {len(class_names)}")
    return head or len(class_names)


def file_name(dataset: Any, index: int) -> str:
    """The file of an image, or its number where it has none."""
    if hasattr(dataset, "filename"):
        return str(dataset.filename(index, absolute=True))
    if hasattr(dataset, "samples"):  # torchvision's folders
        return str(dataset.samples[index][0])
    return f"image {index}"


class UnreadableImage(Exception):
    """An image that cannot be decoded; the message names the file."""


def read_image(dataset: Any, index: int, mode: str) -> tuple[Image.Image, int]:
    """Image and class of a map-style data set of timm, torchvision or this module.

    timm's own data sets put another image in place of one that they cannot read, which an evaluation must not do: so
    this reads with timm's readers, but decodes by itself.

    Raises:
        UnreadableImage: The image cannot be decoded; the file is named.
    """
    try:
        if hasattr(dataset, "reader"):
            file, target = dataset.reader[index][:2]
            with file:
                image = in_mode(Image.open(file), mode)
        else:
            image, target = dataset[index]
            image = in_mode(image, mode)
    except Exception as error:  # decoders raise whatever a damaged file leads them to
        raise UnreadableImage(f"cannot read {file_name(dataset, index)}: {error}") from error
    return image, int(target)


def resolve_data(
    config: CommonConfig, model: nn.Module, description: dict[str, Any], saved: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What an image goes through before the model: size, mean, std, interpolation, crop and PIL mode.

    A setting wins over what a checkpoint recorded (`saved`), and that over what the model's own `pretrained_cfg` says.
    """
    own = dict(model.pretrained_cfg) | (saved or {})
    arguments = description["args"]
    channels = config.in_chans or arguments.get("in_chans") or own["input_size"][0]
    size = config.img_size or arguments.get("img_size") or own["input_size"][1:]
    size = [size] if isinstance(size, int) else list(size)
    data = {"input_size": [channels, size[0], size[-1]]}
    for key in ("mean", "std"):
        given = getattr(config, key)
        if given and len(given) != channels:
            raise RunError(f"{key}: one number for each of {channels} channels, got {given}")
        values = given or list(own[key])
        # A model for grey pictures takes the average of what its family has for colours.
        data[key] = values if len(values) == channels else [sum(values) / len(values)] * channels
    for key in ("interpolation", "crop_pct", "crop_mode"):
        data[key] = getattr(config, key) or own.get(key)
    if channels not in (1, 3):
        raise RunError(f"in_chans: images are read as grey (1) or colour (3), got {channels}")
    data["mode"] = "L" if channels == 1 else "RGB"
    return data


class TrainImages(Dataset):
    """Augmented images by the keys of `TrainOrder`. An unreadable image gives its place to the next readable one."""

    def __init__(self, dataset: Any, transform: Callable, mode: str, seed: int):
        self.dataset, self.transform, self.mode, self.seed = dataset, transform, mode, seed

    def __getitem__(self, key: tuple[int, int, int]) -> Item:
        epoch, index, copy = key
        unreadable: list[str] = []
        for neighbour in range(index, index + REPLACEMENTS):
            try:
                image, target = read_image(self.dataset, neighbour % len(self.dataset), self.mode)
            except UnreadableImage as error:
                unreadable.append(str(error))
                continue
            seed_host(mixed_seed(self.seed, epoch, index, copy))
            return self.transform(image), target, unreadable
        raise RunError(f"{len(unreadable)} images in a row cannot be read; the last: {unreadable[-1]}")


class EvalImages(Dataset):
    """Images by their number. An unreadable one comes as a blank with its error, for the evaluation to raise."""

    def __init__(self, dataset: Any, transform: Callable, mode: str):
        self.dataset, self.transform, self.mode = dataset, transform, mode

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Item:
        try:
            image, target = read_image(self.dataset, index, self.mode)
        except UnreadableImage as error:
            return self.transform(Image.new(self.mode, (32, 32))), -1, [str(error)]
        return self.transform(image), target, []


class TrainOrder(Sampler):
    """The batches of a whole run, from any update on, as lists of keys (epoch, image, copy).

    An update takes the next `total_batch` images of the epoch's order; what is left over at the end of an epoch is left
    out. Each of the `accum * count` forward passes that share an update takes a slice from the front and the mirrored
    slice from the back: mixup and cutmix mix image `i` of a batch with image `-1 - i`, so every pair stays together and
    is the same pair however the update is shared out.

    One iteration runs over all epochs, so the loader works ahead over the end of an epoch and during an evaluation.
    """

    def __init__(self, size: int, config: TrainConfig, processes: Processes):
        """Plans a run.

        Args:
            size: Number of images.
            config: For `batch_size`, `grad_accum`, `seed`, `epochs`, `cooldown_epochs` and `repeated_aug`.
            processes: How many share an update, and which of them this is.

        Raises:
            RunError: The data set is smaller than one update's batch.
        """
        self.size, self.batch_size, self.accum = size, config.batch_size, config.grad_accum
        self.rank, self.count = processes.rank, processes.count
        self.seed, self.repeats = config.seed, config.repeated_aug
        self.epochs = config.epochs + config.cooldown_epochs
        self.total_batch = self.batch_size * self.accum * self.count
        self.updates_per_epoch = size // self.total_batch
        self.start = (0, 0)  # epoch and update
        if not self.updates_per_epoch:
            raise RunError(f"batch_size: an update takes {self.total_batch} images, but the data set has {size}")

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        first_epoch, first_update = self.start
        front, back = (self.batch_size + 1) // 2, self.batch_size // 2
        for epoch in range(first_epoch, self.epochs):
            generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch))
            order = torch.randperm(self.size, generator=generator)
            order = order.repeat_interleave(self.repeats)[: self.size]
            for update in range(first_update if epoch == first_epoch else 0, self.updates_per_epoch):
                begin = update * self.total_batch
                end = begin + self.total_batch
                for micro in range(self.accum):
                    part = micro * self.count + self.rank
                    places = torch.cat([
                        torch.arange(begin + part * front, begin + (part + 1) * front),
                        torch.arange(end - (part + 1) * back, end - part * back),
                    ])  # fmt: skip
                    copies = places % self.repeats
                    yield [(epoch, *key) for key in zip(order[places].tolist(), copies.tolist(), strict=True)]


class ImagesInMemory:
    """The images of a data set on the device, and the batches of a run from there."""

    num_workers, prefetch_factor = 0, None  # as a DataLoader tells them

    def __init__(
        self, config: TrainConfig, dataset: Any, data: dict[str, Any], order: TrainOrder, device: torch.device
    ):
        """Decodes all images.

        Raises:
            RunError: The data set is a stream, an image cannot be read, or their sizes do not fit.
        """
        if isinstance(dataset, IterableDataset):
            raise RunError(f"in_memory: the data set {config.dataset!r} is a stream")
        # As lists of arrays, because not all may have one size.
        options = loader_options(config, device) | {"batch_size": config.batch_size, "collate_fn": list}
        items = [item for items in Loader(EvalImages(dataset, np.asarray, data["mode"]), **options) for item in items]
        if unreadable := [error for _, _, errors in items for error in errors]:
            raise RunError(f"in_memory: {unreadable[0]}")
        sizes = sorted({image.shape[:2] for image, _, _ in items})
        if len(sizes) > 1 or any(side > limit for side, limit in zip(sizes[0], data["input_size"][1:], strict=True)):
            limit = "{1} x {2}".format(*data["input_size"])
            found = " and ".join(f"{height} x {width}" for height, width in (sizes[0], sizes[-1]))
            raise RunError(f"in_memory: images of one size, {limit} or smaller, but there are some of {found}")
        images = torch.from_numpy(np.stack([image for image, _, _ in items]))
        self.images = images.view(*images.shape[:3], -1).permute(0, 3, 1, 2).contiguous().to(device)
        self.targets = torch.tensor([target for _, target, _ in items]).to(device)
        self.order, self.seed = order, mixed_seed(config.seed)

    def __iter__(self) -> Iterator[tuple[KeyedImages, torch.Tensor, list[str]]]:
        for batch in self.order:
            places = torch.tensor(batch)
            keys, indices = torch.stack([image_keys(self.seed, places), places[:, 1]]).to(
                self.images.device, non_blocking=True
            )
            yield KeyedImages(self.images[indices], keys), self.targets[indices], []


def train_loader(
    config: TrainConfig, dataset: Any, data: dict[str, Any], order: TrainOrder, device: torch.device
) -> Iterable[tuple[torch.Tensor | ErasedImages | KeyedImages, torch.Tensor, list[str]]]:
    """Batches (images, classes, unreadable) of the run from `order.start` on, for `ToDevice`.

    Images come as uint8, and all that augments them on the device is left to it; so are the normalisation and the
    writing of what random erasing took.
    """
    if config.in_memory:
        return ImagesInMemory(config, dataset, data, order, device)
    if config.device_augment:
        # On tensors, where resizing takes half the time that it takes Pillow.
        kind = InterpolationMode(data["interpolation"])
        crop = v2.RandomResizedCrop(data["input_size"][1:], config.scale, config.ratio, kind)
        transform = KeyedTransform(v2.Compose([v2.PILToTensor(), crop]))
    else:
        transform = create_transform(
            data["input_size"], is_training=True, mean=data["mean"], std=data["std"],
            interpolation=data["interpolation"], scale=config.scale, ratio=config.ratio, hflip=config.hflip,
            vflip=config.vflip, color_jitter=config.color_jitter, auto_augment=config.aa, use_prefetcher=True,
        )  # fmt: skip
        if config.reprob:
            erasing = RandomErasing(config.reprob, mode=config.remode, max_count=config.recount, device="cpu")
            transform = ErasingTransform(transform, erasing)
    options = loader_options(config, device)
    if isinstance(dataset, IterableDataset):
        return StreamLoader(TrainStream(dataset, transform, data["mode"], order), **options)
    return Loader(TrainImages(dataset, transform, data["mode"], config.seed), batch_sampler=order, **options)


def eval_loader(config: CommonConfig, dataset: Any, data: dict[str, Any], processes: Processes) -> DataLoader:
    """Batches (images, classes, unreadable) of this process's share: every image is in exactly one share."""
    transform = create_transform(
        data["input_size"], is_training=False, interpolation=data["interpolation"], mean=data["mean"], std=data["std"],
        crop_pct=data["crop_pct"], crop_mode=data["crop_mode"], use_prefetcher=True,
    )  # fmt: skip
    options = loader_options(config, processes.device) | {"batch_size": config.batch_size}
    if isinstance(dataset, IterableDataset):
        return Loader(EvalStream(dataset, transform, data["mode"], processes), **options)
    share = range(processes.rank, len(dataset), processes.count)
    options["persistent_workers"] = options["num_workers"] > 0
    return Loader(EvalImages(dataset, transform, data["mode"]), sampler=share, **options)


class ToDevice:
    """Moves a batch to the device, and augments and normalises it there, without waiting for the device."""

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        augment: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ):
        self.device, self.augment = device, augment
        self.mean = torch.tensor(mean, device=device).view(-1, 1, 1) * 255
        self.std = torch.tensor(std, device=device).view(-1, 1, 1) * 255

    def __call__(
        self, batch: torch.Tensor | ErasedImages | KeyedImages, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        images = batch if isinstance(batch, torch.Tensor) else batch.images
        images = images.to(self.device, non_blocking=True)
        targets = targets.to(self.device, non_blocking=True)
        if isinstance(batch, KeyedImages):
            return self.augment(images, batch.keys.to(self.device, non_blocking=True)), targets
        if images.dtype == torch.uint8:
            images = images.float().sub_(self.mean).div_(self.std)
        if isinstance(batch, ErasedImages):
            batch.write(images)
        return images, targets


class SeededMixup:
    """timm's mixup and cutmix, drawn anew for every update from (seed, epoch, update).

    All forward passes of an update, on all processes, draw the same mix; with the mirrored slices of `TrainOrder` an
    update is the same however it is shared out.
    """

    def __init__(self, config: TrainConfig, num_classes: int):
        self.seed = config.seed
        self.mixup = Mixup(
            config.mixup, config.cutmix, prob=config.mixup_prob, switch_prob=config.mixup_switch_prob,
            label_smoothing=config.smoothing, num_classes=num_classes,
        )  # fmt: skip

    def __call__(self, images: torch.Tensor, targets: torch.Tensor, epoch: int, update: int):
        seed_host(mixed_seed(self.seed, epoch, update))
        return self.mixup(images, targets)
