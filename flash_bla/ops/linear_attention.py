"""Public linear-attention functions: they check their arguments, choose a backend and call it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flash_bla.ops import triton_linear_attention, triton_linear_attention_dwc
from flash_bla.ops.arguments import (
    autocast,
    check_device,
    check_tensors,
    choose_backend,
    expect,
    merge_heads,
    split_heads,
    unpack,
    unpack_gate,
)
from flash_bla.ops.depthwise_conv import check_convolution, check_grid, depthwise_conv_reference
from flash_bla.ops.feature_maps import FeatureMap, resolve_feature_map
from flash_bla.ops.reference import linear_attention_reference
from flash_bla.ops.triton_support import is_eager


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str | FeatureMap | None = None,
    key_weight: Tensor | str | None = None,
    key_encoding: Tensor | None = None,
    rope: Tensor | None = None,
    normalize: bool = True,
    scale: float | None = None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    r"""Bidirectional linear attention, O(N D²).

    .. math:: o_n = \frac{R_n φ(q_n) \; s \sum_m w_m (R_m φ(k_m + e_m))^T v_m}
                         {φ(q_n) \cdot \frac{1}{M} \sum_m w_m φ(k_m + e_m) + ε}

    with R the rotation of ``rope``, w the ``key_weight``, e the ``key_encoding`` and s = ``scale``. Sums, features and
    denominators are computed in float32 (float64 for float64 inputs); under autocast q, k and v are cast to its type.

    Args:
        q: Queries ``(B, H, N, D)``; any strides here and below.
        k: Keys ``(B, H, M, D)``, finite: what leaves keys out is ``key_weight``.
        v: Values ``(B, H, M, Dv)``, of the dtype of q and k: float16, bfloat16, float32 or float64.
        feature_map: φ: None (identity), ``"elu1"`` (elu + 1), ``"relu"``, or what ``focusing_power(scale)`` or
            ``signed_power(power)`` return. With these ``rope`` is not possible; with the latter Dv must be even.
        key_weight: w, ``(B, H, M)`` or broadcastable to it; differentiable. Or ``"softmax"``, the weights of RALA:
            w = M softmax_m(D^-0.5 · mean_n(φ(q_n)) · φ(k_m)); not with ``focusing_power`` and ``signed_power``.
        key_encoding: ``(H, M, D)`` or broadcastable to it, a positional encoding that is added to the keys of each
            sequence before the feature map; differentiable. It is read in the dtype of k.
        rope: ``(1 or H, N, D/2, 2)``: cosine and sine of the angles by which pairs of adjacent channels of φ(q) and
            φ(k) turn in the numerator; M must equal N. float16 is enough for bfloat16 inputs. Not differentiable.
        normalize: False leaves the denominator out.
        scale: Factor of the numerator, 1/M by default.
        eps: Added to the denominator.
        backend: ``"triton"`` or ``"reference"``; by default the environment variable ``FLASH_BLA_BACKEND``, else Triton
            for CUDA tensors where it is installed, and the PyTorch reference elsewhere. Gradients of gradients,
            forward-mode derivatives and those of ``torch.func`` are the reference's alone.

    Returns:
        ``(B, H, N, Dv)`` in the dtype of v, laid out so that ``.transpose(1, 2).flatten(2)`` copies nothing on CUDA.

    Raises:
        ValueError: A shape, device or name that does not fit.
        TypeError: Not tensors, or dtypes that differ or are not supported.

    Reference:
        Katharopoulos et al., "Transformers are RNNs", ICML 2020.
    """
    q, k, v = autocast(q, k, v)
    return _attend(q, k, v, _check_qkv, feature_map=feature_map, key_weight=key_weight, key_encoding=key_encoding,
                   rope=rope, normalize=normalize, scale=scale, eps=eps, backend=backend)  # fmt: skip


def _check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    check_tensors({"q": q, "k": k, "v": v}, "(B, H, N, D)", ndim=4)
    B, H, _, D = q.shape
    M, D_v = k.shape[2], v.shape[3]
    expect("k", k, (B, H, M, D), "(B, H, M, D) with B, H, D of q")
    expect("v", v, (B, H, M, D_v), "(B, H, M, Dv) with B, H of q and M of k")


def linear_attention_qkvpacked(qkv: Tensor, **options: Any) -> Tensor:
    """``linear_attention`` of queries, keys and values that are one tensor, as is then their gradient.

    Where q, k and v are views of one projection's output, autograd copies their gradients into one tensor. Here the
    kernels write them there at once.

    Args:
        qkv: ``(B, N, 3, H, D)``, what ``.unflatten(-1, (3, H, D))`` makes of a projection's output.
        **options: ``feature_map`` and all that follows it in ``linear_attention``.

    Returns:
        ``(B, N, H, D)``; ``.flatten(2)`` copies nothing on CUDA.

    Raises:
        ValueError, TypeError: As ``linear_attention``.
    """
    (qkv,) = autocast(qkv)
    return _attend(qkv, None, None, _check_packed, **options).transpose(1, 2)


def _check_packed(qkv: Tensor, *_) -> None:
    check_tensors({"qkv": qkv}, "(B, N, 3, H, D)", ndim=5)
    B, N, _, H, D = qkv.shape
    expect("qkv", qkv, (B, N, 3, H, D), "(B, N, 3, H, D)")


def linear_attention_dwc(
    qkv: Tensor, grid: tuple[int, int], weight: Tensor, bias: Tensor | None = None, *, v: Tensor | None = None,
    **options: Any,
) -> Tensor:  # fmt: skip
    r"""Linear attention with a depthwise convolution of the values beside it, and a gate.

    .. math:: y = (LA(q, k, v) + w \star v + b) \odot g

    As ``depthwise_conv(v, grid, weight, bias, add=o, gate=g)`` of the attention's output o, of tokens that are one
    tensor, as is then their gradient: autograd would add the two gradients of v, and copy all into one tensor.

    Args:
        qkv: ``(B, N, 3, H, D)``; with a gate ``(B, N, 4, H, D)``; without values ``(B, N, 2, H, D)``.
        grid: (H, W); the first N - H·W tokens are prefix tokens, for which the convolution gives zero.
        weight: Filters ``(channels, 1, k, k)`` with k in 3, 5, 7; heads share them if there are fewer than H·D.
        bias: ``(channels,)``.
        v: Values ``(B, N, H·Dv)`` that stand elsewhere.
        **options: ``feature_map`` and all that follows it in ``linear_attention``.

    Returns:
        ``(B, N, H·D)``.

    Raises:
        ValueError, TypeError: As ``linear_attention`` and ``depthwise_conv``.
    """
    qkv, v = autocast(qkv, v)
    grid = check_grid(grid)

    def check(qkv: Tensor, _, v: Tensor | None) -> None:
        wanted = "(B, N, 3 or 4, H, D)" if v is None else "(B, N, 2, H, D), beside v"
        check_tensors({"qkv": qkv}, wanted, ndim=5)
        B, N, parts, H, _ = qkv.shape
        if parts not in ((3, 4) if v is None else (2,)):
            raise ValueError(f"qkv must have shape {wanted}, got {tuple(qkv.shape)}")
        if v is not None:
            check_tensors({"v": v}, "(B, N, H·Dv)", ndim=3)
            if v.shape[:2] != (B, N) or v.shape[2] % H:
                raise ValueError(f"v must have shape ({B}, {N}, {H}·Dv) with B, N, H of qkv, got {tuple(v.shape)}")
            check_device("v", v, qkv)
            if v.dtype != qkv.dtype:
                raise TypeError(f"v must have the dtype of qkv, {qkv.dtype}, got {v.dtype}")
        values = qkv[:, :, 2].flatten(2) if v is None else v
        check_convolution(values, weight, bias, None, None, *grid, 1, False, None, None)

    return _attend(qkv, None, v, check, (grid, weight, bias), **options)


def simple_la(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, *, backend: str | None = None) -> Tensor:
    """Linear attention without feature map and denominator: o = q (kᵀ v) · scale.

    Args:
        q: ``(B, H, N, D)``.
        k: ``(B, H, M, D)``.
        v: ``(B, H, M, Dv)``.
        scale: D^-0.5 by default.
        backend: As in ``linear_attention``.

    Returns:
        ``(B, H, N, Dv)``. In float16 it overflows where the product does: there is no denominator to tame it.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return linear_attention(q, k, v, normalize=False, scale=scale, backend=backend)


def decoupled_la(
    q: Tensor,
    k: Tensor,
    q_rope: Tensor,
    k_rope: Tensor,
    v: Tensor,
    scale: float | None = None,
    eps: float = 1e-6,
    *,
    backend: str | None = None,
) -> Tensor:
    """Linear attention with features of its own in the numerator: o = q_rope (k_ropeᵀ v · scale) / (q · mean(k) + ε).

    Args:
        q: Queries of the denominator ``(B, H, N, D)``, after their feature map.
        k: Keys of the denominator ``(B, H, M, D)``.
        q_rope: Queries of the numerator, shaped as q.
        k_rope: Keys of the numerator, shaped as k.
        v: ``(B, H, M, Dv)``.
        scale: 1/M by default.
        eps: Added to the denominator.
        backend: As in ``linear_attention``.

    Returns:
        ``(B, H, N, Dv)``.
    """
    q, k, q_rope, k_rope, v = autocast(q, k, q_rope, k_rope, v)
    check_tensors({"q": q, "k": k, "q_rope": q_rope, "k_rope": k_rope, "v": v}, "(B, H, N, D)", ndim=4)
    B, H, _, D = q.shape
    M = k.shape[2]
    expect("k", k, (B, H, M, D), "(B, H, M, D) with B, H, D of q")
    expect("v", v, (B, H, M, v.shape[3]), "(B, H, M, Dv) with B, H of q and M of k")
    expect("q_rope", q_rope, tuple(q.shape), "the shape of q")
    expect("k_rope", k_rope, tuple(k.shape), "the shape of k")
    return _run(q_rope, k_rope, v, FeatureMap("identity"), choose_backend(backend, q), q_denominator=q,
                k_denominator=k, scale=scale, eps=eps)  # fmt: skip


def varlen_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float | None = None,
    eps: float = 1e-6,
    *,
    feature_map: str | FeatureMap | None = None,
    backend: str | None = None,
) -> Tensor:
    """Linear attention within each of several sequences that are packed into one tensor.

    Args:
        q: ``(total, H, D)``: the sequences' tokens one after the other.
        k: ``(total, H, D)``.
        v: ``(total, H, Dv)``.
        cu_seqlens: int32 ``(sequences + 1,)``, cumulative lengths from 0 to total. The Triton kernels trust them: to
            check them would be to wait for the GPU.
        max_seqlen: Length of the longest sequence, or more.
        scale: By default 1 / length, for each sequence its own.
        eps: Added to the denominator.
        feature_map: As in ``linear_attention``.
        backend: As in ``linear_attention``.

    Returns:
        ``(total, H, Dv)``.
    """
    q, k, v = autocast(q, k, v)
    check_tensors({"q": q, "k": k, "v": v}, "(total, H, D)", ndim=3)
    feature_map = resolve_feature_map(feature_map)
    total, H, D = q.shape
    expect("k", k, tuple(q.shape), "the shape of q")
    expect("v", v, (total, H, v.shape[2]), "(total, H, Dv) with total, H of q")
    check_device("cu_seqlens", cu_seqlens, q)
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"cu_seqlens must be int32 of shape (sequences + 1,), got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    if not 0 < max_seqlen:
        raise ValueError(f"max_seqlen must be positive, got {max_seqlen}")
    _check_feature_map(feature_map, q, H, D, v.shape[2], None)
    backend = choose_backend(backend, q)
    q, k, v = (x.unsqueeze(0).transpose(1, 2) for x in (q, k, v))  # (1, H, total, D)
    o = _run(q, k, v, feature_map, backend, scale=scale, eps=eps, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
    return o.transpose(1, 2).squeeze(0)


def _attend(
    q: Tensor, k: Tensor | None, v: Tensor | None, check_shapes: Callable, dwc: tuple | None = None, /, *,
    feature_map=None, key_weight=None, key_encoding=None, rope=None, normalize: bool = True,
    scale: float | None = None, eps: float = 1e-6, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """The operator on q, k, v that ``unpack`` takes and ``check_shapes`` checks.

    ``dwc`` are grid, filters and bias of a convolution beside it; values beside a packed q are then ``(B, N, H·Dv)``.
    """
    feature_map = resolve_feature_map(feature_map)
    weighted = key_weight is not None and not isinstance(key_weight, str)
    if isinstance(key_weight, str) and key_weight != "softmax":  # here: what is met before does not tell strings apart
        raise ValueError(f'key_weight must be a tensor, "softmax" or None, got {key_weight!r}')

    def check(*_) -> None:
        check_shapes(q, k, v)
        _, H, N, M, D, D_v = _sizes(q, k, v)
        _check_feature_map(feature_map, q, H, D, D_v, rope)
        if feature_map.signed and not normalize:
            raise ValueError("normalize=False is not defined for signed_power")
        if isinstance(key_weight, str) and feature_map.parameter is not None:
            raise ValueError(f'key_weight="softmax" is not defined for {feature_map.name}')
        if rope is not None:
            check_rope(rope, q, H, N, M, D)

    try:
        eager = is_eager(q) and choose_backend(backend, q) == "triton"
        if not eager:  # else where such arguments were not met before
            check()
        arguments = dict(key_weight=key_weight, key_encoding=key_encoding, rope=rope, normalize=normalize, scale=scale,
                         eps=eps)  # fmt: skip
        if weighted or key_encoding is not None:
            B, H, _, M, D, _ = _sizes(q, k, v)
            if weighted:
                arguments["key_weight"] = _expand("key_weight", key_weight, q, (B, H, M), "(B, H, M)")
            if key_encoding is not None:
                arguments["key_encoding"] = _expand("key_encoding", key_encoding, q, (H, M, D), "(H, M, D)")
        if eager:
            return _run(q, k, v, feature_map, "triton", dwc, check=check, **arguments)
    except (AttributeError, IndexError, ValueError):  # what is no tensor or has too few dimensions, or is one of these
        check()
        raise
    return _run(q, k, v, feature_map, choose_backend(backend, q), dwc, **arguments)


def _sizes(q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[int, int, int, int, int, int]:
    """B, H, N, M, D, Dv."""
    if q.ndim == 5:
        B, N, _, H, D = q.shape
        return B, H, N, N, D, D if v is None else v.shape[2] // H
    B, H, N, D = q.shape
    return B, H, N, k.shape[2], D, v.shape[3]


def _run(q, k, v, feature_map, backend, dwc=None, **arguments) -> Tensor:
    if backend == "triton":
        if dwc is not None:
            return triton_linear_attention_dwc.linear_attention_dwc(q, v, *dwc, feature_map, **arguments)
        return triton_linear_attention.linear_attention(q, k, v, feature_map, **arguments)
    arguments.pop("max_seqlen", None)
    if dwc is None:
        return linear_attention_reference(*unpack(q, k, v), feature_map, **arguments)
    grid, weight, bias = dwc
    gate = unpack_gate(q)
    q, k, v = unpack(q, k, None if v is None else split_heads(v, q.shape[3]))
    o = linear_attention_reference(q, k, v, feature_map, **arguments)
    return depthwise_conv_reference(merge_heads(v), weight, bias, merge_heads(o), gate, *grid, 1, False, None, None)


def _expand(name: str, x: Tensor, like: Tensor, shape: tuple[int, ...], meaning: str) -> Tensor:
    check_device(name, x, like)
    if x.shape == shape:
        return x
    try:
        return x.expand(shape)
    except RuntimeError as error:
        raise ValueError(f"{name} must be broadcastable to {meaning} = {shape}, got {tuple(x.shape)}") from error


def _check_feature_map(feature_map: FeatureMap, q: Tensor, H: int, D: int, D_v: int, rope) -> None:
    if feature_map.parameter is not None:
        check_device(f"the parameter of {feature_map.name}", feature_map.parameter, q)
        expect(f"the parameter of {feature_map.name}", feature_map.parameter, (H, D), "(H, D)")
    if feature_map.signed and D_v % 2:
        raise ValueError(f"signed_power splits v's channels in two: Dv must be even, got {D_v}")
    if feature_map.parameter is not None and rope is not None:
        raise ValueError(f"rope is not defined for {feature_map.name}")


def check_rope(rope: Tensor, q: Tensor, H: int, N: int, M: int, D: int) -> None:
    check_device("rope", rope, q)
    if M != N or D % 2:
        raise ValueError(f"rope needs as many keys as queries and an even head width, got N={N}, M={M}, D={D}")
    if rope.ndim != 4 or rope.shape[0] not in (1, H) or tuple(rope.shape[1:]) != (N, D // 2, 2):
        raise ValueError(
            f"rope must have shape (1 or H, N, D/2, 2), here ({H}, {N}, {D // 2}, 2), got {tuple(rope.shape)}"
        )
