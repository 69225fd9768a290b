"""LinFusion's attention against its formula, computed here in float64 with explicit N x N weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from flash_bla.layers import GeneralizedLinearAttention

DIM, HEADS = 24, 3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def build(mid_dim=None, dtype=torch.float64, std=0.5):
    torch.manual_seed(0)
    attention = GeneralizedLinearAttention(DIM, HEADS, projection_mid_dim=mid_dim, dtype=dtype)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=std)
    return attention


def tokens(count, dtype=torch.float64, seed=1):
    return torch.randn(2, count, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def formula(attention, x, y=None):
    y = x if y is None else y
    entries = dict(attention.named_parameters())

    def residual(name, x):
        if f"{name}.0.weight" not in entries:
            return x
        first, weight, bias = (entries[f"{name}.{key}"] for key in ("0.weight", "1.weight", "1.bias"))
        x = x @ first.T + entries[f"{name}.0.bias"]
        x = x - x.mean(dim=-1, keepdim=True)
        x = x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * weight + bias
        return torch.where(x > 0, x, 0.01 * x) @ entries[f"{name}.3.weight"].T + entries[f"{name}.3.bias"]

    def heads(x):
        return x.reshape(*x.shape[:2], HEADS, DIM // HEADS).permute(0, 2, 1, 3)

    def features(x):
        return torch.where(x > 0, x + 1, x.clamp(max=0).exp())

    q = features(heads((x + residual("to_q_", x)) @ entries["to_q.weight"].T))
    k = features(heads((y + residual("to_k_", y)) @ entries["to_k.weight"].T))
    weights = q @ k.transpose(-1, -2) / y.shape[1]
    o = weights @ heads(y @ entries["to_v.weight"].T) / (weights.sum(dim=-1, keepdim=True) + 1e-4)
    return o.permute(0, 2, 1, 3).flatten(2) @ entries["to_out.0.weight"].T + entries["to_out.0.bias"]


def relative_error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("context", [None, 7, 20])
@pytest.mark.parametrize("mid_dim", [None, 10, -1])
def test_formula_and_its_gradients(mid_dim, context):
    attention = build(mid_dim)
    x = tokens(12).requires_grad_()
    y = None if context is None else tokens(context, seed=2)
    actual, expected = attention(x, encoder_hidden_states=y), formula(attention, x, y)
    assert relative_error(actual, expected) < 1e-10
    inputs = [x, *attention.parameters()]
    output_grad = torch.randn_like(actual)
    for a, b in zip(
        torch.autograd.grad(actual, inputs, output_grad),
        torch.autograd.grad(expected, inputs, output_grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_precisions(backend, dtype, tolerance, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("FLASH_BLA_BACKEND", backend)
    attention = build(dtype=dtype, std=0.2).to(DEVICE)
    x = tokens(70, dtype).to(DEVICE).requires_grad_()
    actual = attention(x)
    expected = formula(copy.deepcopy(attention).double(), x.double())
    assert actual.dtype == dtype and relative_error(actual, expected) < tolerance
    (x_grad,) = torch.autograd.grad(actual, x, torch.ones_like(actual))
    (expected_grad,) = torch.autograd.grad(expected, x, torch.ones_like(expected))
    assert relative_error(x_grad, expected_grad) < 4 * tolerance


@pytest.mark.parametrize("count", [16_384, 65_536])
def test_float16_holds_on_long_sequences(count):
    attention = build(dtype=torch.float16, std=0.3)
    x = 30 * tokens(count, torch.float16)[:1]
    with torch.no_grad():
        k = attention.to_k(x + attention.to_k_(x)).float()
        assert k.relu().sum(dim=1).max() > 4 * torch.finfo(torch.float16).max  # where sums in float16 end
        actual = attention(x)
        assert actual.isfinite().all()
        expected = attention.double()(x.double())  # equal to the formula, see above, which needs N x N weights
    assert relative_error(actual, expected) < 5e-3


def test_autocast_and_meta():
    attention, x = build(dtype=torch.float32), tokens(9, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention(x).dtype == torch.bfloat16
    assert (
        GeneralizedLinearAttention(DIM, HEADS, device="meta", dtype=torch.float16)(x.to("meta").half()).shape == x.shape
    )


def test_compiles_as_diffusers_calls_it():
    attention, x = build(dtype=torch.float32), tokens(9, torch.float32)
    call = {"encoder_hidden_states": None, "attention_mask": None, "scale": 1.0}
    torch._dynamo.reset()
    # Inductor without its code generation.
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager_decomp_partition")
    actual, expected = compiled(x, **call), attention(x, **call)
    torch.testing.assert_close(actual, expected)
    for a, b in zip(*(torch.autograd.grad(o.sum(), attention.parameters()) for o in (actual, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_bad_arguments():
    with pytest.raises(ValueError, match="dim=24 cannot be divided into 5 heads"):
        GeneralizedLinearAttention(DIM, 5)
    with pytest.raises(ValueError, match="takes no attention_mask"):
        build()(tokens(4), attention_mask=torch.zeros(2, 4))
