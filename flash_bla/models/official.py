"""What the families' checkpoint filters have in common: official entry names to this library's."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

# Entries that the architecture fixes; here they are computed.
FIXED = re.compile(r"(^|\.)(attn_mask|relative_position_index|rotations|angle)$")

Rule = tuple[str, str | Callable[[re.Match], str]]


def rename_entries(state_dict: Mapping[str, Tensor], rules: Sequence[Rule]) -> dict[str, Tensor]:
    """Renames the entries of a state dict and leaves out fixed buffers.

    Args:
        state_dict: The entries.
        rules: Pairs for ``re.sub``, applied in order to every name; none may match a name of this library.
    """
    renamed = {}
    for key, value in state_dict.items():
        if FIXED.search(key):
            continue
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


def join_projections(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Joins the projections ``q, kv`` to ``qkv``, and ``qg, kv`` to ``qkvg``: q, k, v and the gate in this order."""
    joined = dict(state_dict)
    for key in state_dict:
        match = re.fullmatch(r"(.*\.)(q|qg)\.(weight|bias)", key)
        if match and f"{match[1]}kv.{match[3]}" in state_dict:
            block, name, leaf = match.groups()
            first, *gate = joined.pop(key).chunk(len(name))
            joined[f"{block}{'qkv' if name == 'q' else 'qkvg'}.{leaf}"] = torch.cat(
                [first, joined.pop(f"{block}kv.{leaf}"), *gate]
            )
    return joined
