"""What weighs tokens inside the operator, at its extremes: the norm ratios of focusing_power and RALA's softmax."""

import pytest
import torch

from flash_bla.ops import focusing_power, linear_attention
from tests.ops.cases import DEVICE, TOLERANCE, Variant, assert_close, forward_backward, make_inputs

pytest.importorskip("triton")

FOCUSING, SOFTMAX = Variant("focusing_power"), Variant(softmax=True, rope=True)


def both(variant, inputs, **options):
    """Results of the kernels and of the reference in float64."""
    return (
        forward_backward(linear_attention, variant, inputs, backend="triton", **options),
        forward_backward(linear_attention, variant, inputs, torch.float64, backend="reference", **options),
    )


SHAPES = [  # (H, N, M, D, Dv)
    (1, 70, 70, 24, 24),  # its loops compute the norms
    (2, 270, 270, 64, 64),  # the outputs' loop computes the queries'
    (3, 140, 140, 32, 32),
    (7, 70, 70, 16, 16),  # so do tiles of several heads, the last of fewer
    (5, 67, 40, 8, 8),
    (2, 100, 90, 20, 33),
    (3, 70, 70, 32, 32),  # a launch for them all
    (5, 70, 70, 64, 64),  # several parts of a token's channels
    (6, 70, 70, 128, 128),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norms_run_over_all_heads(shape):
    inputs = make_inputs((2, *shape), FOCUSING, torch.bfloat16)
    assert_close(*both(FOCUSING, inputs), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("H", [1, 3])
def test_norms_without_denominator(normalize, H):
    """Without one the queries' ratio does not cancel."""
    inputs = make_inputs((1, H, 40, 70, 24, 24), FOCUSING, torch.bfloat16)
    assert_close(*both(FOCUSING, inputs, normalize=normalize), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("exponent", [1, 2, 5])
@pytest.mark.parametrize("H", [1, 2])
def test_other_exponents(exponent, H):
    generator = torch.Generator().manual_seed(0)
    q, k, v, do = torch.randn(4, 1, H, 50, 24, generator=generator)
    scale = 0.5 + torch.rand(H, 24, generator=generator)
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = [x.to(DEVICE, dtype).requires_grad_() for x in (q, k, v, scale)]
        o = linear_attention(*leaves[:3], feature_map=focusing_power(leaves[3], exponent), backend=backend)
        gradients = torch.autograd.grad(o, leaves, do.to(o))
        results.append({"o": o.detach()} | dict(zip(("dq", "dk", "dv", "dscale"), gradients, strict=True)))
    assert_close(*results, 1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("H, N", [(2, 64), (1, 80), (2, 80)])
def test_extreme_tokens(dtype, H, N):
    """Tokens without a positive channel, in one head or in all, tiny and huge ones, and scales of many sizes."""
    leaves, _, do = make_inputs((1, H, N, N, 16, 16), FOCUSING, torch.float32)
    size = torch.tensor([1.0, 1e-3, 1.0, 1e3]).repeat(N // 4)[:, None]
    for name in "qk":
        leaves[name] = leaves[name] * size
        leaves[name][:, :, 2::8] = -leaves[name][:, :, 2::8].abs()
        leaves[name][:, 0, 3::8] = -leaves[name][:, 0, 3::8].abs()
    leaves = {name: x if name == "parameter" else x.to(dtype) for name, x in leaves.items()}
    leaves["parameter"] = torch.logspace(-1, 1, 16 * H).view(H, 16)
    got, expected = both(FOCUSING, (leaves, None, do.to(dtype)))
    torch.testing.assert_close(got["o"].double(), expected["o"], rtol=0, atol=4 * TOLERANCE[dtype])
    largest = torch.finfo(dtype).max
    assert all((x.isfinite() | (expected[name].abs() > largest)).all() for name, x in got.items())
    assert all(got[name][:, :, 2::8].abs().max() == 0 for name in ("dq", "dk"))  # there relu has slope 0


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_softmax_of_extreme_scores(dtype):
    """Scores of hundreds that grow from block to block, keys whose weights underflow, and many splits."""
    leaves, rope, do = make_inputs((1, 2, 700, 700, 16, 16), SOFTMAX, torch.float32)
    leaves["q"] = leaves["q"].abs() * 100
    leaves["k"] = leaves["k"] * 0.02 + torch.linspace(-3, 0, 700)[:, None]
    leaves = {name: x.to(dtype) for name, x in leaves.items()}
    got, expected = both(SOFTMAX, (leaves, rope, do.to(dtype)))
    assert_close(got, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("variant", [FOCUSING, SOFTMAX], ids=["focusing", "softmax"])
@pytest.mark.parametrize("H", [1, 3])
def test_two_runs_agree_bit_for_bit(variant, H):
    inputs = make_inputs((1, H, 270, 270, 16, 16), variant, torch.bfloat16)
    first, second = (forward_backward(linear_attention, variant, inputs, backend="triton") for _ in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("variant", [FOCUSING, SOFTMAX], ids=["focusing", "softmax"])
@pytest.mark.parametrize("trained", ["q", "k", "v"])
@pytest.mark.parametrize("H", [1, 2])
def test_frozen_inputs_do_not_change_the_other_gradients(variant, trained, H):
    leaves, rope, do = make_inputs((1, H, 40, 40, 16, 16), variant, torch.float32)
    expected = forward_backward(linear_attention, variant, (leaves, rope, do), backend="triton")
    leaves = {name: x.to(DEVICE).requires_grad_(name == trained) for name, x in leaves.items()}
    phi = focusing_power(leaves["parameter"]) if "parameter" in leaves else "elu1"
    rope = None if rope is None else rope.to(DEVICE)
    key_weight = "softmax" if variant.softmax else None
    o = linear_attention(
        leaves["q"], leaves["k"], leaves["v"], feature_map=phi, key_weight=key_weight, rope=rope, backend="triton"
    )
    o.backward(do.to(DEVICE))
    torch.testing.assert_close(leaves[trained].grad, expected[f"d{trained}"], rtol=1e-5, atol=1e-5)
