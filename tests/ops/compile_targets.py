"""Compiles every kernel ahead of time, without a GPU, and checks the shared memory that it asks for.

    python -m tests.ops.compile_targets [target ...]

Run on its own (and by test_compile_targets.py), because it needs Triton without its interpreter.
"""

import sys
from functools import partial

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flash_bla.ops import feature_maps
from flash_bla.ops import triton_depthwise_conv as conv
from flash_bla.ops import triton_layer_norm as layer_norm
from flash_bla.ops import triton_linear_attention as module
from flash_bla.ops import triton_norm_ratios as ratios
from flash_bla.ops import triton_piecewise_sparse as sparse
from flash_bla.ops import triton_support as support
from flash_bla.ops import triton_tiles as tiles
from flash_bla.ops.triton_column_sums import column_sums

silu_gate = sys.modules["flash_bla.ops.silu_gate"]  # the package has a function of that name

# target and its shared memory per block, in KiB
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163),
    "sm_90": (GPUTarget("cuda", 90, 32), 227),
    "sm_100": (GPUTarget("cuda", 100, 32), 227),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64),
}
TYPES = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32",
    torch.uint8: "*u8", int: "i32", float: "fp32",
}  # fmt: skip
VARIANTS = {
    "plain": dict(feature_map="elu1"),
    "unnormalized": dict(feature_map="identity", normalize=False, scale=0.5),
    "relu, packed": dict(feature_map="relu", cu_seqlens=torch.empty(3, dtype=torch.int32, device="meta")),
    "rope, weight": dict(feature_map="elu1", rope=True, weight=True),
    "softmax": dict(feature_map="elu1", rope=True, softmax=True),
    "focusing": dict(feature_map="focusing_power", exponent=3, parameter=True),
    "signed": dict(feature_map="signed_power", parameter=True),
    "decoupled": dict(feature_map="identity", decoupled=True),
}

# Compiled for sm_90 alone: they hold no more than the others, and every target takes minutes.
OF_ONE_TARGET = ("unnormalized", "relu", "rope", "softmax", "focusing", "decoupled")


def problem(variant, dtype, D, N):
    B, H = 2, 3
    variant = dict(variant)
    x = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
    decoupled = x(B, H, N, D, dtype=dtype) if variant.pop("decoupled", False) else None
    table = (
        x(H, N, D // 2, 2, dtype=torch.float16 if dtype == torch.bfloat16 else torch.float32)
        if variant.pop("rope", False)
        else None
    )
    weight = x(B, H, N) if variant.pop("weight", False) else None
    parameter = x(H, D) if variant.pop("parameter", False) else None
    options = dict(cu_seqlens=None, max_seqlen=N, feature_map=None, exponent=1, normalize=True, scale=None, eps=1e-6,
                   softmax=False) | variant  # fmt: skip
    q, k, v = x(B, N, 3, H, D, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
    return module._Problem(q, k, v, decoupled, decoupled, parameter, weight, table, **options)


def launches(modules, run):
    """The arguments with which a function calls the kernels of modules."""
    calls = []
    call = support.call
    for where in modules:
        where.call = lambda kernel, grid, arguments, num_warps=4, **options: calls.append(
            (kernel, arguments, dict(num_warps=num_warps) | options)
        )
    try:
        run()
    finally:
        for where in modules:
            where.call = call
    return calls


def linear(variant, dtype, D, N):
    """Forward and backward pass of linear attention."""
    p = problem(variant, dtype, D, N)
    p = p._replace(v=p.v[..., : module.widest_values(p.q, p.signs)])
    o, *saved = module._forward(*p[:-1])
    module._backward(o, *saved, True, *p[:-1])


def piecewise_sparse(dtype, D, block_size):
    q, k, v = torch.empty((2, 100, 3, 3, D), dtype=dtype, device="meta").permute(2, 0, 3, 1, 4).unbind(0)
    _, k_mean, v_mean, slope, _ = sparse.block_statistics._init_fn(q, k, v, block_size, True)
    choice = sparse.choose._init_fn(k_mean @ k_mean.mT, 1, 100, block_size)
    sparse.attend._init_fn(q, k, v, k_mean, v_mean, slope, *choice, block_size, D**-0.5)


def depthwise_conv(dtype, D):
    """Forward and backward pass, with an activation, which brings every kernel."""
    x, weight = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((2, 56, D), (D, 1, 3, 3)))
    arguments = (x, weight, None, None, None, 7, 8, 1, False, "gelu", None)
    y = conv._forward(*arguments)
    conv._backward(y, [True, True, False, False, False], *arguments)


def around_attention(dtype, D):
    """Forward and backward pass of layer norm and gate, and the gradient of a bias."""
    x, weight = torch.empty((128, D), dtype=dtype, device="meta"), torch.empty(D, device="meta")
    layer_norm.layer_norm_forward(x, x, weight, weight, 1e-5, 0.01, dtype)
    layer_norm.layer_norm_backward(x, x, x, weight, weight, 1e-5, 0.01, True)
    silu_gate._launch(silu_gate.gate_kernel, dict(x_ptr=x, gate_ptr=x, y_ptr=x))
    silu_gate._launch(silu_gate.gate_gradient_kernel, dict(dy_ptr=x, x_ptr=x, gate_ptr=x, dx_ptr=x, d_gate_ptr=x))
    column_sums(x)


def kind(value):
    if isinstance(value, tuple):
        return tuple(kind(x) for x in value)
    return TYPES[value.dtype] if isinstance(value, torch.Tensor) else TYPES[type(value)]


def compile_launch(kernel, arguments, options, target, precision):
    if "PRECISION" in arguments and target.backend == "hip":
        arguments |= {"PRECISION": precision["PRECISION"]}
    signature, constants, aligned = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = kind(value)
        if isinstance(value, torch.Tensor):
            aligned[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, tuple):  # as the launcher does: strides of 1 are constants, multiples of 16 are known
            signature[parameter.name] = tuple("constexpr" if stride == 1 else kind(stride) for stride in value)
            for j, stride in enumerate(value):
                if stride == 1:
                    constants[(i, j)] = 1
                elif stride % 16 == 0:
                    aligned[(i, j)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = support.launch_options(**options, hip=target.backend == "hip")
    return triton.compile(source, target=target, options=options)


def main(targets):
    # every variant with split sequences, short ones, then other operand types and the widest heads
    cases = [(label, torch.bfloat16, 32, 5000) for label in VARIANTS]
    cases += [
        ("plain", torch.bfloat16, 64, 50),
        ("plain", torch.bfloat16, 64, 200),
        ("signed", torch.bfloat16, 64, 100),
    ]
    cases += [(label, dtype, D, 5000) for label in ("plain", "signed")
              for dtype, D in ((torch.float16, 64), (torch.float32, 256))]  # fmt: skip
    runs = []
    for label, dtype, D, N in cases:
        what = f"{label}, D={D}, N={N}, {dtype}"
        runs.append((what, dtype, (module, ratios), partial(linear, VARIANTS[label], dtype, D, N)))
    for dtype, D, block in ((torch.bfloat16, 128, 64), (torch.float16, 64, 128), (torch.float32, 128, 64)):
        what = f"blocks of {block}, D={D}, {dtype}"
        runs.append((what, dtype, (sparse,), partial(piecewise_sparse, dtype, D, block)))
    for run in (depthwise_conv, around_attention):
        runs.append((f"C=64, {torch.bfloat16}", torch.bfloat16, (support,), partial(run, torch.bfloat16, 64)))
    for name in targets:
        target, limit = TARGETS[name]
        # as an import on such a machine does
        hip = target.backend == "hip"
        feature_maps.fast_log2 = support.log2 if hip else support.fast_log2
        tiles.fast_rounded_positive_part = support.rounded_positive_part if hip else support.fast_rounded_positive_part
        most, count = (0, ""), 0
        for label, dtype, where, run in runs:
            if name != "sm_90" and label.split(",")[0] in OF_ONE_TARGET:
                continue
            for kernel, arguments, options in launches(where, run):
                precision = support.precision(dtype, hip=target.backend == "hip")
                shared = compile_launch(kernel, arguments, options, target, precision).metadata.shared / 1024
                what = f"{kernel.__name__}, {label}"
                assert shared <= limit, f"{name}: {what} needs {shared:.0f} KiB of shared memory of {limit}"
                most, count = max(most, (shared, what)), count + 1
        print(f"{name}: {count} kernels, at most {most[0]:.0f} of {limit} KiB of shared memory ({most[1]})", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or TARGETS)
