"""Softmax attention within windows and within stripes, against loops over pairs of tokens and over stripes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from flash_bla.layers import create_attention
from flash_bla.layers.window import _cached_window_tables, merge_windows, split_windows

DIM, HEADS = 24, 4
GRIDS = [(8, 8), (4, 12), (12, 3), (3, 2), (7, 10), (1, 9)]
NAMES = ["window", "window_shifted", "cross_window"]


def build(name, dtype=torch.float64, seed=0, **options):
    """An attention with every parameter random; windows of 4 and stripes of 3."""
    torch.manual_seed(seed)
    defaults = {"split_size": 3} if name == "cross_window" else {"window_size": 4, "shift": name == "window_shifted"}
    attention = create_attention(name.removesuffix("_shifted"), DIM, HEADS, **{**defaults, **options}, dtype=dtype)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.5)
    return attention.eval()


def tokens(grid, batch=2, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, grid[0] * grid[1], DIM, generator=generator, dtype=torch.float64).to(dtype)


def heads(x, count=HEADS):
    return x.reshape(*x.shape[:2], count, -1).transpose(1, 2)


def softmax_attention(q, k, v, bias=0.0):
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias
    return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)


def window_formula(module, x, grid):
    """All pairs of places: who sees whom, and with what bias. For shifts, only maps that need no padding."""
    (wy, wx), shift = module.window_size, [0, 0]
    sides = [min(wy, grid[0]), min(wx, grid[1])]
    if module.shift:
        shift = [w // 2 if w < length else 0 for w, length in zip((wy, wx), grid, strict=True)]
    height, width = (math.ceil(length / side) * side for length, side in zip(grid, sides, strict=True))
    padded = F.pad(x.unflatten(1, grid), (0, 0, 0, width - grid[1], 0, height - grid[0])).flatten(1, 2)
    places = [(y, x) for y in range(height) for x in range(width)]
    table = module.relative_position_bias_table.view(2 * wy - 1, 2 * wx - 1, HEADS)
    rows = []
    for y1, x1 in places:
        row = []
        for y2, x2 in places:
            seen = all(
                (a - s) // side == (b - s) // side
                for a, b, s, side in zip((y1, x1), (y2, x2), shift, sides, strict=True)
            )
            row.append(table[y1 - y2 + wy - 1, x1 - x2 + wx - 1] if seen else torch.full_like(table[0, 0], -math.inf))
        rows.append(torch.stack(row))
    bias = torch.stack(rows).permute(2, 0, 1)
    out = softmax_attention(*(heads(y) for y in module.qkv(padded).chunk(3, dim=-1)), bias)
    return module.proj(out.unflatten(1, (height, width))[:, : grid[0], : grid[1]].flatten(1, 2))


def cross_window_formula(module, x, grid):
    """Half of the channels in vertical stripes, half in horizontal ones, a stripe after the other."""
    qkv = [y.unflatten(1, grid) for y in module.qkv(x).chunk(3, dim=-1)]
    half = DIM // 2
    out = torch.zeros(*qkv[0].shape, dtype=x.dtype)
    for dim, channels in ((2, slice(0, half)), (1, slice(half, DIM))):
        for start in range(0, grid[dim - 1], module.split_size):
            stripe = [slice(None)] * 3
            stripe[dim] = slice(start, start + module.split_size)
            q, k, v = (y[(*stripe, channels)] for y in qkv)
            image, filters = v.permute(0, 3, 1, 2), (module.get_v.weight[channels], module.get_v.bias[channels])
            image = F.conv2d(image, *filters, padding=1, groups=half)
            attended = softmax_attention(*(heads(y.flatten(1, 2), HEADS // 2) for y in (q, k, v)))
            out[(*stripe, channels)] = attended.view(v.shape) + image.permute(0, 2, 3, 1)
    return module.proj(out.flatten(1, 2))


def is_padded(grid):
    return any(length > 4 and length % 4 for length in grid)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", NAMES)
def test_formula_and_its_gradients(name, grid):
    if name == "window_shifted" and is_padded(grid):
        pytest.skip("compared with timm's in tests/models/test_swin.py")
    attention = build(name)
    reference = copy.deepcopy(attention)
    x, x_reference = (tokens(grid).requires_grad_() for _ in range(2))
    actual = attention(x, grid)
    expected = (cross_window_formula if name == "cross_window" else window_formula)(reference, x_reference, grid)
    torch.testing.assert_close(actual, expected)
    gradient = torch.randn_like(actual)
    actual.backward(gradient)
    expected.backward(gradient)
    torch.testing.assert_close(x.grad, x_reference.grad)
    for (key, p), wanted in zip(attention.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, wanted.grad, msg=key)


def test_rectangular_windows():
    attention = build("window_shifted", window_size=(2, 6))
    torch.testing.assert_close(attention(tokens((6, 12)), (6, 12)), window_formula(attention, tokens((6, 12)), (6, 12)))


def test_a_small_map_is_one_cross_shaped_window():
    attention, x, grid = build("cross_window", split_size=5), tokens((4, 5)), (4, 5)
    q, k, v = attention.qkv(x).chunk(3, dim=-1)
    expected = softmax_attention(heads(q), heads(k), heads(v)) + attention.get_v(v, grid)
    torch.testing.assert_close(attention(x, grid), attention.proj(expected))


def test_windows_are_split_and_merged():
    x = torch.arange(2 * 6 * 4 * 3).view(2, 6, 4, 3)
    windows = split_windows(x, (3, 2))
    assert windows.shape == (8, 6, 3)
    torch.testing.assert_close(windows[1], x[0, :3, 2:].flatten(0, 1))
    torch.testing.assert_close(merge_windows(windows, (3, 2), (6, 4)), x)


def smooth(window):
    """A table ((2h-1)(2w-1), heads) of a function of the offset over the table's extent."""
    y, x = (torch.arange(1 - side, side, dtype=torch.float64) / (side - 0.5) for side in window)
    table = torch.exp(-2 * (y[:, None] ** 2 + x**2)) + 0.2 * y[:, None]
    return table.flatten()[:, None] * torch.linspace(1, 2, HEADS, dtype=torch.float64)


@pytest.mark.parametrize("window", [(12, 12), (10, 14), (5, 5)])
def test_the_table_follows_the_window(window):
    attention = build("window", window_size=7)
    with torch.no_grad():
        attention.relative_position_bias_table.copy_(smooth((7, 7)))
    loaded = build("window", window_size=window)
    loaded.load_state_dict(attention.state_dict())
    attention.relative_position_bias_table.requires_grad_(False)
    attention.set_window_size(window)
    assert attention.window_size == window and not attention.relative_position_bias_table.requires_grad
    table = attention.relative_position_bias_table
    torch.testing.assert_close(loaded.relative_position_bias_table.detach(), table)
    assert (table - smooth(window)).norm() <= 0.02 * smooth(window).norm()
    attention.set_window_size(window)
    assert attention.relative_position_bias_table is table  # what fits stays as it is
    torch.testing.assert_close(loaded(tokens((9, 6)), (9, 6)), attention(tokens((9, 6)), (9, 6)))


def test_a_table_of_another_kind_is_not_resampled():
    attention = build("window")
    for shape in ((7 * 5, HEADS), (7 * 7, HEADS + 1)):  # no square window; other heads
        entries = {**attention.state_dict(), "relative_position_bias_table": torch.zeros(shape)}
        with pytest.raises(RuntimeError, match="size mismatch for relative_position_bias_table"):
            attention.load_state_dict(entries)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build("window")(torch.zeros(1, 17, DIM), (4, 4)), "no class or register tokens: grid 4x4.*17 tokens"),
        (lambda: build("cross_window")(torch.zeros(1, 17, DIM), (4, 4)), "no class or register tokens"),
        (lambda: build("window")(torch.zeros(1, 15, DIM), (4, 4)), "4x4 needs 16 tokens, got 15"),
        (lambda: create_attention("window", 24, 5), "dim=24 cannot be divided into 5 heads"),
        (lambda: create_attention("cross_window", 24, 5), "dim=24 cannot be divided into 5 heads"),
        (lambda: create_attention("cross_window", 24, 3), "even number of heads, got 3"),
        (lambda: build("window", window_size=0), "window_size must be positive, got 0"),
        (lambda: build("window").set_window_size((3, -1)), r"window_size must be positive, got \(3, -1\)"),
        (lambda: build("cross_window", split_size=0), "split_size must be positive, got 0"),
    ],
)
def test_errors_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", NAMES)
def test_dropout_only_in_training(name):
    attention, x, grid = build(name, attn_drop=0.5), tokens((8, 6)), (8, 6)
    torch.testing.assert_close(attention(x, grid), build(name)(x, grid))
    assert not torch.allclose(attention.train()(x, grid), build(name)(x, grid))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision(name, dtype):
    attention, x, grid = build(name, dtype=torch.float32), tokens((8, 6), dtype=torch.float32), (8, 6)
    expected = copy.deepcopy(attention).double()(x.double(), grid)
    tolerance = 5e-2 if dtype == torch.bfloat16 else 5e-3
    half = copy.deepcopy(attention).to(dtype)
    out = half(x.to(dtype), grid)
    assert out.dtype == dtype and (out.double() - expected).norm() < tolerance * expected.norm()
    out.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in half.parameters())
    with torch.autocast("cpu", dtype=dtype):
        out = attention(x, grid)
    assert out.dtype == dtype and (out.double() - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("grid", [(8, 8), (6, 3)])
@pytest.mark.parametrize("name", NAMES)
def test_compile_export_and_meta(name, grid):
    attention, x = build(name, dtype=torch.float32), tokens(grid, dtype=torch.float32)
    expected = attention(x, grid)
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")(x, grid)
    torch.testing.assert_close(compiled, expected)
    gradients = (torch.autograd.grad(y.square().sum(), attention.parameters()) for y in (compiled, expected))
    for actual, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-4)
    exported = torch.export.export(attention, (x, grid))
    torch.testing.assert_close(exported.module()(x, grid), expected)
    assert copy.deepcopy(attention).to("meta")(x.to("meta"), grid).shape == x.shape


def test_tables_serve_training_after_inference_and_tracing():
    _cached_window_tables.cache_clear()
    attention, x, grid = build("window_shifted", dtype=torch.float32), tokens((8, 8), dtype=torch.float32), (8, 8)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert attention(mode.from_tensor(x), grid).shape == x.shape
    assert _cached_window_tables.cache_info().currsize == 0
    with torch.inference_mode():
        attention(x, grid)
    attention(x, grid).sum().backward()
    assert _cached_window_tables.cache_info().hits == 1
    assert attention.relative_position_bias_table.grad.isfinite().all()
