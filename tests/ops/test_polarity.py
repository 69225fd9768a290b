"""PolaFormer's parameters against their definition in float64."""

import pytest
import torch
import torch.nn.functional as F

from flash_bla.ops.polarity import polarity_parameters
from flash_bla.ops.triton_support import HAS_TRITON
from tests.ops.cases import DEVICE

BACKENDS = ["reference", pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="needs Triton"))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("H", "D", "N"), [(2, 16, 5), (3, 24, 150)])
def test_definition_and_gradients(backend, H, D, N):
    torch.manual_seed(0)
    scale, power, encoding = (
        torch.randn(*shape, device=DEVICE) for shape in ((1, 1, H * D), (1, H, 1, D), (1, N, H * D))
    )
    scale[..., :2] = torch.tensor([30.0, -8.0], device=DEVICE)
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = s, p, e = [x.to(dtype).requires_grad_() for x in (scale, power, encoding)]
        if dtype == torch.float32:
            outputs = polarity_parameters(s, p, e, 4.0, backend=backend)
        else:
            factor = F.softplus(s.flatten()).pow(-2)
            outputs = [
                torch.cat([torch.ones_like(factor), factor, torch.ones_like(factor), torch.ones_like(factor)]),
                1 + 4 * p.sigmoid()[0, :, 0],
                (e[0] * factor).view(N, H, D).transpose(0, 1),
            ]
        weights = [torch.linspace(-1, 2, y.numel(), device=DEVICE).to(dtype).view(y.shape) for y in outputs]
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, weights)])
    for got, want in zip(*results, strict=True):
        # sums over tokens lose digits where they cancel
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5 * min(want.abs().max().item(), 100.0))


def test_without_scale():
    power, encoding = torch.randn(1, 2, 1, 16, device=DEVICE), torch.randn(1, 5, 32, device=DEVICE)
    factor, _, scaled = polarity_parameters(None, power, encoding, 4.0)
    assert factor is None and torch.equal(scaled, encoding[0].view(5, 2, 16).transpose(0, 1))
