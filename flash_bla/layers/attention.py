"""The attentions by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from timm.layers import register_notrace_module
from torch import nn

from flash_bla.suggest import did_you_mean

_ATTENTIONS: dict[str, type[nn.Module]] = {}


def register_attention(name: str) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Class decorator that makes an attention available under a name, to ``create_attention`` and to every model.

    The class takes ``(dim, num_heads, *, device, dtype)`` and options of its own, and maps tokens ``(B, N, C)`` and a
    grid (H, W) to tokens ``(B, N, C)``, where the first N - H·W tokens are prefix tokens, without a place. Of what a
    backbone offers (``qkv_bias``, ``attn_drop``, ``proj_drop``, ``grid_size``) it declares what it has a use for. If it
    has a method ``set_grid_size``, models call it when their input size changes. torch.fx does not trace into it, so it
    may branch on shapes; with an attribute ``static_grid = True``, ``torch.compile`` makes a graph for each image size.

    Example:
        >>> @register_attention("mean")
        ... class MeanAttention(nn.Module):
        ...     def __init__(self, dim, num_heads=8, *, device=None, dtype=None):
        ...         super().__init__()
        ...         self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        ...
        ...     def forward(self, x, grid):
        ...         return self.proj(x.mean(dim=1, keepdim=True).expand_as(x))
    """

    def register(cls: type[nn.Module]) -> type[nn.Module]:
        known = _ATTENTIONS.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"attention {name!r} exists already: {known.__module__}.{known.__qualname__}")
        _ATTENTIONS[name] = register_notrace_module(cls)
        return cls

    return register


def create_attention(
    name: str, dim: int, num_heads: int, *, offer: Mapping[str, Any] | None = None, **options: Any
) -> nn.Module:
    """Creates an attention by its registered name.

    Args:
        name: ``"linear"``, ``"focused"``, ``"pola"``, ``"mlla"``, ``"rala"``, ``"rala_softmax"``, ``"softmax"``,
            ``"window"``, ``"cross_window"``, ``"focused_lepe"``, or a registered one.
        dim: Channels C.
        num_heads: Heads that share them.
        offer: Options that a backbone has for whichever attention it is given; those that this one lacks are left out.
        **options: Options that it must have.

    Raises:
        ValueError: An unknown name.
        TypeError: An option that the attention does not have.
    """
    wanted = attention_options(name)
    offered = {key: value for key, value in (offer or {}).items() if key in wanted}
    return _lookup(name)(dim, num_heads, **offered, **options)


def attention_options(name: str) -> set[str]:
    """Names of the options that an attention has, besides its width, heads, device and dtype."""
    return set(inspect.signature(_lookup(name)).parameters) - {"dim", "num_heads", "device", "dtype"}


def check_attention_args(names: Iterable[str], attention_args: Iterable[str]) -> None:
    """Raises a ValueError for an option that none of the named attentions has, as a backbone that mixes them must."""
    valid = set().union(*(attention_options(name) for name in names))
    for key in attention_args:
        if key not in valid:
            raise ValueError(f"no attention of this model has an option {key!r}{did_you_mean(key, valid)}")


def _lookup(name: str) -> type[nn.Module]:
    if name not in _ATTENTIONS:
        raise ValueError(f"no attention is called {name!r}{did_you_mean(name, _ATTENTIONS)}")
    return _ATTENTIONS[name]
