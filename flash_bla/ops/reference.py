"""The specification of every operator: plain PyTorch, differentiable, float64-capable, on any device.

It is also what runs where Triton cannot. Sums, features and denominators are float32 at least, whatever the inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_bla.ops.arguments import without_autocast
from flash_bla.ops.feature_maps import FeatureMap


def linear_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: FeatureMap,
    q_denominator: Tensor | None = None,
    k_denominator: Tensor | None = None,
    key_weight: Tensor | str | None = None,
    key_encoding: Tensor | None = None,
    rope: Tensor | None = None,
    normalize: bool = True,
    scale: float | None = None,
    eps: float = 1e-6,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """o = q̂ (k̂ᵀ v · scale) / (q̃ · mean(k̃) + ε) for ``q (B, H, N, D)``, ``k (B, H, M, D)``, ``v (B, H, M, Dv)``.

    ``key_encoding (H, M, D)`` is added to k first. q̃ = φ(q) and k̃ = w φ(k), or those of ``q_denominator``,
    ``k_denominator`` where they are given; q̂ and k̂ are φ(q) and w φ(k) turned by ``rope``. ``scale`` is 1/M by
    default. Arguments are those of ``linear_attention``, already checked; with ``cu_seqlens`` the batch is 1 and each
    sequence attends to itself.
    """
    if cu_seqlens is not None:
        starts = cu_seqlens.tolist()
        if starts[0] != 0 or starts[-1] != q.shape[2] or starts != sorted(starts):
            raise ValueError(f"cu_seqlens must run from 0 to {q.shape[2]}, the number of tokens, got {starts}")
        none = v[..., :0, :]
        outputs = [
            linear_attention_reference(
                q[..., a:b, :], k[..., a:b, :], v[..., a:b, :], feature_map, normalize=normalize, scale=scale, eps=eps
            )
            for a, b in zip(starts[:-1], starts[1:], strict=True)
            if b > a
        ]
        return torch.cat([none, *outputs], dim=2)

    out_dtype = v.dtype
    dtype = torch.promote_types(out_dtype, torch.float32)
    with without_autocast(q):
        if key_encoding is not None:
            k = k.to(dtype) + key_encoding.to(k.dtype)  # as the kernels read it
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        if isinstance(key_weight, str):
            key_weight = softmax_weights(feature_map(q), feature_map(k))
        weight = None if key_weight is None else key_weight.to(dtype).unsqueeze(-1)
        if feature_map.signed:
            same, opposite = v.chunk(2, dim=-1)
            keys = feature_map(k) if weight is None else feature_map(k) * weight
            streams = [
                _attend(feature_map(x), keys, x_v, normalize, scale, eps) for x, x_v in ((q, same), (-q, opposite))
            ]
            return torch.cat(streams, dim=-1).to(out_dtype)
        q_hat, k_hat = feature_map(q), feature_map(k)
        if weight is not None:
            k_hat = k_hat * weight
        q_tilde = q_hat if q_denominator is None else feature_map(q_denominator.to(dtype))
        k_tilde = k_hat if k_denominator is None else feature_map(k_denominator.to(dtype))
        if rope is not None:
            q_hat, k_hat = rotate(q_hat, rope), rotate(k_hat, rope)
        return _attend(q_hat, k_hat, v, normalize, scale, eps, q_tilde, k_tilde).to(out_dtype)


def softmax_weights(q_hat: Tensor, k_hat: Tensor) -> Tensor:
    """RALA's weight of each key, of mean 1: M softmax(D^-0.5 · mean(q̂) · k̂), ``(B, H, M)``."""
    # a product and a sum: autocast would compute a matrix product in half precision
    scores = (_mean(q_hat) * k_hat).sum(dim=-1)
    return k_hat.shape[2] * torch.softmax(scores * k_hat.shape[3] ** -0.5, dim=-1)


def _attend(q_hat, k_hat, v, normalize, scale, eps, q_tilde=None, k_tilde=None):
    state = k_hat.transpose(-2, -1) @ (v * (1 / max(v.shape[-2], 1) if scale is None else scale))
    o = q_hat @ state
    if not normalize:
        return o
    q_tilde = q_hat if q_tilde is None else q_tilde
    k_tilde = k_hat if k_tilde is None else k_tilde
    return o / (q_tilde @ _mean(k_tilde).transpose(-2, -1) + eps)


def _mean(x: Tensor) -> Tensor:
    """The mean of the tokens, zero where there is none."""
    return x.sum(dim=-2, keepdim=True) / max(x.shape[-2], 1)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turns adjacent channels (x₂ⱼ, x₂ⱼ₊₁) by angles whose cosine and sine are given: ``(1 or H, N, D/2, 2)``."""
    cos, sin = rope.to(x.dtype).split(1, dim=-1)
    pairs = x.unflatten(-1, (-1, 2))
    return torch.addcmul(pairs * cos, pairs.flip(-1), torch.cat([-sin, sin], dim=-1)).flatten(-2)
