"""Streams: an order that is the same in every run, taken up anywhere, and shares that hold every image once."""

from __future__ import annotations

import io
import itertools
import random
import tarfile

import pytest
import torch
from PIL import Image
from timm.data import IterableImageDataset
from torch.utils.data import get_worker_info

from flash_bla.engine.config import RunError, TrainConfig
from flash_bla.engine.data import TrainOrder, eval_loader, image_count, open_dataset, train_loader
from flash_bla.engine.processes import Processes

CPU = torch.device("cpu")
DATA = {
    "input_size": [3, 8, 8], "mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic", "crop_pct": 1.0,
    "crop_mode": "center", "mode": "RGB",
}  # fmt: skip


class Reader:
    """Stands for one of timm's readers: it deals images out to loader processes, and shuffles by their seeds."""

    num_samples = 60

    def __init__(self):
        self.epoch, self.random, self.dist_rank, self.dist_num_replicas = 0, None, 0, 1

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        worker = get_worker_info()
        if self.random is None:  # goes on from epoch to epoch, as that of timm's reader of webdatasets
            self.random = random.Random(worker.seed if worker else 5)
        place, places = (worker.id, worker.num_workers) if worker else (0, 1)
        images = list(range(60))
        random.Random(self.epoch).shuffle(images)
        share = images[place::places]
        self.random.shuffle(share)
        for number in share:
            yield Image.new("RGB", (20, 20), (number, self.epoch, 0)), number % 3

    def __len__(self):
        return 60


def settings(**changes) -> TrainConfig:
    values = {"epochs": 3, "batch_size": 5, "scale": [1.0, 1.0], "ratio": [1.0, 1.0], "workers": 0, "seed": 5}
    return TrainConfig(**(values | changes))


def stream(config, dataset, start=(0, 0), count=None):
    order = TrainOrder(image_count(dataset), config, Processes(CPU, 0, 1))
    order.start = start
    return list(itertools.islice(train_loader(config, dataset, DATA, order, CPU), count))


def pixels(batches) -> list[list[int]]:
    """Red, which is the number of an image, by batch."""
    return [images[:, 0, 4, 4].tolist() for images, _, _ in batches]


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize(("accum", "on_device"), [(1, False), (3, False), (3, True)])
def test_a_stream_is_the_same_again_and_taken_up_anywhere(workers, accum, on_device):
    config = settings(workers=workers, grad_accum=accum, reprob=0.5, device_augment=on_device)
    whole = stream(config, IterableImageDataset("", reader=Reader()))
    assert len(whole) == 3 * 12
    for start in ((0, 1), (1, 0), (1, 3), (2, 2)):
        rest = stream(config, IterableImageDataset("", reader=Reader()), start)
        skipped = (start[0] * (12 // accum) + start[1]) * accum
        assert len(rest) == len(whole) - skipped
        for (a, _, _), (b, _, _) in zip(whole[skipped:], rest, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_of_a_stream_has_every_image_once(workers):
    found = stream(settings(workers=workers), IterableImageDataset("", reader=Reader()))
    for epoch in range(3):
        images = torch.cat([batch[0] for batch in found[12 * epoch : 12 * epoch + 12]])
        assert sorted(images[:, 0, 4, 4].tolist()) == list(range(60))
        assert set(images[:, 1, 4, 4].tolist()) == {epoch}
    assert pixels(found[:12]) != pixels(found[12:24])


# Webdataset ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path):
    """Four shards of ten pictures, red by their number."""
    for shard in range(4):
        with tarfile.open(tmp_path / f"{shard:04d}.tar", "w") as tar:
            for number in range(10 * shard, 10 * shard + 10):
                picture = io.BytesIO()
                Image.new("RGB", (20, 20), (number, 0, 0)).save(picture, "png")
                for kind, content in (("png", picture.getvalue()), ("cls", str(number % 3).encode())):
                    member = tarfile.TarInfo(f"{number:05d}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return tmp_path


def webdataset(root, **changes) -> TrainConfig:
    pytest.importorskip("webdataset")
    names = "{0000..0003}.tar|40"
    return settings(dataset="wds/", data_dir=str(root), train_split=names, val_split=names, **changes)


def opened(config, training=True):
    return open_dataset(config, training=training, batch_size=config.batch_size, seed=config.seed)


@pytest.mark.parametrize("workers", [0, 2])
def test_webdataset(shards, workers):
    config = webdataset(shards, workers=workers)
    whole = stream(config, opened(config))
    for epoch in range(3):
        assert sorted(sum(pixels(whole[8 * epoch : 8 * epoch + 8]), [])) == list(range(40))
    assert pixels(whole[:8]) != pixels(whole[8:16])
    assert pixels(stream(config, opened(config), (1, 3))) == pixels(whole[11:])


@pytest.mark.parametrize("workers", [0, 3])
def test_the_shares_of_a_stream_hold_every_image_once(shards, workers):
    config = webdataset(shards, workers=workers)
    loaders = [eval_loader(config, opened(config, False), DATA, Processes(CPU, rank, 3)) for rank in range(3)]
    assert sorted(sum((sum(pixels(loader), []) for loader in loaders), [])) == list(range(40))


def test_a_shard_cut_short(shards):
    config = webdataset(shards, epochs=2)
    shard = shards / "0001.tar"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2 + 700])
    # Training goes on with the other images, and tells. An evaluation must not pass over images.
    found = stream(config, opened(config))
    assert [len(numbers) for numbers in pixels(found)] == [5] * 16
    lost = set(range(40)) - set(sum(pixels(found[:8]), []))
    assert lost and lost < set(range(10, 20))
    assert any("unexpected end of data" in message for batch in found[:8] for message in batch[2])
    failures = [message for batch in eval_loader(config, opened(config, False), DATA, Processes(CPU, 0, 1))
                for message in batch[2]]  # fmt: skip
    assert len(failures) == 1 and "unexpected end of data" in failures[0]


def test_more_loader_processes_than_shards(shards):
    config = webdataset(shards, workers=5)
    with pytest.raises(RunError, match="a loader process has no image to read"):
        stream(config, opened(config))
