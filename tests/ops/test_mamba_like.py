"""The halves of MLLA's block in mixed-precision training against their operators in float64."""

from functools import partial

import pytest
import torch

from flash_bla.layers.rope import axial_rope
from flash_bla.ops.mamba_like import mamba_like_mixer, mamba_like_mlp
from flash_bla.ops.triton_support import HAS_TRITON
from tests.ops.cases import DEVICE

BACKENDS = ["reference", pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="needs Triton"))]
GRID, C, HEADS = (3, 5), 24, 2
START = {"cpe": (C, 1, 3, 3), "norm": (C,)}
LAYERS = {
    "mixer": START | {"gate": (C, C), "in": (C, C), "dwc": (C, 1, 3, 3), "qk": (2 * C, C), "lepe": (C, 1, 3, 3),
                      "out": (C, C)},
    "mlp": START | {"fc1": (3 * C, C), "fc2": (C, 3 * C)},
}  # fmt: skip


def make_inputs(half, N=15, biases=True):
    torch.manual_seed(0)
    randn = partial(torch.randn, device=DEVICE)
    inputs = {"x": randn(2, N, C)} | ({"add": randn(2, N, C)} if half == "mlp" else {})
    for name, shape in LAYERS[half].items():
        inputs[name] = randn(shape) / (5 if len(shape) > 1 else 1)
        inputs[f"{name}.bias"] = randn(shape[0]) if biases or name == "norm" else None
    return inputs


def apply(half, inputs, grid=GRID, backend=None):
    if half == "mlp":
        x, add, *parameters = inputs
        return mamba_like_mlp(x, add, grid, 1e-5, *parameters, backend=backend)
    x, *parameters = inputs
    rope = axial_rope(x, GRID, C, HEADS).float()  # in bfloat16 training it would be float16
    return mamba_like_mixer(x, grid, 1e-5, HEADS, rope, *parameters, backend=backend)


def forward_backward(half, inputs, dtype=None, frozen=(), outputs=(0, 1), backend=None):
    """The outputs and the gradients, in mixed precision or in a type without it."""
    leaves = {
        name: None if y is None else y.to(dtype or y.dtype).requires_grad_(name not in frozen)
        for name, y in inputs.items()
    }
    with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype is None):
        results = apply(half, leaves.values(), backend=backend)
    needed = {name: y for name, y in leaves.items() if y is not None and y.requires_grad}
    generator = torch.Generator(DEVICE).manual_seed(1)
    randn = [torch.randn(y.shape, device=DEVICE, generator=generator).to(y.dtype) for y in results]
    gradients = torch.autograd.grad(
        [results[i] for i in outputs], needed.values(), [randn[i] for i in outputs], materialize_grads=True
    )
    return results, dict(zip(needed, gradients, strict=True))


@pytest.mark.parametrize(("N", "biases", "frozen", "outputs"), [
    (15, True, (), (0, 1)), (17, True, (), (0, 1)), (15, False, (), (0, 1)), (15, True, (), (0,)), (15, True, (), (1,)),
    (15, True, ("x", "cpe", "norm.bias", "gate.bias", "dwc.bias", "lepe", "fc1.bias"), (0, 1)),
    (15, True, ("add", "cpe.bias", "norm", "in.bias", "dwc", "qk.bias", "lepe.bias", "out.bias", "fc2.bias"), (0, 1)),
], ids=["", "prefix", "no biases", "first", "second", "frozen", "others frozen"])  # fmt: skip
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("half", LAYERS)
def test_mixed_precision(half, backend, N, biases, frozen, outputs):
    inputs = make_inputs(half, N, biases)
    inputs["x"] = inputs["x"].bfloat16()  # add is float32
    results, gradients = forward_backward(half, inputs, None, frozen, outputs, backend)
    expected, expected_gradients = forward_backward(half, inputs, torch.float64, frozen, outputs)
    assert {y.dtype for y in results} == {torch.bfloat16}
    assert all(gradient.dtype == inputs[name].dtype for name, gradient in gradients.items())
    pairs = [*zip(results, expected, strict=True), *((gradients[name], expected_gradients[name]) for name in gradients)]
    for got, want in pairs:
        assert got.shape == want.shape and (got.double() - want).norm() <= 5e-2 * want.norm()


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("changed", [
    {"lepe.bias": (8,)}, {"lepe": (C + 8, 1, 3, 3), "lepe.bias": (C + 8,)}, {"lepe": (C, 1, 9, 9)}, {"lepe": (C, 9)},
    {"dwc.bias": (8,)}, {"qk": (4 * C, C), "qk.bias": (4 * C,)}, {"gate": (8, C), "gate.bias": (8,)},
    {"gate.bias": (8,)},
], ids=lambda changed: " ".join(f"{name} {shape}" for name, shape in changed.items()))  # fmt: skip
def test_shapes_that_do_not_fit(changed):
    inputs = make_inputs("mixer") | {name: torch.randn(shape, device=DEVICE) for name, shape in changed.items()}
    leaves = [y.requires_grad_() for y in inputs.values()]
    with torch.autocast(DEVICE, torch.bfloat16), pytest.raises(ValueError, match="got"):
        apply("mixer", leaves, backend="triton")


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("half", LAYERS)
def test_one_node_where_all_layers_train(half):
    inputs = make_inputs(half)
    for frozen, node in (((), {"mixer": "_MixerBackward", "mlp": "_MlpBackward"}[half]), (list(inputs), None)):
        (y, s), _ = forward_backward(half, inputs, None, [name for name in frozen if name != "cpe"], backend="triton")
        assert (y.grad_fn is s.grad_fn and y.grad_fn.name() == node) == (not frozen)


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("half", LAYERS)
def test_gradients_are_the_same_in_every_run(half):
    inputs = make_inputs(half)
    (first, first_gradients), (second, second_gradients) = (
        forward_backward(half, inputs, backend="triton") for _ in range(2)
    )
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, first_gradients.values(), second_gradients.values()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("half", LAYERS)
def test_errors(half, backend):
    inputs = make_inputs(half)
    leaves = [y.requires_grad_() for y in inputs.values()]
    with torch.autocast(DEVICE, torch.bfloat16), pytest.raises(ValueError, match="grid must be positive"):
        apply(half, leaves, (4, 5), backend)
    if backend == "triton":  # PyTorch has errors of its own
        last = dict(zip(inputs, leaves, strict=True)) | {list(inputs)[-1]: leaves[-1][:4]}
        with (
            torch.autocast(DEVICE, torch.bfloat16),
            pytest.raises(ValueError, match=r"bias must have shape .*got \(4,"),
        ):
            apply(half, last.values(), GRID, backend)
