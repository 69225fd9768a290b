"""Which modules may be read instead of being called."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.module import _has_any_global_hook


def is_plain(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether a module is of a class itself, and not what another library has put in its place, and has no hooks.

    Nor a ``forward`` of its own, which Accelerate's hooks are; nor has it been compiled by itself.
    """
    return is_untouched(module, cls) and not _has_any_global_hook()


def is_untouched(module: nn.Module, cls: type[nn.Module]) -> bool:
    """``is_plain`` even if there are hooks for all modules, as of a counter of operations, which then do not see it."""
    return type(module) is cls and not (
        module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
        or "forward" in module.__dict__ or module._compiled_call_impl is not None
    )  # fmt: skip
