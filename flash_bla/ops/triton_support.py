"""Triton where it is installed, names that let the kernels' modules be imported where it is not, and launches."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    jit = triton.jit
    HAS_TRITON = True
except ImportError:
    from types import SimpleNamespace

    triton = None
    tl = SimpleNamespace(constexpr=None)
    HAS_TRITON = False

    def jit(function=None, **options):
        """Stands in for ``triton.jit``: the function stays, and nothing calls it."""
        return function if function is not None else jit


# Whether Triton's interpreter runs the kernels, on any device; Triton reads the variable when it is imported, too.
INTERPRETING = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"

# Lengths and counts are never specialised: a new sequence length compiles nothing.
NOT_SPECIALIZED = [
    "length", "query_length", "key_length", "heads", "splits", "query_splits", "blocks", "padded", "kept", "programs",
]  # fmt: skip


@jit
def log2(x):
    return tl.log2(x)


@jit
def rounded_positive_part(x, TYPE: tl.constexpr):
    """max(x, 0) in another type."""
    return tl.maximum(x, 0.0).to(TYPE)


@jit
def _rounded_positive_part_nvidia(x, TYPE: tl.constexpr):
    if TYPE == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "cvt.rn.relu.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        return tl.maximum(x, 0.0).to(TYPE)


# NVIDIA's own instructions: Triton's logarithm takes 31 to be right for denormal numbers, too, and two numbers take one
# to lose their negative part and be rounded
if HAS_TRITON and not INTERPRETING and torch.version.hip is None:
    fast_log2 = tl.extra.cuda.libdevice.fast_log2f
    fast_rounded_positive_part = _rounded_positive_part_nvidia
else:
    fast_log2 = log2
    fast_rounded_positive_part = rounded_positive_part


@jit
def tile_pointers(base, rows, columns, stride_row, stride_column):
    """Pointers to the elements of a tile."""
    # 64-bit, because a tensor may hold more than 2³¹ elements
    return base + rows.to(tl.int64)[:, None] * stride_row + columns.to(tl.int64)[None, :] * stride_column


def launch_options(
    num_warps: int, num_stages: int = 1, maxnreg: int | None = None, hip: bool = torch.version.hip is not None
) -> dict:
    """Options of a launch; pipelines need more shared memory than AMD has, and the limit of registers is NVIDIA's."""
    if hip:
        return dict(num_warps=num_warps, num_stages=1)
    return dict(num_warps=num_warps, num_stages=num_stages) | ({} if maxnreg is None else dict(maxnreg=maxnreg))


_COMPILED: dict[tuple, object] = {}


def call(
    kernel,
    grid: tuple[int, int, int],
    arguments: dict,
    num_warps: int = 4,
    num_stages: int = 1,
    maxnreg: int | None = None,
) -> None:
    """``kernel[grid](**arguments)``, without Triton's search for the compiled kernel where the same call came before.

    What Triton specialises on stands in the key: types, strides, whether pointers are multiples of 16, constants.
    """
    values = [arguments[name] for name in kernel.arg_names]
    if INTERPRETING:
        kernel[grid](*values)
        return
    device = next(x.device for x in values if isinstance(x, Tensor))
    key = (
        kernel,
        device,
        num_stages,
        *((x.dtype, x.data_ptr() % 16 == 0) if isinstance(x, Tensor) else x
          for name, x in zip(kernel.arg_names, values, strict=True) if name not in NOT_SPECIALIZED),
    )  # fmt: skip
    with torch.cuda.device(device):  # Triton launches on the current device
        compiled = _COMPILED.get(key)
        if compiled is not None:
            compiled[grid](*values)
            return
        if len(_COMPILED) > 4096:  # strides change with the length: images of ever new sizes must not fill the memory
            _COMPILED.clear()
        options = launch_options(num_warps, num_stages, maxnreg)
        _COMPILED[key] = kernel[grid](*values, **options)


def is_eager(x: Tensor) -> bool:
    """Whether nothing looks on that must see operators: tracing, a dispatch mode, a transform, a subclass of Tensor."""
    return not (
        torch.compiler.is_compiling() or type(x) is not Tensor or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
    )  # fmt: skip


class _Launch(NamedTuple):
    """All of a launch but its pointers, for tensors of certain shapes, strides and types."""

    kernel: object
    grid: tuple[int, int, int]
    values: list
    places: list[int]  # of the tensors among the values
    options: dict
    compiled: dict[tuple, object]  # the kernel, by which of the tensors are aligned

    def run(self, tensors: list[Tensor]) -> None:
        values = self.values.copy()
        for place, tensor in zip(self.places, tensors, strict=True):
            values[place] = tensor
        aligned = tuple([tensor.data_ptr() % 16 == 0 for tensor in tensors])
        compiled = self.compiled.get(aligned)
        device = tensors[0].device
        with nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device):
            if compiled is None:
                self.compiled[aligned] = self.kernel[self.grid](*values, **self.options)
            else:
                compiled[self.grid](*values)


_LAUNCHES: dict[tuple, _Launch] = {}


def launch(kernel, pointers: dict[str, Tensor | None], signature: tuple, describe: Callable) -> None:
    """Launches a kernel, as ``describe`` says: with a grid, a limit of registers, and arguments besides the pointers.

    They are asked for once for a signature (and the tensors' shapes, strides and types), because putting them together
    takes longer than many a kernel.
    """
    tensors = [x for x in pointers.values() if x is not None]
    device = tensors[0].device
    signature = (
        id(kernel), device,  # a kernel's own hash is slow
        *[id(x) if callable(x) else x for x in signature],
        *[None if x is None else (x.dtype, x.shape, x.stride()) for x in pointers.values()],
    )  # fmt: skip
    prepared = _LAUNCHES.get(signature)
    if prepared is not None:
        prepared.run(tensors)
        return
    grid, maxnreg, arguments = describe()
    if min(grid) == 0:
        return
    arguments |= pointers
    call(kernel, grid, arguments, maxnreg=maxnreg)
    if device.type == "cuda" and not INTERPRETING:
        if len(_LAUNCHES) > 4096:  # images of ever new sizes must not fill the memory
            _LAUNCHES.clear()
        values = [None if isinstance(arguments[name], Tensor) else arguments[name] for name in kernel.arg_names]
        places = [kernel.arg_names.index(name) for name, x in pointers.items() if x is not None]
        _LAUNCHES[signature] = _Launch(kernel, grid, values, places, launch_options(4, 1, maxnreg), {})


def precision(dtype: torch.dtype, hip: bool = torch.version.hip is not None) -> dict:
    """The type of the operands of matrix products that float16 would overflow in, and how float32 is multiplied."""
    if dtype == torch.bfloat16 and not INTERPRETING:  # the interpreter cannot multiply bfloat16
        return dict(OPERAND=tl.bfloat16, PRECISION="ieee")
    # three products of tf32 parts have the accuracy of float32; AMD has float32 products instead
    return dict(OPERAND=tl.float32, PRECISION="ieee" if hip else "tf32x3")


@lru_cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The least that is not below n."""
    return 1 << (n - 1).bit_length()
