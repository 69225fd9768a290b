"""The factory, the rotary tables, the depthwise convolution, the weights of RALA."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.layers import get_notrace_modules, resample_abs_pos_embed
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from flash_bla.layers import (
    DepthwiseConv,
    Mlp,
    attention_options,
    axial_rope,
    check_attention_args,
    create_attention,
    register_attention,
    resample_encoding,
)
from flash_bla.layers.attention import _ATTENTIONS


def test_registered_attention_is_created_by_name(monkeypatch):
    monkeypatch.setattr("flash_bla.layers.attention._ATTENTIONS", dict(_ATTENTIONS))

    @register_attention("mean")
    class MeanAttention(nn.Module):
        def __init__(self, dim, num_heads=8, *, proj_drop=0.0, device=None, dtype=None):
            super().__init__()
            self.dim, self.proj_drop = dim, proj_drop

        def forward(self, x, grid):
            return x.mean(dim=1, keepdim=True).expand_as(x)

    attention = create_attention("mean", 8, 2, offer={"proj_drop": 0.5, "grid_size": (2, 2)})
    assert (attention.dim, attention.proj_drop) == (8, 0.5)
    assert attention_options("mean") == {"proj_drop"}
    assert MeanAttention in get_notrace_modules()
    with pytest.raises(ValueError, match="'mean' exists already"):
        register_attention("mean")(nn.Linear)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: create_attention("polaa", 32, 4), ValueError, "no attention is called 'polaa'; did you mean 'pola'"),
        (lambda: create_attention("xyz", 32, 4), ValueError, "valid are cross_window, focused"),
        (lambda: create_attention("linear", 32, 4, alpha=3), TypeError, "alpha"),
        (lambda: create_attention("linear", 32, 5), ValueError, "dim=32 cannot be divided into 5 heads"),
        (lambda: create_attention("softmax", 32, 5), ValueError, "dim=32 cannot be divided into 5 heads"),
        (lambda: create_attention("pola", 9, 3), ValueError, "multiple of 2 channels"),
        (lambda: create_attention("rala", 12, 2), ValueError, "multiple of 4 channels"),
        (lambda: create_attention("mlla", 6, 1), ValueError, "multiple of 4, got 6"),
        (lambda: create_attention("pola", 32, 4, kernel_size=4), ValueError, r"one of \(3, 5, 7\), got 4"),
        (lambda: check_attention_args(["pola", "softmax"], {"alpa": 1}), ValueError, "'alpa'; did you mean 'alpha'"),
        (
            lambda: create_attention("rala", 32, 4)(torch.zeros(1, 5, 32), (2, 3)),
            ValueError,
            "2x3 needs 6 tokens, got 5",
        ),
    ],
)
def test_errors_say_what_is_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(("old", "new", "prefix"), [((6, 6), (9, 13), 0), ((5, 9), (30, 3), 2), ((1, 1), (3, 2), 1)])
def test_resampling_is_that_of_timm(old, new, prefix):
    encoding = torch.randn(1, prefix + old[0] * old[1], 8, dtype=torch.float32)
    expected = resample_abs_pos_embed(encoding, new, old, prefix)
    torch.testing.assert_close(resample_encoding(encoding, new, old, prefix), expected, rtol=1e-5, atol=2e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(resample_encoding(encoding, new, old, prefix), expected, rtol=1e-5, atol=2e-6)
    assert resample_encoding(encoding.bfloat16(), new, old, prefix).dtype == torch.bfloat16


def test_rotary_tables_are_kept():
    x = torch.zeros(1, 2 + 12, 16)
    table = axial_rope(x, (3, 4), 16, num_heads=2)
    assert table.shape == (2, 14, 4, 2) and table.dtype == torch.float32
    assert (table[:, :2] == torch.tensor([1.0, 0.0])).all()
    assert axial_rope(x.double(), (3, 4), 16, num_heads=2) is table
    assert axial_rope(x, (4, 3), 16, num_heads=2) is not table
    assert axial_rope(x.to("meta"), (3, 4), 16, num_heads=2).device.type == "meta"
    torch.testing.assert_close(table.square().sum(-1), torch.ones(2, 14, 4))
    half = axial_rope(x.bfloat16(), (3, 4), 16, num_heads=2)
    torch.testing.assert_close(half, table.half())
    with torch.autocast("cpu", torch.bfloat16):
        assert axial_rope(x, (3, 4), 16, num_heads=2) is half


def test_rotary_tables_serve_training_after_inference_and_tracing():
    x, grid = torch.randn(1, 35, 16), (5, 7)
    with torch.inference_mode():
        axial_rope(x, grid, 16)
    with FakeTensorMode():
        assert axial_rope(torch.zeros(1, 35, 16), grid, 16).shape == (1, 35, 8, 2)
    table = axial_rope(x, grid, 16)
    assert type(table) is torch.Tensor and not table.is_inference()


def test_depthwise_conv_shares_filters_between_heads_and_skips_prefix_tokens():
    conv = DepthwiseConv(4, 3).double()
    x, grid = torch.randn(2, 1 + 15, 12, dtype=torch.float64), (3, 5)
    out = conv(x, grid)
    image = x[:, 1:].transpose(1, 2).reshape(2, 12, 3, 5)
    by_head = torch.cat([nn.Conv2d.forward(conv, head) for head in image.split(4, dim=1)], dim=1)
    torch.testing.assert_close(out[:, 1:], by_head.flatten(2).transpose(1, 2))
    assert out[:, 0].abs().max() == 0


@pytest.mark.parametrize(
    "name, conv, calls, options",
    [
        ("focused", "dwc", 1, {}),
        ("pola", "dwc", 1, {}),
        ("rala", "lepe", 1, {}),
        ("focused_lepe", "dwc", 1, {}),
        ("focused_lepe", "get_v", 1, {}),
        ("cross_window", "get_v", 4, {"split_size": 2}),  # for stripes of 2 rows and of 2 columns, and what remains
    ],
)
def test_convolutions_with_hooks_are_called(name, conv, calls, options):
    """And give what the one operator does, which reads their filters alone."""
    attention = create_attention(name, 16, 2, offer={"grid_size": (3, 5)}, dtype=torch.float64, **options)
    x, called = torch.randn(2, 15, 16, dtype=torch.float64), []
    expected = attention(x, (3, 5))
    attention.get_submodule(conv).register_forward_hook(lambda *arguments: called.append(arguments))
    torch.testing.assert_close(attention(x, (3, 5)), expected)
    assert len(called) == calls


def test_the_two_convolutions_of_cswin_are_one():
    attention = create_attention("focused_lepe", 16, 2, offer={"grid_size": (3, 4)}, dtype=torch.float64)
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    with torch.no_grad():
        v = attention.qkv(x)[..., 32:].transpose(1, 2).unflatten(2, (3, 4))
        image = F.conv2d(v, attention.get_v.weight, attention.get_v.bias, padding=1, groups=16)
        both = attention(x, (3, 4))
        attention.get_v.weight.zero_()
        attention.get_v.bias.zero_()
        one = attention(x, (3, 4))
    torch.testing.assert_close(both - one, image.flatten(2).transpose(1, 2) @ attention.proj.weight.T)


def test_hooks_of_a_linear_layer_see_what_is_multiplied():
    mlp = Mlp(8, 16)
    x, seen = torch.randn(2, 5, 8), []
    mlp.fc2.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    mlp(x)
    torch.testing.assert_close(*seen, F.gelu(mlp.fc1(x)))


@pytest.mark.parametrize("around", ["offloaded", "global hook"])
def test_what_is_put_around_a_linear_layer_is_called(around, monkeypatch):
    mlp, seen = Mlp(8, 16), []
    x = torch.randn(2, 5, 8)
    expected = mlp(x)
    see = lambda module, *_: seen.append(module)  # noqa: E731
    if around == "offloaded":  # as Accelerate does it
        forward = mlp.fc1.forward
        monkeypatch.setattr(mlp.fc1, "forward", lambda x: (see(mlp.fc1), forward(x))[1])
        torch.testing.assert_close(mlp(x), expected)
    else:
        hook = nn.modules.module.register_module_forward_hook(see)
        torch.testing.assert_close(mlp(x), expected)
        hook.remove()
    assert mlp.fc1 in seen
