"""Operators called again: what was recorded for tensors of one kind must serve others of it, and no other kind."""

import ast
import gc
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flash_bla.ops import add_layer_norm, depthwise_conv, linear_attention, silu_gate, triton_support
from flash_bla.ops.triton_activations import record_mlp_gradients
from flash_bla.ops.triton_column_sums import column_sums
from flash_bla.ops.triton_support import HAS_TRITON, META, Record
from tests.ops.cases import DEVICE

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")

# a function of x (2, 4, 32) in any layout, and how many leaves it has besides
OPERATORS = {
    "attention": (lambda x, backend: linear_attention(*[x.unflatten(2, (2, 16)).transpose(1, 2)] * 3,
                                                      feature_map="elu1", backend=backend), 0),
    "conv": (lambda x, w, b, backend: depthwise_conv(x, (2, 2), w.expand(32, 9).reshape(32, 1, 3, 3), b,
                                                     activation="silu", gate=x, backend=backend), 2),
    "norm": (lambda x, w, b, backend: sum(add_layer_norm(x, w.flatten(), b, 1e-5, add=x, backend=backend)), 2),
    "gate": (lambda x, backend: silu_gate(x, x, backend=backend), 0),
}  # fmt: skip


def layouts(dtype):
    """The same kind twice, another stride, another alignment, another order of dimensions."""
    randn = lambda *shape: torch.randn(shape, device=DEVICE).to(dtype)  # noqa: E731
    yield from (randn(2, 4, 32), randn(2, 4, 32))
    yield randn(2, 4, 64)[..., 32:]
    yield from (randn(2 * 4 * 32 + offset)[offset:].view(2, 4, 32) for offset in (1, 2, 8))
    yield randn(2, 32, 4).transpose(1, 2)
    yield randn(1, 4, 32).expand(2, -1, -1)


@pytest.mark.parametrize("name", OPERATORS)
def test_again_in_another_layout(name):
    function, others = OPERATORS[name]
    torch.manual_seed(0)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 2e-3)):
        for x in layouts(dtype) if dtype == torch.float32 else [next(layouts(dtype))]:
            leaves = [x, *(torch.randn(32, *[1] * (others - 1 - i), device=DEVICE) for i in range(others))]
            results = []
            for backend, to in (("triton", None), ("reference", torch.float64)):
                values = [y.detach().to(to or y.dtype).requires_grad_() for y in leaves]
                y = function(*values, backend=backend)
                results.append([y.detach(), *torch.autograd.grad(y, values, y.detach() * 0.5)])
            for got, want in zip(*results, strict=True):
                assert got.shape == want.shape and (got.double() - want).norm() <= tolerance * want.norm()


def test_nothing_is_kept():
    x = torch.randn(2, 4, 32, device=DEVICE, requires_grad=True)
    y = silu_gate(x, x, backend="triton")
    kept = weakref.ref(x), weakref.ref(y)
    del x, y
    gc.collect()
    assert [reference() for reference in kept] == [None, None]


@pytest.mark.parametrize("name", OPERATORS)
def test_gradients_of_gradients_are_refused(name):
    function, others = OPERATORS[name]
    leaves = [torch.rand(2, 4, 32, device=DEVICE), *(torch.rand(32, 1, device=DEVICE) for _ in range(others))]
    if others:
        leaves[-1] = leaves[-1].flatten()
    leaves = [x.requires_grad_() for x in leaves]
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(function(*leaves, backend="triton").square().sum(), leaves, create_graph=True)


def test_every_kernel_waits_first():
    """A launch may start before the end of the one before."""
    kernels = 0
    for path in Path(triton_support.__file__).parent.glob("triton_*.py"):
        for function in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(function, ast.FunctionDef) and function.name.endswith("_kernel"):
                first = function.body[1 if ast.get_docstring(function) else 0]
                assert ast.unparse(first) == "wait_for_inputs()", f"{path.name}: {function.name}"
                kernels += 1
    assert kernels > 30


def test_sums_go_together():
    x = torch.empty(64, 32, dtype=torch.bfloat16, device=META)
    names = lambda *record: [launch.kernel.__name__ for launch in Record(*record).launches]  # noqa: E731
    sums = ["column_sums_kernel", "shares_kernel"]
    assert names(record_mlp_gradients, (x, x, x), (True, True)) == ["gelu_gradient_kernel", *sums]
    five = lambda record, *tensors: tuple(column_sums(record, y) for y in tensors)  # noqa: E731
    assert names(five, [x] * 5) == [name for name, launches in zip(sums, (3, 2), strict=True) for _ in range(launches)]


def test_a_launch_keeps_its_kernel(monkeypatch):
    """Triton unloads one that nobody holds."""

    class Compiled:
        run, function, packed_metadata = print, 0, ()

    class Kernel:
        def __getitem__(self, grid):
            return lambda *values, **options: Compiled()

    monkeypatch.setattr(triton_support, "INTERPRETING", False)
    launch = triton_support.Launch(Kernel(), (1, 1, 1), [5], dict(num_warps=4))
    launch.run([])
    assert type(launch.compiled) is Compiled and launch.call == (print, (0, (), None, None, None), False)


@pytest.mark.parametrize("kind", ["separate", "together", "another order", "scratch"])
def test_launches_go_past_triton_where_it_does_nothing_else(kind):
    seen = []

    class Launcher:
        global_scratch_size = int(kind == "scratch")
        profile_scratch_size = 0

        def __init__(self):
            self.launch = lambda *arguments: seen.append(arguments)

        def __call__(self, x, y, z, stream, function, metadata, *others):
            values = others[3:]
            if kind == "another order":
                return self.launch(stream, x, y, z, function, metadata, *values)
            return self.launch(x, y, z, stream, function, 7, metadata, *([values] if kind == "together" else values))

    compiled = SimpleNamespace(run=Launcher(), function="function", packed_metadata=(4, 1))
    call, others, together = triton_support._compiled_call(compiled, (2, 3, 1), [torch.empty(2, device=META), 5, None])
    assert not seen and (call is compiled.run.launch) == (kind in ("separate", "together"))
    values = 11, 12, 13
    call(2, 3, 1, "stream", *others, *([values] if together else values))
    compiled.run(2, 3, 1, "stream", "function", (4, 1), None, None, None, *values)
    assert len(seen) == 2 and seen[0] == seen[1]
