"""Depthwise convolution on tokens in Triton: the kernels, their launches, and the torch.library operators over them.

Tokens of a grid are an image with its channels last. A thread holds a few neighbouring channels of a strip of COLUMNS
columns and walks down its rows. It reads a row once, with the columns that stand out on both sides, and adds it to all
the rows of the target that it reaches, K of which are under way at a time: (COLUMNS + K - 1) / COLUMNS loads an output
and not K². A program is STRIPS such strips, side by side, on BLOCK_C channels.

Inputs and outputs are of one type; filters, sums and the filters' gradients are float32. Those gradients are sums in a
fixed order: within a program, then over the programs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from flash_bla.ops.triton_support import cdiv, is_eager, jit, launch, multiprocessors, tl

# --- activations ------------------------------------------------------------------------------------------------------


@jit
def _identity(z):
    return z


@jit
def _one(z):
    return 1.0


@jit
def _relu(z):
    return tl.maximum(z, 0.0)


@jit
def _relu_derivative(z):
    return tl.where(z > 0.0, 1.0, 0.0)


@jit
def _reciprocal(x):
    root = tl.rsqrt(x)  # two instructions; a division has eight
    return root * root


@jit
def _sigmoid(z):
    return _reciprocal(1.0 + tl.exp2(-1.4426950408889634 * z))


@jit
def _silu(z):
    return z * _sigmoid(z)


@jit
def _silu_derivative(z):
    s = _sigmoid(z)
    return s + z * s * (1.0 - s)


@jit
def _normal_tail(z):
    """The normal distribution's tail beyond |z| (Abramowitz and Stegun 7.1.26, within 1e-7), and exp(-z²/2)."""
    exponential = tl.exp2(-0.7213475204444817 * z * z)
    t = _reciprocal(1.0 + 0.2316418882663604 * tl.abs(z))
    tail = 0.7107068705 + t * (-0.7265760135 + t * 0.5307027145)
    return t * (0.127414796 + t * (-0.142248368 + t * tail)) * exponential, exponential


@jit
def _gelu(z):
    return tl.maximum(z, 0.0) - tl.abs(z) * _normal_tail(z)[0]


@jit
def _gelu_derivative(z):
    tail, exponential = _normal_tail(z)
    return tl.where(z < 0.0, tail, 1.0 - tail) + 0.3989422804014327 * z * exponential


# name: (value, derivative)
ACTIVATIONS = {
    None: (_identity, _one),
    "relu": (_relu, _relu_derivative),
    "silu": (_silu, _silu_derivative),
    "gelu": (_gelu, _gelu_derivative),
}

# --- kernels ----------------------------------------------------------------------------------------------------------
# A source of height x width tokens becomes a target of out_height x out_width. Strides come as pairs in the order
# (batch, token). TRANSPOSED is the convolution's transpose: it takes gradients of outputs to gradients of inputs.

SIZES = ["images", "height", "width", "out_height", "out_width", "depth"]


@jit
def _channels(channels, filters, BLOCK_C: tl.constexpr):
    """A program's channels, which of them exist, their filters; and which of the programs on these channels it is."""
    # programs side by side take the channels of the same tokens: memory likes long runs
    blocks = tl.cdiv(channels, BLOCK_C)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    return c, c < channels, c % filters, tl.program_id(0) // blocks


@jit
def _fill(value, COUNT: tl.constexpr, STRIPS: tl.constexpr):
    values = ()
    for _ in tl.static_range(COUNT):
        values += (tl.broadcast_to(value[None, :], (STRIPS, value.shape[0])),)
    return values


@jit
def _apply(function: tl.constexpr, values):
    results = ()
    for i in tl.static_range(len(values)):
        results += (function(values[i].to(tl.float32)),)
    return results


@jit
def _multiply(values, factors):
    products = ()
    for i in tl.static_range(len(values)):
        products += (values[i] * factors[i],)
    return products


@jit
def _load_taps(filters_ptr, f, exists, K: tl.constexpr, RESIDUAL: tl.constexpr, STRIPS: tl.constexpr):
    taps = ()
    for tap in tl.static_range(K * K):
        weight = tl.load(filters_ptr + f * (K * K) + tap, mask=exists, other=0.0).to(tl.float32)
        if RESIDUAL and tap == K * K // 2:
            weight += 1.0
        taps += _fill(weight, 1, STRIPS)
    return taps


@jit
def _strips(group, images, out_width, c, exists, COLUMNS: tl.constexpr, STRIPS: tl.constexpr):
    """Where the strips of a group stand: their images, left columns and channels, and which of these exist."""
    per_image = tl.cdiv(out_width, COLUMNS)
    strip = group * STRIPS + tl.arange(0, STRIPS)
    image = strip // per_image
    inside = (image < images)[:, None] & exists[None, :]
    # 64-bit, because a tensor may hold more than 2³¹ elements
    return image.to(tl.int64)[:, None], (strip % per_image * COLUMNS)[:, None], c[None, :], inside


@jit
def _place(base, strides, strips, column, row, first, last, width):
    """Pointers to the strips' elements of a row, which must lie from first to last; and which of them exist."""
    image, left, c, inside = strips
    pointers = base + image * strides[0] + column.to(tl.int64) * strides[1] + c + row.to(tl.int64) * width * strides[1]
    rows = tl.zeros_like(left) + row  # the interpreter takes no masks made of scalars
    return pointers, inside & (rows >= first) & (rows < last)


@jit
def _load_row(
    base, strides, strips, column, row, first, last, width, COUNT: tl.constexpr, BEFORE: tl.constexpr
):  # fmt: skip
    """COUNT tokens of a row, from BEFORE before the column on; zeros beyond the image and outside of first to last."""
    values = ()
    if base is not None:
        pointers, inside = _place(base, strides, strips, column, row, first, last, width)
        for j in tl.static_range(COUNT):
            if j < BEFORE:  # what lies before the column can only be beyond the left border, the rest beyond the right
                mask = inside & (column + (j - BEFORE) >= 0)
            else:
                mask = inside & (column + (j - BEFORE) < width)
            values += (tl.load(pointers + (j - BEFORE) * strides[1], mask=mask, other=0.0),)
    return values


@jit
def _load_rows(
    base, strides, strips, column, step, first, last, width,
    K: tl.constexpr, STRIDE: tl.constexpr, COUNT: tl.constexpr, BEFORE: tl.constexpr,
):  # fmt: skip
    """The rows that come in reach with a step, the last STRIDE of the K around row step · STRIDE."""
    values = ()
    for r in tl.static_range(K - STRIDE, K):
        values += _load_row(base, strides, strips, column, step * STRIDE + (r - K // 2), first, last, width, COUNT,
                            BEFORE)  # fmt: skip
    return values


@jit
def _store_row(base, strides, strips, values, row, first, last, width):
    if base is not None:
        left = strips[1]
        pointers, inside = _place(base, strides, strips, left, row, first, last, width)
        for q in tl.static_range(len(values)):
            value = values[q].to(base.dtype.element_ty)
            tl.store(pointers + q * strides[1], value, mask=inside & (left + q < width))


@jit
def _convolve(
    lines, taps, sums, K: tl.constexpr, STRIDE: tl.constexpr, TRANSPOSED: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Adds what comes in reach with a step to the rows of the target that are under way, the oldest one first.

    That is STRIDE rows of the source, and one when TRANSPOSED.
    """
    LINES: tl.constexpr = 1 if TRANSPOSED else STRIDE
    ROWS: tl.constexpr = K if TRANSPOSED else (K - 1) // STRIDE + 1
    WIDTH: tl.constexpr = len(lines) // LINES
    # along a row, the source's token j and the target's q meet in the tap U j + V q + T
    U: tl.constexpr = -STRIDE if TRANSPOSED else 1
    V: tl.constexpr = 1 if TRANSPOSED else -STRIDE
    T: tl.constexpr = K // 2 + STRIDE * (K // 2 // STRIDE) if TRANSPOSED else 0
    for s in tl.static_range(LINES):
        for r in tl.static_range(ROWS):
            if TRANSPOSED or K - STRIDE + s - STRIDE * r >= 0:
                for q in tl.static_range(COLUMNS):
                    total = sums[r * COLUMNS + q]
                    for b in tl.static_range(K):
                        if (b - V * q - T) % U == 0:
                            tap = taps[(r if TRANSPOSED else K - STRIDE + s - STRIDE * r) * K + b]
                            total = tl.fma(lines[s * WIDTH + (b - V * q - T) // U], tap, total)
                    sums = sums[: r * COLUMNS + q] + (total,) + sums[r * COLUMNS + q + 1 :]
    return sums


@jit
def _correlate(line, values, d_taps, counts, K: tl.constexpr, STRIDE: tl.constexpr, COLUMNS: tl.constexpr):
    """Adds to each tap's gradient the products of what meets in it, of a line of dz and K rows of x.

    Last comes the bias's, to which the elements of dz are added if the line ``counts`` (1.0, else 0.0).
    """
    T: tl.constexpr = K // 2 + STRIDE * (K // 2 // STRIDE)
    sums = ()
    for r in tl.static_range(K):
        for b in tl.static_range(K):
            total = d_taps[r * K + b]
            for q in tl.static_range(COLUMNS):
                if (q + T - b) % STRIDE == 0:
                    total = tl.fma(line[(q + T - b) // STRIDE], values[r * COLUMNS + q], total)
            sums += (total,)
    total = d_taps[K * K]
    for q in tl.static_range(0, COLUMNS, STRIDE):
        total = tl.fma(line[q // STRIDE + K // 2 // STRIDE], counts, total)
    return sums + (total,)


@jit(do_not_specialize=SIZES)
def forward_kernel(
    x_ptr, x_strides, filters_ptr, bias_ptr, add_ptr, add_strides, gate_ptr, gate_strides, y_ptr, y_strides,
    dy_ptr, dy_strides, d_add_ptr, d_add_strides, d_gate_ptr, d_gate_strides,
    images, height, width, out_height, out_width, channels, filters, depth,
    K: tl.constexpr, STRIDE: tl.constexpr, RESIDUAL: tl.constexpr, INPUT: tl.constexpr,
    ACTIVATION: tl.constexpr, DERIVATIVE: tl.constexpr,
    COLUMNS: tl.constexpr, STRIPS: tl.constexpr, BLOCK_C: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """y = (add + activation(z)) · gate with z = input(x) ⋆ filters + bias, on ``depth`` rows of the target.

    With dy, the gradient of y, instead the gradients: that of z in y's place, and those of add and gate.
    """
    PAD: tl.constexpr = K // 2
    WIDTH: tl.constexpr = (COLUMNS - 1) * STRIDE + K
    UNDER_WAY: tl.constexpr = (K - 1) // STRIDE  # rows of the target besides the one that a step completes
    c, exists, f, program = _channels(channels, filters, BLOCK_C)
    taps = _load_taps(filters_ptr, f, exists, K, RESIDUAL, STRIPS)
    bias = tl.zeros((BLOCK_C,), tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + f, mask=exists, other=0.0).to(tl.float32)
    start = _fill(bias, COLUMNS, STRIPS)
    segments = tl.cdiv(out_height, depth)
    strips = _strips(program // segments, images, out_width, c, exists, COLUMNS, STRIPS)
    left = strips[1]
    first = program % segments * depth
    last = tl.minimum(first + depth, out_height)

    # Steps from the first one that brings a row in reach of the first. What they read is asked for AHEAD steps before,
    # so that memory has time to answer.
    begin = tl.maximum(first - UNDER_WAY, -(PAD // STRIDE))
    bottom = tl.minimum((last - 1) * STRIDE + PAD + 1, height)
    sums = start * (UNDER_WAY + 1)
    queue, adds, gates, dys = (), (), (), ()
    for ahead in tl.static_range(AHEAD):
        step = begin + ahead
        queue += _load_rows(x_ptr, x_strides, strips, left * STRIDE, step, 0, bottom, width, K, STRIDE, WIDTH, PAD)
        adds += _load_row(add_ptr, add_strides, strips, left, step, first, last, out_width, COLUMNS, 0)
        gates += _load_row(gate_ptr, gate_strides, strips, left, step, first, last, out_width, COLUMNS, 0)
        dys += _load_row(dy_ptr, dy_strides, strips, left, step, first, last, out_width, COLUMNS, 0)
    for steps in range(begin, last, AHEAD):
        for ahead in tl.static_range(AHEAD):  # as many as the queue is long, so that its places keep their registers
            step = steps + ahead
            sums = _convolve(_apply(INPUT, queue[: STRIDE * WIDTH]), taps, sums, K, STRIDE, False, COLUMNS)
            ys, d_adds, d_gates = (), (), ()
            for q in tl.static_range(COLUMNS):
                value = ACTIVATION(sums[q])
                if add_ptr is not None:
                    value += adds[q].to(tl.float32)
                if dy_ptr is None:
                    if gate_ptr is not None:
                        value *= gates[q].to(tl.float32)
                    ys += (value,)
                else:
                    gradient = dys[q].to(tl.float32)
                    d_gates += (gradient * value,)
                    if gate_ptr is not None:
                        gradient *= gates[q].to(tl.float32)
                    d_adds += (gradient,)
                    ys += (gradient * DERIVATIVE(sums[q]),)
            sums = sums[COLUMNS:] + start

            then = step + AHEAD
            queue = queue[STRIDE * WIDTH :] + _load_rows(
                x_ptr, x_strides, strips, left * STRIDE, then, 0, bottom, width, K, STRIDE, WIDTH, PAD
            )
            row = _load_row(add_ptr, add_strides, strips, left, then, first, last, out_width, COLUMNS, 0)
            adds = adds[len(row) :] + row
            row = _load_row(gate_ptr, gate_strides, strips, left, then, first, last, out_width, COLUMNS, 0)
            gates = gates[len(row) :] + row
            row = _load_row(dy_ptr, dy_strides, strips, left, then, first, last, out_width, COLUMNS, 0)
            dys = dys[len(row) :] + row
            _store_row(y_ptr, y_strides, strips, ys, step, first, last, out_width)
            _store_row(d_add_ptr, d_add_strides, strips, d_adds, step, first, last, out_width)
            _store_row(d_gate_ptr, d_gate_strides, strips, d_gates, step, first, last, out_width)


@jit(do_not_specialize=SIZES)
def gradient_kernel(
    dz_ptr, dz_strides, x_ptr, x_strides, filters_ptr, dx_ptr, dx_strides, partial_ptr,
    images, height, width, out_height, out_width, channels, filters, depth,
    K: tl.constexpr, STRIDE: tl.constexpr, RESIDUAL: tl.constexpr, INPUT: tl.constexpr, INPUT_DERIVATIVE: tl.constexpr,
    COLUMNS: tl.constexpr, STRIPS: tl.constexpr, BLOCK_C: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """From the gradient of z (the source) that of x (the target), and shares of those of the filters and of the bias.

    partial (programs, K² + 1, C) takes the shares, the bias's last.
    """
    PAD: tl.constexpr = K // 2
    BEFORE: tl.constexpr = PAD // STRIDE
    WIDTH: tl.constexpr = (COLUMNS - 1 + PAD) // STRIDE + BEFORE + 1
    c, exists, f, program = _channels(channels, filters, BLOCK_C)
    zero = tl.zeros((BLOCK_C,), tl.float32)
    taps, d_taps = (), ()
    if dx_ptr is not None:
        taps = _load_taps(filters_ptr, f, exists, K, RESIDUAL, STRIPS)
    if partial_ptr is not None:
        d_taps = _fill(zero, K * K + 1, STRIPS)
    segments = tl.cdiv(out_height, depth)
    units = tl.cdiv(images * tl.cdiv(out_width, COLUMNS), STRIPS) * segments
    for unit in range(program, units, tl.num_programs(0) // tl.cdiv(channels, BLOCK_C)):
        strips = _strips(unit // segments, images, out_width, c, exists, COLUMNS, STRIPS)
        left = strips[1]
        first = unit % segments * depth
        last = tl.minimum(first + depth, out_height)

        # a step's row of dz meets the K rows of x and dx around step · STRIDE, and completes the first STRIDE of them
        begin = (tl.maximum(first - PAD, 0) + STRIDE - 1) // STRIDE
        end = (last - 1 + PAD) // STRIDE + 1
        bottom = tl.minimum(end, height)
        sums = _fill(zero, K * COLUMNS, STRIPS)
        raw, xs, queue = (), (), ()
        for r in tl.static_range(K - STRIDE):
            row = begin * STRIDE + (r - PAD)
            raw += _load_row(x_ptr, x_strides, strips, left, row, first, last, out_width, COLUMNS, 0)
        # of the K rows of x, the values that meet dz and, with an activation of the input, its slopes
        values, slopes = _apply(INPUT, raw), ()
        if INPUT_DERIVATIVE is not None:
            slopes = _apply(INPUT_DERIVATIVE, raw)
        for ahead in tl.static_range(AHEAD):
            step = begin + ahead
            queue += _load_row(dz_ptr, dz_strides, strips, left // STRIDE, step, 0, bottom, width, WIDTH, BEFORE)
            xs += _load_rows(x_ptr, x_strides, strips, left, step, first, last, out_width, K, STRIDE, COLUMNS, 0)
        for steps in range(begin, end, AHEAD):
            for ahead in tl.static_range(AHEAD):
                step = steps + ahead
                line = _apply(_identity, queue[:WIDTH])
                if partial_ptr is not None:
                    values += _apply(INPUT, xs[: STRIDE * COLUMNS])
                    # of the programs that read an element of dz, that one counts it which has its place in x
                    counts = tl.where((step * STRIDE >= first) & (step * STRIDE < last), 1.0, 0.0)
                    d_taps = _correlate(line, values, d_taps, counts, K, STRIDE, COLUMNS)
                    values = values[STRIDE * COLUMNS :]
                if dx_ptr is not None:
                    sums = _convolve(line, taps, sums, K, STRIDE, True, COLUMNS)
                    if INPUT_DERIVATIVE is not None:
                        slopes += _apply(INPUT_DERIVATIVE, xs[: STRIDE * COLUMNS])
                        sums = _multiply(sums[: STRIDE * COLUMNS], slopes) + sums[STRIDE * COLUMNS :]
                        slopes = slopes[STRIDE * COLUMNS :]

                then = step + AHEAD
                queue = queue[WIDTH:] + _load_row(
                    dz_ptr, dz_strides, strips, left // STRIDE, then, 0, bottom, width, WIDTH, BEFORE
                )
                rows = _load_rows(x_ptr, x_strides, strips, left, then, first, last, out_width, K, STRIDE, COLUMNS, 0)
                xs = xs[len(rows) :] + rows
                for r in tl.static_range(STRIDE):
                    done = sums[r * COLUMNS : r * COLUMNS + COLUMNS]
                    _store_row(dx_ptr, dx_strides, strips, done, step * STRIDE + (r - PAD), first, last, out_width)
                sums = sums[STRIDE * COLUMNS :] + _fill(zero, STRIDE * COLUMNS, STRIPS)
    if partial_ptr is not None:
        for tap in tl.static_range(K * K + 1):
            at = (program.to(tl.int64) * (K * K + 1) + tap) * channels + c
            tl.store(partial_ptr + at, tl.sum(d_taps[tap], 0), mask=exists)


@jit(do_not_specialize=["rows", "heads"])
def reduce_kernel(
    partial_ptr, d_weight_ptr, d_bias_ptr, rows, heads, filters,
    TAPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Adds up the programs' and the heads' shares of one tap, or of the bias, always in the same order."""
    tap = tl.program_id(0)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    total = tl.zeros((BLOCK_N, BLOCK_F), tl.float32)
    for start in range(0, rows, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        at = ((n // heads * (TAPS + 1) + tap) * heads + n % heads)[:, None] * filters + f[None, :]
        total += tl.load(partial_ptr + at, mask=(n < rows)[:, None] & (f < filters)[None, :], other=0.0)
    total = tl.sum(total, 0)
    if tap < TAPS:
        if d_weight_ptr is not None:
            tl.store(d_weight_ptr + f * TAPS + tap, total.to(d_weight_ptr.dtype.element_ty), mask=f < filters)
    else:
        if d_bias_ptr is not None:
            tl.store(d_bias_ptr + f, total.to(d_bias_ptr.dtype.element_ty), mask=f < filters)


# --- launches ---------------------------------------------------------------------------------------------------------


class _Blocks(NamedTuple):
    """How a launch is cut."""

    columns: int  # of a strip
    depth: int  # rows that a program walks down
    block_c: int
    strips: int
    programs: int  # on a block of channels
    ahead: int
    places: int  # for programs on a block of channels at a time


@lru_cache(maxsize=1024)
def _blocks(
    images: int, height: int, width: int, channels: int, kernel_size: int, resident: int, device: torch.device
) -> _Blocks:
    """For a target of height x width, where so many programs are resident on a multiprocessor at a time."""
    columns, ahead = (4, 2) if kernel_size < 7 else (2, 1)  # as the registers allow
    # whole lines of 128 bytes in half precision, unless narrower blocks waste fewer channels; a thread holds two
    block_c = min((64, 32, 16), key=lambda block: cdiv(channels, block) * block)
    strips = 256 // block_c
    groups = cdiv(images * cdiv(width, columns), strips)
    places = resident * multiprocessors(device)

    def duration(segments: int) -> int:
        """In rows: each segment reads K - 1 rows of its neighbours again, and starting takes as long as some rows."""
        programs = groups * cdiv(channels, block_c) * segments
        return cdiv(programs, places) * (cdiv(height, segments) + kernel_size + 3)

    depth = cdiv(height, min(range(1, max(1, height // kernel_size) + 1), key=duration))
    places = max(1, places // cdiv(channels, block_c))
    return _Blocks(columns, depth, block_c, strips, groups * cdiv(height, depth), ahead, places)


class _Image(NamedTuple):
    """Tokens that stand on a grid, and what they are convolved with."""

    tokens: slice | None  # which ones; None for all
    height: int
    width: int
    filters: Tensor  # (number of filters, K²)
    bias: Tensor | None

    @property
    def kernel_size(self) -> int:
        return math.isqrt(self.filters.shape[1])


def _images(x: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int) -> list[_Image]:
    """The tokens on the grid; and the prefix tokens, a row of an image whose only tap is zero."""
    prefix = x.shape[1] - height * width
    filters = weight.flatten(1).contiguous()
    bias = None if bias is None else bias.contiguous()
    if not prefix:
        return [_Image(None, height, width, filters, bias)]
    no_filters = filters.new_zeros((filters.shape[0], 1))
    return [
        _Image(slice(prefix, None), height, width, filters, bias),
        _Image(slice(prefix), 1, prefix, no_filters, None),
    ]


def _launch_on(
    image: _Image, kernel, resident: int, maxnreg: int | None, source: tuple[int, int], target: tuple[int, int],
    tensors: dict[str, Tensor | None], pointers: dict[str, Tensor | None], programs: int | None = None, **options,
) -> None:  # fmt: skip
    """Runs a kernel over an image, from a source to a target of these heights and widths."""
    if image.tokens is not None:
        tensors = {name: None if x is None else x[:, image.tokens] for name, x in tensors.items()}

    def describe() -> tuple:
        images, _, channels = next(x for x in tensors.values() if x is not None).shape
        blocks = _blocks(images, *target, channels, image.kernel_size, resident, image.filters.device)
        arguments = dict(
            images=images, height=source[0], width=source[1], out_height=target[0], out_width=target[1],
            channels=channels, filters=image.filters.shape[0], depth=blocks.depth, K=image.kernel_size,
            COLUMNS=blocks.columns, STRIPS=blocks.strips, BLOCK_C=blocks.block_c, AHEAD=blocks.ahead, **options,
        )  # fmt: skip
        for name, x in tensors.items():
            arguments[f"{name}_strides"] = (0, 0) if x is None else x.stride()[:2]
        count = blocks.programs if programs is None else programs
        return (count * cdiv(channels, blocks.block_c), 1, 1), maxnreg, arguments

    pointers = pointers | {f"{name}_ptr": x for name, x in tensors.items()}
    launch(kernel, pointers, (source, target, *options.values()), describe)


def _rows(x: Tensor | None) -> Tensor | None:
    """x with neighbouring channels side by side in memory."""
    return x if x is None or x.stride(2) == 1 else x.contiguous()


def _output_size(height: int, width: int, stride: int) -> tuple[int, int]:
    return cdiv(height, stride), cdiv(width, stride)


# --- operators --------------------------------------------------------------------------------------------------------


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, gate: Tensor | None,
    height: int, width: int, stride: int, residual: bool, activation: str | None, input_activation: str | None,
) -> Tensor:  # fmt: skip
    x, add, gate = _rows(x), _rows(add), _rows(gate)
    y = _empty_output(x, height, width, stride)
    for image in _images(x, weight, bias, height, width):
        tensors = dict(x=x, y=y, add=add, gate=gate, dy=None, d_add=None, d_gate=None)
        _launch_forward(image, tensors, stride, residual, activation, input_activation)
    return y


def _launch_forward(
    image: _Image, tensors: dict, stride: int, residual: bool, activation: str | None, input_activation: str | None
) -> None:
    source = image.height, image.width
    value, derivative = ACTIVATIONS[activation]
    _launch_on(
        image, forward_kernel, 5 if image.kernel_size * stride <= 3 else 3, None, source, _output_size(*source, stride),
        tensors, {"filters_ptr": image.filters, "bias_ptr": image.bias}, STRIDE=stride, RESIDUAL=residual,
        INPUT=ACTIVATIONS[input_activation][0], ACTIVATION=value, DERIVATIVE=derivative,
    )  # fmt: skip


depthwise_conv_forward = torch.library.custom_op("flash_bla::depthwise_conv_forward", _forward, mutates_args=())


@depthwise_conv_forward.register_fake
def _(x, weight, bias, add, gate, height, width, stride, *_):
    return _empty_output(x, height, width, stride)


def _empty_output(x: Tensor, height: int, width: int, stride: int) -> Tensor:
    B, N, C = x.shape
    out_height, out_width = _output_size(height, width, stride)
    return x.new_empty((B, N - height * width + out_height * out_width, C))


def _backward(
    dy: Tensor, needed: Sequence[bool],
    x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, gate: Tensor | None,
    height: int, width: int, stride: int, residual: bool, activation: str | None, input_activation: str | None,
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of the first five inputs of the forward operator, None for what is not needed.

    So is that of ``add`` without ``gate``: it is dy.
    """
    dy, x, add, gate = _rows(dy), _rows(x), _rows(add), _rows(gate)
    gradients = _empty_gradients(needed, dy, x, weight, bias, gate)
    dx, d_weight, d_bias, d_add, d_gate = gradients
    of_filters = d_weight is not None or d_bias is not None
    dz = dy
    if activation is not None or gate is not None:
        dz = None
        if activation is None and d_add is not None:
            dz, d_add = d_add, None
        elif dx is not None or of_filters:
            dz = torch.empty_like(dy, memory_format=torch.contiguous_format)
    sloped = dx is not None and input_activation is not None
    of_input, of_input_derivative = ACTIVATIONS[input_activation]
    for image in _images(x, weight, bias, height, width):
        if dz is not dy:
            tensors = dict(x=x, y=dz, add=add, gate=gate, dy=dy, d_add=d_add, d_gate=d_gate)
            _launch_forward(image, tensors, stride, residual, activation, input_activation)
        k = image.kernel_size
        of_filters = of_filters and k > 1
        if dx is None and not of_filters:
            continue
        # more programs at a time, if that many registers are enough
        resident, maxnreg = (2, None) if k > 5 or sloped or (k == 5 and dx is not None and of_filters) else (3, 168)
        source = image.height, image.width
        partial = programs = None
        if of_filters:
            images, _, channels = x.shape
            blocks = _blocks(images, *source, channels, k, resident, x.device)
            # each goes on until all is done: there are fewer shares to add
            programs = min(blocks.programs, blocks.places)
            partial = x.new_empty((programs, k * k + 1, channels), dtype=torch.float32)
        tensors = dict(dz=dz, x=x if of_filters or sloped else None, dx=dx)
        _launch_on(
            image, gradient_kernel, resident, maxnreg, _output_size(*source, stride), source, tensors,
            {"filters_ptr": image.filters, "partial_ptr": partial}, programs, STRIDE=stride, RESIDUAL=residual,
            INPUT=of_input, INPUT_DERIVATIVE=of_input_derivative if sloped else None,
        )  # fmt: skip
        if of_filters:
            _reduce(partial, d_weight, d_bias, weight)
    return gradients


def _reduce(partial: Tensor, d_weight: Tensor | None, d_bias: Tensor | None, weight: Tensor) -> None:
    programs, rows, channels = partial.shape
    filters = weight.shape[0]

    def describe() -> tuple:
        heads, block = channels // filters, 32
        arguments = dict(rows=programs * heads, heads=heads, filters=filters, TAPS=rows - 1, BLOCK_N=128, BLOCK_F=block)
        return (rows, cdiv(filters, block), 1), None, arguments

    pointers = {"partial_ptr": partial, "d_weight_ptr": d_weight, "d_bias_ptr": d_bias}
    launch(reduce_kernel, pointers, (filters,), describe)


def _empty_gradients(
    needed: Sequence[bool], dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None
) -> list[Tensor | None]:
    # those of add and gate are computed only where there is a gate
    like = x, weight, bias, None if gate is None else dy, None if gate is None else dy
    return [
        torch.empty(y.shape, dtype=y.dtype, device=y.device) if need and y is not None else None
        for y, need in zip(like, needed, strict=True)
    ]


def _as_outputs(gradients: Sequence[Tensor | None], dy: Tensor) -> tuple[Tensor, ...]:
    """An operator's outputs are tensors: one that is None has no elements."""
    return tuple(dy.new_empty(0) if g is None else g for g in gradients)


@torch.library.custom_op("flash_bla::depthwise_conv_backward", mutates_args=())
def depthwise_conv_backward(
    dy: Tensor, needed: list[bool],
    x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, gate: Tensor | None,
    height: int, width: int, stride: int, residual: bool, activation: str | None, input_activation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    inputs = x, weight, bias, add, gate, height, width, stride, residual, activation, input_activation
    return _as_outputs(_backward(dy, needed, *inputs), dy)


@depthwise_conv_backward.register_fake
def _(dy, needed, x, weight, bias, add, gate, *_):
    return _as_outputs(_empty_gradients(needed, dy, x, weight, bias, gate), dy)


def _setup_context(ctx, inputs, output):
    x, weight, bias, add, gate, *ctx.options = inputs
    ctx.save_for_backward(x, weight, bias, add if gate is not None else None, gate)


def _differentiate(ctx, dy, backward=depthwise_conv_backward):
    needed = list(ctx.needs_input_grad[:5])
    gradients = backward(dy, needed, *ctx.saved_tensors, *ctx.options)
    dx, d_weight, d_bias, d_add, d_gate = (g if need else None for g, need in zip(gradients, needed, strict=True))
    if ctx.saved_tensors[4] is None and needed[3]:
        d_add = dy
    return dx, d_weight, d_bias, d_add, d_gate, *[None] * len(ctx.options)


depthwise_conv_forward.register_autograd(_differentiate, setup_context=_setup_context)


class _Eager(torch.autograd.Function):
    """The operators' work without their dispatcher, which takes longer than small maps' kernels."""

    @staticmethod
    def forward(ctx, *inputs):
        y = _forward(*inputs)
        _setup_context(ctx, inputs, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return _differentiate(ctx, dy, backward=_backward)


def depthwise_conv(x: Tensor, *arguments) -> Tensor:
    """The operator on checked arguments, those of ``depthwise_conv_reference``."""
    return (_Eager.apply if is_eager(x) else depthwise_conv_forward)(x, *arguments)


@register_flop_formula(torch.ops.flash_bla.depthwise_conv_forward)
def _forward_flops(x_shape, weight_shape, bias_shape, add_shape, gate_shape, height, width, stride, *_, **__) -> int:
    """Operations of the convolution, for ``torch.utils.flop_counter``."""
    out_height, out_width = _output_size(height, width, stride)
    return 2 * x_shape[0] * out_height * out_width * x_shape[2] * weight_shape[2] ** 2


@register_flop_formula(torch.ops.flash_bla.depthwise_conv_backward)
def _backward_flops(dy_shape, needed, *arguments, **_) -> int:
    return (needed[0] + needed[1]) * _forward_flops(*arguments)
