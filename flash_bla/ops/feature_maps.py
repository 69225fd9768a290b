"""Feature maps φ: what tells one linear attention from another.

A map is defined once for PyTorch (the specification, any dtype and device) and once for Triton: the value, and from
input and value the derivatives by the input and by the map's parameter, elementwise on float32 tiles. Both stand side
by side below; to add a map, add the two and an entry in ``FEATURE_MAPS`` and ``TRITON_FEATURE_MAPS``.

    identity        φ(x) = x
    relu            φ(x) = max(x, 0)
    elu1            φ(x) = elu(x) + 1                                                   (Katharopoulos et al., 2020)
    focusing_power  φ(x) = uᵖ · ‖u‖ / ‖uᵖ‖,  u = (max(x, 0) + 1e-6) / scale             (FLatten Transformer, 2023)
    signed_power    φ(x) = [max(x, 0)ᵃ, max(-x, 0)ᵃ], 2D features                       (PolaFormer, 2025)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from flash_bla.ops.triton_support import NVIDIA, fast_exp_to_one, fast_log2, jit, tl

if TYPE_CHECKING:
    from torch import Tensor

FOCUSING_FLOOR = 1e-6


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """A feature map with its parameter.

    Attributes:
        name: Key of ``FEATURE_MAPS``.
        parameter: ``(H, D)``; the scale of ``focusing_power``, the exponent of ``signed_power``, else None.
        exponent: p of ``focusing_power``.
    """

    name: str
    parameter: Tensor | None = None
    exponent: int = 1

    @property
    def signed(self) -> bool:
        """Whether the map gives 2D features, one half for each sign of its input."""
        return self.name == "signed_power"

    def __call__(self, x: Tensor) -> Tensor:
        """φ(x) for ``x (B, H, N, D)``, in the dtype of x."""
        parameter = None if self.parameter is None else self.parameter.to(x.dtype)[:, None]
        return FEATURE_MAPS[self.name](x, parameter, self.exponent)


def focusing_power(scale: Tensor, exponent: int = 3) -> FeatureMap:
    """Focusing map of FLatten Transformer: φ(x) = uᵖ · ‖u‖ / ‖uᵖ‖ with u = (max(x, 0) + 1e-6) / scale.

    Both norms run over all heads and channels of a token.

    Args:
        scale: Positive, ``(H, D)``.
        exponent: p, a positive integer.
    """
    if not isinstance(exponent, int) or exponent < 1:
        raise ValueError(f"focusing_power: exponent must be a positive integer, got {exponent!r}")
    return FeatureMap("focusing_power", scale, exponent)


def signed_power(power: Tensor) -> FeatureMap:
    """Polarity-aware map of PolaFormer: φ(x) = [max(x, 0)ᵃ, max(-x, 0)ᵃ] with a = power.

    With it the first half of v's channels takes the products of equal signs, and the second half those of opposite
    signs: o = concat(LA(φ(q), φ(k), v₁), LA(φ(-q), φ(k), v₂)).

    Args:
        power: At least 1, ``(H, D)``.
    """
    return FeatureMap("signed_power", power)


def resolve_feature_map(feature_map: str | FeatureMap | None) -> FeatureMap:
    """Turns the public argument into a ``FeatureMap``; an unknown name is a ValueError."""
    if isinstance(feature_map, FeatureMap):
        return feature_map
    name = "identity" if feature_map is None else feature_map
    if name in ("focusing_power", "signed_power"):
        raise ValueError(f"feature_map {name!r} has a parameter: pass flash_bla.ops.{name}(...) instead of its name")
    if name not in FEATURE_MAPS:
        raise ValueError(f"feature_map must be one of {sorted(FEATURE_MAPS)} or None, got {name!r}")
    return FeatureMap(name)


def focusing_norm_ratio(x: Tensor, scale: Tensor, exponent: int) -> Tensor:
    """The factor ‖u‖ / ‖uᵖ‖ of ``focusing_power`` for each token: ``x (B, H, N, D)`` gives ``(B, 1, N)``.

    It is computed on u / max(u), which changes nothing in exact arithmetic and neither over- nor underflows.
    """
    u = (x.relu() + FOCUSING_FLOOR) / scale
    largest = u.detach().amax(dim=(1, 3), keepdim=True)
    t = u / largest
    ratio = t.square().sum(dim=(1, 3)).sqrt() / t.pow(2 * exponent).sum(dim=(1, 3)).sqrt()
    return (ratio * largest[:, 0, :, 0].pow(1 - exponent)).unsqueeze(1)


# --- identity ---------------------------------------------------------------------------------------------------------


def _identity(x, parameter, exponent):
    return x


@jit
def _identity_triton(x, a, P: tl.constexpr):
    return x


@jit
def _identity_dx(x, phi, a, P: tl.constexpr, factor=None):
    return 1.0 if factor is None else factor


# --- relu -------------------------------------------------------------------------------------------------------------


def _relu(x, parameter, exponent):
    return x.relu()


@jit
def _relu_triton(x, a, P: tl.constexpr):
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@jit
def _relu_dx(x, phi, a, P: tl.constexpr, factor=None):
    return tl.where(phi > 0.0, 1.0 if factor is None else factor, 0.0)


# --- elu + 1 ----------------------------------------------------------------------------------------------------------


def _elu1(x, parameter, exponent):
    # elu(x) + 1 rounds small features to 0; clamp has slope 0 at 0, where that of φ is 1
    return torch.where(x >= 0, x + 1, x.clamp(max=0).exp())


@jit
def _elu1_triton(x, a, P: tl.constexpr):
    return tl.maximum(x + 1.0, fast_exp_to_one(x))  # eˣ is never below x + 1


@jit
def _elu1_dx(x, phi, a, P: tl.constexpr, factor=None):
    # times a factor that is not negative, by which phi has been multiplied
    if factor is None:
        return fast_exp_to_one(x)  # which the compiler has computed for the value
    else:
        return tl.minimum(phi, factor)


@jit
def _elu1_in_loops(x, a, P: tl.constexpr):
    return tl.maximum(x, 0.0) + tl.exp2(tl.minimum(x * 1.4426950408889634, 0.0))


@jit
def _elu1_in_loops_dx(x, phi, a, P: tl.constexpr):
    return tl.minimum(phi, 1.0)


# --- focusing power (the Triton functions give (scale u)ᵖ; the kernels bring in the scale and the norm ratio) ---------


def _focusing_power(x, parameter, exponent):
    ratio = focusing_norm_ratio(x, parameter, exponent)
    return ((x.relu() + FOCUSING_FLOOR) / parameter).pow(exponent) * ratio.unsqueeze(-1)


@jit
def integer_power(u, P: tl.constexpr):
    if P == 0:
        return u * 0.0 + 1.0
    else:
        power = u
        for _ in tl.static_range(P - 1):
            power = power * u
        return power


@jit
def _focusing_power_triton(x, a, P: tl.constexpr):
    return integer_power(tl.maximum(x, 0.0) + 1e-6, P)


@jit
def _focusing_power_dx(x, phi, a, P: tl.constexpr):
    u = tl.maximum(x, 0.0) + 1e-6
    return tl.where(u > 1e-6, integer_power(u, P - 1) * P, 0.0)  # u and not x, whose signs would take registers


# --- signed power (the Triton functions are of sign(x) |x|ᵃ; the kernels tell the signs apart) ------------------------


def _signed_power(x, parameter, exponent):
    # max(x, 0)ᵃ with finite derivatives at 0, where d(xᵃ)/da = xᵃ log x must be 0 and not NaN.
    def half(x):
        positive = x > 0
        return torch.where(positive, torch.where(positive, x, 1.0).pow(parameter), 0.0)

    return torch.cat([half(x), half(-x)], dim=-1)


@jit
def _less_one(a):
    return tl.maximum(a - 1.0, 1e-7)  # so that |x|^(a - 1) is 0 at 0 for a = 1, too


@jit
def _signed_power_triton(x, a, P: tl.constexpr):
    return x * tl.exp2(_less_one(a) * fast_log2(tl.abs(x)))


@jit
def _signed_power_dx(x, phi, a, P: tl.constexpr):
    power = tl.exp2(_less_one(a) * fast_log2(tl.abs(x)))
    return _less_one(a) * power + power


@jit
def _signed_power_da(x, phi, a, P: tl.constexpr):
    # log 2 and 1 / a are left to the kernels; the maximum's product with 0 is 0
    return tl.maximum(fast_log2(tl.abs(x)), -1e30) * x


# --- features as operands of products ---------------------------------------------------------------------------------


@jit
def _rounded(x, PHI: tl.constexpr, P: tl.constexpr, OPERAND: tl.constexpr):
    return PHI(x.to(tl.float32), 1.0, P).to(OPERAND)


@jit
def _elu1_rounded_nvidia(x, PHI: tl.constexpr, P: tl.constexpr, OPERAND: tl.constexpr):
    # Two numbers at a time: max(x + 1, eˣ), each rounded, is the value rounded. Ten instructions instead of thirteen.
    if OPERAND == tl.bfloat16 and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "{.reg .b32 x, y, one; .reg .f32 a, b; mov.b32 one, 0; min.bf16x2 x, $1, one; mov.b32 one, 0x3F803F80;"
            " shl.b32 y, x, 16; and.b32 x, x, 0xFFFF0000; mov.b32 a, y; mov.b32 b, x;"
            " mul.f32 a, a, 0f3FB8AA3B; mul.f32 b, b, 0f3FB8AA3B; ex2.approx.ftz.f32 a, a; ex2.approx.ftz.f32 b, b;"
            " cvt.rn.bf16x2.f32 x, b, a; fma.rn.bf16x2 y, $1, one, one; max.NaN.bf16x2 $0, x, y;}",
            "=r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return _rounded(x, PHI, P, OPERAND)


_elu1_rounded = _elu1_rounded_nvidia if NVIDIA else _rounded

FEATURE_MAPS = {
    "identity": _identity,
    "relu": _relu,
    "elu1": _elu1,
    "focusing_power": _focusing_power,
    "signed_power": _signed_power,
}

# name: (value, value as an operand of a product, derivative by x, what times that is the derivative by the parameter,
# where the value is zero); the kernels take the fourth of signed_power alone.
TRITON_FEATURE_MAPS = {
    "identity": (_identity_triton, _rounded, _identity_dx, _identity_dx, 0.0),
    "relu": (_relu_triton, _rounded, _relu_dx, _relu_dx, 0.0),
    "elu1": (_elu1_triton, _elu1_rounded, _elu1_dx, _elu1_dx, -1e4),
    "focusing_power": (_focusing_power_triton, _rounded, _focusing_power_dx, _focusing_power_dx, 0.0),
    "signed_power": (_signed_power_triton, _rounded, _signed_power_dx, _signed_power_da, 0.0),
}
# What all but plain maps in bfloat16 take: in the loops of triton_loops.py this form of elu + 1 is up to 9 % faster,
# for RALA's gradients.
LOOP_FEATURE_MAPS = TRITON_FEATURE_MAPS | {
    "elu1": (_elu1_in_loops, _elu1_rounded, _elu1_in_loops_dx, _elu1_in_loops_dx, -1e4)
}
