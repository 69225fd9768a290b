"""Compiles every kernel ahead of time, without a GPU, and checks the shared memory that it asks for.

    python -m tests.ops.compile_targets [target ...]

Run on its own (and by test_compile_targets.py), because it needs Triton without its interpreter.
"""

import re
import sys
from functools import partial
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flash_bla.ops import feature_maps
from flash_bla.ops import triton_activations as activations
from flash_bla.ops import triton_depthwise_conv as conv
from flash_bla.ops import triton_focusing as focusing
from flash_bla.ops import triton_layer_norm as layer_norm
from flash_bla.ops import triton_linear_attention as module
from flash_bla.ops import triton_loops as loops
from flash_bla.ops import triton_norm_ratios as norm_ratios
from flash_bla.ops import triton_piecewise_sparse as sparse
from flash_bla.ops import triton_plain as plain
from flash_bla.ops import triton_polarity as polarity
from flash_bla.ops import triton_problem as problem
from flash_bla.ops import triton_rotary as rotary
from flash_bla.ops import triton_signed as signed
from flash_bla.ops import triton_single as single
from flash_bla.ops import triton_support as support
from flash_bla.ops import triton_tiles as tiles
from flash_bla.ops.triton_support import Record, cdiv
from flash_bla.ops.triton_tuning import widest_values

# target and its shared memory per block, in KiB
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163),
    "sm_90": (GPUTarget("cuda", 90, 32), 227),
    "sm_100": (GPUTarget("cuda", 100, 32), 227),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64),
}
TYPES = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32",
    torch.int16: "*i16", torch.uint8: "*u8", int: "i32", float: "fp32",
}  # fmt: skip
VARIANTS = {
    "plain": dict(feature_map="elu1"),
    "queries alone": dict(feature_map="elu1", keys=False),
    "unnormalized": dict(feature_map="identity", normalize=False, scale=0.5),
    "relu, packed": dict(feature_map="relu", cu_seqlens=torch.empty(3, dtype=torch.int32, device="meta")),
    "rope": dict(feature_map="elu1", rope=True),
    "rope, weight": dict(feature_map="elu1", rope=True, weight=True),
    "softmax": dict(feature_map="elu1", rope=True, softmax=True),
    "focusing": dict(feature_map="focusing_power", exponent=3, parameter=True, encoding=True),
    "focusing, one head": dict(feature_map="focusing_power", exponent=3, parameter=True, encoding=True, heads=1),
    "focusing tokens": dict(feature_map="focusing_power", exponent=3, parameter=True, encoding=True, heads=2),
    "signed": dict(feature_map="signed_power", parameter=True, encoding=True),
    "signed, few values": dict(feature_map="signed_power", parameter=True, values=32),
    "decoupled": dict(feature_map="identity", decoupled=True),
}

# What begins so is compiled for every target, which takes minutes: the largest of each kind of kernel. All others are
# for sm_90 alone.
OF_EVERY_TARGET = (
    "plain, D=64", "plain, D=256", "signed, D=64, N=200", "signed, D=64, N=5000", "signed, D=256",
    "focusing tokens, D=64", "rope, weight, D=256", "blocks", "C=64",
)  # fmt: skip


def linear(variant, dtype, D, N):
    """Forward and backward pass of linear attention."""
    variant = dict(variant)
    keys, D_v = variant.pop("keys", True), variant.pop("values", D)
    B, H = 2, variant.pop("heads", 3)
    x = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
    decoupled = x(B, H, N, D, dtype=dtype) if variant.pop("decoupled", False) else None
    half = torch.float16 if dtype == torch.bfloat16 else torch.float32
    rope = x(H, N, D // 2, 2, dtype=half) if variant.pop("rope", False) else None
    weight = x(B, H, N) if variant.pop("weight", False) else None
    encoding = x(N, H, D, dtype=dtype).transpose(0, 1) if variant.pop("encoding", False) else None
    parameter = x(H, D) if variant.pop("parameter", False) else None
    options = dict(max_seqlen=N, feature_map=None, exponent=1, normalize=True, scale=None, eps=1e-6, softmax=False)
    cu_seqlens = variant.pop("cu_seqlens", None)
    options = tuple((options | variant).values())
    q, k, v = x(B, N, 3, H, D, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
    v = v[..., : min(D_v, widest_values(q, 2 if variant["feature_map"] == "signed_power" else 1))]
    tensors = q, k, v, decoupled, decoupled, parameter, weight, encoding, rope, cu_seqlens
    ratios = x(B, 2, 2 * N) if variant["feature_map"] == "focusing_power" else None
    do = x(B, N, H, v.shape[3], dtype=dtype).transpose(1, 2)
    p = problem.Problem(None, q, k, v, *tensors[3:], *options)
    yield Record(module.record_forward, tensors, (options, True))
    state = p.saved_state()
    yield Record(module.record_backward, (do, state, ratios, *tensors), (options, keys))


def piecewise_sparse(dtype, D, block_size):
    x = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
    B, H, N = 2, 3, 100
    q, k, v = x(B, N, 3, H, D, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
    blocks = cdiv(N, block_size)
    padded = cdiv(blocks, sparse.PADDING) * sparse.PADDING
    mean, slope = x(B, H, padded, D, dtype=dtype), x(B, H, D, D, dtype=dtype)
    chosen, log_size = x(B, H, blocks, 1, dtype=torch.int32), x(B, H, blocks, padded)
    yield Record(sparse.record_statistics, (q, k, v), (block_size, True))
    yield Record(sparse.record_choice, (x(B, H, blocks, blocks),), (1, N, block_size))
    tensors = q, k, v, mean, mean, slope, x(B, H, 1, 1), chosen, log_size
    yield Record(sparse.record_attention, tensors, (block_size, D**-0.5))


def depthwise_conv(dtype, D):
    """Forward and backward pass, with an activation, which brings every kernel."""
    x, weight = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((2, 56, D), (D, 1, 3, 3)))
    options = 7, 8, 1, False, "gelu", None
    yield Record(conv.record_forward, (x, weight, None, None, None), options)
    needed = True, True, False, False, False
    yield Record(conv.record_backward, (x, x, weight, None, None, None, x, None), (needed, *options))


def around_attention(dtype, D):
    """Forward and backward pass of layer norm and activations, and the gradient of a bias."""
    x, weight = torch.empty((128, D), dtype=dtype, device="meta"), torch.empty(D, device="meta")
    yield Record(layer_norm.record_forward, (x, x, weight, weight), (1e-5, 0.01, dtype))
    yield Record(layer_norm.record_backward, (x, x, x, weight, weight), (1e-5, 0.01, True))
    for gate, factor in ((None, None), (x, weight)):
        yield Record(activations.record_operands, (x, gate, x, x[:, 0], factor), (dtype,))
        yield Record(activations.record_gradients, (x, x, x, gate), (gate is None, True))
    yield Record(activations.record_casts, (x, weight) * 4, (dtype,))
    yield Record(activations.record_mlp_gradients, (x, x, x), (True, True))
    yield Record(activations.record_sum, (x, x))
    yield Record(activations.scale_gradients, (x, weight, x, weight, weight))


def parameters_and_rotation(dtype, D):
    x = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
    B, N, H = 2, 100, 3
    scale, power, encoding = x(1, 1, H * D), x(1, H, 1, D), x(1, N, H * D)
    yield Record(polarity.record_parameters, (scale, power, encoding), (4.0,))
    gradients = x(4 * H * D), x(H, D), x(N, H, D).transpose(0, 1)
    yield Record(polarity.record_parameter_gradients, (*gradients, scale, power, encoding), (4.0,))
    heads, tokens, rope = x(B, H, N, D, dtype=dtype), x(B, N, H * D, dtype=dtype), x(1, N, D // 2, 2)
    yield Record(rotary.record_rotation, (x(B, N, 4, H, D, dtype=dtype), rope))
    yield Record(rotary.record_rotation_gradient, (heads, heads, heads, tokens, tokens, rope))


def kind(value):
    if isinstance(value, tuple):
        return tuple(kind(x) for x in value)
    return TYPES[value.dtype] if isinstance(value, torch.Tensor) else TYPES[type(value)]


def compile_launch(launch, target, precision):
    kernel, arguments = launch.kernel, dict(zip(launch.kernel.arg_names, launch.values, strict=True))
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
    options = support.launch_options(**launch.options, hip=target.backend == "hip", overlap=overlaps(target))
    return triton.compile(source, target=target, options=options)


def overlaps(target):
    return target.backend == "cuda" and target.arch >= 90


def check_wait(compiled, target, what):
    """A kernel that may start before the end of the one before waits for it before it touches memory."""
    pattern = r"griddepcontrol\.wait|\b(?:ld|st|atom|red|prefetch)[.\w:]*\.global|cp\.(?:async|reduce)"
    instructions = re.findall(pattern, compiled.asm["ptx"])
    if overlaps(target):
        assert instructions[0] == "griddepcontrol.wait", f"{what} touches memory before it waits"
    assert instructions.count("griddepcontrol.wait") == overlaps(target), what


def main(targets):
    # every variant with split sequences, short ones, then other operand types and the widest heads, with all that a
    # kernel can hold beside them
    cases = [(label, torch.bfloat16, 32, 5000) for label in VARIANTS]
    cases += [
        ("plain", torch.bfloat16, 32, 50),
        ("plain", torch.bfloat16, 64, 50),
        ("plain", torch.bfloat16, 64, 200),
        ("queries alone", torch.bfloat16, 64, 200),
        ("signed", torch.bfloat16, 64, 100),
        ("signed", torch.bfloat16, 64, 200),
        ("signed", torch.float32, 32, 5000),
        ("signed, few values", torch.bfloat16, 64, 200),
        ("rope", torch.bfloat16, 32, 100),
        ("focusing", torch.bfloat16, 64, 50),
        ("focusing", torch.bfloat16, 64, 200),
        ("focusing tokens", torch.bfloat16, 64, 5000),
        ("focusing", torch.bfloat16, 64, 5000),
        ("focusing, one head", torch.float16, 64, 5000),
        ("focusing, one head", torch.float32, 64, 5000),
        ("rope, weight", torch.bfloat16, 128, 5000),
        ("rope, weight", torch.bfloat16, 256, 20),
    ]
    cases += [(label, dtype, D, 5000) for label in ("plain", "signed")
              for dtype, D in ((torch.float16, 64), (torch.float32, 256))]  # fmt: skip
    runs = []
    for label, dtype, D, N in cases:
        what = f"{label}, D={D}, N={N}, {dtype}"
        runs.append((what, dtype, partial(linear, VARIANTS[label], dtype, D, N)))
    for dtype, D, block in ((torch.bfloat16, 128, 64), (torch.float16, 64, 128), (torch.float32, 128, 64)):
        what = f"blocks of {block}, D={D}, {dtype}"
        runs.append((what, dtype, partial(piecewise_sparse, dtype, D, block)))
    for run in (depthwise_conv, around_attention, parameters_and_rotation):
        runs.append((f"C=64, {torch.bfloat16}", torch.bfloat16, partial(run, torch.bfloat16, 64)))
    for name in targets:
        target, limit = TARGETS[name]
        # as an import on such a machine does
        hip = target.backend == "hip"
        triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda target=target: target))
        feature_maps.fast_log2 = support.log2 if hip else support.fast_log2
        feature_maps.fast_exp_to_one = support.exp_to_one if hip else support.fast_exp_to_one
        for maps in (feature_maps.TRITON_FEATURE_MAPS, feature_maps.LOOP_FEATURE_MAPS):
            elu1 = list(maps["elu1"])
            elu1[1] = feature_maps._rounded if hip else feature_maps._elu1_rounded_nvidia
            maps["elu1"] = tuple(elu1)
        problem.is_hopper = lambda device, hopper=name == "sm_90": hopper
        problem.has_products_in_registers = lambda device, has=name in ("sm_80", "sm_90"): has
        for kernels in (focusing, loops, norm_ratios, plain, signed, single, tiles):
            for fast in ("inverse", "positive", "rounded_parts", "to_float"):
                if hasattr(kernels, f"fast_{fast}"):
                    setattr(kernels, f"fast_{fast}", getattr(support, fast if hip else f"fast_{fast}"))
        signed.computed_here = support.same if hip else support.computed_here
        most, count = (0, ""), 0
        for label, dtype, run in runs:
            if name != "sm_90" and not label.startswith(OF_EVERY_TARGET):
                continue
            precision = support.precision(dtype, hip=hip)
            for launch in [launch for record in run() for launch in record.launches]:
                compiled = compile_launch(launch, target, precision)
                shared = compiled.metadata.shared / 1024
                what = f"{launch.kernel.__name__}, {label}"
                if target.backend == "cuda":
                    check_wait(compiled, target, f"{name}: {what}")
                assert shared <= limit, f"{name}: {what} needs {shared:.0f} KiB of shared memory of {limit}"
                most, count = max(most, (shared, what)), count + 1
        print(f"{name}: {count} kernels, at most {most[0]:.0f} of {limit} KiB of shared memory ({most[1]})", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or TARGETS)
