"""The reference, which everything else is held against, equals attention written out with its N × M weights."""

import pytest
import torch
import torch.nn.functional as F

from flash_bla.ops import FeatureMap, decoupled_la, focusing_power, linear_attention, signed_power, simple_la
from flash_bla.ops.reference import rotate
from tests.ops.cases import SHAPES, VARIANTS, assert_close, forward_backward, make_inputs


def explicit_attention(
    q, k, v, feature_map, key_weight, rope, key_encoding=0.0, normalize=True, scale=None, eps=1e-6
):  # fmt: skip
    """o = Σ_m A_nm v_m with A_nm = w_m (R φ(q_n) · R φ(k_m)) s / (mean_m w_m φ(q_n) · φ(k_m) + ε), A written out."""
    M = k.shape[2]
    k = k + key_encoding
    if isinstance(key_weight, str):  # RALA's, of which φ is elu + 1
        mean = (F.elu(q) + 1).mean(2)
        exponentials = torch.einsum("bhd,bhmd->bhm", mean, F.elu(k) + 1).div(q.shape[3] ** 0.5).exp()
        key_weight = exponentials / exponentials.mean(-1, keepdim=True)
    w = 1 if key_weight is None else key_weight[:, :, None, :]
    scale = 1 / M if scale is None else scale

    def attend(q, k, v):
        turned_q, turned_k = (q, k) if rope is None else (turn(q, rope), turn(k, rope))
        A = torch.einsum("bhnd,bhmd->bhnm", turned_q, turned_k) * w * scale
        if normalize:
            A = A / ((torch.einsum("bhnd,bhmd->bhnm", q, k) * w).mean(-1, keepdim=True) + eps)
        return A @ v

    if feature_map is None:
        return attend(q, k, v)
    if feature_map == "elu1":
        return attend(F.elu(q) + 1, F.elu(k) + 1, v)
    if feature_map == "relu":
        return attend(F.relu(q), F.relu(k), v)
    parameter = feature_map.parameter[:, None]
    if feature_map.name == "focusing_power":

        def focus(x):
            u = ((F.relu(x) + 1e-6) / parameter).transpose(1, 2).flatten(2)  # norms over all heads
            u = u**3 * u.norm(dim=-1, keepdim=True) / (u**3).norm(dim=-1, keepdim=True)
            return u.unflatten(2, (q.shape[1], -1)).transpose(1, 2)

        return attend(focus(q), focus(k), v)
    q_plus, q_minus, k_plus, k_minus = (F.relu(x) ** parameter for x in (q, -q, k, -k))
    keys = torch.cat([k_plus, k_minus], -1)
    v_same, v_opposite = v.chunk(2, -1)
    same, opposite = torch.cat([q_plus, q_minus], -1), torch.cat([q_minus, q_plus], -1)
    return torch.cat([attend(same, keys, v_same), attend(opposite, keys, v_opposite)], -1)


def turn(x, rope):
    """Rotation as a product of complex numbers."""
    return torch.view_as_real(
        torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.view_as_complex(rope)
    ).flatten(-2)


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[6], SHAPES[8]], ids=str)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_equals_explicit_attention(variant, shape):
    if not variant.fits(shape):
        pytest.skip("rope needs M = N")
    inputs = make_inputs(shape, variant, torch.float64)
    reference = forward_backward(linear_attention, variant, inputs, torch.float64, backend="reference")
    explicit = forward_backward(explicit_attention, variant, inputs, torch.float64)
    assert_close(reference, explicit, 1e-9)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_gradcheck(variant):
    leaves, rope, _ = make_inputs((1, 2, 5, 5, 4, 4), variant, torch.float64, seed=1)
    # finite differences must not step over the kink at 0
    leaves = {name: (x + 0.05 * x.sign()).double().requires_grad_() for name, x in leaves.items()}
    rope = None if rope is None else rope.double()
    maps = {"focusing_power": focusing_power, "signed_power": signed_power}

    def function(q, k, v, *rest):
        rest = dict(zip([name for name in leaves if name not in "qkv"], rest, strict=True))
        make = maps.get(variant.feature_map)
        feature_map = variant.feature_map if make is None else make(rest["parameter"])
        return linear_attention(
            q, k, v, feature_map=feature_map, key_weight="softmax" if variant.softmax else rest.get("key_weight"),
            key_encoding=rest.get("key_encoding"), rope=rope, backend="reference", **variant.options,
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, list(leaves.values()))


def test_simple_la_is_the_numerator_alone():
    q, k, v = (torch.randn(2, 3, 9, 16, dtype=torch.float64) for _ in range(3))
    torch.testing.assert_close(simple_la(q, k, v), (q @ k.transpose(2, 3)) @ v / 4)


def test_decoupled_la_divides_by_its_own_features():
    q, k, q_rope, k_rope = (torch.rand(2, 3, 9, 16, dtype=torch.float64) for _ in range(4))
    v = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    expected = (q_rope @ k_rope.transpose(2, 3)) @ v / 9 / ((q @ k.transpose(2, 3)).mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(decoupled_la(q, k, q_rope, k_rope, v), expected)


def test_derivative_at_zero_is_finite():
    """relu(x)ᵖ and p ↦ xᵖ have finite derivatives at x = 0, where a logarithm is not."""
    q, k, v = (torch.zeros(1, 1, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    power = torch.full((1, 8), 1.5, dtype=torch.float64, requires_grad=True)
    o = linear_attention(q, k, v, feature_map=signed_power(power))
    assert all(g.isfinite().all() for g in torch.autograd.grad(o.sum(), [q, k, v, power]))


def test_slope_of_elu1_at_zero():
    x = torch.zeros(1, 1, 1, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(FeatureMap("elu1")(x).sum(), x)[0].eq(1).all()


def test_rotation_keeps_the_norm():
    x, angle = torch.randn(2, 3, 7, 8), torch.randn(3, 7, 4)
    turned = rotate(x, torch.stack([angle.cos(), angle.sin()], dim=-1))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_the_encoding_is_read_in_the_type_of_the_keys():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 9, 8, dtype=torch.bfloat16)
    encoding = torch.randn(2, 9, 8)
    outputs = [linear_attention(q, k, v, feature_map="elu1", key_encoding=e) for e in (encoding, encoding.bfloat16())]
    assert torch.equal(*outputs)
