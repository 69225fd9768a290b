"""What the public functions share: the checks of their tensors, autocast and the choice of a backend."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flash_bla.ops.triton_support import HAS_TRITON, INTERPRETING
from flash_bla.tracing import is_exporting

BACKENDS = ("reference", "triton")
_CAST = (torch.float16, torch.bfloat16, torch.float32)  # what autocast casts
DTYPES = (*_CAST, torch.float64)


def choose_backend(backend: str | None, q: Tensor) -> str:
    backend = backend or os.environ.get("FLASH_BLA_BACKEND") or None
    if backend not in (None, *BACKENDS):
        raise ValueError(f"backend (or FLASH_BLA_BACKEND) must be one of {BACKENDS}, got {backend!r}")
    if is_exporting():
        return "reference"  # an exported program must run where this package is not installed
    # The kernels have neither derivatives. When the former changes, torch.compile sees it by itself (from some version
    # after 2.11 on); the latter it cannot trace.
    transformed = forward_ad._current_level >= 0 or _has_gradient_transform()
    if backend is None:
        may_run = HAS_TRITON and q.is_cuda and q.dtype != torch.float64 and not transformed
        return "triton" if may_run else "reference"
    if backend == "triton":
        if not HAS_TRITON:
            raise ValueError("backend 'triton' was asked for, but Triton is not installed")
        if transformed:
            raise ValueError(
                "backend 'triton' has no forward-mode derivatives, nor those of torch.func.grad; "
                "those of 'reference' are right"
            )
        if q.dtype == torch.float64:
            raise TypeError("backend 'triton' takes float16, bfloat16 or float32; float64 is for the reference")
        if not (q.is_cuda or q.is_meta or INTERPRETING):
            raise ValueError(
                f"backend 'triton' needs CUDA tensors (or TRITON_INTERPRET=1), got tensors on {q.device.type}"
            )
    return backend


@torch.compiler.assume_constant_result
def _has_gradient_transform() -> bool:
    """Whether ``torch.func`` differentiates what is called."""
    if not torch._C._are_functorch_transforms_active():
        return False
    kinds = (torch._C._functorch.TransformType.Grad, torch._C._functorch.TransformType.Jvp)
    return any(transform.key() in kinds for transform in torch._C._functorch.get_interpreter_stack())


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in autocast's type, where it is on."""
    first = tensors[0]
    if not isinstance(first, Tensor) or not is_autocast(first):
        return tensors
    dtype = torch.get_autocast_dtype(_kind(first))
    return tuple([x if x is None or x.dtype == dtype or x.dtype not in _CAST else x.to(dtype) for x in tensors])


def is_autocast(x: Tensor) -> bool:
    return not x.is_meta and torch.is_autocast_enabled(_kind(x))  # meta tensors know no autocast


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Autocast's type where it is on, else that of x."""
    return torch.get_autocast_dtype(_kind(x)) if is_autocast(x) else x.dtype


def _kind(x: Tensor) -> str:
    """The type of its device."""
    return "cuda" if x.is_cuda else x.device.type  # the first takes a tenth of the second's time


def convert(x: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    """x in a type; ``Tensor.to`` takes time even where there is nothing to do."""
    return x if x is None or x.dtype == dtype else x.to(dtype)


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Where operations on x and its like keep their types."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def check_tensors(tensors: dict[str, Tensor], shape: str, ndim: int) -> None:
    first_name, first = next(iter(tensors.items()))
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor of shape {shape}, got {type(x).__name__}")
        check_dtype(name, x)
        if x.ndim != ndim:
            raise ValueError(f"{name} must have {ndim} dimensions {shape}, got {tuple(x.shape)}")
        if x.dtype != first.dtype:
            raise TypeError(f"{name} must have the dtype of {first_name}, {first.dtype}, got {x.dtype}")
        check_device(name, x, first)


def unpack(q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, ...]:
    """q, k and v ``(B, H, N, D)``, of which the first may hold the next, as ``(B, N, 2 or more, H, D)``."""
    return (q, k, v) if q.ndim == 4 else (*q.permute(2, 0, 3, 1, 4).unbind(0), v)[:3]


def unpack_gate(q: Tensor) -> Tensor | None:
    """The gate ``(B, N, H·D)`` that a packed q may hold behind the values."""
    return q[:, :, 3].flatten(2) if q.ndim == 5 and q.shape[2] == 4 else None


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """``(B, N, H·D)`` to ``(B, H, N, D)``, a view."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """``(B, H, N, D)`` to ``(B, N, H·D)``."""
    return x.transpose(1, 2).flatten(2)


def check_dtype(name: str, x: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")


def check_device(name: str, x: Tensor, like: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like the other tensors, got {x.device}")


def expect(name: str, x: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must have shape {meaning}, here {shape}, got {tuple(x.shape)}")
