"""Attention at extremes: signs far apart, features that vanish, no tokens, derivatives of other kinds."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from flash_bla import linear_attention, varlen_linear_attention
from flash_bla.ops import depthwise_conv, focusing_power, signed_power
from flash_bla.ops.triton_linear_attention import record_backward, record_forward
from flash_bla.ops.triton_support import Record
from tests.ops.cases import (
    DEVICE,
    TOLERANCE,
    VARIANTS,
    Variant,
    assert_close,
    compare,
    forward_backward,
    make_inputs,
)


@pytest.mark.parametrize("name", ["signed_power", "signed_power_weighted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("M", [49, 400])
def test_signed_power_of_signs_far_apart(name, dtype, M):
    """A sum over keys of one sign may be 10⁷ times that of the other, and the queries may have the other."""
    leaves, _, do = make_inputs((1, 2, M, M, 32, 32), VARIANTS[name], dtype)
    leaves["parameter"].fill_(4.0)
    leaves["q"][..., 0] -= 25
    leaves["k"][..., 0] += 25
    compare(name, leaves, do, TOLERANCE[dtype])


@pytest.mark.parametrize("exponent, scale", [(3, 1.0), (3, 10.0), (5, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("H, D", [(2, 16), (2, 24), (1, 24)])
@pytest.mark.parametrize("value, names", [(0.0, "qk"), (4e6, "q"), (4e6, "k")])
def test_focusing_power_at_the_limits_of_float32(value, names, exponent, scale, dtype, H, D):
    """Tokens without a positive channel, and tokens whose squared powers overflow."""
    leaves, _, do = make_inputs((1, H, 80, 80, D, D), VARIANTS["focusing_power"], dtype)
    leaves["parameter"].fill_(scale)
    for name in names:
        leaves[name][:, :, 3] = value
    q, k, v, parameter = (x.to(DEVICE).requires_grad_() for x in leaves.values())
    results = []
    for backend, kind in (("triton", None), ("reference", torch.float64)):
        inputs = [x.to(kind) if kind else x for x in (q, k, v)]
        phi = focusing_power(parameter.to(kind) if kind else parameter, exponent)
        o = linear_attention(*inputs, feature_map=phi, backend=backend)
        gradients = torch.autograd.grad(o, (q, k, v, parameter), do.to(o))
        assert all(x.isfinite().all() for x in gradients)
        if value == 0.0:  # where max(x, 0) has no slope
            assert not any(x[:, :, 3].any() for x in gradients[:2])
        results.append({"o": o.detach(), "token": o[:, :, 3].detach(), "dv": gradients[2]})
    assert_close(*results, TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["elu1", "focusing_power", "signed_power"])
@pytest.mark.parametrize("N", [50, 150])
@pytest.mark.parametrize("step, D_v", [(1, 64), (1, 32), (2, 64), (16, 64)])
def test_columns_with_gaps(name, N, step, D_v):
    """Channels that are no neighbours, and an output gradient that is one number."""
    parameter = 1.0 + torch.rand(2, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    kinds = {"focusing_power": focusing_power, "signed_power": signed_power}
    results = []
    for backend, dtype in (("triton", torch.bfloat16), ("reference", torch.float64)):
        generator = torch.Generator().manual_seed(1)
        x = [torch.randn(2, N, 2, d * step, generator=generator).to(torch.bfloat16) for d in (64, 64, D_v)]
        q, k, v = (t.to(DEVICE, dtype)[..., ::step].transpose(1, 2).requires_grad_() for t in x)
        a = parameter.to(dtype=torch.float32 if backend == "triton" else dtype)
        o = linear_attention(q, k, v, feature_map=kinds[name](a) if name in kinds else name, backend=backend)
        gradients = torch.autograd.grad(o.sum(), (q, k, v))
        results.append({"o": o.detach()} | dict(zip("qkv", gradients, strict=True)))
    assert_close(*results, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("rows", [(0, 1), (140, 141), (299, 300), (0, 300)])
def test_focusing_power_of_few_queries_with_gradients_by_their_ratios(rows):
    """Blocks of queries without any are left out."""
    leaves, _, do = make_inputs((8, 2, 300, 300, 16, 16), VARIANTS["focusing_power"], torch.float32)
    without = torch.ones(300, dtype=torch.bool)
    without[slice(*rows)] = False
    do[:, :, without] = 0.0
    compare("focusing_power", leaves, do, TOLERANCE[torch.float32], eps=1.0)


@pytest.mark.parametrize(
    "shape",
    [(1, 2, 100, 100, 64, 64), (1, 2, 150, 150, 64, 64), (1, 3, 300, 200, 24, 24)],
    ids=["summed again", "kept without the mean", "kept"],
)
def test_gradients_of_queries_alone(shape):
    """Of the keys they need no more than the state."""
    leaves, _, do = make_inputs(shape, VARIANTS["elu1"], torch.bfloat16)
    gradients = []
    for backend, dtype in (("triton", torch.bfloat16), ("reference", torch.float64)):
        q, k, v = (leaves[name].to(DEVICE, dtype) for name in "qkv")
        o = linear_attention(q.requires_grad_(), k, v, feature_map="elu1", backend=backend)
        gradients += torch.autograd.grad(o, q, do.to(o))
    assert (gradients[0] - gradients[1]).norm() <= TOLERANCE[torch.bfloat16] * gradients[1].norm()


@pytest.mark.parametrize("signs", ["minus", "both"])
@pytest.mark.parametrize("N", [100, 300])
def test_features_of_either_sign(signs, N):
    """Where denominators are positive, the values' mean is taken out of the gradients, too."""
    leaves, _, do = make_inputs((1, 2, N, N, 32, 32), Variant(None), torch.bfloat16)
    sign = -1.0 if signs == "minus" else (-1.0) ** torch.arange(32)
    for name in "qk":
        leaves[name] = (leaves[name].abs() + 0.2) * sign
    leaves["v"] += 100
    inputs = {name: x.bfloat16() for name, x in leaves.items()}, None, do
    results = forward_backward(linear_attention, Variant(None), inputs, backend="triton")
    expected = forward_backward(linear_attention, Variant(None), inputs, torch.float64, backend="reference")
    assert_close(results, expected, TOLERANCE[torch.bfloat16])


def test_rotary_features_have_no_parameter():
    q = torch.randn(1, 1, 4, 8, device=DEVICE)
    rope = torch.ones(1, 4, 4, 2, device=DEVICE)
    for feature_map in (focusing_power, signed_power):
        phi = feature_map(torch.ones(1, 8, device=DEVICE))
        with pytest.raises(ValueError, match=f"rope is not defined for {feature_map.__name__}"):
            linear_attention(q, q, q, feature_map=phi, rope=rope)
    with pytest.raises(TypeError, match="the parameter of signed_power must be a tensor, got float"):
        linear_attention(q, q, q, feature_map=signed_power(3.0))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_sequence_bounds_of_any_stride_and_no_tokens(backend):
    q = torch.randn(9, 2, 8, device=DEVICE)
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32, device=DEVICE)
    strided = torch.stack([bounds, bounds + 5], 1)[:, 0]
    got, want = (varlen_linear_attention(q, q, q, x, 5, feature_map="elu1", backend=backend) for x in (strided, bounds))
    assert torch.equal(got, want)
    none = q[:0].requires_grad_()
    o = varlen_linear_attention(none, none, none, bounds * 0, 1, feature_map="elu1", backend=backend)
    assert o.shape == none.shape
    o.sum().backward()


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("N, M, key_weight", [(3, 0, None), (0, 3, "softmax")])
def test_no_queries_or_no_keys(backend, N, M, key_weight):
    q, k, v = (torch.randn(1, 2, n, 8, device=DEVICE).requires_grad_() for n in (N, M, M))
    o = linear_attention(q, k, v, feature_map="elu1", key_weight=key_weight, backend=backend)
    assert torch.equal(o, torch.zeros(1, 2, N, 8, device=DEVICE))
    o.sum().backward()
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in (q, k, v))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_relu_does_not_hide_a_nan(backend):
    x = torch.randn(1, 4, 8, device=DEVICE)
    x[0, 0, 0] = torch.nan
    weight = torch.ones(8, 1, 3, 3, device=DEVICE)
    y = depthwise_conv(x, (2, 2), weight, activation="relu", backend=backend)
    assert y[..., 0].isnan().all() and y[..., 1:].isfinite().all()
    q = x.unsqueeze(1)
    o = linear_attention(q, q.nan_to_num(), q.nan_to_num(), feature_map="relu", backend=backend)
    assert o[0, 0, 0].isnan().all() and o[0, 0, 1:].isfinite().all()


@pytest.mark.parametrize("watched", [False, True])
def test_gradients_of_gradients_are_refused(watched):
    """Also those of the operators that a dispatch mode sees, and of given inputs alone."""
    x = torch.randn(1, 1, 6, 8, device=DEVICE).requires_grad_()
    with FlopCounterMode(display=False) if watched else nullcontext():
        loss = linear_attention(x, x, x, feature_map="elu1", backend="triton").sum()
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize("each", [False, True])
def test_gradients_by_transforms_are_those_of_the_reference(each):
    x = torch.randn(3, 1, 6, 8, device=DEVICE)

    def loss(x, **backend):
        return linear_attention(x, x, x, feature_map="elu1", **backend).square().sum()

    function = torch.func.vmap(torch.func.grad(lambda y: loss(y[None]))) if each else torch.func.grad(loss)
    y = x.double().requires_grad_()
    (want,) = torch.autograd.grad(loss(y, backend="reference"), y)
    torch.testing.assert_close(function(x).double(), want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="torch.func"):
        torch.func.grad(partial(loss, backend="triton"))(x)


def test_forward_mode_is_refused():
    x = torch.randn(1, 1, 6, 8, device=DEVICE)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(ValueError, match="torch.func"):
            linear_attention(dual, x, x, feature_map="elu1", backend="triton")
        tangent = forward_ad.unpack_dual(linear_attention(dual, x, x, feature_map="elu1")).tangent
    double = x.double()
    want = torch.func.jvp(
        lambda q: linear_attention(q, double, double, feature_map="elu1"), (double,), (torch.ones_like(double),)
    )[1]
    torch.testing.assert_close(tangent, want.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(torch.__version__ < "2.14", reason="Dynamo of PyTorch 2.11 has no guard for it")
def test_a_compiled_function_notices_forward_mode():
    x = torch.randn(1, 1, 6, 8, device=DEVICE)
    torch._dynamo.reset()
    attend = torch.compile(partial(linear_attention, feature_map="elu1", backend="triton"), backend="aot_eager")
    attend(x, x, x)
    with forward_ad.dual_level(), pytest.raises(ValueError, match="no forward-mode derivatives"):
        attend(forward_ad.make_dual(x, torch.ones_like(x)), x, x)


def test_more_sequences_than_a_grid_has_places_on_its_second_axis():
    q = torch.empty(70000, 1, 4, 8, device="meta")
    arguments = (q, q, q, None, None, torch.ones(1, 8, device="meta"), *[None] * 4)
    options = (4, "focusing_power", 3, True, None, 1e-6, False)
    launches = Record(lambda record, *inputs: record_forward(record, *inputs, options, True), arguments).launches
    ratios = torch.empty(70000, 2, 32, device="meta")  # of queries and keys, each padded to 16
    gradients = Record(
        lambda record, *inputs: record_backward(record, *inputs, options, True), (q, None, ratios, *arguments)
    )
    launches += gradients.launches
    names = {launch.kernel.__name__ for launch in launches}
    assert {"norm_ratio_kernel", "norm_ratio_gradient_kernel"} <= names
    assert all(max(launch.grid[1:]) <= 65535 for launch in launches)
