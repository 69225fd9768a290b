"""Checkpoints: always a good one on the disk, nothing executed on reading, and weights of other models refused."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import pickle
import resource
import sys
import types
from unittest.mock import Mock

import pytest
import timm
import torch
from safetensors.torch import save_file

from flash_bla.engine.checkpoint import (
    STATE,
    CheckpointFolder,
    DamagedCheckpoint,
    load_weights,
    read_checkpoint,
    state_dict_of,
    write_atomically,
)
from flash_bla.engine.config import RunError


@pytest.fixture
def warnings():
    return []


@pytest.fixture
def folder(tmp_path, warnings):
    return CheckpointFolder(tmp_path / "run", warnings.append)


def content(number: int) -> dict:
    own = {"epoch": number, "weights": torch.full((5000,), float(number)), "optimizer": {}, "history": [{"top1": 1.5}]}
    return dict.fromkeys(STATE) | own


def damage(path) -> None:
    """Flips one bit in the middle of the weights, which torch.load would not notice."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def tear(path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_the_last_two_are_kept(folder, warnings):
    assert folder.load() is None
    for number in range(3):
        assert folder.save_last(content(number))
    assert folder.load()["epoch"] == 2
    assert read_checkpoint(folder.previous)["epoch"] == 1
    folder.save_best(content(7))
    assert "optimizer" not in read_checkpoint(folder.best)
    assert {file.name for file in folder.folder.iterdir()} == {"last.pt", "previous.pt", "best.pt"}
    assert not warnings


@pytest.mark.parametrize("harm", [damage, tear, lambda path: path.write_bytes(b"")])
def test_a_damaged_last_gives_way_to_the_one_before(folder, warnings, harm):
    for number in range(2):
        folder.save_last(content(number))
    harm(folder.last)
    assert folder.load()["epoch"] == 0
    assert len(warnings) == 2 and "last.pt" in warnings[0] and "previous.pt" in warnings[1]
    folder.save_last(content(5))  # must not move the damaged one over the good one
    assert folder.load()["epoch"] == 5
    assert read_checkpoint(folder.previous)["epoch"] == 0


def test_a_crash_between_the_renames_leaves_the_one_before(folder):
    for number in range(2):
        folder.save_last(content(number))
    os.replace(folder.last, folder.previous)
    assert folder.load()["epoch"] == 1
    folder.save_last(content(2))
    assert (folder.load()["epoch"], read_checkpoint(folder.previous)["epoch"]) == (2, 1)


def test_checkpoints_that_cannot_be_read_are_not_overwritten(folder):
    for number in range(2):
        folder.save_last(content(number))
    tear(folder.last)
    tear(folder.previous)
    before = {file: file.read_bytes() for file in folder.folder.iterdir()}
    with pytest.raises(RunError, match="left as they are"):
        folder.load()
    assert before == {file: file.read_bytes() for file in folder.folder.iterdir()}
    folder.last.unlink(), folder.previous.unlink()
    folder.save_best(content(3))
    with pytest.raises(RunError, match="left as they are"):  # a new run would overwrite it by something worse
        folder.load()


@contextlib.contextmanager
def full_disk():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
        yield


@contextlib.contextmanager
def small_files_only():
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("trouble", [full_disk, small_files_only])
def test_a_full_disk_costs_nothing_saved_before(folder, warnings, trouble):
    for number in range(2):
        folder.save_last(content(number))
    before = {file: file.read_bytes() for file in folder.folder.iterdir()}
    with trouble():
        assert not folder.save_last(content(2))
        assert not folder.save_best(content(2))
    assert before == {file: file.read_bytes() for file in folder.folder.iterdir()}
    assert len(warnings) == 2 and "could not save" in warnings[0] and "last.pt" in warnings[0]
    assert folder.save_last(content(3))
    assert (folder.load()["epoch"], read_checkpoint(folder.previous)["epoch"]) == (3, 1)


def test_a_process_that_does_not_write(tmp_path, warnings):
    folder = CheckpointFolder(tmp_path / "run", warnings.append, writes=False)
    assert folder.save_last(content(0)) and folder.save_best(content(0))
    assert not (tmp_path / "run").exists()


# Files of weights ----------------------------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_nothing_in_a_file_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"a": torch.ones(1)}, "bomb": Bomb()}, "bomb.pt")
    (tmp_path / "bomb.pkl").write_bytes(pickle.dumps(Bomb()))
    for name in ("bomb.pt", "bomb.pkl"):
        with pytest.raises(DamagedCheckpoint, match=name):
            read_checkpoint(name)
    assert not (tmp_path / "exploded").exists()
    with pytest.raises(RunError, match="no such checkpoint: nowhere.pt"):
        read_checkpoint("nowhere.pt")


def test_settings_objects_of_other_projects_are_read(tmp_path, monkeypatch):
    yacs = types.ModuleType("yacs.config")
    yacs.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    node = yacs.CfgNode(LR=0.1)
    node.__dict__["__immutable__"] = True
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", yacs)
        file = {"model": {"module.a": torch.ones(1)}, "config": node, "args": argparse.Namespace(lr=0.1)}
        torch.save(file, tmp_path / "official.pth")
    assert state_dict_of(read_checkpoint(tmp_path / "official.pth")) == {"a": torch.ones(1)}


def vit(**changes):
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 10}
    return timm.create_model("vit_tiny_patch16_224", **(arguments | changes))


def test_the_weights_in_a_file(tmp_path):
    a, b = {"w": torch.zeros(1)}, {"w": torch.ones(1)}
    assert state_dict_of({"state_dict": a, "state_dict_ema": b}) is not a
    assert state_dict_of({"state_dict": a, "state_dict_ema": b})["w"] == 1
    assert state_dict_of({"state_dict": a, "state_dict_ema": b}, use_ema=False)["w"] == 0
    assert state_dict_of({"model": {"name": "x"}, "state_dict": a, "state_dict_ema": None})["w"] == 0
    assert state_dict_of({"model": b, "epoch": 3})["w"] == 1
    assert state_dict_of({"_orig_mod.w": torch.ones(1)})["w"] == 1
    assert state_dict_of({"module.w": torch.ones(1)})["w"] == 1
    save_file(b, tmp_path / "x.safetensors")
    assert state_dict_of(read_checkpoint(tmp_path / "x.safetensors"))["w"] == 1
    with pytest.raises(RunError, match="holds no weights"):
        state_dict_of({"epoch": 3})


def test_weights_for_another_class_count_and_resolution():
    source, target = vit(), vit(num_classes=3, img_size=(48, 64))
    head = target.head.weight.clone()
    notes = load_weights(target, source.state_dict(), "x.pt")
    assert notes == ["x.pt has 10 classes: new classifier for 3 classes"]
    assert torch.equal(target.head.weight, head)
    assert torch.equal(target.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)
    assert target.pos_embed.shape[1] == 1 + 6 * 8
    assert load_weights(vit(), source.state_dict(), "x.pt") == []
    headless = {key: value for key, value in source.state_dict().items() if not key.startswith("head")}
    assert load_weights(vit(), headless, "x.pt") == ["x.pt has no classifier: new classifier for 10 classes"]


def test_weights_of_another_model_are_refused():
    with pytest.raises(RunError) as error:
        load_weights(vit(), vit(depth=3, embed_dim=48).state_dict(), "x.pt")
    message = str(error.value)
    assert "x.pt is the checkpoint of another model" in message
    assert "blocks.1.norm1.weight" in message and "... 24 in all" in message
    assert message.count("size mismatch for") == 5 and "shapes in all" in message
    with pytest.raises(RunError, match="Missing key"):
        load_weights(vit(), timm.create_model("resnet18", num_classes=10).state_dict(), "x.pt")


def test_an_atomic_write_keeps_the_old_content_until_the_new_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "log.csv"
    write_atomically(path, b"old")
    seen = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *names: (seen.append(path.read_bytes()), replace(*names)))
    write_atomically(path, b"new")
    assert seen == [b"old"] and path.read_bytes() == b"new"
