"""The inputs on which every operator is tested, and how an error is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.overrides import TorchFunctionMode

from flash_bla import linear_attention
from flash_bla.ops import focusing_power, signed_power

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Largest relative error, in the Frobenius norm, against float64.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}

# (B, H, N, M, D, Dv): one token, odd lengths and heads, several blocks of rows, widths that are no powers of two,
# Dv ≠ D, M ≠ N, keys so wide that values are cut
SHAPES = [
    (2, 2, 1, 1, 16, 16),
    (1, 2, 10, 16, 8, 8),
    (1, 2, 17, 17, 8, 8),
    (1, 3, 127, 127, 24, 24),
    (1, 1, 197, 197, 36, 36),
    (1, 2, 110, 110, 48, 48),
    (1, 2, 49, 49, 64, 64),
    (1, 3, 50, 50, 32, 32),
    (1, 2, 50, 50, 48, 48),
    (1, 3, 150, 150, 32, 32),
    (1, 1, 130, 130, 72, 40),
    (1, 1, 33, 33, 96, 96),
    (1, 1, 40, 300, 32, 48),
    (1, 1, 70, 1, 32, 32),
    (1, 1, 31, 70, 128, 160),
    (1, 1, 20, 20, 256, 80),
    (1, 3, 70, 70, 24, 24),
    (1, 1, 140, 140, 64, 64),
]


@dataclass(frozen=True)
class Variant:
    """One way of calling ``linear_attention``."""

    feature_map: str | None = "elu1"
    key_weight: bool = False
    encoding: bool = False
    softmax: bool = False
    rope: bool = False
    options: dict = field(default_factory=dict)

    def fits(self, shape) -> bool:
        """Rotation needs M = N."""
        return not self.rope or shape[2] == shape[3]


VARIANTS = {
    "elu1": Variant(),
    "relu": Variant("relu"),
    "identity": Variant(None, options=dict(normalize=False, scale=0.125)),
    "elu1_scaled": Variant(options=dict(scale=-0.5, eps=1e-2)),
    "elu1_weighted": Variant(key_weight=True),
    "elu1_encoded": Variant(encoding=True),
    "elu1_rope": Variant(rope=True),
    "elu1_rope_weighted": Variant(rope=True, key_weight=True),
    "elu1_softmax": Variant(softmax=True),
    "elu1_rope_softmax": Variant(softmax=True, rope=True),
    "focusing_power": Variant("focusing_power"),
    "focusing_power_weighted": Variant("focusing_power", key_weight=True),
    "focusing_power_encoded": Variant("focusing_power", encoding=True),
    "signed_power": Variant("signed_power"),
    "signed_power_weighted": Variant("signed_power", key_weight=True, options=dict(scale=-0.5)),
    "signed_power_encoded": Variant("signed_power", encoding=True),
}


def make_inputs(shape, variant: Variant, dtype: torch.dtype, seed: int = 0):
    """Leaves that need gradients, the fixed tables of ``rope``, and the gradient of the output.

    q, k and v are views of one projection where the shape allows it, and v has a mean: gradients of q are then small
    differences of large terms. Learned parameters, weights and tables stay float32.
    """
    B, H, N, M, D, D_v = shape
    generator = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(*size, generator=generator)

    if N == M and D == D_v:
        q, k, v = randn(B, N, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
    else:
        q, k, v = randn(B, H, N, D), randn(B, M, H, D).transpose(1, 2), randn(B, H, D_v, M).transpose(2, 3)
    leaves = {"q": q.to(dtype), "k": k.to(dtype), "v": (v + 1).to(dtype)}
    if variant.feature_map == "focusing_power":
        leaves["parameter"] = 0.5 + torch.rand(H, D, generator=generator)
    if variant.feature_map == "signed_power":
        leaves["parameter"] = 1 + 4 * torch.rand(H, D, generator=generator)
    if variant.key_weight:
        leaves["key_weight"] = 0.1 + torch.rand(B, 1, M, generator=generator)
        leaves["key_weight"][..., 1::5] *= -0.05  # weights may be negative, if the denominators are not
    angle = randn(H, N, D // 2)
    rope = torch.stack([angle.cos(), angle.sin()], dim=-1) if variant.rope else None
    do = randn(B, N, H, D_v).transpose(1, 2).to(dtype)
    if variant.encoding:  # as kernels read it
        leaves["key_encoding"] = (0.5 * randn(M, H, D).transpose(0, 1)).to(dtype).float()
    return leaves, rope, do


def forward_backward(function, variant: Variant, inputs, dtype: torch.dtype | None = None, **options):
    """The output of ``linear_attention`` and the gradients of all leaves, on the test's device; ``dtype`` upcasts."""
    leaves, rope, do = inputs
    place = dict(device=DEVICE) if dtype is None else dict(device=DEVICE, dtype=dtype)
    leaves = {name: x.detach().to(**place).requires_grad_() for name, x in leaves.items()}
    rope = None if rope is None else rope.to(**place)
    feature_map = {"focusing_power": focusing_power, "signed_power": signed_power}.get(variant.feature_map)
    feature_map = variant.feature_map if feature_map is None else feature_map(leaves["parameter"])
    if variant.encoding:
        options["key_encoding"] = leaves["key_encoding"]
    key_weight = "softmax" if variant.softmax else leaves.get("key_weight")
    o = function(
        leaves["q"], leaves["k"], leaves["v"], feature_map=feature_map, key_weight=key_weight, rope=rope,
        **variant.options, **options,
    )  # fmt: skip
    gradients = torch.autograd.grad(o, list(leaves.values()), do.to(o))
    return {"o": o.detach()} | {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}


class _RoundedProduct(torch.autograd.Function):
    """a b with operands rounded to bfloat16, forward and backward."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return _rounded(a) @ _rounded(b)

    @staticmethod
    def backward(ctx, gradient):
        a, b = (_rounded(x).transpose(-2, -1) for x in ctx.saved_tensors)
        return _rounded(gradient) @ b, a @ _rounded(gradient)


def _rounded(x):
    return x.to(torch.bfloat16).to(x.dtype)


class RoundedProducts(TorchFunctionMode):
    """Matrix products as in mixed precision: of operands rounded to bfloat16, everything else in the dtype of x."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.matmul:  # as which `a @ b` comes here, too
            return _RoundedProduct.apply(*args)
        return function(*args, **(kwargs or {}))


def assert_close(results: dict, expected: dict, tolerance: float, mixed: Callable[[], dict] | None = None) -> None:
    """Each tensor within ``tolerance`` of the expected one, relative in the Frobenius norm.

    With a single key all weights are one, and what is left of the gradients of queries, keys and weights, terms in ε,
    is a difference of numbers a million times as large. So the norm of a gradient counts as at least a hundredth of
    that of the largest gradient, and with a single key as that of the largest.

    Where rounded operands alone cost more than the tolerance, the error may be as large as that of ``mixed``, the
    results of PyTorch with ``RoundedProducts``.
    """
    errors = _errors(results, expected)
    if mixed is not None and not all(error <= tolerance for error in errors.values()):
        allowed = {name: max(tolerance, error) for name, error in _errors(mixed(), expected).items()}
    else:
        allowed = dict.fromkeys(errors, tolerance)
    assert all(error <= allowed[name] for name, error in errors.items()), (errors, allowed)


def _errors(results: dict, expected: dict) -> dict[str, float]:
    assert results.keys() == expected.keys()
    norms = {name: x.double().norm().item() for name, x in expected.items()}
    single_key = "dk" in expected and expected["dk"].shape[2] == 1
    floor = max(norm for name, norm in norms.items() if name != "o") * (1 if single_key else 1e-2)
    errors = {}
    for name, x in expected.items():
        assert results[name].shape == x.shape
        error = (results[name].double() - x.double()).norm().item()
        errors[name] = error / max(norms[name], 0 if name == "o" else floor)
    return errors


def compare(name: str, leaves: dict, do: torch.Tensor, tolerance: float, **options) -> None:
    """The kernels on such leaves with the reference in float64."""
    results = [
        forward_backward(linear_attention, VARIANTS[name], (leaves, None, do), dtype, backend=backend, **options)
        for backend, dtype in (("triton", None), ("reference", torch.float64))
    ]
    assert_close(*results, tolerance)
