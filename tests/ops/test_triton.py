"""The kernels against the float64 reference: on the GPU where there is one, in Triton's interpreter elsewhere."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flash_bla.ops import (
    decoupled_la,
    focusing_power,
    linear_attention,
    signed_power,
    simple_la,
    varlen_linear_attention,
)
from flash_bla.ops.triton_linear_attention import linear_attention_forward
from tests.ops.cases import (
    DEVICE,
    SHAPES,
    TOLERANCE,
    VARIANTS,
    RoundedProducts,
    Variant,
    assert_close,
    compare,
    forward_backward,
    make_inputs,
)

pytest.importorskip("triton")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_equals_reference(variant, shape):
    if not variant.fits(shape):
        pytest.skip("rope needs M = N")
    dtypes = list(TOLERANCE)
    if DEVICE == "cpu":  # the interpreter takes minutes: one type, by turns over shapes and variants
        turn = SHAPES.index(shape) + list(VARIANTS.values()).index(variant)
        dtypes = [(torch.bfloat16, torch.float32, torch.bfloat16, torch.float16)[turn % 4]]
    for dtype in dtypes:
        inputs = make_inputs(shape, variant, dtype)

        def reference(variant=variant, inputs=inputs):
            return forward_backward(linear_attention, variant, inputs, torch.float64, backend="reference")

        def mixed(reference=reference):
            with RoundedProducts():
                return reference()

        results = forward_backward(linear_attention, variant, inputs, backend="triton")
        # few tokens' powers of up to 5: the parameter's gradient is a sum of few terms of either sign
        assert_close(results, reference(), TOLERANCE[dtype], mixed if dtype == torch.bfloat16 else None)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_simple_la(dtype):
    inputs = make_inputs((2, 2, 70, 70, 24, 24), Variant(None), dtype)
    call = lambda q, k, v, feature_map, key_weight, rope, backend: simple_la(q, k, v, backend=backend)  # noqa: E731
    expected = forward_backward(call, Variant(None), inputs, torch.float64, backend="reference")
    assert_close(forward_backward(call, Variant(None), inputs, backend="triton"), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_decoupled_la(dtype):
    generator = torch.Generator().manual_seed(0)
    # positive features, as after any feature map: q, k, q_rope, k_rope, v
    leaves = [torch.rand(2, 2, n, 24, generator=generator).to(dtype) for n in (70, 90, 70, 90, 90)]
    results = []
    for backend, to in (("triton", dtype), ("reference", torch.float64)):
        leaves = [x.detach().to(DEVICE, to).requires_grad_() for x in leaves]
        o = decoupled_la(*leaves, backend=backend)
        gradients = torch.autograd.grad(o, leaves, torch.ones_like(o).cumsum(2) / 70 - 0.5)
        results.append({"o": o} | dict(zip(("dq", "dk", "dq_rope", "dk_rope", "dv"), gradients, strict=True)))
    assert_close(*results, TOLERANCE[dtype])


@pytest.mark.parametrize(
    "feature_map, H", [("elu1", 2), ("relu", 2), ("focusing_power", 2), ("focusing_power", 1), ("signed_power", 2)]
)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_varlen_equals_one_call_for_each_sequence(feature_map, H, backend):
    lengths, D = [1, 70, 0, 33], 24
    generator = torch.Generator().manual_seed(0)
    packed = [torch.randn(sum(lengths), H, D, generator=generator).to(DEVICE).requires_grad_() for _ in range(3)]
    parameter = (1 + torch.rand(H, D, generator=generator)).to(DEVICE).requires_grad_()
    make = {"focusing_power": focusing_power, "signed_power": signed_power}.get(feature_map)
    phi = feature_map if make is None else make(parameter)
    leaves = packed if make is None else [*packed, parameter]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().to(DEVICE)
    o = varlen_linear_attention(*packed, cu_seqlens, max(lengths), feature_map=phi, backend=backend)

    parts = zip(*(x.split(lengths) for x in packed), strict=True)
    expected = [
        linear_attention(*(x.transpose(0, 1)[None] for x in qkv), feature_map=phi, backend="reference")
        for qkv in parts
        if len(qkv[0])
    ]
    expected = torch.cat([x[0].transpose(0, 1) for x in expected])
    do = torch.randn(o.shape, generator=generator).to(DEVICE)
    torch.testing.assert_close(o, expected, rtol=1e-5, atol=1e-5)
    for got, want in zip(torch.autograd.grad(o, leaves, do), torch.autograd.grad(expected, leaves, do), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["identity", "relu", "elu1", "focusing_power", "signed_power"])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_float16_stays_finite_on_long_sequences_of_large_activations(name, backend):
    N, H, D = 65536 if backend == "reference" or DEVICE == "cuda" else 2048, 1, 32
    generator = torch.Generator().manual_seed(0)
    q, k, v, do = (30 * torch.randn(1, H, N, D, generator=generator) for _ in range(4))
    if (
        name == "identity"
    ):  # features of a denominator are not negative; without a feature map that is the caller's part
        q, k = q.abs(), k.abs()
    q, k, v = (x.half().to(DEVICE).requires_grad_() for x in (q, k, v))
    phi = {
        "focusing_power": focusing_power(torch.full((H, D), 0.7, device=DEVICE)),
        "signed_power": signed_power(torch.full((H, D), 5.0, device=DEVICE)),
    }.get(name, name)
    o = linear_attention(q, k, v, feature_map=phi, backend=backend)
    assert o.dtype == torch.float16 and o.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(o, [q, k, v], do.half().to(DEVICE)))


@pytest.mark.parametrize("power", [1.0, 2.5])
def test_signed_power_at_zero(power):
    leaves, _, do = make_inputs((1, 2, 20, 20, 16, 16), VARIANTS["signed_power"], torch.float32)
    for name in "qk":
        leaves[name][:, :, ::3, ::2] = 0.0
        leaves[name][:, :, 5] = 0.0
    leaves["parameter"].fill_(power)
    compare("signed_power", leaves, do, 1e-5)


@pytest.mark.parametrize(
    "name, dtype",
    [("signed_power", torch.float32), ("focusing_power", torch.float32), ("elu1", torch.bfloat16)],
)
@pytest.mark.parametrize("missing", ["q", "k", "v", "keys"])
def test_frozen_inputs_do_not_change_the_other_gradients(missing, name, dtype):
    leaves, _, do = make_inputs((1, 2, 30, 30, 16, 16), VARIANTS[name], dtype)
    leaves = {name: x.to(DEVICE) for name, x in leaves.items()}

    def gradients(frozen):
        inputs = {name: x.detach().requires_grad_(name not in frozen) for name, x in leaves.items()}
        maps = {"signed_power": signed_power, "focusing_power": focusing_power}
        phi = maps[name](inputs["parameter"]) if name in maps else name
        o = linear_attention(inputs["q"], inputs["k"], inputs["v"], feature_map=phi, backend="triton")
        o.backward(do.to(DEVICE))
        return {name: x.grad for name, x in inputs.items()}

    frozen = ("k", "v", "parameter") if missing == "keys" else (missing,)
    every, some = gradients(()), gradients(frozen)
    for leaf in leaves:
        if leaf in frozen:
            assert some[leaf] is None
        else:
            torch.testing.assert_close(some[leaf], every[leaf], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name, shape",
    [("elu1", (1, 2, 60, 60, 16, 16)), ("signed_power", (12, 2, 5, 5, 8, 8))],
    ids=["with state", "more sequences than programs that stay"],
)
def test_output_is_the_same_without_gradients(name, shape):
    """A state is kept only for a backward pass."""
    leaves, _, _ = make_inputs(shape, VARIANTS[name], torch.bfloat16)
    leaves = {name: x.to(DEVICE).requires_grad_() for name, x in leaves.items()}

    def attend(x, backend):
        phi = signed_power(x["parameter"]) if name == "signed_power" else name
        return linear_attention(x["q"], x["k"], x["v"], feature_map=phi, backend=backend)

    o = attend(leaves, "triton")
    with torch.no_grad():
        assert torch.equal(attend(leaves, "triton"), o)
        expected = attend({name: x.double() for name, x in leaves.items()}, "reference")
    assert (o - expected).norm() <= TOLERANCE[torch.bfloat16] * expected.norm()


@pytest.mark.parametrize("length", [49, 1000])
def test_two_runs_agree_bit_for_bit(length):
    inputs = make_inputs((1, 1, length, length, 32, 32), VARIANTS["signed_power"], torch.bfloat16)
    first, second = (
        forward_backward(linear_attention, VARIANTS["signed_power"], inputs, backend="triton") for _ in "ab"
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_output_is_laid_out_for_the_projection():
    q = torch.randn(2, 3, 20, 16, device=DEVICE)
    o = linear_attention(q, q, q, feature_map="elu1", backend="triton")
    assert o.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    "name, dtype, shape",
    [
        ("elu1_rope_weighted", torch.float32, (1, 2, 20, 20, 16, 16)),
        ("elu1_softmax", torch.float32, (1, 2, 20, 20, 16, 16)),
        ("signed_power_encoded", torch.float32, (1, 2, 20, 20, 16, 16)),
        ("focusing_power", torch.float32, (1, 2, 20, 20, 16, 16)),
        ("elu1", torch.bfloat16, (1, 3, 90, 90, 40, 24)),  # keeps a state that is rounded
    ],
)
def test_opcheck(name, dtype, shape):
    variant = VARIANTS[name]
    leaves, rope, _ = make_inputs(shape, variant, dtype)
    leaves = {key: x.to(DEVICE).requires_grad_() for key, x in leaves.items()}
    rope = None if rope is None else rope.to(DEVICE)
    key_weight = leaves["key_weight"].expand(1, 2, 20) if "key_weight" in leaves else None
    torch.library.opcheck(
        linear_attention_forward,
        (leaves["q"], leaves["k"], leaves["v"], None, None, leaves.get("parameter"), key_weight,
         leaves.get("key_encoding"), rope, None, 0, variant.feature_map, 3, True, None, 1e-6, variant.softmax),
    )  # fmt: skip


def test_compiled_graph_holds_the_operator():
    """Without a graph break, and not the reference's many small operations."""
    targets = []

    def record(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    q = torch.randn(1, 2, 20, 16, device=DEVICE)
    torch.compile(linear_attention, fullgraph=True, backend=record)(q, q, q, feature_map="elu1", backend="triton")
    assert any("linear_attention_forward" in target for target in targets)


def test_compiled_gradients():
    variant = VARIANTS["focusing_power_encoded"]
    inputs = make_inputs((1, 2, 20, 20, 16, 16), variant, torch.float32)
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"
    compiled = torch.compile(linear_attention, fullgraph=True, backend=backend)
    eager = forward_backward(linear_attention, variant, inputs, backend="triton")
    assert_close(forward_backward(compiled, variant, inputs, backend="triton"), eager, 1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_operations_are_counted_as_those_of_the_reference(name):
    """The operators tell ``FlopCounterMode`` their sum; the reference's products are counted one by one."""
    inputs = make_inputs((2, 3, 20, 20, 16, 24), VARIANTS[name], torch.float32)
    counts = []
    for backend in ("triton", "reference"):
        with FlopCounterMode(display=False) as counter:
            forward_backward(linear_attention, VARIANTS[name], inputs, backend=backend)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_export_takes_the_reference():
    """An exported program must run where this package is not installed."""

    class Module(torch.nn.Module):
        def forward(self, q):
            return linear_attention(q, q, q, feature_map="elu1")

    q = torch.randn(1, 2, 20, 16, device=DEVICE)
    program = torch.export.export(Module(), (q,))
    assert not any("flash_bla" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(q), linear_attention(q, q, q, feature_map="elu1", backend="reference"))


@pytest.mark.parametrize("make", [focusing_power, signed_power])
def test_empty_batch_has_a_gradient_of_zero(make):
    q = torch.randn(0, 2, 20, 16, device=DEVICE, requires_grad=True)
    parameter = torch.full((2, 16), 1.5, device=DEVICE, requires_grad=True)
    linear_attention(q, q, q, feature_map=make(parameter), backend="triton").sum().backward()
    assert q.grad.shape == q.shape and torch.equal(parameter.grad, torch.zeros_like(parameter))


@pytest.mark.parametrize("heads", [4, 5])
@pytest.mark.parametrize("N, D", [(40, 8), (300, 16)])
def test_four_heads_share_a_tile(heads, N, D):
    inputs = make_inputs((1, heads, N, N, D, D), Variant(), torch.bfloat16)
    results = [
        forward_backward(linear_attention, Variant(), inputs, dtype, backend=backend)
        for backend, dtype in (("triton", None), ("reference", torch.float64))
    ]
    assert_close(*results, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("shape", [(1, 2, 3000, 3000, 64, 64), (2, 3, 1000, 2500, 24, 24)], ids=str)
def test_split_sequences_are_reproducible(shape):
    if DEVICE == "cpu":
        shape = (1, 1, *(n // 5 for n in shape[2:4]), *shape[4:])
    inputs = make_inputs(shape, Variant(), torch.bfloat16)
    results = [forward_backward(linear_attention, Variant(), inputs, backend="triton") for _ in range(3)]
    expected = forward_backward(linear_attention, Variant(), inputs, torch.float64, backend="reference")
    assert_close(results[0], expected, TOLERANCE[torch.bfloat16])
    for other in results[1:]:
        assert all(torch.equal(x, other[name]) for name, x in results[0].items())


@pytest.mark.parametrize("feature_map, mean", [("elu1", 0.0), ("elu1", -12.0), ("relu", 0.0)])
def test_varlen_in_bfloat16(feature_map, mean):
    """Also with features of keys that are tiny beside those of rows which do not exist."""
    lengths, H, D = [1, 70, 0, 33, 200], 2, 24
    generator = torch.Generator().manual_seed(0)
    packed = [torch.randn(sum(lengths), H, D, generator=generator) for _ in range(4)]
    packed[1] += mean
    packed = [x.to(DEVICE, torch.bfloat16) for x in packed]
    leaves, do = [x.requires_grad_() for x in packed[:3]], packed[3]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().to(DEVICE)
    o = varlen_linear_attention(*leaves, cu_seqlens, max(lengths), feature_map=feature_map, backend="triton")
    exact = [x.detach().double().requires_grad_() for x in leaves]
    expected = varlen_linear_attention(*exact, cu_seqlens, max(lengths), feature_map=feature_map, backend="reference")
    for got, want in zip(
        (o, *torch.autograd.grad(o, leaves, do)),
        (expected, *torch.autograd.grad(expected, exact, do.double())),
        strict=True,
    ):
        assert (got - want).norm() <= TOLERANCE[torch.bfloat16] * want.norm()


@pytest.mark.parametrize("feature_map, eps", [("elu1", 1.0), ("relu", 3.0)])
@pytest.mark.parametrize("shape", [(1, 3, 80, 85, 16, 16), (9, 5, 30, 20, 16, 16)], ids=str)
def test_a_large_eps_and_several_turns(shape, feature_map, eps):
    """ε counts beside the denominators; of the second shape each program has several sequences in the interpreter."""
    generator = torch.Generator().manual_seed(0)
    B, H, N, M, D, D_v = shape
    sizes = {"q": (N, D), "k": (M, D), "v": (M, D_v), "do": (N, D_v)}
    tensors = {name: torch.randn(B, H, *size, generator=generator) for name, size in sizes.items()}
    tensors["v"] += 3
    if feature_map == "elu1":
        tensors["q"], tensors["k"] = tensors["q"] - 3, tensors["k"] - 3
    *leaves, do = [x.to(DEVICE, torch.bfloat16) for x in tensors.values()]
    results = []
    for dtype, backend in ((torch.bfloat16, "triton"), (torch.float64, "reference")):
        inputs = [x.to(dtype).requires_grad_() for x in leaves]
        o = linear_attention(*inputs, feature_map=feature_map, eps=eps, backend=backend)
        results.append((o, *torch.autograd.grad(o, inputs, do.to(dtype))))
    for got, want in zip(*results, strict=True):
        assert (got - want).norm() <= TOLERANCE[torch.bfloat16] * want.norm()
