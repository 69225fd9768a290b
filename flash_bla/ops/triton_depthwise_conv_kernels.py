"""Depthwise convolution on tokens in Triton: the kernels.

Tokens of a grid are an image with its channels last. A thread holds a few neighbouring channels of a strip of COLUMNS
columns and walks down its rows. It reads a row once, with the columns that stand out on both sides, and adds it to all
the rows of the target that it reaches, K of which are under way at a time: (COLUMNS + K - 1) / COLUMNS loads an output
and not K². A program is STRIPS such strips, side by side, on BLOCK_C channels.

Inputs and outputs are of one type; filters, sums and the filters' gradients are float32. Those gradients are sums in a
fixed order: within a program, then over the programs.
"""

from __future__ import annotations

from flash_bla.ops.triton_support import jit, tl, wait_for_inputs

# --- activations ------------------------------------------------------------------------------------------------------


@jit
def _identity(z):
    return z


@jit
def _one(z):
    return 1.0


@jit
def _relu(z):
    return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)


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
def _begin(values, zero, COUNT: tl.constexpr, STRIPS: tl.constexpr):
    """Sums to begin with: the values, if there are any, or zeros."""
    if len(values) == 0:
        return _fill(zero, COUNT, STRIPS)
    else:
        return _apply(_identity, values)


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
    wait_for_inputs()
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
    K: tl.constexpr, STRIDE: tl.constexpr, RESIDUAL: tl.constexpr, ADD: tl.constexpr, INPUT: tl.constexpr,
    INPUT_DERIVATIVE: tl.constexpr, COLUMNS: tl.constexpr, STRIPS: tl.constexpr, BLOCK_C: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """From the gradient of z (the source) that of x (the target), and shares of those of the filters and of the bias.

    With ``ADD`` that of x is added to what is there. partial (programs, K² + 1, C) takes the shares, the bias's last.
    """
    wait_for_inputs()
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
        raw, xs, queue, sums = (), (), (), ()
        for r in tl.static_range(K - STRIDE):
            row = begin * STRIDE + (r - PAD)
            raw += _load_row(x_ptr, x_strides, strips, left, row, first, last, out_width, COLUMNS, 0)
            if ADD:
                sums += _load_row(dx_ptr, dx_strides, strips, left, row, first, last, out_width, COLUMNS, 0)
        # of the K rows of x, the values that meet dz and, with an activation of the input, its slopes
        values, slopes = _apply(INPUT, raw), ()
        if INPUT_DERIVATIVE is not None:
            slopes = _apply(INPUT_DERIVATIVE, raw)
        for ahead in tl.static_range(AHEAD):
            step = begin + ahead
            queue += _load_row(dz_ptr, dz_strides, strips, left // STRIDE, step, 0, bottom, width, WIDTH, BEFORE)
            xs += _load_rows(x_ptr, x_strides, strips, left, step, first, last, out_width, K, STRIDE, COLUMNS, 0)
        if ADD:
            sums += _load_rows(dx_ptr, dx_strides, strips, left, begin, first, last, out_width, K, STRIDE, COLUMNS, 0)
        sums = _begin(sums, zero, K * COLUMNS, STRIPS)
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
                new = ()
                if ADD:
                    new = _load_rows(
                        dx_ptr, dx_strides, strips, left, step + 1, first, last, out_width, K, STRIDE, COLUMNS, 0
                    )
                for r in tl.static_range(STRIDE):
                    done = sums[r * COLUMNS : r * COLUMNS + COLUMNS]
                    _store_row(dx_ptr, dx_strides, strips, done, step * STRIDE + (r - PAD), first, last, out_width)
                sums = sums[STRIDE * COLUMNS :] + _begin(new, zero, STRIDE * COLUMNS, STRIPS)
    if partial_ptr is not None:
        for tap in tl.static_range(K * K + 1):
            at = (program.to(tl.int64) * (K * K + 1) + tap) * channels + c
            tl.store(partial_ptr + at, tl.sum(d_taps[tap], 0), mask=exists)
