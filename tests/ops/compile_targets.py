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

from flash_bla.ops import triton_linear_attention as module
from flash_bla.ops import triton_piecewise_sparse as sparse
from flash_bla.ops import triton_support as support

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
    "focusing": dict(feature_map="focusing_power", exponent=3, parameter=True, weight=True),
    "signed": dict(feature_map="signed_power", parameter=True),
    "decoupled": dict(feature_map="identity", decoupled=True),
}


def problem(variant, dtype, D):
    B, H, N = 2, 3, 100
    variant = dict(variant)
    x = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
    decoupled = x(B, H, N, D, dtype=dtype) if variant.pop("decoupled", False) else None
    table = x(H, N, D // 2) if variant.pop("rope", False) else None
    weight = x(B, H, N) if variant.pop("weight", False) else None
    parameter = x(H, D) if variant.pop("parameter", False) else None
    options = dict(exponent=1, cu_seqlens=None, max_seqlen=N, normalize=True, scale=None, eps=1e-6) | variant
    q, k, v = x(B, N, 3, H, D, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
    return module._Problem(
        q=q, k=k, v=v, q_denominator=decoupled, k_denominator=decoupled, parameter=parameter, query_weight=weight,
        key_weight=weight, cos=table, sin=table, **options,
    )  # fmt: skip


def launches(module, run):
    """The arguments with which a function calls the kernels of a module."""
    calls = []
    call = module.call
    module.call = lambda kernel, grid, arguments, num_warps=4: calls.append((kernel, arguments, num_warps))
    try:
        run()
    finally:
        module.call = call
    return calls


def linear(variant, dtype, D):
    """Forward and backward pass of linear attention."""
    arguments = tuple(problem(variant, dtype, D))
    o, *saved = module.linear_attention_forward._init_fn(*arguments)
    module.linear_attention_backward._init_fn(o, *saved, True, *arguments)


def piecewise_sparse(dtype, D, block_size):
    q, k, v = torch.empty((2, 100, 3, 3, D), dtype=dtype, device="meta").permute(2, 0, 3, 1, 4).unbind(0)
    _, k_mean, v_mean, slope, _ = sparse.block_statistics._init_fn(q, k, v, block_size)
    chosen = torch.empty((*k_mean.shape[:3], 1), dtype=torch.int64, device="meta")
    sparse.attend._init_fn(q, k, v, k_mean, v_mean, slope, chosen, block_size, D**-0.5)


def kind(value):
    if isinstance(value, tuple):
        return tuple(kind(x) for x in value)
    return TYPES[value.dtype] if isinstance(value, torch.Tensor) else TYPES[type(value)]


def compile_launch(kernel, arguments, num_warps, target, precision):
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
            for j, stride in enumerate(value):
                if stride % 16 == 0:
                    aligned[(i, j)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=target, options=dict(num_warps=num_warps, num_stages=1))


def main(targets):
    # every variant at one width, then the other operand types and the widest heads where a kernel holds the most
    cases = [(label, torch.bfloat16, 32) for label in VARIANTS]
    cases += [(label, dtype, D) for label in ("plain", "signed")
              for dtype, D in ((torch.float16, 64), (torch.float32, 256))]  # fmt: skip
    runs = []
    for label, dtype, D in cases:
        runs.append((f"{label}, D={D}, {dtype}", dtype, module, partial(linear, VARIANTS[label], dtype, D)))
    for dtype, D, block in ((torch.bfloat16, 128, 64), (torch.float16, 64, 128), (torch.float32, 128, 64)):
        runs.append((f"blocks of {block}, D={D}, {dtype}", dtype, sparse, partial(piecewise_sparse, dtype, D, block)))
    for name in targets:
        target, limit = TARGETS[name]
        most, count = (0, ""), 0
        for label, dtype, where, run in runs:
            for kernel, arguments, num_warps in launches(where, run):
                precision = support.precision(dtype, hip=target.backend == "hip")
                shared = compile_launch(kernel, arguments, num_warps, target, precision).metadata.shared / 1024
                what = f"{kernel.__name__}, {label}"
                assert shared <= limit, f"{name}: {what} needs {shared:.0f} KiB of shared memory of {limit}"
                most, count = max(most, (shared, what)), count + 1
        print(f"{name}: {count} kernels, at most {most[0]:.0f} of {limit} KiB of shared memory ({most[1]})", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or TARGETS)
