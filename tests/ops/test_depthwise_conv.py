"""Depthwise convolution on tokens: reference and kernels against ``F.conv2d`` in float64."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from flash_bla.ops import depthwise_conv, triton_depthwise_conv
from flash_bla.ops.triton_support import HAS_TRITON, INTERPRETING
from tests.ops.cases import DEVICE, TOLERANCE

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
BACKENDS = ["reference", pytest.param("triton", marks=needs_triton)]


@dataclass(frozen=True)
class Case:
    """One call, on inputs of this shape."""

    batch: int
    grid: tuple[int, int]
    dim: int
    kernel_size: int = 3
    heads: int = 1
    prefix: int = 0
    stride: int = 1
    residual: bool = False
    input_activation: str | None = None
    activation: str | None = None
    bias: bool = True
    add: bool = False
    gate: bool = False

    @property
    def options(self) -> dict:
        return dict(stride=self.stride, residual=self.residual, activation=self.activation,
                    input_activation=self.input_activation)  # fmt: skip

    @property
    def output_tokens(self) -> int:
        return self.prefix + -(-self.grid[0] // self.stride) * -(-self.grid[1] // self.stride)


CASES = {
    "3x3": Case(1, (5, 6), 24),
    "5x5": Case(1, (6, 5), 8, 5),
    "7x7": Case(1, (3, 4), 8, 7),
    "one token": Case(1, (1, 1), 8, bias=False),
    "one row": Case(1, (1, 9), 8, 5),
    "one column": Case(1, (7, 1), 8),
    "blocks of channels": Case(1, (1, 3), 40),
    "whole blocks of channels": Case(1, (1, 3), 96),
    "groups of strips": Case(3, (2, 25), 16),
    "segments of rows": Case(1, (7, 2), 8),
    "residual": Case(1, (4, 5), 8, prefix=2, residual=True),
    "silu": Case(1, (3, 6), 8, prefix=1, activation="silu"),
    "gelu": Case(1, (3, 6), 8, activation="gelu"),
    "gelu before": Case(1, (3, 6), 8, prefix=1, residual=True, input_activation="gelu"),
    "relu around": Case(2, (5, 6), 8, stride=2, input_activation="relu", activation="relu"),
    "silu before": Case(1, (3, 5), 8, 5, input_activation="silu", activation="gelu", gate=True),
    "add": Case(2, (2, 3), 24, add=True),
    "gate": Case(1, (4, 3), 8, bias=False, gate=True),
    "add, gate, heads": Case(1, (3, 4), 24, 5, heads=3, prefix=1, add=True, gate=True),
    "everything": Case(1, (3, 4), 16, heads=2, prefix=2, residual=True, activation="silu", add=True, gate=True),
    "stride 2": Case(2, (5, 7), 8, stride=2),
    "stride 2, even": Case(1, (4, 6), 8, 5, stride=2, activation="gelu", add=True, gate=True),
    "stride 2, segments": Case(1, (12, 3), 8, stride=2),
}
# small, for what needs several calls
SMALL = Case(1, (1, 2), 8, activation="silu", add=True, gate=True)
# for half precision; the other cases are for float32 alone, to be quick to interpret or compile
HALF_PRECISION = ["3x3", "gate"]


def make_inputs(case: Case, dtype: torch.dtype):
    """Leaves, of which x, add and gate are views of one projection, and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE)  # noqa: E731
    B, C, channels, k = case.batch, case.dim, case.dim // case.heads, case.kernel_size
    x = randn(B, case.prefix + case.grid[0] * case.grid[1], 3 * C).to(dtype)
    leaves = {"x": x[..., C : 2 * C], "weight": randn(channels, 1, k, k) / k}
    if case.bias:
        leaves["bias"] = randn(channels)
    add, gate, dy = randn(B, case.output_tokens, 3 * C).to(dtype).chunk(3, dim=-1)
    return leaves | {name: y for name, y in (("add", add), ("gate", gate)) if getattr(case, name)}, dy


def call(leaves: dict, case: Case, **options):
    return depthwise_conv(leaves["x"], case.grid, leaves["weight"], leaves.get("bias"), add=leaves.get("add"),
                          gate=leaves.get("gate"), **case.options, **options)  # fmt: skip


def by_conv2d(leaves: dict, case: Case):
    """What the function stands for, written for images."""
    x, heads = leaves["x"], case.heads
    if case.input_activation is not None:
        x = getattr(F, case.input_activation)(x)
    bias = leaves["bias"].repeat(heads) if case.bias else None
    image = x[:, case.prefix :].transpose(1, 2).unflatten(2, case.grid)
    image = F.conv2d(image, leaves["weight"].repeat(heads, 1, 1, 1), bias, case.stride, case.kernel_size // 2,
                     groups=case.dim)  # fmt: skip
    y = torch.cat([torch.zeros_like(x[:, : case.prefix]), image.flatten(2).transpose(1, 2)], dim=1)
    if case.residual:
        y = x + y
    if case.activation == "relu":
        y = y.clamp(min=0)
    if case.activation == "silu":
        y = y * y.sigmoid()
    if case.activation == "gelu":
        y = 0.5 * y * (1 + torch.erf(y / 2**0.5))
    if case.add:
        y = leaves["add"] + y
    return y * leaves["gate"] if case.gate else y


def forward_backward(function, case: Case, inputs, dtype: torch.dtype | None = None, **options):
    leaves, dy = inputs
    leaves = {name: (x.detach() if dtype is None else x.to(dtype)).requires_grad_() for name, x in leaves.items()}
    y = function(leaves, case, **options)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"y": y.detach()} | {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}


def assert_close(results: dict, expected: dict, tolerance: float) -> None:
    assert results.keys() == expected.keys()
    for name, want in expected.items():
        assert results[name].shape == want.shape
        error = (results[name].double() - want).norm() / want.norm()
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in CASES for dtype in TOLERANCE if dtype == torch.float32 or name in HALF_PRECISION],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_conv2d(backend, name, dtype):
    case = CASES[name]
    inputs = make_inputs(case, dtype)
    expected = forward_backward(by_conv2d, case, inputs, torch.float64)
    results = forward_backward(call, case, inputs, backend=backend)
    assert all(x.dtype == (torch.float32 if name in ("dweight", "dbias") else dtype) for name, x in results.items())
    assert_close(results, expected, TOLERANCE[dtype])


def test_gradients_of_the_reference():
    case = Case(1, (2, 3), 4, heads=2, prefix=1, residual=True, activation="gelu", add=True, gate=True)
    leaves, _ = make_inputs(case, torch.float64)
    leaves = {name: x.double().requires_grad_() for name, x in leaves.items()}
    assert torch.autograd.gradcheck(
        lambda *values: call(dict(zip(leaves, values, strict=True)), case), [*leaves.values()]
    )


@needs_triton
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_activations_far_from_zero(activation):
    """Values and derivatives of all magnitudes, through a filter that keeps x as it is."""
    x = torch.cat([torch.linspace(-12, 12, 56), torch.tensor([-1e4, -100.0, 100.0, 1e4, 0.0, -1e-20, 1e-20])])
    x = x.view(1, -1, 1).expand(1, -1, 16).contiguous().to(DEVICE)
    weight = F.pad(torch.ones(16, 1, 1, 1, device=DEVICE), (1, 1, 1, 1))
    tolerance = dict(rtol=1e-6, atol=2e-6 if INTERPRETING else 1e-5)  # a GPU's roots and exponentials are quick ones
    leaves = [x.requires_grad_(), x.detach().double().requires_grad_()]
    got = depthwise_conv(leaves[0], (1, x.shape[1]), weight, activation=activation, backend="triton")
    expected = getattr(F, activation)(leaves[1])
    torch.testing.assert_close(got.double(), expected, **tolerance)
    got, expected = (torch.autograd.grad(y.sum(), x)[0] for y, x in zip((got, expected), leaves, strict=True))
    torch.testing.assert_close(got.double(), expected, **tolerance)


@needs_triton
@pytest.mark.parametrize("case", [SMALL, replace(SMALL, activation=None, gate=False)], ids=["fused", "plain"])
def test_frozen_inputs_do_not_change_the_other_gradients(case):
    leaves, dy = make_inputs(case, torch.float32)

    def gradients(frozen):
        inputs = {name: x.detach().requires_grad_(name not in frozen) for name, x in leaves.items()}
        call(inputs, case, backend="triton").backward(dy)
        return {name: x.grad for name, x in inputs.items()}

    every = gradients(())
    for frozen in (("x",), ("weight", "bias", "gate"), ("x", "weight", "bias")):
        some = gradients(frozen)
        for name in leaves:
            assert (some[name] is None) if name in frozen else torch.equal(some[name], every[name])


@needs_triton
def test_any_strides():
    case = replace(SMALL, grid=(1, 3), activation=None, prefix=1)
    leaves, dy = make_inputs(case, torch.float32)
    dy = dy[:, :1].expand_as(dy)
    expected = forward_backward(call, case, ({name: x.contiguous() for name, x in leaves.items()}, dy.contiguous()),
                                backend="triton")  # fmt: skip
    leaves = {name: x.mT.contiguous().mT if x.ndim == 3 else x for name, x in leaves.items()}
    leaves["weight"] = leaves["weight"].permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    assert not any(leaves[name].is_contiguous() for name in ("x", "weight", "add", "gate"))
    results = forward_backward(call, case, (leaves, dy), backend="triton")
    assert all(torch.equal(results[name], expected[name]) for name in expected)


@needs_triton
def test_two_runs_agree_bit_for_bit():
    case = Case(1, (5, 5), 8)
    inputs = make_inputs(case, torch.bfloat16)
    first, second = (forward_backward(call, case, inputs, backend="triton") for _ in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_tokens_and_not_filters(backend):
    leaves, _ = make_inputs(SMALL, torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = call(leaves, SMALL, backend=backend)
    assert y.dtype == torch.bfloat16
    half = {name: x if name in ("weight", "bias") else x.bfloat16() for name, x in leaves.items()}
    assert torch.equal(y, call(half, SMALL, backend=backend))


@needs_triton
def test_filters_in_half_precision():
    case = CASES["one row"]
    leaves, dy = make_inputs(case, torch.bfloat16)
    leaves |= {name: leaves[name].bfloat16() for name in ("weight", "bias")}
    results = forward_backward(call, case, (leaves, dy), backend="triton")
    assert all(x.dtype == torch.bfloat16 for x in results.values())
    assert_close(results, forward_backward(by_conv2d, case, (leaves, dy), torch.float64), 1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_images(backend):
    case = replace(SMALL, batch=0, grid=(2, 3))
    results = forward_backward(call, case, make_inputs(case, torch.float32), backend=backend)
    assert results["y"].shape == (0, 6, 8) and not results["dweight"].any() and not results["dbias"].any()


@needs_triton
@pytest.mark.parametrize("case", [SMALL, Case(1, (2, 3), 8, bias=False, stride=2)], ids=["fused", "stride 2"])
def test_opcheck(case):
    from flash_bla.ops.triton_depthwise_conv import depthwise_conv_forward

    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    leaves, _ = make_inputs(case, torch.float32)
    leaves = {name: x.requires_grad_() for name, x in leaves.items()}
    tensors = (leaves.get(name) for name in ("x", "weight", "bias", "add", "gate"))
    torch.library.opcheck(depthwise_conv_forward, (*tensors, *case.grid, *case.options.values()), test_utils=checks)


@needs_triton
def test_compiled_without_graph_breaks():
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    for grid in ((1, 2), (2, 3)):  # the second size compiles for any
        case = replace(SMALL, grid=grid)
        inputs = make_inputs(case, torch.float32)
        expected = forward_backward(call, case, inputs, backend="triton")
        assert_close(forward_backward(compiled, case, inputs, backend="triton"), expected, 1e-6)


@needs_triton
@pytest.mark.parametrize("case", [SMALL, Case(1, (2, 2), 8, 5, heads=2, stride=2)])
def test_operations_are_counted_as_those_of_the_reference(case):
    """Those of the filters' gradient, which PyTorch counts as if groups did not part the channels, by hand."""
    leaves, dy = make_inputs(case, torch.float32)
    leaves["x"].requires_grad_()
    counts = {}
    for trained in (False, True):
        leaves["weight"].requires_grad_(trained)
        for backend in ("triton", "reference"):
            with FlopCounterMode(display=False) as counter:
                call(leaves, case, backend=backend).backward(dy)
            counts[backend, trained] = counter.get_total_flops()
    assert counts["triton", False] == counts["reference", False] > 0
    assert 2 * counts["triton", True] == 3 * counts["triton", False]


def test_export_takes_the_reference():
    """An exported program must run where this package is not installed."""

    class Module(torch.nn.Module):
        def forward(self, x, weight):
            return depthwise_conv(x, (2, 3), weight, activation="gelu")

    inputs = torch.randn(1, 7, 8, device=DEVICE), torch.randn(8, 1, 3, 3, device=DEVICE)
    program = torch.export.export(Module(), inputs)
    assert not any("flash_bla" in str(node.target) for node in program.graph.nodes)
    expected = depthwise_conv(inputs[0], (2, 3), inputs[1], activation="gelu", backend="reference")
    torch.testing.assert_close(program.module()(*inputs), expected)


X, W = torch.rand(2, 7, 8), torch.rand(4, 1, 3, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X[0], (2, 3), W), {}, ValueError, r"x must have 3 dimensions \(B, N, C\), got \(7, 8\)"),
        (("x", (2, 3), W), {}, TypeError, r"x must be a tensor"),
        ((X.long(), (2, 3), W), {}, TypeError, r"x must be float16, .* got torch.int64"),
        ((X, (2, 4), W), {}, ValueError, r"a token for each place: got \(2, 4\) and 7 tokens"),
        ((X, (0, 3), W), {}, ValueError, r"grid must be positive"),
        ((X, 7, W), {}, ValueError, r"grid must be two integers \(H, W\), got 7"),
        ((X, (2.0, 3), W), {}, ValueError, r"grid must be two integers \(H, W\), got \(2.0, 3\)"),
        ((X, (2, 3), W[:3]), {}, ValueError, r"weight's channels must divide those of x, 8, got 3"),
        ((X, (2, 3), W[:, 0]), {}, ValueError, r"weight must have shape \(channels, 1, k, k\), got \(4, 3, 3\)"),
        ((X, (2, 3), torch.rand(4, 1, 2, 2)), {}, ValueError, r"filters of side \(3, 5, 7\), got 2"),
        ((X, (2, 3), None), {}, TypeError, r"weight must be a tensor"),
        ((X, (2, 3), W.long()), {}, TypeError, r"weight must be float16, .* got torch.int64"),
        ((X, (2, 3), W, torch.rand(8)), {}, ValueError, r"bias must have shape .* of weight, here \(4,\), got \(8,\)"),
        ((X, (2, 3), W), dict(add=X[:1]), ValueError, r"add must have shape that of the output, here \(2, 7, 8\), got"),
        ((X, (2, 3), W), dict(gate=X.half()), TypeError, r"gate must have the dtype of x, .* got torch.float16"),
        ((X, (2, 3), W), dict(activation="mish"), ValueError, r"^activation must be one of .* got 'mish'"),
        ((X, (2, 3), W), dict(input_activation=1), ValueError, r"input_activation must be one of .* got 1"),
        ((X, (1, 7), W), dict(stride=3), ValueError, r"stride must be 1 or 2, got 3"),
        ((X, (2, 3), W), dict(stride=2), ValueError, r"stride 2 takes no prefix tokens: grid \(2, 3\) .* x 7 tokens"),
        ((X, (1, 7), W), dict(stride=2, residual=True), ValueError, r"residual needs stride 1"),
        ((X, (2, 3), W), dict(backend="cuda"), ValueError, r"backend .* got 'cuda'"),
        pytest.param((X.double(), (2, 3), W), dict(backend="triton"), TypeError, "float64 is for the reference",
                     marks=needs_triton),
    ],
)  # fmt: skip
def test_errors(arguments, options, error, message):
    with pytest.raises(error, match=message):
        depthwise_conv(*arguments, **options)


def test_strips_have_the_fewest_loads():
    """Of 4 and 7 columns, or 4 and 5, that read K - 1 more."""
    columns = lambda kind, k, *widths: [triton_depthwise_conv._way(kind, k, 1, width).columns for width in widths]  # noqa: E731
    assert columns("forward", 3, 56, 28, 14, 7, 16, 4) == [7, 7, 7, 7, 4, 4]
    assert columns("filters", 5, 56, 14, 7, 16) == [7, 7, 7, 4]
    assert columns("both", 3, 56, 28, 14, 7) == [5, 5, 5, 4]
