"""Kernels of the tokens' weights against float64: on the GPU where there is one, in Triton's interpreter elsewhere."""

import pytest
import torch

from flash_bla.layers.rank_augmented import key_weights
from flash_bla.ops import focusing_power, linear_attention
from flash_bla.ops.triton_token_weights import key_weights_forward, norm_ratios
from tests.ops.cases import DEVICE, TOLERANCE, assert_close

pytest.importorskip("triton")

# (B, H, N, M, D): one token, M ≠ N, widths that are no powers of two, odd heads, one tile of channels and several,
# whole sequences and splits, several blocks of rows, several sequences a program
SHAPES = [
    (2, 2, 1, 1, 16),
    (1, 3, 17, 40, 32),
    (2, 1, 70, 33, 24),
    (1, 5, 30, 30, 36),
    (1, 5, 140, 140, 16),
    (2, 1, 260, 260, 64),
    (1, 3, 270, 400, 8),
    (17, 1, 20, 3, 32),
    (1, 6, 20, 20, 128),
    (1, 1, 9, 9, 256),
]
CASES = [(shape, torch.float32) for shape in SHAPES]
CASES += [(shape, dtype) for shape in SHAPES[1:7:2] for dtype in (torch.bfloat16, torch.float16)]


def make_inputs(shape, dtype):
    """q and k, views of one projection where the shape allows it, a positive scale and gradients of the weights."""
    B, H, N, M, D = shape
    generator = torch.Generator().manual_seed(0)

    def randn(*size):
        return torch.randn(*size, generator=generator)

    if N == M:
        q, k, _ = randn(B, N, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
    else:
        q, k = randn(B, H, D, N).transpose(2, 3), randn(B, M, H, D).transpose(1, 2)
    scale = 0.5 + torch.rand(H, D, generator=generator)
    return q.to(dtype), k.to(dtype), scale, randn(B, H, N), randn(B, M, H).transpose(1, 2)


def norm_ratios_float64(q, k, scale, exponent):
    """The definition, ‖u‖ / ‖uᵖ‖, which float64 computes without overflow."""
    u = [(x.relu() + 1e-6) / scale[:, None] for x in (q, k)]
    ratios = [x.norm(dim=(1, 3)) / x.pow(exponent).norm(dim=(1, 3)) for x in u]
    return [r[:, None].expand(-1, q.shape[1], -1) for r in ratios]


def results(function, leaves, gradients, dtype=None):
    """Outputs and gradients of all leaves, on the test's device; ``dtype`` upcasts."""
    place = dict(device=DEVICE) if dtype is None else dict(device=DEVICE, dtype=dtype)
    leaves = [x.detach().to(**place).requires_grad_() for x in leaves]
    outputs = function(*leaves)
    inputs = torch.autograd.grad(outputs, leaves, [g.to(x) for g, x in zip(gradients, outputs, strict=True)])
    named = {f"output{i}": x.detach() for i, x in enumerate(outputs)}
    return named | {f"d{i}": g for i, g in enumerate(inputs)}


def both_norm_ratios(leaves, gradients, exponent):
    """Results of the operator and of the definition in float64."""
    return (
        results(lambda *x: norm_ratios(*x, exponent), leaves, gradients),
        results(lambda *x: norm_ratios_float64(*x, exponent), leaves, gradients, torch.float64),
    )


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_norm_ratios(shape, dtype):
    *leaves, dq, dk = make_inputs(shape, dtype)
    got, expected = both_norm_ratios(leaves, (dq, dk), 3)
    assert_close(got, expected, TOLERANCE[dtype])
    assert got["output0"].dtype == torch.float32 and got["d0"].dtype == dtype


@pytest.mark.parametrize("exponent", [1, 2, 5])
def test_norm_ratios_of_other_exponents(exponent):
    *leaves, dq, dk = make_inputs((1, 2, 20, 20, 24), torch.float32)
    got, expected = both_norm_ratios(leaves, (dq, dk), exponent)
    if exponent == 1:  # the ratio is 1 whatever the inputs are
        assert all(got[name].abs().max() < 1e-4 for name in ("d0", "d1", "d2"))
        got, expected = ({name: x[name] for name in ("output0", "output1")} for x in (got, expected))
    assert_close(got, expected, 1e-5)


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_key_weights(shape, dtype):
    q, k, _, _, dw = make_inputs(shape, dtype)
    got = results(lambda *x: key_weights_forward(*x)[:1], (q, k), (dw,))
    expected = results(lambda *x: [key_weights(*x)], (q, k), (dw,), torch.float64)
    if shape[3] == 1:  # a single key has weight 1 whatever the inputs are
        assert all(got[name].abs().max() == 0 for name in ("d0", "d1"))
        got, expected = ({"output0": x["output0"]} for x in (got, expected))
    assert_close(got, expected, TOLERANCE[dtype])
    assert got["output0"].dtype == torch.float32


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_norm_ratios_of_extreme_tokens(dtype):
    """Tokens without a positive channel, tiny and huge ones, and scales of many sizes."""
    size = torch.tensor([-1.0, 1e-3, 1.0, 3e4])[:, None]
    x = (size * (0.5 + torch.rand(4, 24, generator=torch.Generator().manual_seed(0)))).to(dtype)[None, None]
    scale = torch.logspace(-2, 2, 24)[None]
    one = torch.ones(1, 1, 4)
    got, expected = both_norm_ratios((x, x, scale), (one, one), 3)
    for name in ("output0", "output1"):
        torch.testing.assert_close(got[name], expected[name].float(), rtol=1e-4, atol=0)
    assert got["d0"][..., 0, :].abs().max() == 0  # there relu has slope 0
    assert got["d2"].isfinite().all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_key_weights_of_extreme_scores(dtype):
    """Scores of hundreds, keys whose weights underflow, and more splits than are added up at a time."""
    generator = torch.Generator().manual_seed(0)
    q, k = (size * torch.randn(1, 2, 700, 16, generator=generator) for size in (300, 0.02))
    k[:, :, 100:] -= 20
    q, k = q.to(DEVICE, dtype), k.to(DEVICE, dtype)
    expected = key_weights(q.double(), k.double()).float()
    assert 1 < expected[..., :100].amax() < 350 and expected[..., 100:].amax() == 0
    torch.testing.assert_close(key_weights_forward(q, k)[0], expected, rtol=1e-3, atol=0)


def test_two_runs_agree_bit_for_bit():
    *leaves, dq, dk = make_inputs((1, 3, 270, 270, 16), torch.bfloat16)
    for function, inputs, gradients in (
        (lambda *x: norm_ratios(*x, 3), leaves, (dq, dk)),
        (lambda *x: key_weights_forward(*x)[:1], leaves[:2], (dk,)),
    ):
        first, second = (results(function, inputs, gradients) for _ in "ab")
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_frozen_inputs_do_not_change_the_other_gradients(frozen):
    *leaves, dq, dk = make_inputs((1, 2, 20, 20, 16), torch.float32)
    expected = results(lambda *x: norm_ratios(*x, 3), leaves, (dq, dk))
    leaves = [x.to(DEVICE).requires_grad_(i != frozen) for i, x in enumerate(x.detach() for x in leaves)]
    torch.autograd.backward(norm_ratios(*leaves, 3), (dq.to(DEVICE), dk.to(DEVICE)))
    for i, x in enumerate(leaves):
        assert x.grad is None if i == frozen else torch.equal(x.grad, expected[f"d{i}"])


def test_opcheck():
    q, k, scale, *_ = (x.to(DEVICE) for x in make_inputs((1, 2, 20, 20, 16), torch.float32))
    for x in (q, k, scale):
        x.requires_grad_()
    torch.library.opcheck(norm_ratios, (q, k, scale, 3))
    torch.library.opcheck(key_weights_forward, (q, k))


def attend(q, k, scale):
    """Both weights as the attentions use them."""
    focused = linear_attention(q, k, k, feature_map=focusing_power(scale))
    return [focused, linear_attention(q, k, k, feature_map="elu1", key_weight=key_weights(q, k))]


def test_compiled_graph_holds_the_operators(monkeypatch):
    """Without a graph break, and not the reference's many small operations."""
    monkeypatch.setenv("FLASH_BLA_BACKEND", "triton")
    targets = []

    def record(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    leaves = (x.to(DEVICE) for x in make_inputs((1, 2, 20, 20, 16), torch.float32)[:3])
    torch.compile(attend, fullgraph=True, backend=record)(*leaves)
    assert all(any(name in target for target in targets) for name in ("norm_ratios", "key_weights"))
    assert not any("softmax" in target or "exp" in target.split(".") for target in targets)


def test_compiled_gradients(monkeypatch):
    monkeypatch.setenv("FLASH_BLA_BACKEND", "triton")
    leaves = make_inputs((1, 2, 20, 20, 16), torch.float32)[:3]
    gradients = (torch.ones(()).expand(1, 2, 20, 16).cumsum(3),) * 2
    eager = results(attend, leaves, gradients)
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"
    assert_close(results(torch.compile(attend, fullgraph=True, backend=backend), leaves, gradients), eager, 1e-5)


def test_empty_batch():
    q = torch.empty(0, 2, 5, 16, device=DEVICE, requires_grad=True)
    scale = torch.ones(2, 16, device=DEVICE, requires_grad=True)
    ratios = norm_ratios(q, q, scale, 3)
    weights = key_weights_forward(q, q)[0]
    assert [x.shape for x in (*ratios, weights)] == [(0, 2, 5)] * 3
    (sum(x.sum() for x in ratios) + weights.sum()).backward()
    assert q.grad.shape == q.shape and torch.equal(scale.grad, torch.zeros_like(scale))
