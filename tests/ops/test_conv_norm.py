"""A convolution and the norm of its sum: what the two operators make one after the other."""

import pytest
import torch

from flash_bla.ops import add_layer_norm, depthwise_conv
from flash_bla.ops.conv_norm import depthwise_conv_norm
from flash_bla.ops.triton_support import HAS_TRITON
from tests.ops.cases import DEVICE

BACKENDS = ["reference", pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="needs Triton"))]
GRID = (3, 5)


def one_after_the_other(x, grid, weight, bias, norm_weight, norm_bias, eps, *, add):
    s = depthwise_conv(x if add is None else x + add, grid, weight, bias, residual=True)
    return add_layer_norm(s, norm_weight, norm_bias, eps)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("outputs", ["both", "norm", "sum"])
@pytest.mark.parametrize("added", [False, True])
def test_equals_both_operators(backend, dtype, tolerance, outputs, added):
    torch.manual_seed(0)
    C = 24
    leaves = [torch.randn(2, 17, C, device=DEVICE, dtype=dtype) for _ in range(2)]  # two prefix tokens
    leaves += [torch.randn(*shape, device=DEVICE) for shape in ((C, 1, 3, 3), (C,), (C,), (C,))]
    gradients = [torch.randn(2, 17, C, device=DEVICE) for _ in range(2)]
    results = []
    for to, options in ((None, dict(backend=backend)), (torch.float64, {})):
        x, add, *parameters = [y.to(to or y.dtype).requires_grad_() for y in leaves]
        function = one_after_the_other if to else depthwise_conv_norm
        y, s = function(x, GRID, *parameters, 1e-5, add=add if added else None, **options)
        chosen = {"both": [0, 1], "norm": [0], "sum": [1]}[outputs]
        inputs = [x, *([add] if added else []), *(parameters if outputs != "sum" else parameters[:2])]
        of = torch.autograd.grad([(y, s)[i] for i in chosen], inputs, [gradients[i].to(s.dtype) for i in chosen])
        results.append([y, s, *of])
    for got, want in zip(*results, strict=True):
        assert got.shape == want.shape and (got.double() - want).norm() <= tolerance * want.norm()


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_frozen_parameters_and_errors():
    x, weight, ones = (
        torch.randn(1, 15, 16, device=DEVICE),
        torch.randn(16, 1, 3, 3, device=DEVICE),
        torch.ones(16, device=DEVICE),
    )
    x.requires_grad_()
    y, s = depthwise_conv_norm(x, GRID, weight, None, ones, ones, 1e-5, backend="triton")
    expected, _ = one_after_the_other(x, GRID, weight, None, ones, ones, 1e-5, add=None)
    torch.testing.assert_close(*(torch.autograd.grad(z.square().sum(), x) for z in (y, expected)), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="grid must be positive"):
        depthwise_conv_norm(x, (4, 5), weight, None, ones, ones, 1e-5, backend="triton")
    with pytest.raises(ValueError, match="weight must have shape"):
        depthwise_conv_norm(x, GRID, weight, None, ones[:8], ones, 1e-5, backend="triton")


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_gradients_that_do_not_arrive():
    class Stop(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: x.clone())
        backward = staticmethod(lambda ctx, dy: None)

    x, weight, ones = torch.randn(1, 15, 16), torch.randn(16, 1, 3, 3), torch.ones(16)
    x, weight, ones = (y.to(DEVICE).requires_grad_() for y in (x, weight, ones))
    y, s = depthwise_conv_norm(x, GRID, weight, None, ones, ones, 1e-5, backend="triton")
    (Stop.apply(y).sum() + Stop.apply(s).sum() + ones.sum()).backward()
    assert x.grad is None and weight.grad is None and torch.equal(ones.grad, torch.ones_like(ones))
