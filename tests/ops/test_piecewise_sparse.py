"""Piecewise sparse attention: the reference against loops over tokens, the kernels against the reference."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import piecewise_sparse_error
from flash_bla import piecewise_sparse_attention
from flash_bla.ops import piecewise_sparse as reference
from flash_bla.ops import triton_piecewise_sparse as kernels
from flash_bla.ops.triton_support import HAS_TRITON
from tests.ops.cases import DEVICE, TOLERANCE

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
BACKENDS = ["reference", pytest.param("triton", marks=needs_triton)]

# (B, H, N, D) and block size: last blocks that are full, partial and alone, both head widths of today's models and
# others, blocks of several tiles, more blocks than a tile of them holds
SHAPES = [
    ((1, 2, 1, 8), 16),
    ((1, 1, 128, 64), 64),
    ((1, 1, 150, 64), 64),
    ((1, 1, 130, 128), 32),
    ((1, 1, 200, 40), 128),
    ((2, 2, 35, 24), 16),
    ((1, 1, 270, 16), 16),
]


def make_inputs(shape, dtype=torch.float32, magnitude=1.0):
    """q, k and v as views of one projection; v has a mean, and in larger logits the order of the blocks matters."""
    B, H, N, D = shape
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(B, N, 3, H, D, generator=generator).permute(2, 0, 3, 1, 4).unbind(0)
    return [(magnitude * x).to(DEVICE, dtype) for x in (q, k, v + 1)]


def relative_error(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def by_loops(q, k, v, density, block_size, scale, use_bias):
    """One head, token by token, as the formula is written."""
    N, D = q.shape
    blocks = [list(range(start, min(start + block_size, N))) for start in range(0, N, block_size)]
    q_mean, k_mean = ([sum(x[m] for m in block) / len(block) for block in blocks] for x in (q, k))
    v_sum = [sum(v[m] for m in block) for block in blocks]
    slopes = [
        sum(torch.outer(k[m] - mean, v[m]) for m in block) for block, mean in zip(blocks, k_mean, strict=True)
    ]  # fmt: skip
    o = torch.empty_like(v)
    for i, queries in enumerate(blocks):
        scores = [float(q_mean[i] @ mean) * scale for mean in k_mean]
        if use_bias:
            scores = [s + math.log(float((h**2).sum()) ** 0.5 + 1e-5) for s, h in zip(scores, slopes, strict=True)]
            scores = [math.exp(s) / sum(math.exp(t) for t in scores) for s in scores]
        best = sorted(range(len(blocks)), key=lambda j: -scores[j])
        kept = best[: max(1, int(density * len(blocks)))]
        for n in queries:
            numerator, denominator, others = torch.zeros(D, dtype=q.dtype), 0.0, 0.0
            for j, block in enumerate(blocks):
                if j in kept:
                    for m in block:
                        weight = math.exp(scale * float(q[n] @ k[m]))
                        numerator, denominator = numerator + weight * v[m], denominator + weight
                else:
                    weight = math.exp(scale * float(q[n] @ k_mean[j]))
                    numerator, denominator = numerator + weight * v_sum[j], denominator + len(block) * weight
                    others += len(block) * weight
            numerator = numerator + others / N * scale * (q[n] @ sum(slopes))
            o[n] = numerator / denominator
    return o


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("density", [0.01, 0.5, 0.8])
@pytest.mark.parametrize("N", [12, 14])
def test_reference_equals_loops_over_tokens(N, density, use_bias):
    q, k, v = (x.cpu() for x in make_inputs((1, 2, N, 5), torch.float64))
    for scale in (None, 0.7):
        o = piecewise_sparse_attention(q, k, v, density, 4, scale, use_bias, backend="reference")
        s = 5**-0.5 if scale is None else scale
        expected = [by_loops(*(x[0, head] for x in (q, k, v)), density, 4, s, use_bias) for head in range(2)]
        torch.testing.assert_close(o[0], torch.stack(expected), rtol=1e-12, atol=1e-12)


def test_density_one_is_softmax_attention_in_the_reference():
    q, k, v = make_inputs((2, 3, 150, 64))
    for block_size in (1, 7, 64, 200):
        o = piecewise_sparse_attention(q, k, v, 1.0, block_size, backend="reference")
        assert relative_error(o, scaled_dot_product_attention(q.double(), k.double(), v.double())) <= 1e-5


@needs_triton
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_density_one_is_softmax_attention_in_the_kernels(dtype):
    q, k, v = make_inputs((1, 2, 150, 64), dtype)
    o = piecewise_sparse_attention(q, k, v, density=1.0, backend="triton")
    assert o.dtype == dtype and o.transpose(1, 2).is_contiguous()
    assert relative_error(o, scaled_dot_product_attention(q.double(), k.double(), v.double())) <= TOLERANCE[dtype]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_single_block_is_softmax_attention(backend):
    q, k, v = make_inputs((1, 2, 50, 64))
    o = piecewise_sparse_attention(q, k, v, density=0.1, backend=backend)
    torch.testing.assert_close(o, scaled_dot_product_attention(q, k, v), rtol=1e-5, atol=1e-5)


@needs_triton
@pytest.mark.parametrize(("shape", "block_size"), SHAPES, ids=str)
def test_kernels_equal_the_reference_on_the_same_blocks(shape, block_size):
    density = 0.4
    for dtype, tolerance in TOLERANCE.items():
        q, k, v = make_inputs(shape, dtype, magnitude=2.0)
        use_bias = dtype == torch.float32
        scale = (-1 if dtype == torch.float16 else 1) * shape[-1] ** -0.5
        o = piecewise_sparse_attention(q, k, v, density, block_size, scale, use_bias, backend="triton")

        inputs = [x.double() for x in (q, k, v)]
        expected = reference.block_statistics(*inputs, block_size)
        statistics = reference.BlockStatistics(*kernels.block_statistics(q, k, v, block_size, use_bias))
        norms = {"slope": 1.0, "slope_norm": 1.0}  # a single token deviates from no mean: these are zero
        for name, x in statistics._asdict().items():
            if name == "slope_norm" and not use_bias:
                continue
            want = getattr(expected, name)
            assert (x - want).norm() <= 1e-5 * max(want.norm(), norms.get(name, 0)), name
        chosen = reference.choose_blocks(statistics, density, scale, use_bias)
        expected = reference.attend(*inputs, expected, chosen, block_size, scale)
        assert relative_error(o, expected) <= tolerance


@needs_triton
def test_a_running_maximum_that_grows_late():
    """The largest logits are those of blocks' means in the last tile, as no query keeps the blocks it likes best."""
    q, k, v = make_inputs((1, 1, 520, 16))
    k = k + torch.linspace(0, 30, 520, device=DEVICE)[:, None]
    q = q.abs()
    choice = kernels.choose(-torch.arange(33.0, device=DEVICE).expand(1, 1, 33, 33), 1, 520, 16)
    assert not choice[0].any()
    inputs = [x.double() for x in (q, k, v)]
    expected = reference.attend(*inputs, reference.block_statistics(*inputs, 16), choice[0].long(), 16, 0.25)
    _, k_mean, v_mean, slope, _ = kernels.block_statistics(q, k, v, 16, False)
    assert relative_error(kernels.attend(q, k, v, k_mean, v_mean, slope, *choice, 16, 0.25), expected) <= 1e-4


@needs_triton
@pytest.mark.parametrize(("blocks", "kept"), [(1, 1), (5, 2), (70, 33), (64, 64), (1500, 150)])
def test_the_choice_of_blocks(blocks, kept):
    scores = torch.randn(1, 2, 3, blocks, generator=torch.Generator().manual_seed(0))
    scores[0, 0, 0] = scores[0, 0, 0].sign()  # many of them equal
    scores[0, 0, 1] = -scores[0, 0, 1].abs()
    scores[0, 0, 2, 3:] = -torch.inf
    chosen, log_size = (x.cpu() for x in kernels.choose(scores.to(DEVICE), kept, 16 * blocks - 5, 16))
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :kept]  # of equal scores the first
    assert torch.equal(chosen.long(), best.sort(dim=-1).values)
    sizes = torch.tensor([16.0] * (blocks - 1) + [11.0] + [0.0] * (-blocks % 64))
    torch.testing.assert_close(log_size, sizes.log2().expand_as(log_size).scatter(-1, best, -torch.inf))


@needs_triton
def test_any_strides():
    shape = (2, 2, 40, 24)
    q, k, v = make_inputs(shape)
    o = piecewise_sparse_attention(q, k, v, 0.5, 16, backend="triton")
    k = k.transpose(2, 3).contiguous().transpose(2, 3)
    v = torch.stack([v, v], dim=-1)[..., 0]
    q = q.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    # not equal bit for bit: other strides may give other layouts, whose sums have another order
    assert relative_error(piecewise_sparse_attention(q, k, v, 0.5, 16, backend="triton"), o) <= 1e-6


def test_on_smooth_tokens_the_error_falls_as_the_density_rises():
    for use_bias in (False, True):
        errors = piecewise_sparse_error.errors((0.1, 0.2, 0.4, 0.6, 0.8, 1.0), use_bias, tokens=1024, waves=4)
        assert errors == sorted(errors, reverse=True)
        assert errors[0] < 0.1 and errors[-1] < 1e-10


def test_the_error_is_drawn(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(piecewise_sparse_error, "errors", lambda densities, use_bias: list(densities))
    piecewise_sparse_error.main(str(tmp_path / "error.png"))
    assert (tmp_path / "error.png").stat().st_size > 1000


@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_of_large_activations_stays_finite(backend):
    q, k, v = make_inputs((1, 1, 16384 if DEVICE == "cuda" else 640, 64), torch.float16, magnitude=30.0)
    for tokens in (v, v + 20000):
        o = piecewise_sparse_attention(q, k, tokens, density=0.1, backend=backend)
        assert o.dtype == torch.float16 and o.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_and_keeps_float32_inside(backend):
    q, k, v = make_inputs((1, 1, 70, 16))
    with torch.autocast(DEVICE, torch.bfloat16):
        o = piecewise_sparse_attention(q, k, v, 0.3, 16, backend=backend)
    inputs = [x.bfloat16() for x in (q, k, v)]
    assert o.dtype == torch.bfloat16
    assert relative_error(o, piecewise_sparse_attention(*inputs, 0.3, 16, backend=backend)) < 1e-6


def test_gradients_are_the_reference_s():
    q, k, v = (x.requires_grad_() for x in make_inputs((1, 1, 10, 3), torch.float64))
    assert torch.autograd.gradcheck(
        lambda *qkv: piecewise_sparse_attention(*qkv, 0.5, 4, backend="reference"), (q, k, v)
    )


@needs_triton
def test_a_backward_pass_through_the_kernels_is_refused():
    q, k, v = (x.requires_grad_() for x in make_inputs((1, 1, 20, 16)))
    o = piecewise_sparse_attention(q, k, v, 0.5, 16, backend="triton")
    with pytest.raises(RuntimeError, match="no backward pass on Triton.*torch.no_grad.*backend='reference'"):
        o.sum().backward()


@needs_triton
def test_opcheck():
    q, k, v = make_inputs((1, 2, 40, 16))
    for norms in (False, True):
        torch.library.opcheck(kernels.block_statistics, (q, k, v, 16, norms))
    _, k_mean, v_mean, slope, _ = kernels.block_statistics(q, k, v, 16, False)
    scores = torch.rand(1, 2, 3, 3, device=DEVICE)
    torch.library.opcheck(kernels.choose, (scores, 2, 40, 16))
    torch.library.opcheck(
        kernels.attend, (q, k, v, k_mean, v_mean, slope, *kernels.choose(scores, 2, 40, 16), 16, 0.25)
    )


@needs_triton
def test_compiled_without_graph_breaks():
    inductor = "inductor" if DEVICE == "cuda" else "aot_eager"
    compiled = torch.compile(piecewise_sparse_attention, fullgraph=True, backend=inductor)
    for N in (40, 70):  # the second length compiles for any
        q, k, v = make_inputs((1, 2, N, 16))
        expected = piecewise_sparse_attention(q, k, v, 0.5, 16, use_bias=True, backend="triton")
        torch.testing.assert_close(compiled(q, k, v, 0.5, 16, use_bias=True, backend="triton"), expected)


X = torch.rand(1, 2, 8, 16)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X[0], X, X), {}, ValueError, r"q must have 4 dimensions .* got \(2, 8, 16\)"),
        ((X, X[:, :, :4], X), {}, ValueError, r"k must have shape the shape of q, here \(1, 2, 8, 16\), got \(1, 2, 4"),
        ((X, X, X[..., :8]), {}, ValueError, r"v must have shape the shape of q"),
        ((X, X, X.half()), {}, TypeError, r"v must have the dtype of q, torch.float32, got torch.float16"),
        ((X[:, :, :0],) * 3, {}, ValueError, r"at least one token, got shape \(1, 2, 0, 16\)"),
        ((X, X, X), dict(density=0), ValueError, r"density must be a number in \(0, 1\], got 0"),
        ((X, X, X), dict(density=1.5), ValueError, r"density must be a number in \(0, 1\], got 1.5"),
        ((X, X, X), dict(density=float("nan")), ValueError, r"density .* got nan"),
        ((X, X, X), dict(density="half"), ValueError, r"density .* got 'half'"),
        ((X, X, X), dict(block_size=0), ValueError, r"block_size must be a positive integer, got 0"),
        ((X, X, X), dict(block_size=64.0), ValueError, r"block_size must be a positive integer, got 64.0"),
        ((X, X, X), dict(backend="cuda"), ValueError, r"backend .* got 'cuda'"),
        pytest.param((X, X, X), dict(block_size=48, backend="triton"), ValueError,
                     r"block_size of 16, 32, 64, 128, ..., got 48; backend='reference' takes any", marks=needs_triton),
        pytest.param((X, X, X), dict(block_size=8, backend="triton"), ValueError, r"got 8", marks=needs_triton),
        pytest.param((torch.rand(1, 1, 8, 160),) * 3, dict(backend="triton"), ValueError,
                     r"heads up to 128 wide, got 160; backend='reference' takes any", marks=needs_triton),
    ],
)  # fmt: skip
def test_errors(arguments, options, error, message):
    with pytest.raises(error, match=message):
        piecewise_sparse_attention(*(x.to(DEVICE) for x in arguments), **options)
