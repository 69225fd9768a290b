"""Layer normalisation of a sum against ``F.layer_norm`` in float64."""

import pytest
import torch
import torch.nn.functional as F

from flash_bla.ops import add_layer_norm
from flash_bla.ops.triton_support import HAS_TRITON
from tests.ops.cases import DEVICE, TOLERANCE

BACKENDS = ["reference", pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="needs Triton"))]
EPS = 1e-3


def make_inputs(shape, dtype, add):
    generator = torch.Generator().manual_seed(0)
    randn = lambda *size: torch.randn(*size, generator=generator).to(DEVICE)  # noqa: E731
    C = shape[-1]
    leaves = {"x": (3 + randn(*shape)).to(dtype), "weight": 1 + randn(C), "bias": randn(C)}
    if add:
        leaves["add"] = randn(*shape).to(dtype)
    return leaves, (randn(*shape).to(dtype), randn(*shape).to(dtype))


def by_torch(x, weight, bias, eps, add=None, negative_slope=1.0):
    s = x if add is None else x + add
    return F.leaky_relu(F.layer_norm(s, weight.shape, weight, bias, eps), negative_slope), s


def forward_backward(function, inputs, dtype=None, outputs=(0, 1), **options):
    leaves, gradients = inputs
    leaves = {name: (x if dtype is None else x.to(dtype)).detach().requires_grad_() for name, x in leaves.items()}
    parameters = {name: leaves[name] for name in ("x", "weight", "bias")}
    results = function(*parameters.values(), EPS, add=leaves.get("add"), **options)
    gradients = [g.to(y.dtype) for g, y in zip(gradients, results, strict=True)]
    d = torch.autograd.grad([results[i] for i in outputs], list(leaves.values()), [gradients[i] for i in outputs],
                            allow_unused=True)  # fmt: skip
    return [y.detach() for y in results], dict(zip(leaves, d, strict=True))


@pytest.mark.parametrize(("add", "slope"), [(False, 1.0), (False, 0.2), (True, 1.0)])
@pytest.mark.parametrize("shape", [(2, 5, 24), (70, 64), (3, 1, 320)], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_torch(backend, dtype, shape, add, slope):
    inputs = make_inputs(shape, dtype, add)
    results, gradients = forward_backward(add_layer_norm, inputs, negative_slope=slope, backend=backend)
    expected, expected_gradients = forward_backward(by_torch, inputs, torch.float64, negative_slope=slope)
    for y, want in (*zip(results, expected, strict=True), *((gradients[k], expected_gradients[k]) for k in gradients)):
        assert (y.double() - want).norm() <= TOLERANCE[dtype] * want.norm()
    assert all(y.dtype == dtype for y in results)
    assert gradients["weight"].dtype == gradients["bias"].dtype == torch.float32


@pytest.mark.parametrize("outputs", [(0,), (1,)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_one_output(backend, outputs):
    inputs = make_inputs((3, 16), torch.float32, True)
    _, gradients = forward_backward(add_layer_norm, inputs, outputs=outputs, backend=backend)
    _, expected = forward_backward(by_torch, inputs, torch.float64, outputs=outputs)
    for name, want in expected.items():
        if want is None:
            assert gradients[name] is None
        else:
            torch.testing.assert_close(gradients[name].double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(dtype, backend):
    """The norm has autocast's type, the sum that of x."""
    leaves, _ = make_inputs((3, 16), dtype, False)
    x, weight, bias = leaves.values()
    add = torch.randn(3, 16, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        y, s = add_layer_norm(x, weight, bias, EPS, add=add, backend=backend)
    assert (y.dtype, s.dtype) == (torch.bfloat16, dtype)
    expected = by_torch(x.double(), weight.double(), bias.double(), EPS, add=add.double())
    assert (y - expected[0]).norm() <= 1e-2 * expected[0].norm() and (s - expected[1]).norm() <= 1e-2 * s.norm()


def test_compiled_without_graph_breaks():
    compiled = torch.compile(add_layer_norm, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    inputs = make_inputs((3, 16), torch.float32, True)
    results, gradients = forward_backward(compiled, inputs)
    expected, expected_gradients = forward_backward(add_layer_norm, inputs)
    torch.testing.assert_close(results, expected)
    torch.testing.assert_close(gradients, expected_gradients)


@pytest.mark.parametrize("name, shape", [("weight", (8,)), ("bias", (1, 16)), ("add", (1, 16))])
def test_another_shape_is_refused(name, shape):
    tensors = {"weight": torch.ones(16), "bias": torch.zeros(16)} | {name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=f"{name} must have shape"):
        add_layer_norm(torch.randn(3, 16), eps=EPS, **tensors)


INTEGERS = torch.zeros(3, 16, dtype=torch.int32)


@pytest.mark.parametrize(
    "name, wrong", [("x", INTEGERS), *((name, x) for name in ("weight", "bias", "add") for x in (INTEGERS, [0.0]))]
)
def test_what_is_no_floating_point_tensor_is_refused(name, wrong):
    tensors = {"x": torch.randn(3, 16), "weight": torch.ones(16), "bias": torch.zeros(16)} | {name: wrong}
    with pytest.raises(TypeError, match=f"{name} must be .*got (torch.int32|list)"):
        add_layer_norm(**tensors, eps=EPS)
