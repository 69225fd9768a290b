"""Each attention against its formula, computed here in float64 with explicit N x N weights."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flash_bla.layers import create_attention

NAMES = ["linear", "focused", "pola", "mlla", "rala", "rala_softmax", "softmax"]
DIM, HEADS = 24, 3


def build(name, grid_size=(4, 4), dtype=torch.float64, seed=0):
    """An attention with every parameter random, those that begin at zero too."""
    torch.manual_seed(seed)
    options = {"grid_size": grid_size}
    attention = create_attention(name, DIM, HEADS, offer=options, dtype=dtype)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.5)
    return attention


def tokens(grid, prefix=0, batch=2, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, prefix + grid[0] * grid[1], DIM, generator=generator, dtype=torch.float64).to(dtype)


# --- the formulas -----------------------------------------------------------------------------------------------------


def heads(x):
    return x.reshape(*x.shape[:2], HEADS, DIM // HEADS).permute(0, 2, 1, 3)


def channels(x):
    return x.permute(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], DIM)


def weighted(numerator, denominator, v, eps=1e-6):
    """Values by the matrix of all weights: numerator (B, H, N, M) over the mean of denominator (B, H, N, M)."""
    weights = numerator / (denominator.mean(dim=-1, keepdim=True) + eps) / v.shape[2]
    return weights @ v


def depthwise(x, grid, weight, bias):
    """Correlation with one filter a channel, tap by tap; prefix tokens give zero."""
    (height, width), size = grid, weight.shape[-1]
    prefix = x.shape[1] - height * width
    image = x[:, prefix:].reshape(x.shape[0], height, width, -1)
    padded = F.pad(image, (0, 0, size // 2, size // 2, size // 2, size // 2))
    out = torch.zeros_like(image) + bias
    for dy in range(size):
        for dx in range(size):
            out = out + padded[:, dy : dy + height, dx : dx + width] * weight[:, 0, dy, dx]
    return torch.cat([torch.zeros_like(x[:, :prefix]), out.flatten(1, 2)], dim=1)


def elu1(x):
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def turn(x, angles):
    """Adjacent channels as complex numbers, turned by angles (H, N, D/2)."""
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def token_angles(grid, prefix, frequencies):
    """(N, 2 * len(frequencies)): y and x times each frequency; prefix tokens stay where they are."""
    rows = [[0.0] * (2 * len(frequencies))] * prefix
    rows += [
        [y * f for f in frequencies] + [x * f for f in frequencies] for y in range(grid[0]) for x in range(grid[1])
    ]
    return torch.tensor(rows, dtype=torch.float64)


def keys_with_encoding(module, k, grid):
    prefix = k.shape[1] - grid[0] * grid[1]
    return torch.cat([k[:, :prefix], k[:, prefix:] + module.positional_encoding], dim=1)


def linear(module, x, grid):
    q, k, v = (heads(y) for y in module.qkv(x).chunk(3, dim=-1))
    similarity = elu1(q) @ elu1(k).transpose(-1, -2)
    return module.proj(channels(weighted(similarity, similarity, v)))


def focused(module, x, grid, p=3):
    q, k, v = module.qkv(x).chunk(3, dim=-1)
    k = keys_with_encoding(module, k, grid)

    def focus(y):
        u = (y.clamp(min=0) + 1e-6) / (1 + module.scale.exp()).log()
        return u**p * u.norm(dim=-1, keepdim=True) / (u**p).norm(dim=-1, keepdim=True)

    similarity = heads(focus(q)) @ heads(focus(k)).transpose(-1, -2)
    out = channels(weighted(similarity, similarity, heads(v)))
    shared = module.dwc.weight.repeat(HEADS, 1, 1, 1), module.dwc.bias.repeat(HEADS)
    return module.proj(out + depthwise(v, grid, *shared))


def pola(module, x, grid, alpha=4):
    q, k, v, gate = module.qkvg(x).chunk(4, dim=-1)
    scale = (1 + module.scale.exp()).log()
    q, k = heads(q / scale), heads(keys_with_encoding(module, k, grid) / scale)
    power = 1 + alpha / (1 + (-module.power).exp())

    def parts(y):
        return y.clamp(min=0) ** power, (-y).clamp(min=0) ** power

    (q_pos, q_neg), (k_pos, k_neg) = parts(q), parts(k)
    same = q_pos @ k_pos.transpose(-1, -2) + q_neg @ k_neg.transpose(-1, -2)
    opposite = q_neg @ k_pos.transpose(-1, -2) + q_pos @ k_neg.transpose(-1, -2)
    first, second = heads(v).chunk(2, dim=-1)
    out = channels(torch.cat([weighted(same, same, first), weighted(opposite, opposite, second)], dim=-1))
    shared = module.dwc.weight.repeat(HEADS, 1, 1, 1), module.dwc.bias.repeat(HEADS)
    return module.proj((out + depthwise(v, grid, *shared)) * gate)


def mlla(module, x, grid):
    q, k = (elu1(y) for y in module.qk(x).chunk(2, dim=-1))
    angles = token_angles(grid, x.shape[1] - grid[0] * grid[1], [10000 ** (-j / (DIM / 4)) for j in range(DIM // 4)])
    numerator = heads(turn(q, angles)) @ heads(turn(k, angles)).transpose(-1, -2)
    denominator = heads(q) @ heads(k).transpose(-1, -2)
    out = channels(weighted(numerator, denominator, heads(x)))
    return out + depthwise(x, grid, module.lepe.weight, module.lepe.bias)


def rala(module, x, grid):
    q, k, v, gate = module.qkvo(x).chunk(4, dim=-1)
    q, k = elu1(heads(q)), elu1(heads(k))
    count, width = q.shape[2:]
    scores = torch.einsum("bhd,bhmd->bhm", q.mean(dim=2), k) / math.sqrt(width)
    k = k * (count * scores.exp() / scores.exp().sum(dim=-1, keepdim=True)).unsqueeze(-1)
    n = width // 4
    angles = token_angles(grid, x.shape[1] - grid[0] * grid[1], [10000 ** (-j / max(n - 1, 1)) for j in range(n)])
    out = weighted(turn(q, angles) @ turn(k, angles).transpose(-1, -2), q @ k.transpose(-1, -2), heads(v))
    return module.proj((channels(out) + depthwise(v, grid, module.lepe.weight, module.lepe.bias)) * gate)


def rala_softmax(module, x, grid):
    q, k, v, gate = module.qkvo(x).chunk(4, dim=-1)
    n = DIM // HEADS // 4
    angles = token_angles(grid, x.shape[1] - grid[0] * grid[1], [10000 ** (-j / max(n - 1, 1)) for j in range(n)])
    weights = (turn(heads(q), angles) @ turn(heads(k), angles).transpose(-1, -2) / math.sqrt(DIM // HEADS)).exp()
    out = weights / weights.sum(dim=-1, keepdim=True) @ heads(v)
    return module.proj((channels(out) + depthwise(v, grid, module.lepe.weight, module.lepe.bias)) * gate)


def softmax(module, x, grid):
    q, k, v = (heads(y) for y in module.qkv(x).chunk(3, dim=-1))
    weights = (q @ k.transpose(-1, -2) / math.sqrt(DIM // HEADS)).exp()
    return module.proj(channels(weights / weights.sum(dim=-1, keepdim=True) @ v))


FORMULAS = {
    "linear": linear,
    "focused": focused,
    "pola": pola,
    "mlla": mlla,
    "rala": rala,
    "rala_softmax": rala_softmax,
    "softmax": softmax,
}


def relative_error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 7), (1, 1)])
@pytest.mark.parametrize("name", NAMES)
def test_formula_and_its_gradients(name, grid, prefix):
    attention = build(name, grid_size=grid)
    expected_attention = copy.deepcopy(attention)
    x, x_expected = (tokens(grid, prefix).requires_grad_() for _ in range(2))
    actual, expected = attention(x, grid), FORMULAS[name](expected_attention, x_expected, grid)
    assert actual.shape == x.shape
    tolerance = 1e-6 if name in ("mlla", "rala", "rala_softmax") else 1e-9  # rotary tables are float32
    assert relative_error(actual, expected) < tolerance

    output_grad = torch.randn_like(actual)
    actual.backward(output_grad)
    expected.backward(output_grad)
    assert relative_error(x.grad, x_expected.grad) < 10 * tolerance
    for (key, p), p_expected in zip(attention.named_parameters(), expected_attention.parameters(), strict=True):
        assert p.grad is not None, key
        largest = p_expected.grad.abs().max()
        torch.testing.assert_close(p.grad, p_expected.grad, rtol=1e-5, atol=1e-6 * max(largest, 1e-3))


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_learns_from_its_initial_value(name):
    attention = create_attention(name, DIM, HEADS, offer={"grid_size": (4, 4)})
    attention(tokens((4, 4), prefix=1, dtype=torch.float32), (4, 4)).square().sum().backward()
    for key, parameter in attention.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize("grid", [(3, 5), (8, 3), (9, 9)])
@pytest.mark.parametrize("name", ["focused", "pola"])
def test_encoding_follows_the_grid(name, grid):
    attention = build(name, grid_size=(4, 4))
    x = tokens(grid, prefix=1)
    out = attention(x, grid)
    resized = copy.deepcopy(attention)
    resized.positional_encoding.requires_grad_(False)
    resized.set_grid_size(grid)
    assert resized.grid_size == grid and not resized.positional_encoding.requires_grad
    torch.testing.assert_close(resized(x, grid), out)

    loaded = build(name, grid_size=grid)
    loaded.load_state_dict(attention.state_dict())
    torch.testing.assert_close(loaded(x, grid), out)
    loaded.load_state_dict(loaded.state_dict())  # what fits already stays as it is
    torch.testing.assert_close(loaded(x, grid), out)

    with torch.no_grad():  # a constant stays that constant
        attention.positional_encoding.copy_(torch.linspace(-1, 1, DIM).expand(1, 16, -1))
    x = torch.zeros(1, 1 + grid[0] * grid[1], DIM, dtype=torch.float64)
    encoding = attention.encode_position(x, grid)
    assert encoding[:, 0].abs().max() == 0
    expected = attention.positional_encoding[:, :1].expand(1, x.shape[1] - 1, -1)
    torch.testing.assert_close(encoding[:, 1:], expected, rtol=1e-6, atol=1e-6)


def test_pola_with_a_projection_that_is_no_linear_layer():
    """As LoRA makes it: the scale of the keys cannot go into the weights then."""
    attention, grid = build("pola"), (4, 4)
    wrapped = copy.deepcopy(attention)
    wrapped.qkvg = nn.Sequential(wrapped.qkvg)
    results = []
    for module in (attention, wrapped):
        o = module(tokens(grid, prefix=1), grid)
        o.square().sum().backward()
        gradients = {key.replace("qkvg.0", "qkvg"): p.grad for key, p in module.named_parameters()}
        results.append({"o": o} | gradients)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision(name, dtype):
    grid = (6, 5)
    attention = build(name, grid_size=grid, dtype=torch.float32)
    x = tokens(grid, prefix=1, dtype=torch.float32)
    attention(x, grid)  # what a float32 call leaves behind must not matter below
    tolerance = 5e-2 if dtype == torch.bfloat16 else 5e-3
    expected = copy.deepcopy(attention).double()(x.double(), grid)
    assert relative_error(attention(x, grid), expected) < 1e-4

    half = copy.deepcopy(attention).to(dtype)
    out = half(x.to(dtype), grid)
    assert out.dtype == dtype and relative_error(out, expected) < tolerance
    out.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in half.parameters())

    with torch.autocast("cpu", dtype=dtype):
        out = attention(x, grid)
    assert out.dtype == dtype and relative_error(out, expected) < tolerance


@pytest.mark.parametrize("name", NAMES)
def test_compile_export_and_meta(name):
    grid = (3, 4)
    attention = build(name, grid_size=grid, dtype=torch.float32)
    x = tokens(grid, prefix=1, dtype=torch.float32)
    expected = attention(x, grid)
    gradients = torch.autograd.grad(expected.square().sum(), attention.parameters())
    torch._dynamo.reset()
    # Inductor without its code generation.
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager_decomp_partition")(x, grid)
    torch.testing.assert_close(compiled, expected)
    for actual, wanted in zip(
        torch.autograd.grad(compiled.square().sum(), attention.parameters()), gradients, strict=True
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-5 * max(wanted.abs().max(), 1))
    exported = torch.export.export(attention, (x, grid))
    torch.testing.assert_close(exported.module()(x, grid), expected)
    torch.testing.assert_close(attention(x, grid), expected)  # tracing left nothing behind
    assert copy.deepcopy(attention).to("meta")(x.to("meta"), grid).shape == x.shape


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("linear", {"qkv.weight": (72, 24), "proj.weight": (24, 24)}),
        (
            "focused",
            {
                "qkv.weight": (72, 24),
                "scale": (1, 1, 24),
                "positional_encoding": (1, 16, 24),
                "dwc.weight": (8, 1, 5, 5),
                "dwc.bias": (8,),
            },
        ),
        (
            "pola",
            {
                "qkvg.weight": (96, 24),
                "scale": (1, 1, 24),
                "power": (1, 3, 1, 8),
                "positional_encoding": (1, 16, 24),
                "dwc.weight": (8, 1, 5, 5),
            },
        ),
        ("mlla", {"qk.weight": (48, 24), "lepe.weight": (24, 1, 3, 3)}),
        ("rala", {"qkvo.weight": (96, 24), "lepe.weight": (24, 1, 5, 5), "proj.weight": (24, 24)}),
        ("rala_softmax", {"qkvo.weight": (96, 24), "lepe.weight": (24, 1, 5, 5), "proj.weight": (24, 24)}),
    ],
)
def test_entries_are_named_as_in_official_checkpoints(name, shapes):
    entries = {key: tuple(value.shape) for key, value in build(name).state_dict().items()}
    assert shapes.items() <= entries.items()
    assert not any(isinstance(module, nn.Conv2d) for module in build(name).modules() if hasattr(module, "qkv"))


def test_reset_parameters_survives_to_empty():
    for name in ("focused", "pola"):
        attention = create_attention(name, DIM, HEADS, device="meta").to_empty(device="cpu")
        attention.reset_parameters()
        for key in ("positional_encoding", "scale", "power"):
            assert getattr(attention, key, torch.zeros(1)).abs().max() == 0
