"""Triton where it is installed, names that let the kernels' modules be imported where it is not, and launches."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Sequence
from copy import copy
from functools import lru_cache
from typing import Any

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


META = torch.device("meta")
PLAIN = (Tensor, torch.nn.Parameter)  # and no subclass that stands for something else

# Whether Triton's interpreter runs the kernels, on any device; Triton reads the variable when it is imported, too.
INTERPRETING = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"

# Lengths and counts are never specialised: a new sequence length compiles nothing. (Of tuples, as of strides, Triton
# specialises all elements.)
NOT_SPECIALIZED = [
    "length", "query_length", "key_length", "heads", "splits", "query_splits", "blocks", "padded", "kept", "programs",
]  # fmt: skip


@jit
def log2(x):
    return tl.log2(x)


@jit
def rounded_parts(x, TYPE: tl.constexpr, MAGNITUDES: tl.constexpr):
    """max(x, 0) and min(x, 0) in another type, or the negative of the latter."""
    return tl.maximum(x, 0.0).to(TYPE), (tl.maximum(-x, 0.0) if MAGNITUDES else tl.minimum(x, 0.0)).to(TYPE)


@jit
def _rounded_parts_nvidia(x, TYPE: tl.constexpr, MAGNITUDES: tl.constexpr):
    if TYPE != tl.bfloat16:
        return rounded_parts(x, TYPE, MAGNITUDES)
    elif MAGNITUDES:
        return tl.inline_asm_elementwise(
            "{.reg .b32 x, z; mov.b32 z, 0; cvt.rn.bf16x2.f32 x, $3, $2; max.bf16x2 $0, x, z; min.bf16x2 x, x, z;"
            " neg.bf16x2 $1, x;}", "=r,=r,f,f", [x], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            "{.reg .b32 x, z; mov.b32 z, 0; cvt.rn.bf16x2.f32 x, $3, $2; max.bf16x2 $0, x, z; min.bf16x2 $1, x, z;}",
            "=r,=r,f,f", [x], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip


@jit
def exp_to_one(x):
    """min(eˣ, 1)"""
    return tl.exp2(tl.minimum(x * 1.4426950408889634, 0.0))


@jit
def _exp_to_one_nvidia(x):
    return tl.inline_asm_elementwise(
        "{.reg .f32 x; mul.f32 x, $1, 0f3FB8AA3B; ex2.approx.ftz.f32 x, x; add.sat.f32 $0, x, 0f00000000;}", "=f,f",
        [x], dtype=tl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@jit
def inverse(x):
    return 1.0 / x


@jit
def _inverse_nvidia(x):
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@jit
def same(x, other=None):
    return x


@jit
def _computed_here(x, zero):
    """x, which is not to be computed later: meanwhile all that it comes from would take registers.

    The store, which never happens, has to stay between its neighbours; ``zero`` is 0, which the compiler cannot know.
    """
    return tl.inline_asm_elementwise(
        "{.reg .pred p; setp.ne.s32 p, $2, 0; @p st.shared.f32 [$2], $1; mov.f32 $0, $1;}", "=f,f,r", [x, zero],
        dtype=tl.float32, is_pure=False, pack=1,
    )  # fmt: skip


@jit
def _anchored(x):
    """x of two bytes, by an instruction that the compiler does not repeat."""
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2)


@jit
def to_float(x):
    return x.to(tl.float32)


@jit
def _to_float_nvidia(x):
    if x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "{shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;}", "=r,=r,r", [x], dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return x.to(tl.float32)


@jit
def positive(x):
    """max(x, 0) in float32"""
    return tl.maximum(x.to(tl.float32), 0.0)


@jit
def _positive_nvidia(x):
    if x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "{.reg .b32 x; mov.b32 x, 0; max.bf16x2 x, x, $2; shl.b32 $0, x, 16; and.b32 $1, x, 0xffff0000;}",
            "=r,=r,r", [x], dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return tl.maximum(x.to(tl.float32), 0.0)


@jit
def _in_layout_of(x, y):
    """x in the registers where y is."""
    return tl.inline_asm_elementwise("mov.f32 $0, $1;", "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1)


@jit
def no_prefetch(pointer, strides, batch, head, first, count, D: tl.constexpr):
    pass


@jit
def _prefetch_nvidia(pointer, strides, batch, head, first, count, D: tl.constexpr):
    """Asks for a sequence's first 256 rows, of D neighbours of two bytes, to come to the L2 cache."""
    if count > 0:
        pointer += batch * strides[0] + head.to(tl.int64) * strides[1] + tl.cast(first, tl.int64) * strides[2]
        rows = tl.minimum(tl.arange(0, 256), count - 1).to(tl.int64)
        for line in tl.static_range(0, D, 64):
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [pointer + (rows * strides[2] + line)],
                dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip


# NVIDIA's own instructions: Triton's logarithm takes 31 to be right for denormal numbers, too, and two numbers are
# rounded by one and take one more each for their positive and their negative part
NVIDIA = HAS_TRITON and not INTERPRETING and torch.version.hip is None
if NVIDIA:
    fast_exp_to_one = _exp_to_one_nvidia
    fast_inverse = _inverse_nvidia
    fast_log2 = tl.extra.cuda.libdevice.fast_log2f
    fast_positive = _positive_nvidia
    fast_rounded_parts = _rounded_parts_nvidia
    computed_here = _computed_here
    anchored = _anchored
    fast_to_float = _to_float_nvidia
    in_layout_of = _in_layout_of
    prefetch_rows = _prefetch_nvidia
else:
    fast_exp_to_one = exp_to_one
    fast_inverse = inverse
    fast_log2 = log2
    fast_positive = positive
    fast_rounded_parts = rounded_parts
    computed_here = same
    anchored = same
    fast_to_float = to_float
    in_layout_of = same
    prefetch_rows = no_prefetch


@jit
def no_wait():
    pass


@jit
def _wait_nvidia():
    if tl.target_info.cuda_capability_geq(9, 0):
        tl.extra.cuda.gdc_wait()


# What every kernel begins with: from Hopper on, a launch starts while the one before it ends ("programmatic dependent
# launch"), and must neither read nor write until that has ended. As all wait, all before have ended then, too. A kernel
# could let the next one start even earlier; but the next one's programs would then be spread unevenly over the
# multiprocessors, and take some percent more, or a quarter where they loop over heads.
wait_for_inputs = _wait_nvidia if NVIDIA else no_wait


@jit
def tile_pointers(base, rows, columns, stride_row, stride_column):
    """Pointers to the elements of a tile."""
    # 64-bit, because a tensor may hold more than 2³¹ elements
    return base + rows.to(tl.int64)[:, None] * stride_row + columns.to(tl.int64)[None, :] * stride_column


@jit
def share(length, part, parts, BLOCK: tl.constexpr):
    """First row and end of one of so many parts of a sequence: whole blocks, spread evenly.

    Where there are more parts than blocks, some have none, and end before they begin.
    """
    blocks = tl.cdiv(length, BLOCK)
    each, more = blocks // parts, blocks % parts
    begin = part * each + tl.minimum(part, more)
    end = begin + each + tl.where(part < more, 1, 0)
    return begin * BLOCK, tl.minimum(end * BLOCK, length)


def launch_options(
    num_warps: int, num_stages: int = 1, maxnreg: int | None = None, hip: bool = torch.version.hip is not None,
    overlap: bool = False,
) -> dict:  # fmt: skip
    """Options of a launch; pipelines need more shared memory than AMD has, and the limit of registers is NVIDIA's.

    ``overlap`` is whether it starts before the end of the launch before it: see ``wait_for_inputs``.
    """
    if hip:
        return dict(num_warps=num_warps, num_stages=1)
    options = dict(num_warps=num_warps, num_stages=num_stages, launch_pdl=overlap)
    return options if maxnreg is None else options | dict(maxnreg=maxnreg)


def is_eager(x: Tensor) -> bool:
    """Whether nothing looks on that must see operators: tracing, a dispatch mode, a transform, a subclass of Tensor."""
    return not (
        torch.compiler.is_compiling() or type(x) not in PLAIN or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active() or torch._C._functorch.is_functorch_wrapped_tensor(x)
    )  # fmt: skip


def eager_function(cls: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """Decorates autograd functions of eager calls: they leave out what PyTorch does around them for transforms."""
    cls.apply = super(torch.autograd.Function, cls).apply
    cls._backward_cls.apply = once_differentiable(cls.backward)
    return cls


def once_differentiable(backward: Callable) -> Callable:
    """A backward pass that no graph is made of: its gradient is refused before it can be wrong.

    PyTorch's own decorator refuses what is asked of such a graph, but not where that goes by saved tensors, nor where
    autograd takes only the gradients of given inputs.
    """

    def checked(ctx, *gradients: Tensor | None):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "backend 'triton' has no second derivatives (create_graph=True); those of 'reference' are right"
            )
        return backward(ctx, *gradients)

    return checked


class Launch:
    """A kernel's call, ``kernel[grid](*values, **options)``."""

    def __init__(self, kernel, grid: tuple[int, int, int], values: list, options: dict) -> None:
        self.kernel, self.grid, self.options = kernel, grid, options
        self.values = values  # with meta tensors in the place of tensors
        self.pointers: list[tuple[int, int, int]] = []  # place among the values, tensor, bytes from its first element
        self.compiled = None  # kept: Triton unloads a kernel that nobody holds
        self.call: tuple[Callable, tuple, bool] | None = None  # see ``_compiled_call``

    def run(self, tensors: list[Tensor | None]) -> None:
        """The call on tensors, by Triton's own launch: it compiles the kernel where it must."""
        values = self.values.copy()
        for place, number, start in self.pointers:
            memory, x = tensors[number], values[place]
            memory = memory.view(x.dtype)  # which may be bytes
            start = memory.storage_offset() + start // x.element_size()
            values[place] = memory.as_strided(x.shape, x.stride(), start)
        if INTERPRETING:
            self.kernel[self.grid](*values)
        else:
            overlap = NVIDIA and torch.cuda.get_device_capability() >= (9, 0)
            options = launch_options(**self.options, overlap=overlap)
            self.compiled = self.kernel[self.grid](*values, **options)
            self.call = self.compiled and _compiled_call(self.compiled, self.grid, values)


def _compiled_call(compiled, grid: tuple[int, int, int], values: list) -> tuple[Callable, tuple, bool]:
    """What launches a compiled kernel on other values: ``call(*grid, stream, *others, *values)``.

    It is what Triton's launcher calls, a function in C, where the launcher does nothing else: that takes as long again.
    ``call`` and ``others``, and whether it takes the values as one sequence, as it does since Triton 3.7.
    """
    stream, calls = object(), []
    launcher = copy(compiled.run)
    others = compiled.function, compiled.packed_metadata, None, None, None  # no hooks
    if getattr(launcher, "global_scratch_size", 1) == 0 == getattr(launcher, "profile_scratch_size", 1):
        launcher.launch = lambda *arguments: calls.append(arguments)
        launcher(*grid, stream, *others, *values)
    same = lambda x, y: len(x) == len(y) and all(map(operator.is_, x, y))  # noqa: E731  tensors have no truth value
    if len(calls) == 1 and same(calls[0][:4], (*grid, stream)):
        (arguments,) = calls
        if same(arguments[-len(values) :], values):
            return compiled.run.launch, arguments[4 : -len(values)], False
        if isinstance(arguments[-1], tuple) and same(arguments[-1], values):
            return compiled.run.launch, arguments[4:-1], True
    return compiled.run, others, False


class Record:
    """What a function allocates and launches, for tensors of certain shapes, strides, types and alignments.

    The function runs once, with this object and meta tensors in the place of its inputs. It may make views of them, and
    asks here for memory and launches. It returns what it has allocated, whole and in any layout, or None. ``replay``
    then does the same for tensors, with pointers and no more: Python and PyTorch would take longer than many a kernel.
    """

    def __init__(
        self, function: Callable, tensors: Sequence[Tensor | None], options: tuple = (), device: torch.device = META
    ) -> None:
        self.device = device
        # what compiled models allocate with: in half the time of torch.empty_strided, on the current device
        self._empty = getattr(torch._C._dynamo.guards, f"_empty_strided_{device.type}", None)
        self.launches: list[Launch] = []
        self._copies: list[tuple[Tensor, Tensor]] = []  # of which input
        self._memory: list[tuple[Tensor, bool]] = []  # whether it is to be zero
        inputs = [
            None if x is None else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=META) for x in tensors
        ]
        self._last: dict[Callable, list] = {}
        outputs = function(self, *inputs, *options)
        for last, items in self._last.items():
            last(self, items)
        self._is_tuple = isinstance(outputs, tuple)
        self._lay_out(inputs, outputs if self._is_tuple else (outputs,))

    def new_empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        self._memory.append((torch.empty(shape, dtype=dtype, device=META), False))
        return self._memory[-1][0]

    def new_zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        self._memory.append((torch.empty(shape, dtype=dtype, device=META), True))
        return self._memory[-1][0]

    def contiguous(self, x: Tensor | None) -> Tensor | None:
        """An input, or a contiguous copy of it."""
        if x is None or x.is_contiguous():
            return x
        assert not x._is_view()
        self._copies.append((x, torch.empty(x.shape, dtype=x.dtype, device=META)))
        return self._copies[-1][1]

    def launch(
        self,
        kernel,
        grid: tuple[int, int, int],
        arguments: dict,
        num_warps: int = 4,
        num_stages: int = 1,
        maxnreg: int | None = None,
    ) -> None:
        """``kernel[grid](**arguments)``, of those that the kernel has."""
        if min(grid) > 0:
            options = dict(num_warps=num_warps, num_stages=num_stages, maxnreg=maxnreg)
            self.launches.append(Launch(kernel, grid, [arguments[name] for name in kernel.arg_names], options))

    def at_end(self, function: Callable, item: Any) -> None:
        """Calls ``function(record, items)`` when all else is recorded, once for all items that it is given."""
        self._last.setdefault(function, []).append(item)

    def _lay_out(self, inputs: list[Tensor | None], outputs: tuple[Tensor | None, ...]) -> None:
        """Numbers all tensors: inputs, copies, outputs and zeros, then one allocation for what else there is."""
        views = {_storage(x): x for x in outputs if x is not None}
        own = [(views.get(_storage(x), x), zero) for x, zero in self._memory if zero or _storage(x) in views]
        tensors = [*inputs, *(copy for _, copy in self._copies), *(x for x, _ in own)]
        places = {_storage(x): (i, 0) for i, x in enumerate(tensors) if x is not None}
        scratch = 0  # bytes
        for x, _ in self._memory:
            if _storage(x) not in places:
                places[_storage(x)] = len(tensors), scratch
                scratch += cdiv(max(x.numel(), 1) * x.element_size(), 256) * 256
        for launch in self.launches:
            for place, x in enumerate(launch.values):
                if isinstance(x, Tensor):
                    number, start = places[_storage(x)]
                    launch.pointers.append((place, number, start + x.storage_offset() * x.element_size()))
        self._sources = [places[_storage(x)][0] for x, _ in self._copies]
        self._sizes = [(tuple(x.shape), x.stride(), x.dtype) for x, _ in own]
        if scratch:
            self._sizes.append(((scratch,), (1,), torch.uint8))
        self._zeros = [places[_storage(x)][0] for x, zero in own if zero]
        self._results = [None if x is None else places[_storage(x)][0] for x in outputs]

    def replay(self, tensors: list[Tensor | None], pointers: list[int]) -> Any:
        """Does it all for inputs and their addresses, and returns what the function returns; appends to both lists."""
        for i in self._sources:
            tensors.append(tensors[i].contiguous())
            pointers.append(tensors[-1].data_ptr())
        for size in self._sizes:
            x = self._empty(*size)
            tensors.append(x)
            pointers.append(x.data_ptr())
        for i in self._zeros:
            tensors[i].zero_()
        if INTERPRETING:
            for launch in self.launches:
                launch.run(tensors)
        else:
            self._launch(tensors, pointers)
        if self._is_tuple:
            return tuple([None if i is None else tensors[i] for i in self._results])
        return tensors[self._results[0]]

    def _launch(self, tensors: list[Tensor | None], pointers: list[int]) -> None:
        stream = torch._C._cuda_getCurrentRawStream(self.device.index)
        runtime = triton.knobs.runtime
        hooked = runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls  # a profiler wants to see launches
        for launch in self.launches:
            if launch.call is None or hooked:
                launch.run(tensors)
                continue
            values = launch.values.copy()
            for place, number, start in launch.pointers:
                values[place] = pointers[number] + start
            call, others, together = launch.call
            if together:
                call(*launch.grid, stream, *others, values)
            else:
                call(*launch.grid, stream, *others, *values)


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


_RECORDS: dict[tuple, Record] = {}


def run(
    function: Callable, tensors: Sequence[Tensor | None], options: tuple = (), check: Callable | None = None
) -> Any:
    """What ``function(record, *tensors, *options)`` returns: see ``Record``.

    All tensors must be on one device. ``check(*tensors, *options)`` raises an error for what cannot be; it is called
    where no such tensors and options were met before.
    """
    try:
        pointers = [0 if x is None else x.data_ptr() for x in tensors]
    except AttributeError:  # what is no tensor
        if check is not None:
            check(*tensors, *options)
        raise
    kinds = [None if x is None else (x.dtype, x.shape, x.stride(), device := x.get_device()) for x in tensors]
    signature = (function, options, *kinds, *[pointer & 15 for pointer in pointers])
    record = _RECORDS.get(signature)
    if record is None:
        if check is not None:
            check(*tensors, *options)
        if len(_RECORDS) >= 4096:  # images of ever new sizes must not fill the memory
            _RECORDS.clear()
        place = next(x.device for x in tensors if x is not None)
        record = _RECORDS[signature] = Record(function, tensors, options, place)
    if INTERPRETING or device == torch._C._cuda_getDevice():
        return record.replay(list(tensors), pointers)
    with torch.cuda.device(device):  # where memory comes from, and Triton launches
        return record.replay(list(tensors), pointers)


def as_outputs(tensors: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """An operator's outputs are tensors: one that is None has no elements."""
    return tuple(like.new_empty(0) if x is None else x for x in tensors)


def define_operator(
    schema: str, function: Callable, fake: Callable, backward: Callable | None = None, setup: Callable | None = None
) -> torch._ops.OpOverload:
    """Defines an operator of ``torch.library``, which calls the function at once, unlike what ``custom_op`` makes."""
    name, arguments = " ".join(schema.split()).split("(", 1)
    qualified = f"flash_bla::{name}"
    torch.library.define(qualified, f"({arguments}", tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(qualified, "default", function)
    torch.library.register_fake(qualified, fake)
    if backward is not None:
        torch.library.register_autograd(qualified, once_differentiable(backward), setup_context=setup)
    return getattr(torch.ops.flash_bla, name).default


def precision(dtype: torch.dtype, hip: bool = torch.version.hip is not None) -> dict:
    """The type of the operands of matrix products that float16 would overflow in, and how float32 is multiplied."""
    if dtype == torch.bfloat16 and not INTERPRETING:  # the interpreter cannot multiply bfloat16
        return dict(OPERAND=tl.bfloat16, PRECISION="ieee")
    # three products of tf32 parts have the accuracy of float32; AMD has float32 products instead
    return dict(OPERAND=tl.float32, PRECISION="ieee" if hip else "tf32x3")


@lru_cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@lru_cache
def is_hopper(device: torch.device) -> bool:
    """Whether the kernels are tuned as for such a chip; the interpreter runs what it would."""
    if INTERPRETING:
        return True
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


@lru_cache
def has_products_in_registers(device: torch.device) -> bool:
    """Whether threads have a product's result as triton_order.py says: not on AMD's chips, nor from Blackwell on."""
    if INTERPRETING:
        return True
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] < 10


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def padded(n: int) -> int:
    """The length of rows of n numbers, whose strides and addresses are then multiples of 16, whatever n is."""
    return 16 * cdiv(n, 16)


def power_of_two(n: int) -> int:
    """The least that is not below n."""
    return 1 << (n - 1).bit_length()
