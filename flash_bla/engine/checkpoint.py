"""Checkpoints: written so that a crash at any moment leaves a good one, read without executing anything.

A run's folder holds `last.pt` (where the run stands), `previous.pt` (the one before) and `best.pt` (the best evaluation
so far, without the optimizer's state). Each is a plain dictionary for `torch.load(..., weights_only=True)`:

    model            description that rebuilds the model in any process (flash_bla.models.registry.build_model)
    state_dict       weights; state_dict_ema: their moving average, where the run keeps one
    class_names      names by class index, or None
    data             input size, mean, std, interpolation and crop, as for evaluation
    config           all settings of the run
    epoch, update    where it stands: epochs done, and updates done within the next one
    history          one row of figures for each epoch
    optimizer, scaler and the run's counters

Low-rank adapters are merged in `best.pt` and stand beside the weights in the others; `load_weights` reads both.
"""

from __future__ import annotations

import argparse
import io
import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import clean_state_dict
from torch import nn

import flash_bla.models.weights  # noqa: F401 - torch.load then accepts what official files hold besides weights
from flash_bla.configs import load_yaml
from flash_bla.engine.config import RunError, differences
from flash_bla.models.vit import VisionTransformer

LOGS = ("config.yaml", "log.csv", "preview.png", "curve.png", "summary.json")  # what a run writes besides
STATE = (  # what a run goes on from
    "model", "state_dict", "state_dict_ema", "class_names", "config", "epoch", "update", "history", "best",
    "unreadable", "seconds", "meter", "optimizer", "scaler",
)  # fmt: skip
AVERAGED = ("state_dict_ema", "model_ema")  # where a file keeps a moving average of its weights


class DamagedCheckpoint(RunError):
    """A file that is no whole checkpoint."""


def write_atomically(path: str | Path, content: bytes | memoryview, keep: Path | None = None) -> None:
    """Writes a file so that its name points at the old or the new content at any moment, never at a part of one.

    Args:
        path: The file.
        content: Its new content.
        keep: A name that the old content is moved to.

    Raises:
        OSError: It could not be written (a full disk); what was there before is untouched and no rest is left.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")  # same folder: a rename is atomic within one file system only
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the renames themselves
    finally:
        os.close(folder)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint or any other file of weights: torch.save (old or new format) or safetensors.

    Nothing in the file is executed. Settings objects in files of other projects (argparse's and yacs') are read as
    plain containers.

    Raises:
        RunError: There is no such file.
        DamagedCheckpoint: The file is torn, has flipped bits, or holds what only an unsafe reader would accept.
    """
    path = Path(path)
    if not path.is_file():
        raise RunError(f"no such checkpoint: {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
                damaged = archive.testzip()
            if damaged:
                raise DamagedCheckpoint(f"{path} is damaged: wrong checksum of {damaged}")
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except DamagedCheckpoint:
        raise
    except pickle.UnpicklingError as error:
        raise DamagedCheckpoint(f"{path} is damaged, or holds objects that are not safe to load") from error
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, zipfile.BadZipFile, SafetensorError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DamagedCheckpoint(f"{path} is no whole checkpoint: {reason}") from error
    if not isinstance(content, dict):
        raise DamagedCheckpoint(f"{path} holds a {type(content).__name__}, no checkpoint")
    return content


class CheckpointFolder:
    """The checkpoints of one run."""

    def __init__(self, folder: str | Path, warn: Callable[[str], None], writes: bool = True):
        """Names the files; `writes` is whether this process writes them, or leaves that to another one."""
        self.folder, self._warn, self._writes = Path(folder), warn, writes
        self.last, self.previous, self.best = (self.folder / f"{name}.pt" for name in ("last", "previous", "best"))
        self._keep = self.previous

    def load(self) -> dict[str, Any] | None:
        """Where the run stands, or None before its first update. A damaged `last.pt` gives way to the one before it.

        Raises:
            RunError: There are checkpoints, but none to go on from, or files that are not of a run that ended before
                its first checkpoint: beginning anew would overwrite them. Or a file is no checkpoint of a run.
        """
        found = [path for path in (self.last, self.previous) if path.exists()]
        for path in found:
            try:
                checkpoint = read_checkpoint(path)
            except DamagedCheckpoint as error:
                self._warn(str(error))
                continue
            if missing := [key for key in STATE if key not in checkpoint]:
                raise RunError(
                    f"{path} is not where a run of train.py stands, it lacks {', '.join(missing)}; choose another "
                    "output folder, or move this file away"
                )
            if checkpoint["epoch"] == checkpoint["update"] == 0 and not self.best.exists():
                found = []  # of no update: it begins anew, and may have other settings
                break
            if path is self.previous:
                self._warn(f"going on from the checkpoint before the last, {path}")
                self._keep = None  # the damaged one must not take the place of this one
            return checkpoint
        if found or self.best.exists():
            raise RunError(
                f"{self.folder} holds checkpoints, but none that the run can go on from; they are left as they are. "
                "Choose another output folder, or move these files away"
            )
        there = [name for name in LOGS if (self.folder / name).exists()]
        if there and ("summary.json" in there or not self._began()):
            raise RunError(
                f"{self.folder} holds {', '.join(there)}, which the run would overwrite, but no checkpoint; choose "
                "another output folder, or move these files away"
            )
        return None

    def _began(self) -> bool:
        """Whether the first file that a run writes is there, its config.yaml."""
        try:
            return {"total_batch", "rates"} <= load_yaml(self.folder / "config.yaml").keys()
        except (OSError, ValueError):
            return False

    def check_same_run(self, state: dict[str, Any], now: dict[str, Any]) -> None:
        """Refuses to go on with, or to overwrite, a run of other settings, and says what differs.

        The data may have moved, and some of those held out be gone, which is a warning. A run that is complete would
        show its old figures as those of the new folder: there it is refused.
        """
        old, new = state["config"], now["config"]
        changed = differences(old, new)
        same_folder = new["dataset"] == "digits" or _absolute(old.get("data_dir")) == _absolute(new["data_dir"])
        for key, same in (("data_dir", same_folder), ("val_images", old.get("val_images") == new["val_images"])):
            if same:
                continue
            if key == "data_dir" and state["epoch"] >= new["epochs"] + new["cooldown_epochs"]:
                changed.append(f"data_dir: {old.get(key)} -> {new[key]}, and the run is complete")
            elif self._writes:
                self._warn(f"{key}: {old.get(key)} -> {new[key]}")
        if state["model"] != now["model"]:
            changed.append(f"model: {state['model']} -> {now['model']}")
        else:  # which another version of this package may build otherwise: the optimizer's state would not fit
            shapes, own = ({key: tuple(x.shape) for key, x in s["state_dict"].items()} for s in (state, now))
            changed += [f"{key}: {shapes.get(key)} -> {own[key]}" for key in own if shapes.get(key) != own[key]]
        if state["class_names"] != now["class_names"]:
            changed.append("class_names: the data set has other classes")
        if changed:
            lines = "\n  ".join(changed)
            raise RunError(f"{self.folder} holds another run; choose another --output, or take back:\n  {lines}")

    def save_last(self, checkpoint: dict[str, Any]) -> bool:
        """Saves where the run stands and keeps the one before; returns whether it worked."""
        saved = self._save(self.last, checkpoint, self._keep)
        if saved:
            self._keep = self.previous
        return saved

    def save_best(self, checkpoint: dict[str, Any]) -> bool:
        """Saves the best weights so far, for others to use: adapters merged; returns whether it worked."""
        best = {k: v for k, v in checkpoint.items() if k not in ("optimizer", "scaler")}
        best |= {k: merge_adapters(best[k]) for k in ("state_dict", "state_dict_ema") if best.get(k)}
        return self._save(self.best, best)

    def _save(self, path: Path, checkpoint: dict[str, Any], keep: Path | None = None) -> bool:
        if not self._writes:
            return True
        # Into memory first: what is written to the disk is then one block of bytes, whose failure is an OSError.
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, buffer.getbuffer(), keep)
        except OSError as error:
            self._warn(f"could not save {path}: {error.strerror}. What was saved before is intact, and the run goes on")
            return False
        return True


def is_own(checkpoint: dict[str, Any]) -> bool:
    """Whether train.py wrote it, so that it says which model it is of, and what the images go through."""
    model = checkpoint.get("model")
    return {"state_dict", "config"} <= checkpoint.keys() and isinstance(model, dict) and "family" in model


def state_dict_of(checkpoint: dict[str, Any], use_ema: bool = True) -> dict[str, torch.Tensor]:
    """The weights in a file, from under whatever key they stand.

    The prefixes of DDP and torch.compile are taken off, and low-rank adapters merged.
    """
    keys = (AVERAGED if use_ema else ()) + ("state_dict", "model")
    for content in (*(checkpoint.get(key) for key in keys), checkpoint):
        if isinstance(content, dict) and _is_state_dict(content):
            return merge_adapters(clean_state_dict(content))
    raise RunError("the file holds no weights")


def merge_adapters(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights with low-rank adapters as plain weights, W + BA; those without are returned as they are.

    The names are peft's, the adapters those of `flash_bla.engine.finetune.add_adapters`, whose scale is 1.
    """
    merged = {}
    for key, value in state_dict.items():
        layer, base, leaf = key.rpartition(".base_layer.")
        if base and leaf == "weight":
            a, b = (state_dict[f"{layer}.lora_{letter}.default.weight"] for letter in "AB")
            value = value + b @ a
        if ".lora_" not in key:
            merged[f"{layer}.{leaf}" if base else key] = value
    return merged


def _is_state_dict(content: dict[str, Any]) -> bool:
    return bool(content) and all(isinstance(value, torch.Tensor) for value in content.values())


def load_weights(model: nn.Module, checkpoint: dict[str, Any], name: str, *, use_ema: bool = True) -> list[str]:
    """Loads the weights of a file into a model.

    Another resolution is resampled by the model. Where the classifier is missing or has another number of classes, the
    model keeps its own.

    Args:
        model: The model.
        checkpoint: What `read_checkpoint` gave.
        name: The file's name, for messages.
        use_ema: Take the averaged weights where the file has them.

    Returns:
        What was adapted, in words.

    Raises:
        RunError: The file belongs to another model; the entries that differ are named.
    """
    state_dict = state_dict_of(checkpoint, use_ema)
    # timm's families keep the adaptation of a file (another resolution, official names) in a function of this name.
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if adapt is not None:
        state_dict = adapt(state_dict, model)
    notes = []
    head_entries = classifier_entries(model)
    if any(k not in state_dict or state_dict[k].shape != v.shape for k, v in head_entries.items()):
        there = next((len(state_dict[k]) for k in head_entries if k in state_dict), None)
        here = next(iter(head_entries.values())).shape[0]
        has = f"{there} classes" if there else "no classifier"
        notes.append(f"{name} has {has}: new classifier for {here} classes")
        state_dict = state_dict | head_entries
    hint = ""
    if isinstance(model, VisionTransformer) and "blocks.0.attn.qkv.weight" in state_dict:
        hint = "\ntrain.py --replace-attention starts from a vision transformer with softmax attention"
    load_entries(model, state_dict, f"{name} is the checkpoint of another model", hint)
    return notes


def load_entries(model: nn.Module, entries: dict[str, torch.Tensor], trouble: str, hint: str = "") -> None:
    """Loads the entries of a model.

    Raises:
        RunError: They are not all of them, or do not fit; `trouble`, the first of them and `hint` are its message.
    """
    try:
        model.load_state_dict(entries)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        raise RunError("\n".join([f"{trouble}:", *_shortened(lines)]) + hint) from error


def _absolute(folder: str | None) -> str | None:
    return None if folder is None else os.path.abspath(folder)


def classifiers(model: nn.Module) -> dict[str, nn.Module]:
    """The last layer by its name in the model, or both of a model with a head for distillation."""
    last = model.get_classifier()
    last = last if isinstance(last, tuple) else (last,)
    return {name: module for name, module in model.named_modules() if module in last}


def classifier_entries(model: nn.Module) -> dict[str, torch.Tensor]:
    """The classifier's entries under their names in the model's state dict."""
    return {f"{name}.{key}": value for name, m in classifiers(model).items() for key, value in m.state_dict().items()}


def _shortened(lines: list[str], limit: int = 5) -> list[str]:
    """PyTorch's list of what does not fit, cut to the first few of each kind."""
    shapes = [line for line in lines if line.startswith("size mismatch")]
    short = []
    for line in lines:
        if line.startswith("size mismatch"):
            continue
        entries = line.split(", ")
        more = f", ... {len(entries)} in all" if len(entries) > limit else ""
        short.append(", ".join(entries[:limit]).rstrip(" .") + more)
    more = [f"... {len(shapes)} shapes in all"] if len(shapes) > limit else []
    return short + shapes[:limit] + more
