"""Loader processes, and the streams of timm that can only be read from their start (webdataset, TFDS, streamed Hugging
Face): their order is reproducible, and they are taken up in the middle of an epoch."""

from __future__ import annotations

import copy
import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import torch
from PIL import Image
from timm.data.readers.shared_count import SharedCount
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from flash_bla.engine.augment import KeyedImages
from flash_bla.engine.config import CommonConfig, RunError
from flash_bla.engine.erasing import ErasedImages, collate_erased
from flash_bla.engine.images import in_mode
from flash_bla.engine.processes import Processes, mixed_seed, seed_host

PREFETCHED_BATCHES = 4  # by each loader process

# Image, class, and what could not be read on the way to it.
Item = tuple[torch.Tensor | ErasedImages | KeyedImages, int, list[str]]


class Loader(DataLoader):
    """A loader that ends the run, with its reason, where a loader process hangs or dies."""

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from super().__iter__()
        except RunError as error:  # of a loader process it comes with a traceback, whose last line has the message
            raise RunError(str(error).rpartition(f"{RunError.__module__}.{RunError.__name__}: ")[2].strip()) from None
        except RuntimeError as error:
            _kill_children()
            if "timed out" in str(error):
                error = f"no batch came for {self.timeout:g} s (--loader-timeout): a file system that does not answer?"
            raise RunError(f"loading the data failed: {error}") from None


def _kill_children() -> None:
    """Ends the loader processes: a hanging one would not go by itself, and the run could not exit."""
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's would raise for each of them
    for process in multiprocessing.active_children():
        process.kill()
        process.join(timeout=5)
    signal.signal(signal.SIGCHLD, handler)


def loader_options(config: CommonConfig, device: torch.device) -> dict[str, Any]:
    """The options that all loaders share."""
    workers = config.workers
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        workers = min(16, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    options = {"num_workers": workers, "collate_fn": _collate, "worker_init_fn": _start_worker}
    options["pin_memory"] = device.type == "cuda"  # what lets a copy to the GPU run beside the host
    return options | ({"prefetch_factor": PREFETCHED_BATCHES, "timeout": config.loader_timeout} if workers else {})


def _collate(items: list[Item]) -> tuple[torch.Tensor | ErasedImages | KeyedImages, torch.Tensor, list[str]]:
    images, targets, unreadable = zip(*items, strict=True)
    if isinstance(images[0], ErasedImages):
        images = collate_erased(images)
    elif isinstance(images[0], KeyedImages):
        images = KeyedImages(*map(torch.stack, zip(*images, strict=True)))
    else:
        images = torch.stack(images)
    return images, torch.tensor(targets), sum(unreadable, [])


def _start_worker(worker: int) -> None:
    """Lets a loader process outlive a signal to the whole process group, so that the running update can be finished."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))


class TrainStream(IterableDataset):
    """Augmented images of a stream (webdataset, TFDS, streamed Hugging Face), which can only be read from its start.

    timm's readers shuffle and share out the shards among the processes and their loader processes. Every epoch is read
    by a fresh copy of the reader, so that its order follows from the seed, the epoch and the number of processes and
    of loader processes alone. A run is taken up at an update by passing over the images before it: they are read and
    decoded, but not augmented. The batch of number n of an epoch comes from loader process n modulo their number.
    """

    def __init__(self, dataset: Any, transform: Callable, mode: str, order: Any):
        self.dataset, self.transform, self.mode, self.order = dataset, transform, mode, order

    def __iter__(self) -> Iterator[Item]:
        order = self.order
        worker, workers = _worker_place()
        first_epoch, first_update = order.start
        passed = first_update * order.accum // workers * order.batch_size
        rounds = -(-order.updates_per_epoch * order.accum // workers)
        for epoch in range(first_epoch, order.epochs):
            images = self._endless(epoch)
            for number in range(rounds * order.batch_size):
                image, target, unreadable = next(images)
                if epoch > first_epoch or number >= passed:
                    seed_host(mixed_seed(order.seed, epoch, order.rank, worker, number))
                    yield self.transform(in_mode(image, self.mode)), int(target), unreadable

    def _endless(self, epoch: int) -> Iterator[Item]:
        """An epoch's images, from the start again where the shards of this loader process hold fewer than it needs."""
        stream = _fresh(self.dataset)
        stream.set_epoch(epoch)
        while True:
            found = False
            for item in _with_warnings(stream):
                found = True
                yield item
            if not found:
                raise RunError("a loader process has no image to read: fewer shards than processes times --workers?")


class EvalStream(IterableDataset):
    """A process's share of the images of a stream: each process reads all of them and takes its part.

    A damaged shard or image comes as a blank with its error, for the evaluation to raise.
    """

    def __init__(self, dataset: Any, transform: Callable, mode: str, processes: Processes):
        self.dataset, self.transform, self.mode = dataset, transform, mode
        self.rank, self.count = processes.rank, processes.count

    def __iter__(self) -> Iterator[Item]:
        stream = _fresh(self.dataset)
        # timm's own shares are of equal length and may hold an image twice.
        stream.reader.dist_rank, stream.reader.dist_num_replicas = 0, 1
        for number, (image, target, unreadable) in enumerate(_with_warnings(stream, last=True)):
            if unreadable:
                yield self.transform(Image.new(self.mode, (32, 32))), -1, unreadable
            elif number % self.count == self.rank:
                yield self.transform(in_mode(image, self.mode)), int(target), []


def _worker_place() -> tuple[int, int]:
    worker = get_worker_info()
    return (worker.id, worker.num_workers) if worker else (0, 1)


def _fresh(dataset: Any) -> Any:
    """A copy of a stream that has not been read yet. The loader processes do not share its count of epochs."""
    stream = copy.copy(dataset)
    stream.reader = copy.copy(dataset.reader)
    for name, value in vars(stream.reader).items():
        if isinstance(value, SharedCount):
            setattr(stream.reader, name, SharedCount())
    return stream


class _Warnings(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def take(self) -> list[str]:
        messages, self.messages = self.messages, []
        return messages


def _with_warnings(stream: Any, last: bool = False) -> Iterator[Item]:
    """The images of a stream, each with what its reader warned of since the one before: it passes over damaged shards.

    With `last`, warnings after the last image come with a further one, that is blank.
    """
    logger, warnings = logging.getLogger("timm.data.readers"), _Warnings()
    logger.addHandler(warnings)
    try:
        for image, target in stream:
            yield image, target, warnings.take()
        if last and warnings.messages:
            yield Image.new("RGB", (1, 1)), -1, warnings.take()
    finally:
        logger.removeHandler(warnings)


class StreamLoader(Loader):
    """Batches of a `TrainStream`, without those before its start and those that fill up the last round of an epoch."""

    def __init__(self, stream: TrainStream, **options: Any):
        order = stream.order
        # The readers shuffle by the seeds of the loader processes, which come from this generator.
        generator = torch.Generator().manual_seed(mixed_seed(order.seed, order.rank))
        super().__init__(stream, batch_size=order.batch_size, generator=generator, **options)

    def __iter__(self) -> Iterator[Any]:
        order, workers = self.dataset.order, max(1, self.num_workers)
        batches = order.updates_per_epoch * order.accum
        in_rounds = -(-batches // workers) * workers
        first = order.start[1] * order.accum
        for number, batch in enumerate(super().__iter__(), first // workers * workers):
            if number >= first and number % in_rounds < batches:
                yield batch
