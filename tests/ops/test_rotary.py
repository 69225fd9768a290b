"""The rotation of packed queries and keys against its definition in float64."""

import pytest
import torch

from flash_bla.ops.rotary import rotate_packed
from flash_bla.ops.triton_support import HAS_TRITON
from tests.ops.cases import DEVICE

BACKENDS = ["reference", pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="needs Triton"))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str)
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("D", [16, 24])
def test_definition_and_gradient(backend, dtype, tolerance, heads, D):
    generator = torch.Generator().manual_seed(0)
    B, N, H = 2, 150, 3
    qkvg = torch.randn(B, N, 5, H, D, generator=generator).to(DEVICE, dtype)[:, :, :4].requires_grad_()
    angles = torch.randn(heads, N, D // 2, generator=generator).to(DEVICE)
    rope = torch.stack([angles.cos(), angles.sin()], dim=-1)

    results = rotate_packed(qkvg, rope, backend=backend)
    gradients = [torch.randn(y.shape, generator=generator).to(DEVICE, dtype) for y in results]
    got = [*results, *torch.autograd.grad(results, qkvg, gradients)]

    x = qkvg.detach().double().requires_grad_()
    q, k, v, gate = x.permute(2, 0, 3, 1, 4).unbind(0)
    turn = torch.polar(torch.ones_like(angles), angles).to(torch.complex128)
    q, k = (torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)
            for y in (q, k))  # fmt: skip
    expected = [q, k, v, *(y.transpose(1, 2).flatten(2) for y in (v, gate))]
    expected += torch.autograd.grad(expected, x, [y.double() for y in gradients])
    for y, want in zip(got, expected, strict=True):
        assert y.dtype == dtype and y.shape == want.shape and (y.double() - want).norm() <= tolerance * want.norm()
