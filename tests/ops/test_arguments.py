"""Wrong arguments are told with what came and what is wanted; autocast and the choice of the backend."""

import pytest
import torch

from flash_bla.ops import decoupled_la, linear_attention, signed_power, simple_la, varlen_linear_attention
from flash_bla.ops.triton_support import HAS_TRITON
from tests.ops.cases import DEVICE

X = torch.rand(2, 3, 8, 16)
HALF = X.half()


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X[0], X, X), {}, ValueError, r"q must have 4 dimensions .* got \(3, 8, 16\)"),
        ((X, X[:, :2], X), {}, ValueError, r"k must have shape .* here \(2, 3, 8, 16\), got \(2, 2, 8, 16\)"),
        ((X, X[..., :8], X), {}, ValueError, r"k must have shape"),
        ((X, X, X[:, :, :4]), {}, ValueError, r"v must have shape .* M of k, here \(2, 3, 8, 16\), got \(2, 3, 4,"),
        ((X, HALF, X), {}, TypeError, r"k must have the dtype of q, torch.float32, got torch.float16"),
        ((X.int(), X, X), {}, TypeError, r"q must be float16, .*got torch.int32"),
        ((X, X, X.to("meta")), {}, ValueError, r"v must be on cpu like the other tensors, got meta"),
        ((X, X, [1]), {}, TypeError, r"v must be a tensor .* got list"),
        ((X, X, X), dict(feature_map="elu"), ValueError, r"feature_map must be one of .*got 'elu'"),
        ((X, X, X), dict(feature_map="signed_power"), ValueError, r"pass flash_bla.ops.signed_power"),
        ((X, X, X), dict(feature_map=signed_power(torch.ones(16))), ValueError, r"shape \(H, D\), here \(3, 16\)"),
        ((X, X, X[..., :3]), dict(feature_map=signed_power(torch.ones(3, 16))), ValueError, r"must be even, got 3"),
        ((X, X, X), dict(key_weight=torch.ones(2, 3, 9)), ValueError, r"key_weight must be broadcast.*\(2, 3, 9\)"),
        ((X, X, X), dict(key_encoding=torch.ones(3, 9, 16)), ValueError, r"key_encoding must be broad.*\(3, 8, 16\)"),
        ((X, X, X), dict(key_encoding=0.5), TypeError, "key_encoding must be a tensor, got float"),
        ((X, X, X), dict(key_weight=0.5), TypeError, "key_weight must be a tensor, got float"),
        ((X, X, X), dict(rope=(X, X)), TypeError, r"rope must be a tensor"),
        ((X, X, X), dict(rope=torch.ones(1, 8, 8)), ValueError, r"rope must have shape .*\(3, 8, 8, 2\)"),
        ((X[:, :, :4], X, X), dict(rope=torch.ones(1, 8, 8, 2)), ValueError, r"as many keys as queries"),
        ((X, X, X), dict(backend="cuda"), ValueError, r"backend .* must be one of .* got 'cuda'"),
        ((X.double(),) * 3, dict(backend="triton"), TypeError, r"float64 is for the reference"),
    ],
)  # fmt: skip
def test_errors(arguments, options, error, message):
    with pytest.raises(error, match=message):
        linear_attention(*arguments, **options)


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_a_wrong_word_after_the_right_one():
    q = X.to(DEVICE)
    linear_attention(q, q, q, key_weight="softmax", backend="triton")
    with pytest.raises(ValueError, match="key_weight must be a tensor, \"softmax\" or None, got 'sofmax'"):
        linear_attention(q, q, q, key_weight="sofmax", backend="triton")


def test_errors_of_the_other_functions():
    with pytest.raises(ValueError, match="q_rope must have shape the shape of q"):
        decoupled_la(X, X, X[..., :8], X, X)
    tokens = torch.rand(10, 2, 8)
    with pytest.raises(ValueError, match=r"q must have 3 dimensions \(total, H, D\)"):
        varlen_linear_attention(X, X, X, torch.tensor([0, 8], dtype=torch.int32), 8)
    with pytest.raises(ValueError, match="cu_seqlens must be int32"):
        varlen_linear_attention(tokens, tokens, tokens, torch.tensor([0, 10]), 10)
    with pytest.raises(ValueError, match=r"cu_seqlens must run from 0 to 10.*got \[0, 9\]"):
        varlen_linear_attention(tokens, tokens, tokens, torch.tensor([0, 9], dtype=torch.int32), 10)


def test_signed_powers_need_their_denominator():
    with pytest.raises(ValueError, match="normalize=False is not defined for signed_power"):
        linear_attention(X, X, X, feature_map=signed_power(torch.ones(X.shape[1], X.shape[3])), normalize=False)


def test_environment_variable_forces_the_backend(monkeypatch):
    monkeypatch.setenv("FLASH_BLA_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="FLASH_BLA_BACKEND"):
        simple_la(X, X, X)
    simple_la(X, X, X, backend="reference")  # the argument goes before the variable
    monkeypatch.setenv("FLASH_BLA_BACKEND", "triton")
    with pytest.raises(TypeError, match="float64 is for the reference"):
        simple_la(X.double(), X.double(), X.double())


def test_autocast_casts_and_keeps_float32_inside():
    with torch.autocast("cpu", torch.bfloat16):
        o = linear_attention(X, X, X, feature_map="elu1")
    assert o.dtype == torch.bfloat16
    expected = linear_attention(*(X.bfloat16().double(),) * 3, feature_map="elu1")
    assert (o - expected).norm() / expected.norm() < 3e-3  # one rounding, that of the result


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_reference_keeps_the_dtype(dtype):
    assert linear_attention(*(X.to(dtype),) * 3, feature_map="relu").dtype == dtype
