"""Files of weights: found, downloaded and read, and refused if they are of another model.

Nothing in a file is executed: timm reads with ``torch.load(..., weights_only=True)``, which refuses pickled code. Where
a file holds a moving average besides the weights, timm takes the average (``timm.models.load_checkpoint(model, file,
use_ema=False)`` does not).
"""

from __future__ import annotations

import os
from collections import OrderedDict
from functools import partial
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import torch
from timm.models import PretrainedCfg, load_state_dict
from timm.models._hub import download_cached_file, download_from_hf, get_cache_dir
from torch import Tensor, nn

# Official files hold their settings beside the weights, in an object of the package yacs. It is read as a plain
# container that only bears this name: yacs, installed or not, is never imported.
torch.serialization.add_safe_globals([(OrderedDict, "yacs.config.CfgNode")])
# NumPy's scalars, as a best accuracy, are read as such, under the names that both of its major versions give them.
torch.serialization.add_safe_globals(
    [np.dtype, *(type(np.dtype(name)) for name in ("float64", "float32", "int64", "bool"))]
    + [(np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("_core", "core")]
)


def read_weights(cfg: PretrainedCfg, cache_dir: str | Path | None = None) -> dict[str, Tensor] | None:
    """The weights of a pretrained configuration, downloaded if they are not in the cache.

    Args:
        cfg: The configuration; its ``file`` goes before its addresses.
        cache_dir: Where downloads are kept, timm's cache by default.

    Returns:
        The entries as the file names them; None if there are none, or if they are in a form of timm's own.

    Raises:
        FileNotFoundError: There is no such file.
        RuntimeError: The download failed, and how to do it by hand; or the file is damaged or unsafe.
    """
    if cfg.source or cfg.state_dict:  # hf-hub:... and local-dir:..., or weights in memory
        return None
    if cfg.file:
        return _read(cfg.file)
    tagged = f"{cfg.architecture}.{cfg.tag}" if cfg.tag else cfg.architecture
    if cfg.hf_hub_id and cfg.hf_hub_filename:
        order = f"download {cfg.hf_hub_filename} from https://huggingface.co/{cfg.hf_hub_id}"
        fetch = partial(_fetch_from_hub, cfg.hf_hub_id, cfg.hf_hub_filename, cache_dir)
    elif cfg.url and not cfg.hf_hub_id:
        url, name = (cfg.url, os.path.basename(urlparse(cfg.url).path)) if isinstance(cfg.url, str) else cfg.url
        name = name or f"{tagged}.pth"  # an address need not end in the name of a file
        order = f"download {url} as {name}"
        fetch = partial(_fetch, url, name, cache_dir)
    elif cfg.origin_url and not cfg.has_weights:
        order = f"get it from {cfg.origin_url}"
        raise RuntimeError(f"no address of a file is known for {tagged}: {_advice(cfg, order)}")
    else:
        return None
    try:
        return fetch()
    except Exception as error:  # of whatever kind the network libraries raise
        raise RuntimeError(
            f"the weights of {tagged} could not be downloaded ({type(error).__name__}: {error}); to do it by hand, "
            f"{_advice(cfg, order)}"
        ) from error


def _read(file: str) -> dict[str, Tensor]:
    if not os.path.isfile(file):
        raise FileNotFoundError(f"no such file of weights: {file}")
    try:
        return load_state_dict(file)
    except Exception as error:  # of many kinds, by where the file is damaged
        raise RuntimeError(f"{file} is damaged, or no file of weights: {error}") from error


def _fetch(url: str, name: str, cache_dir: str | Path | None) -> dict[str, Tensor]:
    cached = os.path.exists(os.path.join(cache_dir or get_cache_dir(), name))
    file = download_cached_file((url, name), check_hash=False, cache_dir=cache_dir)
    try:
        return _read(file)
    except RuntimeError:
        if not cached:  # a page that says sorry must not stay there
            os.remove(file)
        raise


def _fetch_from_hub(repository: str, name: str, cache_dir: str | Path | None) -> dict[str, Tensor]:
    return _read(download_from_hf(repository, name, cache_dir))


def _advice(cfg: PretrainedCfg, order: str) -> str:
    create = f"timm.create_model({cfg.architecture!r}"
    return (
        f"{order} and pass the file's path: {create}, checkpoint_path=PATH), or {create}, pretrained=True, "
        "pretrained_cfg_overlay=dict(file=PATH)), which also adapts it to other num_classes and in_chans"
    )


def check_weights(name: str, state_dict: dict[str, Tensor], model: nn.Module) -> None:
    """Refuses the weights of another model, and sees to it that a classifier that fits is loaded.

    timm goes by the configuration's number of classes: if it is not the model's, timm leaves the classifier out and
    loads whatever fits of the rest.

    Args:
        name: The model's name, for the message.
        state_dict: Entries under the model's own names.
        model: The model that timm is about to load them into.

    Raises:
        RuntimeError: Entries other than the classifier's are missing or unknown; says which.
    """
    cfg = model.pretrained_cfg
    classifiers = (cfg["classifier"],) if isinstance(cfg["classifier"], str) else tuple(cfg["classifier"])
    prefixes = tuple(f"{classifier}." for classifier in classifiers)
    counts = ".num_batches_tracked"  # of BatchNorm, which fills it in where a file has none
    found, expected = (
        {key for key in entries if not key.startswith(prefixes) and not key.endswith(counts)}
        for entries in (state_dict, model.state_dict())
    )
    if found != expected:
        missing, unknown = (", ".join(sorted(keys)[:5]) or "none" for keys in (expected - found, found - expected))
        raise RuntimeError(
            f"these weights are not those of {name}: {len(expected - found)} entries are missing ({missing}), "
            f"{len(found - expected)} are unknown ({unknown})"
        )
    heads = [state_dict.get(f"{classifier}.weight") for classifier in classifiers]
    if all(head is not None and len(head) == model.num_classes for head in heads):
        cfg["num_classes"] = model.num_classes
