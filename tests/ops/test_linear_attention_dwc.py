"""Linear attention with the convolution beside it: what the two operators make one after the other."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flash_bla import linear_attention, linear_attention_dwc
from flash_bla.ops import depthwise_conv, focusing_power, signed_power
from flash_bla.ops.triton_linear_attention_dwc import linear_attention_dwc_forward
from tests.ops.cases import DEVICE, TOLERANCE, assert_close

pytest.importorskip("triton")

H, GRID = 2, (3, 5)


def make_options(name, tokens, width, double=False):
    """Options of the attention, and those of its tensors that are differentiated."""
    generator = torch.Generator().manual_seed(1)
    parameter = (1 + torch.rand(H, width, generator=generator)).to(DEVICE)
    encoding = torch.randn(H, tokens, width, generator=generator).to(DEVICE)
    if double:
        parameter, encoding = parameter.double(), encoding.double()
    parameter.requires_grad_(), encoding.requires_grad_()
    if name == "signed_power":
        return dict(feature_map=signed_power(parameter), key_encoding=encoding), [parameter, encoding]
    if name == "focusing_power":
        return dict(feature_map=focusing_power(parameter), key_encoding=encoding), [parameter, encoding]
    return dict(feature_map="elu1", key_weight=None if name == "elu1" else name), []


def run(function, name, parts, tokens, width, dtype, double=False, **options):
    """Output and gradients of a call, with ``parts`` tensors in one and prefix tokens before those of the grid."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape, scale=1.0, dtype=torch.float32):
        x = (scale * torch.randn(*shape, generator=generator)).to(dtype).to(DEVICE)
        return (x.double() if double else x).requires_grad_()

    packed = leaf(2, tokens, parts, H, width, dtype=dtype)
    v = leaf(2, tokens, H * width, dtype=dtype) if parts == 2 else None
    weight, bias = leaf(width, 1, 3, 3, scale=0.3), leaf(width)
    more, parameters = make_options(name, tokens, width, double)
    y = function(packed, GRID, weight, bias, v=v, **more, **options)
    dy = torch.randn(*y.shape, generator=generator).to(DEVICE, dtype).to(y.dtype)
    inputs = [x for x in (packed, v, weight, bias, *parameters) if x is not None]
    return dict(enumerate([y, *torch.autograd.grad(y, inputs, dy)]))


def one_after_the_other(packed, grid, weight, bias, *, v, **options):
    q, k, *others = packed.unbind(2)
    v = others[0] if v is None else v.unflatten(2, (H, -1))
    o = linear_attention(*(x.transpose(1, 2) for x in (q, k, v)), **options)
    gate = others[1].flatten(2) if len(others) == 2 else None
    return depthwise_conv(v.flatten(2), grid, weight, bias, add=o.transpose(1, 2).flatten(2), gate=gate)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize("name", ["elu1", "softmax", "focusing_power", "signed_power"])
def test_equals_both_operators(name, parts, dtype, backend):
    # class and register tokens before those of the grid
    expected = run(one_after_the_other, name, parts, 17, 16, dtype, double=True)
    results = run(linear_attention_dwc, name, parts, 17, 16, dtype, backend=backend)
    assert_close(results, expected, TOLERANCE[dtype])


def test_values_that_are_cut():
    expected = run(one_after_the_other, "elu1", 4, 15, 256, torch.float32, double=True)
    results = run(linear_attention_dwc, "elu1", 4, 15, 256, torch.float32, backend="triton")
    assert_close(results, expected, TOLERANCE[torch.float32])


# the second so wide in q and k that narrower values are cut, too
@pytest.mark.parametrize(("width", "value_width"), [(16, 24), (256, 48)])
def test_values_of_another_width(width, value_width):
    leaves = [torch.randn(*shape, device=DEVICE) for shape in
              ((2, 15, 2, H, width), (2, 15, H * value_width), (value_width, 1, 5, 5), (value_width,))]  # fmt: skip
    dy = torch.randn(2, 15, H * value_width, device=DEVICE)
    results = []
    for function, dtype, options in ((linear_attention_dwc, torch.float32, {"backend": "triton"}),
                                     (one_after_the_other, torch.float64, {})):  # fmt: skip
        packed, v, weight, bias = inputs = [x.to(dtype).requires_grad_() for x in leaves]
        y = function(packed, GRID, weight, bias, v=v, feature_map="elu1", **options)
        results.append(dict(enumerate([y, *torch.autograd.grad(y, inputs, dy.to(dtype))])))
    assert_close(*results, TOLERANCE[torch.float32])


def test_operations_are_counted():
    packed, v = torch.randn(2, 15, 2, H, 16, device=DEVICE), torch.randn(2, 15, H * 24, device=DEVICE)
    weight = torch.randn(24, 1, 3, 3, device=DEVICE)
    with FlopCounterMode(display=False) as counter:
        linear_attention_dwc(packed, GRID, weight, v=v, feature_map="elu1", backend="triton")
    products = 2 * 2 * H * 15 * 16 * (24 + 24 + 1)  # the state, the output, the denominator
    assert counter.get_total_flops() == products + 2 * 2 * 15 * H * 24 * 9


@pytest.mark.parametrize("parts", [3, 4])
def test_gradient_is_one_tensor(parts):
    packed = torch.randn(1, 15, parts, H, 16, device=DEVICE, requires_grad=True)
    weight = torch.randn(16, 1, 3, 3, device=DEVICE)
    y = linear_attention_dwc(packed, GRID, weight, feature_map="elu1", backend="triton")
    (gradient,) = torch.autograd.grad(y.sum(), packed)
    assert gradient.is_contiguous() and gradient.untyped_storage().nbytes() == 4 * gradient.numel()


@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize("name", ["softmax", "focusing_power"])
def test_opcheck(name, parts):
    packed = torch.randn(1, 15, parts, H, 16, device=DEVICE, requires_grad=True)
    v = torch.randn(1, 15, H * 16, device=DEVICE, requires_grad=True) if parts == 2 else None
    weight, bias = (torch.randn(*shape, device=DEVICE, requires_grad=True) for shape in ((16, 1, 3, 3), (16,)))
    focusing = name == "focusing_power"
    parameter = torch.full((H, 16), 1.5, device=DEVICE, requires_grad=True) if focusing else None
    encoding = torch.randn(H, 15, 16, device=DEVICE, requires_grad=True) if focusing else None
    torch.library.opcheck(
        linear_attention_dwc_forward,
        (weight, bias, *GRID, packed, None, v, None, None, parameter, None, encoding, None, None, 0,
         "focusing_power" if focusing else "elu1", 3, True, None, 1e-6, not focusing),
    )  # fmt: skip


def test_frozen_filters_need_no_gradient():
    packed, weight, bias = (torch.randn(*shape, device=DEVICE) for shape in ((1, 15, 4, H, 16), (16, 1, 3, 3), (16,)))
    gradients = []
    for trained in ((packed, weight, bias), (packed, bias)):
        [x.requires_grad_(any(x is y for y in trained)) for x in (packed, weight, bias)]
        y = linear_attention_dwc(packed, GRID, weight, bias, feature_map="elu1", backend="triton")
        gradients.append(torch.autograd.grad(y.sum(), trained))
    (d_packed, _, d_bias), results = gradients
    assert torch.equal(results[0], d_packed) and torch.equal(results[1], d_bias)


def test_errors():
    x, weight = torch.rand(2, 15, 4, H, 16), torch.rand(16, 1, 3, 3)
    with pytest.raises(ValueError, match=r"qkv must have shape \(B, N, 3 or 4, H, D\), got \(2, 15, 2, 2, 16\)"):
        linear_attention_dwc(x[:, :, :2], GRID, weight)
    with pytest.raises(ValueError, match=r"qkv must have shape .*, beside v, got \(2, 15, 4, 2, 16\)"):
        linear_attention_dwc(x, GRID, weight, v=x[:, :, 2].flatten(2))
    with pytest.raises(ValueError, match=r"v must have shape \(2, 15, 2·Dv\) .*, got \(2, 14, 32\)"):
        linear_attention_dwc(x[:, :, :2], GRID, weight, v=x[:, 1:, 2].flatten(2))
    with pytest.raises(TypeError, match="v must have the dtype of qkv, torch.float32, got torch.float16"):
        linear_attention_dwc(x[:, :, :2], GRID, weight, v=x[:, :, 2].flatten(2).half())
    with pytest.raises(ValueError, match="grid must be positive"):
        linear_attention_dwc(x, (4, 5), weight)
    with pytest.raises(ValueError, match="weight's channels must divide those of x, 32, got 24"):
        linear_attention_dwc(x, GRID, torch.rand(24, 1, 3, 3))
