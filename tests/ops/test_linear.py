"""The linear layer of mixed-precision training against ``F.linear`` in float64."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from flash_bla.layers import Mlp
from flash_bla.ops import linear
from flash_bla.ops.linear import mlp
from flash_bla.ops.triton_support import HAS_TRITON
from tests.ops.cases import DEVICE

BACKENDS = ["reference", pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="needs Triton"))]


def make_inputs(shape, D, dtype):
    generator = torch.Generator().manual_seed(0)
    randn = lambda *size: torch.randn(*size, generator=generator).to(DEVICE)  # noqa: E731
    return [randn(*shape).to(dtype), randn(D, shape[-1]), randn(D)], randn(*shape[:-1], D).bfloat16()


def forward_backward(function, leaves, dy, **options):
    leaves = [x.detach().requires_grad_() for x in leaves]
    y = function(*leaves, **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "D"), [((2, 50, 24), 40), ((7, 16), 130)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_precision(backend, shape, D, dtype):
    leaves, dy = make_inputs(shape, D, dtype)
    with torch.autocast(DEVICE, torch.bfloat16):
        results = forward_backward(linear, leaves, dy, backend=backend)
    expected = forward_backward(F.linear, [x.double() for x in leaves], dy)
    assert [x.dtype for x in results] == [torch.bfloat16, dtype, torch.float32, torch.float32]
    for got, want in zip(results, expected, strict=True):
        assert got.shape == want.shape and (got.double() - want).norm() <= 1e-2 * want.norm()
    if backend == "triton":  # a sum of what was rounded before, and exact to float32
        assert (results[3].double() - expected[3]).norm() <= 1e-6 * expected[3].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["gelu", "gate"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_before(backend, activation, dtype):
    leaves, dy = make_inputs((2, 50, 24), 40, dtype)
    if activation == "gelu":
        ours = lambda x, weight, bias: linear(x, weight, bias, gelu=True, backend=backend)  # noqa: E731
        definition = lambda x, weight, bias: F.linear(F.gelu(x), weight, bias)  # noqa: E731
    else:
        leaves.append(4 * leaves[0].flip(1))
        ours = lambda x, weight, bias, gate: linear(x, weight, bias, gate=gate, backend=backend)  # noqa: E731
        definition = lambda x, weight, bias, gate: F.linear(x * gate * gate.sigmoid(), weight, bias)  # noqa: E731
    with torch.autocast(DEVICE, torch.bfloat16):
        results = forward_backward(ours, leaves, dy)
    expected = forward_backward(definition, [x.double() for x in leaves], dy)
    types = [torch.bfloat16, *(x.dtype for x in leaves)]
    for got, want, type_ in zip(results, expected, types, strict=True):
        assert got.dtype == type_ and (got.double() - want).norm() <= 1e-2 * want.norm()


@pytest.mark.parametrize("frozen", [(), (1,), (2,), (3,)], ids=["", "weight", "bias", "factor"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_factor_and_split(backend, frozen):
    (x, weight, bias), dy = make_inputs((2, 50, 24), 40, torch.bfloat16)
    inputs = [x, weight, bias, 0.5 + torch.rand(1, 1, 40, device=DEVICE)]
    definition = lambda x, weight, bias, factor: F.linear(x, weight, bias) * factor  # noqa: E731
    results = []
    for function, dtype in ((linear, None), (definition, torch.float64)):
        leaves = [y.to(dtype or y.dtype).requires_grad_(i not in frozen) for i, y in enumerate(inputs)]
        options = {} if dtype else dict(factor=leaves.pop(), split=(4, -1), backend=backend)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype is None):
            y = function(*leaves, **options)
        assert y.shape == ((2, 50, 40) if dtype else (2, 50, 4, 10))
        needed = [y for y in (*leaves, *options.values()) if isinstance(y, torch.Tensor) and y.requires_grad]
        results.append(
            [y.flatten(2) if dtype is None else y, *torch.autograd.grad(y, needed, dy.to(y.dtype).view(y.shape))]
        )
    for got, want in zip(*results, strict=True):
        assert (got.double() - want).flatten().norm() <= 1e-2 * want.norm()


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("frozen", [None, "x", "weight", "bias"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_mlp(backend, frozen, biases):
    (x, weight1, bias1), _ = make_inputs((2, 50, 24), 40, torch.bfloat16)
    (_, weight2, bias2), dy = make_inputs((2, 50, 40), 32, torch.bfloat16)
    inputs = dict(x=x, weight1=weight1, bias1=bias1, weight2=weight2, bias2=bias2)
    results = []
    for dtype in (None, torch.float64):
        leaves = {
            name: y.to(dtype or y.dtype).requires_grad_(name.rstrip("12") != frozen) for name, y in inputs.items()
        }
        if not biases:
            leaves |= dict(bias1=None, bias2=None)
        x, weight1, bias1, weight2, bias2 = leaves.values()
        if dtype:
            y = F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)
        else:
            with torch.autocast(DEVICE, torch.bfloat16):
                y = mlp(*leaves.values(), backend=backend)
        needed = [z for z in leaves.values() if z is not None and z.requires_grad]
        results.append([y, *torch.autograd.grad(y, needed, dy.to(y.dtype))])
    for got, want in zip(*results, strict=True):
        assert got.shape == want.shape and (got.double() - want).norm() <= 2e-2 * want.norm()


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("activation", ["gelu", "gate"])
def test_what_the_activation_gives_is_not_kept(activation):
    (x, weight, bias), dy = make_inputs((50, 24), 40, torch.bfloat16)
    x.requires_grad_()
    weight.requires_grad_()
    option = dict(gelu=True) if activation == "gelu" else dict(gate=x)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda y: kept.setdefault(y.data_ptr(), y), lambda y: y):
        with torch.autocast(DEVICE, torch.bfloat16):
            linear(x, weight, bias, backend="triton", **option).backward(dy)
    assert sorted(tuple(y.shape) for y in kept.values()) == [(40, 24), (50, 24)]  # the weight and x


def kept_by(step, *leaves):
    """Shapes of what is kept between the passes of a compiled step that returns a scalar, and the gradients."""
    kept = {}
    step = torch.compile(step, backend="aot_eager_decomp_partition", fullgraph=True)  # partitioned as Inductor does it
    with torch.autograd.graph.saved_tensors_hooks(lambda y: kept.setdefault(y.data_ptr(), y), lambda y: y):
        step(*leaves).backward()
    return sorted(tuple(y.shape) for y in kept.values()), [x.grad for x in leaves]


@pytest.mark.parametrize("in_checkpoint", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "gate"])
def test_nor_is_it_in_compiled_training(activation, in_checkpoint):
    (x, weight, bias), dy = make_inputs((50, 24), 40, torch.float32)
    others = [] if activation == "gelu" else [x.cos().requires_grad_()]

    def step(x, weight, bias, *others):
        options = dict(gate=others[0]) if others else dict(gelu=True)
        return (linear(x, weight, bias, **options) * dy).sum()

    def within(*leaves):  # with a user's checkpoint around, only that one counts
        return checkpoint(step, *leaves, use_reentrant=False)

    leaves = [y.requires_grad_() for y in (x, weight, bias)] + others
    kept, gradients = kept_by(within if in_checkpoint else step, *leaves)
    assert [shape for shape in kept if shape != tuple(dy.shape)] == [(40, 24), *[(50, 24)] * (1 + len(others))]
    for got, want in zip(gradients, torch.autograd.grad(step(*leaves), leaves), strict=True):
        torch.testing.assert_close(got, want)


def test_traced_for_others_it_is_plain():
    (x, weight, bias), _ = make_inputs((5, 16), 8, torch.float32)
    loss = lambda weight: linear(x, weight, bias, gelu=True).sum()  # noqa: E731
    of_sum = torch.compile(torch.func.grad(loss), backend="aot_eager", fullgraph=True)(weight)
    torch.testing.assert_close(of_sum, F.gelu(x).sum(0).expand(8, 16))
    model = Mlp(16, 32)
    for strict in (False, True):
        program = torch.export.export(model, (torch.randn(5, 16),), strict=strict)
        assert [str(node.target) for node in program.graph.nodes if node.op == "call_function"] == [
            "aten.linear.default", "aten.gelu.default", "aten.linear.default", "aten.dropout.default"
        ]  # fmt: skip


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_an_empty_batch_has_gradients_of_zero():
    x, weight, bias = torch.zeros(0, 5, 16), torch.randn(8, 16), torch.randn(8)
    leaves = [y.to(DEVICE).requires_grad_() for y in (x, weight, bias)]
    with torch.autocast(DEVICE, torch.bfloat16):
        y = linear(*leaves, split=(2, -1), backend="triton")
        out = mlp(*leaves, leaves[1].t(), None, backend="triton")
    assert [z.shape for z in (y, out)] == [(0, 5, 2, 4), (0, 5, 16)]
    for gradient in torch.autograd.grad([y.sum(), out.sum()], leaves):
        assert gradient.abs().sum() == 0


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_outputs_may_be_changed_in_place():
    (x, weight, bias), _ = make_inputs((3, 16), 8, torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = linear(x, weight.requires_grad_(), bias, backend="triton")
    expected = y + 1
    y += 1
    assert torch.equal(y, expected) and y.grad_fn is not None


@pytest.mark.parametrize("backend", BACKENDS)
def test_sizes_of_factor_and_bias(backend):
    (x, weight, bias), _ = make_inputs((3, 16), 8, torch.float32)
    weight.requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        for size in (1, 4, 16):
            with pytest.raises(ValueError, match=rf"factor must have D = 8 elements, got shape \({size},\)"):
                linear(x, weight, bias, factor=torch.ones(size, device=DEVICE), backend=backend)
        if backend == "triton":  # F.linear has errors of its own
            with pytest.raises(ValueError, match=r"bias must have shape .*\(8,\), got \(4,\)"):
                linear(x, weight, bias[:4], backend=backend)


def test_gelu_and_gate_exclude_each_other():
    (x, weight, bias), _ = make_inputs((3, 16), 8, torch.float32)
    with pytest.raises(ValueError, match="gelu and gate exclude each other"):
        linear(x, weight, bias, gelu=True, gate=x)
    with pytest.raises(ValueError, match=r"gate must have shape that of x, here \(3, 16\), got \(3, 8\)"):
        linear(x, weight, bias, gate=x[:, :8])


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_frozen_parameters():
    (x, weight, _), dy = make_inputs((3, 16), 8, torch.float32)
    for (of_x, of_weight), gelu in product(((True, False), (False, True)), (False, True)):
        leaves = x.detach().requires_grad_(of_x), weight.detach().requires_grad_(of_weight)
        with torch.autocast(DEVICE, torch.bfloat16):
            linear(*leaves, gelu=gelu, backend="triton").backward(dy)
        assert [leaf.grad is not None for leaf in leaves] == [of_x, of_weight]


def test_without_autocast_it_is_torchs():
    leaves, dy = make_inputs((5, 16), 8, torch.float32)
    for got, want in zip(forward_backward(linear, leaves, dy), forward_backward(F.linear, leaves, dy), strict=True):
        assert torch.equal(got, want)
