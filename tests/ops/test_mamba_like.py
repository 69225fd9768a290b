"""MLLA's mixer in mixed-precision training against its operators in float64."""

import pytest
import torch

from flash_bla.layers.rope import axial_rope
from flash_bla.ops.mamba_like import mamba_like_mixer
from flash_bla.ops.triton_support import HAS_TRITON
from tests.ops.cases import DEVICE

BACKENDS = ["reference", pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="needs Triton"))]
NAMES = "x", "wa", "ba", "wi", "bi", "wc", "bc", "wq", "bq", "wl", "bl", "wo", "bo"
GRID, C, HEADS = (3, 5), 24, 2


def make_inputs(N, biases=True):
    torch.manual_seed(0)
    shapes = (C, C), (C,), (C, C), (C,), (C, 1, 3, 3), (C,), (2 * C, C), (2 * C,), (C, 1, 3, 3), (C,), (C, C), (C,)
    x = torch.randn(2, N, C, device=DEVICE)
    parameters = [torch.randn(shape, device=DEVICE) / (3 if len(shape) > 1 else 1) for shape in shapes]
    return dict(zip(NAMES, [x, *(y if biases or y.ndim > 1 else None for y in parameters)], strict=True))


def forward_backward(inputs, dtype, frozen=(), backend=None):
    """The output and the gradients, in mixed precision or in a type without it."""
    mixed = dtype is None
    leaves = {
        name: None if y is None else y.to(dtype or y.dtype).requires_grad_(name not in frozen)
        for name, y in inputs.items()
    }
    x, *parameters = leaves.values()
    if mixed:
        x = leaves["x"] = x.detach().bfloat16().requires_grad_("x" not in frozen)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=mixed):
        y = mamba_like_mixer(x, GRID, HEADS, axial_rope(x, GRID, C, HEADS), *parameters, backend=backend)
    needed = [y for y in leaves.values() if y is not None and y.requires_grad]
    dy = torch.randn(y.shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1)).to(y.dtype)
    return y, torch.autograd.grad(y, needed, dy)


@pytest.mark.parametrize(("N", "biases", "frozen"), [
    (15, True, ()), (17, True, ()), (15, False, ()), (15, True, ("x", "ba", "bc", "wl")),
    (15, True, ("bi", "wc", "bq", "bl", "bo")),
], ids=["", "prefix", "no biases", "frozen", "others frozen"])  # fmt: skip
@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_precision(backend, N, biases, frozen):
    inputs = make_inputs(N, biases)
    y, gradients = forward_backward(inputs, None, frozen, backend)
    expected = forward_backward(inputs, torch.float64, frozen)
    assert y.dtype == torch.bfloat16 and {x.dtype for x in gradients[-2:]} == {torch.float32}
    for got, want in zip([y, *gradients], [expected[0], *expected[1]], strict=True):
        assert got.shape == want.shape and (got.double() - want).norm() <= 3e-2 * want.norm()


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_one_node_where_all_layers_train():
    for frozen, name in (((), "_MixerBackward"), (("wq",), "_MixedBackward")):
        y, _ = forward_backward(make_inputs(15), None, frozen, "triton")
        assert y.grad_fn.name() == name


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_gradients_are_the_same_in_every_run():
    inputs = make_inputs(15)
    first, second = (forward_backward(inputs, None, (), "triton") for _ in range(2))
    assert all(map(torch.equal, (first[0], *first[1]), (second[0], *second[1])))


def test_errors():
    x, *parameters = make_inputs(15).values()
    with pytest.raises(ValueError, match="grid must be positive"), torch.autocast(DEVICE, torch.bfloat16):
        rope = axial_rope(x, GRID, C, HEADS)
        mamba_like_mixer(x, (4, 5), HEADS, rope, *(y.requires_grad_() for y in parameters))
