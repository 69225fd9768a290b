"""Linear attention in Triton: launches of the kernels, and the torch.library operators over them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from flash_bla.ops.feature_maps import TRITON_FEATURE_MAPS, FeatureMap
from flash_bla.ops.triton_kernels import gradient_kernel, output_kernel, reduce_kernel, state_kernel
from flash_bla.ops.triton_support import call, cdiv, multiprocessors, precision

# --- launches ---------------------------------------------------------------------------------------------------------


class _Problem(NamedTuple):
    """What the launches of both directions share."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_denominator: Tensor | None
    k_denominator: Tensor | None
    parameter: Tensor | None
    query_weight: Tensor | None
    key_weight: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    cu_seqlens: Tensor | None
    max_seqlen: int
    feature_map: str
    exponent: int
    normalize: bool
    scale: float | None
    eps: float

    @property
    def streams(self) -> int:
        return 2 if self.feature_map == "signed_power" else 1

    @property
    def sequences(self) -> int:
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def centered(self) -> bool:
        """Whether the values' mean is taken out of the state: where numerator and denominator have equal features."""
        return self.normalize and self.cos is None and self.q_denominator is None

    def empty_state(self, splits: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """State, z and the values' mean, the first two for each split."""
        _, H, _, D = self.q.shape
        D_v = self.v.shape[3] // self.streams
        shape = (self.sequences, H, self.streams)
        options = dict(dtype=torch.float32, device=self.q.device)
        state = torch.empty(splits, *shape, self.streams, D, D_v, **options)
        z = torch.empty(splits, *shape, self.streams, D, **options)
        return state, z, torch.zeros(*shape, D_v, **options)

    def empty_output(self) -> Tensor:
        B, H, N, _ = self.q.shape
        # laid out as (B, N, H, Dv), which the projection after an attention reads without a copy
        return self._empty(self.v, (B, N, H, self.v.shape[3])).transpose(1, 2)

    def empty_like(self, x: Tensor | None) -> Tensor:
        """A gradient of x, also laid out as (B, N, H, D); of no elements for None."""
        if x is None:
            return self.q.new_empty(0)
        return self._empty(x, x.transpose(1, 2).shape).transpose(1, 2) if x.ndim == 4 else self._empty(x, x.shape)

    def _empty(self, x: Tensor, shape) -> Tensor:
        # packed tokens that belong to no sequence must not come out as garbage
        return x.new_empty(shape) if self.cu_seqlens is None else x.new_zeros(shape)


def _launch(
    kernel, problem: _Problem, queries: bool, tensors: dict, *, splits: int, tiles: int, streams: int = 1, **options
) -> None:
    """Runs a kernel over queries or keys; ``tensors`` are those that it does not share with the others."""
    p = problem
    x, x_denominator = (p.q, p.q_denominator) if queries else (p.k, p.k_denominator)
    weight = p.query_weight if queries else p.key_weight
    H, length, D = x.shape[1:]
    D_v = p.v.shape[3] // p.streams
    block_n, block_d, block_dv = _blocks(D, D_v, p.streams, x.element_size())
    grid = (p.sequences * H * streams, tiles, splits)
    if grid[0] == 0:
        return
    arguments = dict(
        x_ptr=x, x_strides=x.stride(), xd_ptr=x_denominator,
        xd_strides=(0, 0, 0, 0) if x_denominator is None else x_denominator.stride(),
        a_ptr=p.parameter, w_ptr=weight, w_strides=(0, 0, 0) if weight is None else weight.stride(),
        cos_ptr=p.cos, sin_ptr=p.sin, rope_strides=_rope_strides(p.cos), cu_seqlens=p.cu_seqlens,
        length=length, heads=H,
        EXPONENT=p.exponent, D=D, DV=D_v, SIGNED=p.streams == 2, PARAMETER=p.parameter is not None,
        WEIGHT=weight is not None, ROPE=p.cos is not None, DECOUPLED=x_denominator is not None,
        NORMALIZE=p.normalize, VARLEN=p.cu_seqlens is not None, BLOCK_N=block_n, BLOCK_D=block_d, BLOCK_DV=block_dv,
        **precision(x.dtype), **tensors, **options,
    )  # fmt: skip
    call(kernel, grid, arguments, num_warps=4 if block_d <= 64 else 8)


def _rope_strides(table: Tensor | None) -> tuple[int, int, int]:
    if table is None:
        return (0, 0, 0)
    return (0 if table.shape[0] == 1 else table.stride(0), table.stride(1), table.stride(2))


def _blocks(D: int, D_v: int, streams: int, itemsize: int) -> tuple[int, int, int]:
    """BLOCK_N, BLOCK_D, BLOCK_DV. All of D is one block; rows and D_v split so that a program's tiles fit registers."""
    block_d = max(16, 1 << (D - 1).bit_length())
    block_dv = max(16, min(1 << (D_v - 1).bit_length(), 8192 // (block_d * streams)))
    block_n = max(16, min(64, 4096 // (block_d * itemsize)))
    return block_n, block_d, block_dv


def _splits(problem: _Problem, x: Tensor, programs: int) -> int:
    """Into how many parts to cut the sequences so that all multiprocessors have work."""
    length = x.shape[2] if problem.cu_seqlens is None else problem.max_seqlen
    wanted = cdiv(4 * multiprocessors(x.device), max(programs, 1))
    return max(1, min(wanted, cdiv(length, 64), 65535))


def _state(problem: _Problem, queries: bool, y: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    p = problem
    x = p.q if queries else p.k
    D_v = p.v.shape[3] // p.streams
    tiles = cdiv(D_v, _blocks(x.shape[3], D_v, p.streams, x.element_size())[2])
    splits = _splits(p, x, p.sequences * x.shape[1] * p.streams * tiles)
    state, z, mean = p.empty_state(splits)
    tensors = dict(
        y_ptr=y, y_strides=y.stride(), rows_ptr=rows, rows_strides=_rows_strides(rows), state_ptr=state, z_ptr=z
    )
    scale = 1.0 if queries or p.scale is None else p.scale
    _launch(state_kernel, p, queries, tensors, splits=splits, tiles=tiles, streams=p.streams,
            scale=scale, MEAN=not queries and p.scale is None, QUERIES=queries,
            PHI=TRITON_FEATURE_MAPS[p.feature_map][0])  # fmt: skip
    center = p.centered and not queries
    if splits == 1 and not center:
        return state[0], z[0], mean
    whole_state, whole_z, _ = p.empty_state()
    D = x.shape[3]
    _, block_d, block_dv = _blocks(D, D_v, p.streams, x.element_size())
    if mean.numel() > 0:
        arguments = dict(
            partial_state_ptr=state, partial_z_ptr=z, state_ptr=whole_state, z_ptr=whole_z, mean_ptr=mean,
            splits=splits, D=D, DV=D_v, SIGNED=p.streams == 2, CENTER=center, BLOCK_D=block_d, BLOCK_DV=block_dv,
        )  # fmt: skip
        call(reduce_kernel, (mean.numel() // D_v, tiles, 1), arguments)
    return whole_state[0], whole_z[0], mean


def _gradient(
    problem: _Problem, queries: bool, y: Tensor, dy: Tensor | None, state: Tensor, z: Tensor, mean: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Writes dy, and returns the gradients of x, of the denominator's x, of the weight and of the parameter."""
    p = problem
    x, x_denominator, weight = (
        (p.q, p.q_denominator, p.query_weight) if queries else (p.k, p.k_denominator, p.key_weight)
    )
    splits = _splits(p, x, p.sequences * x.shape[1])
    dx, dx_denominator, dw = p.empty_like(x), p.empty_like(x_denominator), p.empty_like(weight)
    da = None if p.parameter is None else p.q.new_empty((splits, p.sequences, *p.parameter.shape), dtype=torch.float32)
    phi, phi_dx, phi_da = TRITON_FEATURE_MAPS[p.feature_map]
    tensors = dict(
        y_ptr=y, y_strides=y.stride(), state_ptr=state, z_ptr=z, mean_ptr=mean, rows_ptr=rows,
        rows_strides=_rows_strides(rows), dx_ptr=dx, dx_strides=dx.stride(), dxd_ptr=dx_denominator,
        dxd_strides=(0, 0, 0, 0) if x_denominator is None else dx_denominator.stride(),
        dy_ptr=dy, dy_strides=(0, 0, 0, 0) if dy is None else dy.stride(), da_ptr=da, dw_ptr=dw,
        dw_strides=(0, 0, 0) if weight is None else dw.stride(),
    )  # fmt: skip
    scale = 1.0 if queries or p.scale is None else p.scale
    _launch(gradient_kernel, p, queries, tensors, splits=splits, tiles=1, scale=scale, eps=p.eps,
            MEAN=not queries and p.scale is None, QUERIES=queries, PHI=phi, PHI_DX=phi_dx, PHI_DA=phi_da)  # fmt: skip
    return dx, dx_denominator, dw, p.q.new_empty(0) if da is None else da.sum((0, 1))


def _rows_strides(rows: Tensor | None) -> tuple[int, int, int, int]:
    """Strides of rows (2, B, H, STREAMS, N) in the order (batch, head, stream, which)."""
    return (0, 0, 0, 0) if rows is None else (rows.stride(1), rows.stride(2), rows.stride(3), rows.stride(0))


# --- operators --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("flash_bla::linear_attention_forward", mutates_args=())
def linear_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, q_denominator: Tensor | None, k_denominator: Tensor | None,
    parameter: Tensor | None, query_weight: Tensor | None, key_weight: Tensor | None, cos: Tensor | None,
    sin: Tensor | None, cu_seqlens: Tensor | None, max_seqlen: int, feature_map: str, exponent: int, normalize: bool,
    scale: float | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The output, and for the backward pass the keys' state, z and the values' mean."""
    p = _Problem(q, k, v, q_denominator, k_denominator, parameter, query_weight, key_weight, cos, sin, cu_seqlens,
                 max_seqlen, feature_map, exponent, normalize, scale, eps)  # fmt: skip
    state, z, mean = _state(p, False, v)
    o = p.empty_output()
    tensors = dict(o_ptr=o, o_strides=o.stride(), state_ptr=state, z_ptr=z, mean_ptr=mean)
    _launch(output_kernel, p, True, tensors, splits=_splits(p, q, p.sequences * q.shape[1]), tiles=1, eps=eps,
            PHI=TRITON_FEATURE_MAPS[feature_map][0])  # fmt: skip
    return o, state, z, mean


@linear_attention_forward.register_fake
def _(*arguments):
    p = _Problem(*arguments)
    state, z, mean = p.empty_state()
    return p.empty_output(), state[0], z[0], mean


@torch.library.custom_op("flash_bla::linear_attention_backward", mutates_args=())
def linear_attention_backward(
    do: Tensor, state: Tensor, z: Tensor, mean: Tensor, keys: bool,
    q: Tensor, k: Tensor, v: Tensor, q_denominator: Tensor | None, k_denominator: Tensor | None,
    parameter: Tensor | None, query_weight: Tensor | None, key_weight: Tensor | None, cos: Tensor | None,
    sin: Tensor | None, cu_seqlens: Tensor | None, max_seqlen: int, feature_map: str, exponent: int, normalize: bool,
    scale: float | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the first eight inputs of the forward operator; without ``keys`` those of the queries alone.

    A gradient that does not exist has no elements.
    """
    p = _Problem(q, k, v, q_denominator, k_denominator, parameter, query_weight, key_weight, cos, sin, cu_seqlens,
                 max_seqlen, feature_map, exponent, normalize, scale, eps)  # fmt: skip
    B, H, N, _ = q.shape
    rows = q.new_empty((2, B, H, p.streams, N), dtype=torch.float32)
    dq, dq_denominator, dq_weight, da = _gradient(p, True, do, None, state, z, mean, rows)
    if not keys:
        dk, dv, dk_denominator, dk_weight = (p.empty_like(None) for _ in range(4))
        return dq, dk, dv, dq_denominator, dk_denominator, da, dq_weight, dk_weight
    dv = p.empty_like(v)
    d_state, d_z, _ = _state(p, True, do, rows)
    dk, dk_denominator, dk_weight, da_keys = _gradient(p, False, v, dv, d_state, d_z, mean, rows)
    return dq, dk, dv, dq_denominator, dk_denominator, da + da_keys, dq_weight, dk_weight


@linear_attention_backward.register_fake
def _(do, state, z, mean, keys, *arguments):
    p = _Problem(*arguments)
    of_keys = [p.empty_like(x if keys else None) for x in (p.k, p.v, p.k_denominator, p.key_weight)]
    dk, dv, dk_denominator, dk_weight = of_keys
    return (p.empty_like(p.q), dk, dv, p.empty_like(p.q_denominator), dk_denominator, p.empty_like(p.parameter),
            p.empty_like(p.query_weight), dk_weight)  # fmt: skip


def _setup_context(ctx, inputs, output):
    tensors, ctx.options = inputs[:11], inputs[11:]
    ctx.save_for_backward(*tensors, *output[1:])


def _backward(ctx, do, *_):
    *tensors, state, z, mean = ctx.saved_tensors
    needed = ctx.needs_input_grad[:8]
    keys = any(needed[i] for i in (1, 2, 4, 5, 7))
    gradients = linear_attention_backward(do, state, z, mean, keys, *tensors, *ctx.options)
    gradients = (g if need else None for g, need in zip(gradients, needed, strict=True))
    return *gradients, *[None] * (3 + len(ctx.options))


linear_attention_forward.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.flash_bla.linear_attention_forward)
def _forward_flops(q_shape, k_shape, v_shape, *options, **_) -> int:
    """Operations of the matrix products in the reference, for ``torch.utils.flop_counter``."""
    (B, H, N, D), M, D_v = q_shape, k_shape[2], v_shape[3]
    feature_map, _, normalize = options[9:12]
    streams = 2 if feature_map == "signed_power" else 1
    return 2 * B * H * streams * D * ((M + N) * D_v + (N * streams if normalize else 0))


@register_flop_formula(torch.ops.flash_bla.linear_attention_backward)
def _backward_flops(do_shape, state_shape, z_shape, mean_shape, keys, *arguments, **_) -> int:
    return 2 * _forward_flops(*arguments)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: FeatureMap,
    *,
    q_denominator: Tensor | None = None,
    k_denominator: Tensor | None = None,
    query_weight: Tensor | None = None,
    key_weight: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    normalize: bool = True,
    scale: float | None = None,
    eps: float = 1e-6,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """The operator on checked arguments; as ``linear_attention_reference``, and ``query_weight`` multiplies φ(q)."""
    cos, sin = (None, None) if rope is None else (table.float() for table in rope)
    parameter = None if feature_map.parameter is None else feature_map.parameter.float().contiguous()
    query_weight, key_weight = (None if w is None else w.float() for w in (query_weight, key_weight))
    return linear_attention_forward(
        q, k, v, q_denominator, k_denominator, parameter, query_weight, key_weight, cos, sin, cu_seqlens,
        max_seqlen or 0, feature_map.name, feature_map.exponent, normalize, scale, eps,
    )[0]  # fmt: skip
