"""The linear layer of mixed-precision training against ``F.linear`` in float64."""

import sys

import pytest
import torch
import torch.nn.functional as F

from flash_bla.ops import linear
from flash_bla.ops.triton_support import HAS_TRITON
from tests.ops.cases import DEVICE

linear_module = sys.modules["flash_bla.ops.linear"]
BACKENDS = ["reference", pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="needs Triton"))]


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch):
    monkeypatch.setattr(linear_module, "LARGE", 1)


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


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_frozen_parameters():
    (x, weight, _), dy = make_inputs((3, 16), 8, torch.float32)
    for of_x, of_weight in ((True, False), (False, True)):
        leaves = x.detach().requires_grad_(of_x), weight.detach().requires_grad_(of_weight)
        with torch.autocast(DEVICE, torch.bfloat16):
            linear(*leaves, backend="triton").backward(dy)
        assert [leaf.grad is not None for leaf in leaves] == [of_x, of_weight]


def test_without_autocast_it_is_torchs():
    leaves, dy = make_inputs((5, 16), 8, torch.float32)
    for got, want in zip(forward_backward(linear, leaves, dy), forward_backward(F.linear, leaves, dy), strict=True):
        assert torch.equal(got, want)
