"""Fine-tuning: weights of a model with another attention, what of a model is trained, and low-rank adapters."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from flash_bla.engine.checkpoint import classifier_entries, classifiers, load_entries, state_dict_of
from flash_bla.engine.config import RunError, TrainConfig
from flash_bla.layers import DepthwiseConv, resample_encoding
from flash_bla.models.vit import VisionTransformer

PREFIX_TOKENS = ("cls_token", "dist_token", "reg_token")  # in this order before the patches
HEADS = ("head.", "head_dist.")

Entries = dict[str, Tensor]


def replace_attention(model: nn.Module, checkpoint: dict[str, Any], name: str, *, use_ema: bool = True) -> list[str]:
    """Takes over the weights of a timm vision transformer with softmax attention into a model with another attention.

    Outside the attention and the classifier every entry must fit. What the model has in another form is brought into
    that form: the position encoding is resampled to its grid; what the encoding adds to class, distillation and
    register tokens joins these tokens unless the model has the same ones with an encoding; the last norm comes behind
    the pooling where the model has it there; layer scales that the model lacks join the layer before them.

    Within the attention the projections to q, k and v are taken over where the new one has them, and all of the same
    name and shape. The rest is new: gates are 1, local branches 0, everything else is as the attention initialises it.
    The classifier is 0, so that the loss starts at the logarithm of the number of classes.

    Args:
        model: A plain vision transformer of this library.
        checkpoint: What `read_checkpoint` gave.
        name: The file's name, for messages.
        use_ema: Take the averaged weights where the file has them.

    Returns:
        What was taken over, adapted, left out and new, in words.

    Raises:
        RunError: The model or the file is of another kind, or something does not fit.
    """
    if not isinstance(model, VisionTransformer):
        raise RunError("replace_attention: works for the plain vision transformers of flash_bla (family vit) only")
    file = state_dict_of(checkpoint, use_ema)
    if not {"blocks.0.attn.qkv.weight", "pos_embed"} <= file.keys():
        raise RunError(f"{name} holds no vision transformer with timm's names (pos_embed, blocks.0.attn.qkv.weight)")
    own, head = model.state_dict(), classifier_entries(model)
    entries = {key: value for key, value in file.items() if not key.startswith(HEADS)}
    adapted = [
        *_fit_tokens(entries, model, name),
        *_fit_norm(entries, own),
        *_fit_layer_scales(entries, own, len(model.blocks)),
        *_fit_projections(entries, own, len(model.blocks)),
    ]

    def may_differ(key: str) -> bool:
        return ".attn." in key or key in PREFIX_TOKENS

    left = [key for key in entries if may_differ(key) and (key not in own or entries[key].shape != own[key].shape)]
    for key in left:
        del entries[key]
    taken = len(entries)
    local = tuple(f"{key}." for key, module in model.named_modules() if isinstance(module, DepthwiseConv))
    new = {key: value for key, value in own.items() if may_differ(key) and key not in entries} | head
    new |= {key: torch.zeros_like(new[key]) for key in new if key.startswith(local) or key in head}
    load_entries(model, entries | new, f"{name} does not fit outside the attention and the classifier")
    left += [key for key in file if key.startswith(HEADS)]
    return [
        f"{name} with another attention: {taken} entries taken over",
        *adapted,
        f"left out: {_patterns(left)}",
        f"new: {_patterns(new)}",
    ]


def _fit_tokens(entries: Entries, model: VisionTransformer, name: str) -> list[str]:
    """Brings the position encoding into the model's form."""
    tokens = {key: entries[key].shape for key in PREFIX_TOKENS if key in entries}
    own = {key: value.shape for key, value in model.named_parameters() if key in PREFIX_TOKENS}
    encoding, grid = entries["pos_embed"], model.patch_embed.grid_size
    count = sum(shape[1] for shape in tokens.values())
    for prefix in (count, 0):  # with rows for these tokens, or without
        places = encoding.shape[1] - prefix
        side = math.isqrt(max(places, 0))
        if places == grid[0] * grid[1] or side * side == places > 0:
            break
    else:
        raise RunError(f"{name}: a pos_embed of {encoding.shape[1]} rows, {count} of them for tokens, fits no square")
    old = grid if places == grid[0] * grid[1] else (side, side)
    notes = [] if old == grid else [f"pos_embed resampled from {old[0]}x{old[1]} to {grid[0]}x{grid[1]}"]
    encodes = model.num_prefix_tokens > 0 and not model.no_embed_class
    if prefix == 0 and not encodes or (prefix > 0 and encodes and tokens == own):
        entries["pos_embed"] = resample_encoding(encoding, grid, old, prefix)
        return notes
    # The same sum in another order: the tokens carry what the encoding would add to them.
    first, encoding = encoding.split([prefix, places], dim=1)
    if prefix:
        for key, rows in zip(tokens, first.split([shape[1] for shape in tokens.values()], dim=1), strict=True):
            entries[key] = entries[key] + rows
        if kept := [key for key in tokens if key in own]:
            notes.append(f"pos_embed's rows for {', '.join(kept)} joined to these")
    encoding = resample_encoding(encoding, grid, old)
    rows = encoding.new_zeros(1, model.num_prefix_tokens if encodes else 0, encoding.shape[2])
    entries["pos_embed"] = torch.cat([rows, encoding], dim=1)
    return notes


def _fit_norm(entries: Entries, own: Entries) -> list[str]:
    """Gives the last norm the name that it has in the model: before the pooling, or behind it."""
    for there, here in (("norm", "fc_norm"), ("fc_norm", "norm")):
        if f"{here}.weight" in own and f"{here}.weight" not in entries and f"{there}.weight" in entries:
            for leaf in ("weight", "bias"):
                entries[f"{here}.{leaf}"] = entries.pop(f"{there}.{leaf}")
            return [f"{there} as {here}"]
    return []


def _fit_layer_scales(entries: Entries, own: Entries, depth: int) -> list[str]:
    """Multiplies layer scales that the model lacks into the layers before them; those that the file lacks become 1."""
    notes = set()
    for index in range(depth):
        for scale, layer in (("ls1", "attn.proj"), ("ls2", "mlp.fc2")):
            key = f"blocks.{index}.{scale}.gamma"
            if key in own and key not in entries:
                entries[key] = torch.ones_like(own[key])
                notes.add("layer scales start at 1")
            elif key in entries and key not in own:
                gamma = entries.pop(key)
                for leaf in ("weight", "bias"):
                    place = f"blocks.{index}.{layer}.{leaf}"
                    if place in entries:
                        entries[place] = entries[place] * gamma.view(-1, *[1] * (entries[place].ndim - 1))
                notes.add("layer scales multiplied into attn.proj and mlp.fc2")
    return sorted(notes)


def _fit_projections(entries: Entries, own: Entries, depth: int) -> list[str]:
    """Brings the rows of q, k and v into the projections of the new attentions, and makes their gates 1."""
    notes = set()
    for index in range(depth):
        prefix = f"blocks.{index}.attn."
        name = next((name for name in ("qkv", "qkvg", "qkvo", "qk") if f"{prefix}{name}.weight" in own), None)
        weight = entries.pop(f"{prefix}qkv.weight", None)
        bias = entries.pop(f"{prefix}qkv.bias", None)
        if name is None or weight is None:
            continue
        rows = own[f"{prefix}{name}.weight"].shape[0]
        gate = max(rows - len(weight), 0)
        has_bias = f"{prefix}{name}.bias" in own
        if gate and not has_bias:
            raise RunError("replace_attention: the gate needs a bias to start at 1 (--model-kwargs qkv_bias=true)")
        entries[f"{prefix}{name}.weight"] = torch.cat([weight[:rows], weight.new_zeros(gate, weight.shape[1])])
        if has_bias:
            bias = weight.new_zeros(len(weight)) if bias is None else bias
            entries[f"{prefix}{name}.bias"] = torch.cat([bias[:rows], bias.new_ones(gate)])
        if name != "qkv":
            parts = "q and k" if rows < len(weight) else "q, k and v"
            notes.add(f"{parts} of qkv as {name}" + (", with a gate of 1" if gate else ""))
    return sorted(notes)


def _patterns(keys: Iterable[str]) -> str:
    """Names of entries, those of all blocks as one."""
    return ", ".join(dict.fromkeys(re.sub(r"\d+", "*", key) for key in keys)) or "nothing"


def add_adapters(model: nn.Module, rank: int) -> None:
    """Adds low-rank adapters (LoRA) to the linear layers of a model's blocks, W + BA, where B begins at 0.

    They and the classifier are what is trained. Their scale is 1, whatever the rank.

    Args:
        model: The model, which is changed in place.
        rank: Rows of A.

    Raises:
        RunError: peft is not installed, or there are no such layers.

    Reference:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise RunError("lora: needs peft (pip install peft)") from error
    layers = [n for n, module in model.named_modules() if isinstance(module, nn.Linear) and "blocks." in n]
    if not layers:
        raise RunError("lora: the model has no linear layers in blocks")
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers), model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    for classifier in classifiers(model).values():
        classifier.requires_grad_(True)


def choose_trained(model: nn.Module, config: TrainConfig) -> None:
    """Adds the adapters that the settings ask for, and leaves only those parameters to train that they name.

    Raises:
        RunError: A pattern matches no parameter, nothing is left to train, or adapters cannot be added.
    """
    if config.lora:
        add_adapters(model, config.lora)
    if config.freeze_backbone:
        model.requires_grad_(False)
        for classifier in classifiers(model).values():
            classifier.requires_grad_(True)
    names = [name for name, _ in model.named_parameters()]
    for pattern in config.freeze or ():
        if not any(fnmatchcase(name, pattern) for name in names):
            raise RunError(f"freeze: no parameter matches {pattern!r}; they are named {', '.join(names[:5])}, ...")
    for name, parameter in model.named_parameters():
        if any(fnmatchcase(name, pattern) for pattern in config.freeze or ()):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise RunError("freeze: nothing is left to train")


def start_training(model: nn.Module, config: TrainConfig) -> None:
    """Training mode, but for what is fixed: batch norms whose parameters are, or all but the classifier."""
    model.train()
    if config.freeze_backbone:  # fixed means fixed: no drop path, no running statistics
        model.eval()
        for classifier in classifiers(model).values():
            classifier.train()
    for module in model.modules():
        parameters = list(module.parameters()) if isinstance(module, _BatchNorm) else []
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()
