"""The SiLU gate against its definition in float64."""

import pytest
import torch

from flash_bla.ops import silu_gate
from flash_bla.ops.triton_support import HAS_TRITON
from tests.ops.cases import DEVICE, TOLERANCE


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_equals_its_definition(dtype):
    generator = torch.Generator().manual_seed(0)
    x, gate, dy = (4 * torch.randn(3, 7, 130, generator=generator).to(DEVICE, dtype) for _ in range(3))
    x = x.transpose(0, 1)
    gate[0, 0, :2] = torch.tensor([-100.0, 100.0])
    dy, gate = dy.transpose(0, 1), gate.transpose(0, 1)
    leaves = [y.detach().requires_grad_() for y in (x, gate)]
    wide = [y.detach().double().requires_grad_() for y in (x, gate)]
    y, expected = silu_gate(*leaves, backend="triton"), wide[0] * wide[1] * wide[1].sigmoid()
    results = [y, *torch.autograd.grad(y, leaves, dy)]
    wanted = [expected, *torch.autograd.grad(expected, wide, dy.double())]
    for got, want in zip(results, wanted, strict=True):
        assert got.dtype == dtype and (got.double() - want).norm() <= TOLERANCE[dtype] * want.norm()


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize(
    "part", [lambda x: x[:, 4:], lambda x: x[::2, :4], lambda x: x[:1, :4].expand(3, 4)], ids=["columns", "rows", "one"]
)
def test_a_gate_that_is_part_of_a_matrix(part):
    whole = torch.randn(6, 8, device=DEVICE)
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaf = whole.to(dtype).requires_grad_()
        gate = part(leaf)
        y = silu_gate(torch.ones_like(gate), gate, backend=backend)
        results.append((y, *torch.autograd.grad(y, leaf, torch.ones_like(y))))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def test_a_gate_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"gate must have shape that of x, here \(2, 8\), got \(2, 4\)"):
        silu_gate(torch.randn(2, 8), torch.randn(2, 4))


def test_what_is_no_floating_point_tensor_is_refused():
    x = torch.randn(2, 8)
    with pytest.raises(TypeError, match="gate must be a tensor, got list"):
        silu_gate(x, [1.0])
    with pytest.raises(TypeError, match="x must be float16, .* got torch.int32"):
        silu_gate(x.int(), x.int())


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_the_wider_type_is_the_outputs(backend):
    x, gate = torch.randn(2, 2, 8, device=DEVICE)
    y = silu_gate(x.half(), gate, backend=backend)
    torch.testing.assert_close(y, x.half().float() * torch.nn.functional.silu(gate))
