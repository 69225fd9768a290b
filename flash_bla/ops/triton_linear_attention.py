"""Linear attention in Triton: launches of the kernels, and the torch.library operators over them."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from flash_bla.ops.feature_maps import TRITON_FEATURE_MAPS, FeatureMap
from flash_bla.ops.triton_kernels import (
    backward_kernel,
    forward_kernel,
    key_gradient_kernel,
    merge_kernel,
    output_kernel,
    query_gradient_kernel,
    query_sum_kernel,
    reduce_kernel,
    state_kernel,
)
from flash_bla.ops.triton_norm_ratios import add_ratio_gradients, norm_ratios, ratio_gradient_programs
from flash_bla.ops.triton_single import single_backward_kernel, single_forward_kernel
from flash_bla.ops.triton_support import call, cdiv, is_eager, multiprocessors, power_of_two, precision
from flash_bla.ops.triton_tiles import Config

# --- launches ---------------------------------------------------------------------------------------------------------


class _Problem(NamedTuple):
    """What the launches of both directions share."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_denominator: Tensor | None
    k_denominator: Tensor | None
    parameter: Tensor | None
    key_weight: Tensor | None
    rope: Tensor | None
    cu_seqlens: Tensor | None
    max_seqlen: int
    feature_map: str
    exponent: int
    normalize: bool
    scale: float | None
    eps: float
    softmax: bool
    query_weight: Tensor | None = None

    @property
    def signs(self) -> int:
        return 2 if self.feature_map == "signed_power" else 1

    @property
    def sequences(self) -> int:
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def longest(self) -> int:
        return max(self.q.shape[2], self.k.shape[2])

    @property
    def short(self) -> bool:
        """Whether a sequence is too short to be split, where one launch can do all."""
        return self.cu_seqlens is None and self.longest <= 4 * self.q.shape[3]

    @property
    def sums_keys_again(self) -> bool:
        """Whether the backward pass does: the state would be about as large as keys and values are."""
        return self.short and not self.softmax and self.longest <= 2 * self.q.shape[3]

    @property
    def single(self) -> bool:
        """Whether the kernels for sequences of one tile do all that is asked for."""
        extras = (self.q_denominator, self.parameter, self.key_weight, self.rope)
        return (
            self.sums_keys_again and self.longest <= 64 and max(self.q.shape[3], self.v.shape[3]) <= 64
            and self.q.dtype == torch.bfloat16 and self.normalize and all(x is None for x in extras)
        )  # fmt: skip

    def empty_state(self, splits: int) -> Tensor:
        """S, z as its next row, and of a softmax two more, for each split."""
        _, H, _, D = self.q.shape
        shape = (splits, self.sequences, H, self.signs, self.v.shape[3] + (3 if self.softmax else 1), D)
        return torch.empty(shape, dtype=torch.float32, device=self.q.device)

    def saved_state(self) -> Tensor:
        """What the forward pass leaves for the backward pass."""
        return self.q.new_empty(0, dtype=torch.float32) if self.sums_keys_again else self.empty_state(1)[0]

    def empty_ratios(self) -> Tensor:
        """The norm ratios of queries and keys, beside each other; of no elements where the map has none."""
        B, _, N, _ = self.q.shape
        shape = (B, N + self.k.shape[2]) if self.feature_map == "focusing_power" else (0, 0)
        return self.q.new_empty(shape, dtype=torch.float32)

    def with_ratios(self, ratios: Tensor) -> _Problem:
        """The norm ratios join as weights of queries and keys."""
        if ratios.numel() == 0:
            return self
        _, H, N, _ = self.q.shape
        query_weight, key_weight = (x[:, None].expand(-1, H, -1) for x in (ratios[:, :N], ratios[:, N:]))
        if self.key_weight is not None:
            key_weight = key_weight * self.key_weight
        return self._replace(query_weight=query_weight, key_weight=key_weight)

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

    def plan(self, kernel) -> tuple[Config, _Tuning]:
        _, H, _, D = self.q.shape
        flags = (
            self.exponent, self.signs == 2, self.parameter is not None, self.normalize,
            self.normalize and self.rope is None and self.q_denominator is None, self.rope is not None,
            self.q_denominator is not None, self.query_weight is not None, self.key_weight is not None, self.softmax,
            self.cu_seqlens is not None, self.scale is None,
            self.cu_seqlens is not None or self.k.shape[2] <= 4 * D,
            any(_is_wide(x) for x in (self.q, self.k, self.v)),
        )  # fmt: skip
        return _plan(kernel, D, self.v.shape[3], H, self.q.dtype, flags)

    def programs(self, C: Config) -> int:
        return self.sequences * cdiv(self.q.shape[1], C.GROUP)

    def arguments(self) -> dict:
        """The arguments of the kernels that stand for inputs."""
        phi, phi_dx, phi_da, pad = TRITON_FEATURE_MAPS[self.feature_map]
        tensors = dict(
            q=self.q, k=self.k, v=self.v, qd=self.q_denominator, kd=self.k_denominator, wq=self.query_weight,
            wk=self.key_weight,
        )  # fmt: skip
        return _with_strides(tensors) | dict(
            a_ptr=self.parameter, rope_ptr=self.rope, rope_strides=_rope_strides(self.rope),
            cu_seqlens=self.cu_seqlens, query_sum_ptr=None, query_splits=0, query_length=self.q.shape[2],
            key_length=self.k.shape[2], heads=self.q.shape[1], scale=self.scale or 0.0, eps=self.eps,
            PHI=phi, PHI_DX=phi_dx, PHI_DA=phi_da, PAD=pad, **precision(self.q.dtype),
        )  # fmt: skip


def _is_wide(x: Tensor) -> bool:
    """Whether offsets in a tile, of up to 64 rows and 4 heads, do not fit into 32 bits."""
    _, head, row, column = x.stride()
    return 4 * head + 64 * row + x.shape[3] * column >= 1 << 31


def _with_strides(tensors: dict[str, Tensor | None]) -> dict:
    arguments = {}
    for name, x in tensors.items():
        arguments[f"{name}_ptr"] = x
        arguments[f"{name}_strides"] = (0, 0, 0, 0) if x is None else x.stride()
    return arguments


def _rope_strides(table: Tensor | None) -> tuple[int, int, int, int]:
    """As of a tensor whose columns are cosines and sines by turns."""
    if table is None:
        return (0, 0, 0, 0)
    return (0, 0 if table.shape[0] == 1 else table.stride(0), table.stride(1), 1)


class _Tuning(NamedTuple):
    """How a kernel runs fastest: found on an H200 for bfloat16 and elu + 1."""

    width: int  # of the tiles, to which narrow heads are joined
    resident: int  # programs on a multiprocessor at a time, as far as registers allow
    num_stages: int  # of the loads' pipeline
    maxnreg: int | None  # registers of a thread
    persistent: bool = False  # no more programs than are resident


# For tiles of at most 32 columns, and for wider ones.
_TUNING = {
    query_sum_kernel: (_Tuning(64, 8, 1, None), _Tuning(64, 8, 1, None)),
    state_kernel: (_Tuning(64, 2, 3, None), _Tuning(64, 2, 3, None)),
    output_kernel: (_Tuning(64, 4, 3, 128), _Tuning(64, 4, 3, 128)),
    query_gradient_kernel: (_Tuning(32, 4, 3, 128), _Tuning(32, 2, 3, None)),
    key_gradient_kernel: (_Tuning(32, 3, 3, 168), _Tuning(32, 2, 3, None)),
    forward_kernel: (_Tuning(64, 4, 3, 128), _Tuning(64, 4, 3, 128)),
    backward_kernel: (_Tuning(64, 2, 3, None), _Tuning(64, 2, 3, None)),
    single_forward_kernel: (_Tuning(0, 5, 2, None, True), _Tuning(0, 3, 2, None, True)),
    single_backward_kernel: (_Tuning(0, 4, 1, 128), _Tuning(0, 2, 1, None)),
}


# The same for what takes more registers: rotary encodings and the softmax, the focusing map, and the map of two signs.
_TUNING_ROPE = _TUNING | {
    state_kernel: (_Tuning(64, 4, 2, 128), _Tuning(64, 4, 2, 128)),
    output_kernel: (_Tuning(64, 3, 3, 168), _Tuning(64, 3, 3, 168)),
}
_TUNING_FOCUSING = _TUNING | {
    state_kernel: (_Tuning(64, 4, 1, 128), _Tuning(64, 4, 1, 128)),
    query_gradient_kernel: (_Tuning(32, 3, 2, 168), _Tuning(32, 2, 3, None)),
}
_TUNING_SIGNED = _TUNING | {
    state_kernel: (_Tuning(64, 3, 3, 168), _Tuning(64, 3, 3, 168)),
    output_kernel: (_Tuning(64, 3, 3, 168), _Tuning(64, 3, 3, 168)),
    query_gradient_kernel: (_Tuning(32, 3, 2, 168), _Tuning(32, 2, 3, None)),
    key_gradient_kernel: (_Tuning(32, 2, 3, None), _Tuning(32, 2, 3, None)),
}


@lru_cache(maxsize=1024)
def _plan(kernel, D: int, D_v: int, heads: int, dtype: torch.dtype, flags: tuple) -> tuple[Config, _Tuning]:
    """Sides of the tiles, all of D and D_v and as many rows as a program's registers hold, and the tuning."""
    config = Config(D, D_v, 1, 0, 0, 0, *flags)
    table = _TUNING
    if config.SIGNED:
        table = _TUNING_SIGNED
    elif config.PARAMETER:
        table = _TUNING_FOCUSING
    elif config.ROPE or config.SOFTMAX:
        table = _TUNING_ROPE
    group = 1
    if D == D_v and D in (8, 16, 32):
        group = min(max(1, table[kernel][0].width // D), 4, 1 << (heads.bit_length() - 1))
    block_d, block_dv = (max(16, 1 << (width * group - 1).bit_length()) for width in (D, D_v))
    tuning = table[kernel][max(block_d, block_dv) > 32]
    config = config._replace(GROUP=group, BLOCK_D=block_d, BLOCK_DV=block_dv)
    size = 4 if config.SIGNED and dtype != torch.bfloat16 else dtype.itemsize  # of the products' operands
    block_n = max(16, min(64, 2048 * _warps(config) // (max(block_d, block_dv) * size)))
    wide = max(block_d, block_dv) > 64 or size > 2
    if wide:  # they need more registers and shared memory
        tuning = tuning._replace(num_stages=1, maxnreg=None)
    extras = config.ROPE or config.DECOUPLED or config.PARAMETER or config.KEY_WEIGHT
    if kernel in (forward_kernel, backward_kernel) and extras:  # their pipelines would need too much of both
        tuning = tuning._replace(num_stages=1)
    return config._replace(BLOCK_N=block_n), tuning


def widest_values(q: Tensor, signs: int) -> int:
    """The widest D_v whose states a program can hold; wider values are cut."""
    block_d = max(16, 1 << (q.shape[3] - 1).bit_length())
    return (16384 if q.dtype == torch.bfloat16 else 8192) // (block_d * signs)


def _warps(C: Config) -> int:
    return 4 if C.BLOCK_D * C.BLOCK_DV * (2 if C.SIGNED else 1) <= 8192 else 8


def _launch(kernel, problem: _Problem, arguments: dict, splits: int = 1) -> None:
    C, tuning = problem.plan(kernel)
    programs = problem.programs(C)
    if programs > 0:
        places = tuning.resident * multiprocessors(problem.q.device) if tuning.persistent else programs
        # a loop of one tile needs no pipeline
        num_stages = tuning.num_stages if tuning.persistent or problem.longest > C.BLOCK_N else 1
        grid = (min(programs, places), splits, 1)
        arguments = arguments | dict(C=C, programs=programs)
        call(kernel, grid, arguments, _warps(C), num_stages=num_stages, maxnreg=tuning.maxnreg)


def _split(kernel, problem: _Problem, length: int) -> int:
    """Into how many parts to cut sequences so that a kernel's programs fill all multiprocessors once."""
    C, tuning = problem.plan(kernel)
    if problem.cu_seqlens is not None:
        length = problem.max_seqlen
    places = tuning.resident * multiprocessors(problem.q.device)
    return max(1, min(places // max(problem.programs(C), 1), cdiv(length, C.BLOCK_N), 65535))


def _fits(kernel, problem: _Problem) -> bool:
    """Whether one launch, with a program for each sequence, is fastest: work enough for all, and not too much code."""
    if problem.softmax or problem.signs == 2:
        return False
    if kernel is backward_kernel and (problem.rope is not None or problem.parameter is not None):
        return False
    programs = problem.programs(problem.plan(kernel)[0])
    return problem.short or programs >= 3 * multiprocessors(problem.q.device)


def _reduce(partial: Tensor) -> Tensor:
    """Adds up the first dimension, always in the same order."""
    if partial.shape[0] == 1 or partial.numel() == 0:
        return partial[0]
    total = torch.empty_like(partial[0])
    splits = partial.shape[0]
    rows, columns, warps = (4, 512, 4) if splits <= 8 else (16, 128, 4) if splits <= 64 else (1024, 8, 16)
    arguments = dict(
        partial_ptr=partial, sum_ptr=total, length=total.numel(), splits=splits, BLOCK=columns, SPLITS=rows
    )
    call(reduce_kernel, (cdiv(total.numel(), columns), 1, 1), arguments, warps)
    return total


def _merge(partial: Tensor, query_sums: Tensor, p: _Problem) -> Tensor:
    """The state of a softmax from those of its splits."""
    state = torch.empty_like(partial[0])
    rows, D = state.shape[-2:]
    heads = state.numel() // (rows * D)
    arguments = dict(
        partial_ptr=partial, query_sum_ptr=query_sums, state_ptr=state, query_length=p.q.shape[2],
        splits=partial.shape[0], query_splits=query_sums.shape[0], D=D, ROWS=rows, BLOCK_D=max(16, power_of_two(D)),
        BLOCK=512, SPLITS=8,
    )  # fmt: skip
    if heads > 0:
        call(merge_kernel, (heads, cdiv((rows - 2) * D, 512), 1), arguments)
    return state


# --- operators --------------------------------------------------------------------------------------------------------


def _attend(p: _Problem, keep_state: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and for the backward pass the keys' state and the norm ratios.

    The state has no elements if the backward pass sums the keys again.
    """
    o, ratios = p.empty_output(), p.empty_ratios()
    if ratios.numel() > 0:
        norm_ratios(ratios, p.q, p.k, p.parameter, p.exponent)
        p = p.with_ratios(ratios)
    arguments = p.arguments() | _with_strides(dict(o=o))
    if _fits(forward_kernel, p):
        state = p.saved_state() if keep_state else p.q.new_empty(0, dtype=torch.float32)
        kernel = single_forward_kernel if p.single else forward_kernel
        _launch(kernel, p, arguments | dict(state_ptr=state if state.numel() > 0 else None))
        return o, state, ratios
    if p.softmax:
        query_splits = _split(query_sum_kernel, p, p.q.shape[2])
        query_sums = p.q.new_empty((query_splits, *p.q.shape[:2], p.q.shape[3]), dtype=torch.float32)
        arguments |= dict(query_sum_ptr=query_sums, query_splits=query_splits)
        _launch(query_sum_kernel, p, arguments, query_splits)
    splits = _split(state_kernel, p, p.k.shape[2])
    state = p.empty_state(splits)
    _launch(state_kernel, p, arguments | dict(state_ptr=state), splits)
    state = _merge(state, query_sums, p) if p.softmax else _reduce(state)
    _launch(output_kernel, p, arguments | dict(state_ptr=state), _split(output_kernel, p, p.q.shape[2]))
    return o, p.saved_state() if p.sums_keys_again else state, ratios


def _forward(
    q: Tensor, k: Tensor, v: Tensor, q_denominator: Tensor | None, k_denominator: Tensor | None,
    parameter: Tensor | None, key_weight: Tensor | None, rope: Tensor | None, cu_seqlens: Tensor | None,
    max_seqlen: int, feature_map: str, exponent: int, normalize: bool, scale: float | None,
    eps: float, softmax: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _attend(
        _Problem(q, k, v, q_denominator, k_denominator, parameter, key_weight, rope, cu_seqlens, max_seqlen,
                 feature_map, exponent, normalize, scale, eps, softmax)
    )  # fmt: skip


linear_attention_forward = torch.library.custom_op("flash_bla::linear_attention_forward", _forward, mutates_args=())


@linear_attention_forward.register_fake
def _(*arguments):
    p = _Problem(*arguments)
    return p.empty_output(), p.saved_state(), p.empty_ratios()


def _backward(
    do: Tensor, state: Tensor, ratios: Tensor, keys: bool,
    q: Tensor, k: Tensor, v: Tensor, q_denominator: Tensor | None, k_denominator: Tensor | None,
    parameter: Tensor | None, key_weight: Tensor | None, rope: Tensor | None, cu_seqlens: Tensor | None,
    max_seqlen: int, feature_map: str, exponent: int, normalize: bool, scale: float | None,
    eps: float, softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the first seven inputs of the forward operator; without ``keys`` those of the queries alone.

    A gradient that does not exist has no elements.
    """
    p = _Problem(q, k, v, q_denominator, k_denominator, parameter, key_weight, rope, cu_seqlens, max_seqlen,
                 feature_map, exponent, normalize, scale, eps, softmax).with_ratios(ratios)  # fmt: skip
    do = do.contiguous() if _is_wide(do) else do  # its strides are no part of the plan
    dq, dqd = p.empty_like(q), p.empty_like(q_denominator)
    dk, dv, dkd, dwk = (p.empty_like(x if keys else None) for x in (k, v, k_denominator, p.key_weight))
    focusing = ratios.numel() > 0
    dwq = p.empty_like(p.query_weight) if focusing else None
    arguments = p.arguments() | _with_strides(dict(do=do, dq=dq, dk=dk, dv=dv, dqd=dqd, dkd=dkd, dwq=dwq, dwk=dwk))

    whole = keys and _fits(backward_kernel, p)
    apart = keys and (softmax or p.signs == 2)  # the queries' gradients are a launch after their sums
    query_splits = 1 if whole else _split(query_gradient_kernel, p, q.shape[2])
    key_splits = _split(key_gradient_kernel, p, k.shape[2]) if keys and not whole else 0
    # the parameter's gradient: rows of queries, of keys, and of the norm ratios
    sizes = [p.sequences if focusing else query_splits * p.sequences, 0 if focusing else key_splits * p.sequences]
    sizes += [ratio_gradient_programs(q) if focusing else 0, ratio_gradient_programs(k) if focusing and keys else 0]
    da = q.new_empty(0 if parameter is None else (sum(sizes), *parameter.shape), dtype=torch.float32)
    da_queries, da_keys, da_query_ratios, da_key_ratios = da.split(sizes) if parameter is not None else [da] * 4

    if p.single:
        _launch(single_backward_kernel, p, arguments if keys else arguments | dict(dk_ptr=None, dv_ptr=None))
        return dq, dk, dv, dqd, dkd, p.empty_like(parameter), dwk
    if whole:
        _launch(backward_kernel, p, arguments | dict(state_ptr=None if p.sums_keys_again else state, da_ptr=da_queries))
    else:
        if p.sums_keys_again:
            state = p.empty_state(1)[0]
            _launch(state_kernel, p, arguments | dict(state_ptr=state))
        arguments |= dict(
            state_ptr=state, d_state_ptr=p.empty_state(query_splits) if keys else None, da_ptr=da_queries,
            mean_ptr=q.new_empty((p.sequences, q.shape[1], v.shape[3]), dtype=torch.float32), d_mean_ptr=None,
            splits=key_splits,
        )  # fmt: skip
        if softmax:
            arguments["d_mean_ptr"] = q.new_empty((key_splits, *q.shape[:2], q.shape[3]), dtype=torch.float32)
        _launch(query_gradient_kernel, p, arguments | dict(SUMS=keys, GRADIENT=not apart), query_splits)
        if keys:
            outputs = dict(d_state_ptr=_reduce(arguments["d_state_ptr"]), da_ptr=da_queries if focusing else da_keys)
            _launch(key_gradient_kernel, p, arguments | outputs, key_splits)
        if apart:  # registers cannot hold both, or the keys' weights depend on all queries
            _launch(query_gradient_kernel, p, arguments | dict(SUMS=False, GRADIENT=True), query_splits)
    if focusing:
        add_ratio_gradients(dq, da_query_ratios, dwq, True, q, parameter, exponent)
    if focusing and keys:
        dr = dwk if key_weight is None else dwk * key_weight
        add_ratio_gradients(dk, da_key_ratios, dr, False, k, parameter, exponent)
        if key_weight is not None:
            dwk = dwk * ratios[:, None, q.shape[2] :]
    if key_weight is None:
        dwk = q.new_empty(0)
    return dq, dk, dv, dqd, dkd, _reduce(da) if parameter is not None else da, dwk


linear_attention_backward = torch.library.custom_op("flash_bla::linear_attention_backward", _backward, mutates_args=())


@linear_attention_backward.register_fake
def _(do, state, ratios, keys, *arguments):
    p = _Problem(*arguments)
    of_keys = [p.empty_like(x if keys else None) for x in (p.k, p.v, p.k_denominator, p.key_weight)]
    dk, dv, dk_denominator, dk_weight = of_keys
    return (p.empty_like(p.q), dk, dv, p.empty_like(p.q_denominator), dk_denominator, p.empty_like(p.parameter),
            dk_weight)  # fmt: skip


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # of the state and the ratios, which would be written as zeros
    tensors, ctx.options = inputs[:9], inputs[9:]
    ctx.save_for_backward(*tensors, *output[1:])


def _differentiate(ctx, do, *_, backward=linear_attention_backward):
    *tensors, state, ratios = ctx.saved_tensors
    needed, softmax = ctx.needs_input_grad[:7], ctx.options[-1]
    keys = softmax or any(needed[i] for i in (1, 2, 4, 5, 6))
    gradients = backward(do, state, ratios, keys, *tensors, *ctx.options)
    gradients = (g if need else None for g, need in zip(gradients, needed, strict=True))
    return *gradients, *[None] * (2 + len(ctx.options))


linear_attention_forward.register_autograd(_differentiate, setup_context=_setup_context)


class _Eager(torch.autograd.Function):
    """The operators' work without their dispatcher, which takes longer than short sequences' kernels."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, do, *_):
        return _differentiate(ctx, do, backward=_backward)


@register_flop_formula(torch.ops.flash_bla.linear_attention_forward)
def _forward_flops(q_shape, k_shape, v_shape, *options, **_) -> int:
    """Operations of the matrix products in the reference, for ``torch.utils.flop_counter``."""
    (B, H, N, D), M, D_v = q_shape, k_shape[2], v_shape[3]
    feature_map, _, normalize = options[7:10]
    streams = 2 if feature_map == "signed_power" else 1
    return 2 * B * H * streams * D * ((M + N) * D_v + (N * streams if normalize else 0))


@register_flop_formula(torch.ops.flash_bla.linear_attention_backward)
def _backward_flops(do_shape, state_shape, ratios_shape, keys, *arguments, **_) -> int:
    return 2 * _forward_flops(*arguments)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: FeatureMap,
    *,
    q_denominator: Tensor | None = None,
    k_denominator: Tensor | None = None,
    key_weight: Tensor | str | None = None,
    rope: Tensor | None = None,
    normalize: bool = True,
    scale: float | None = None,
    eps: float = 1e-6,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """The operator on checked arguments; as ``linear_attention_reference``."""
    if rope is not None:  # bfloat16 needs no more than float16, and reads less
        rope = rope.to(torch.float16 if q.dtype == torch.bfloat16 else torch.float32).contiguous()
    parameter = None if feature_map.parameter is None else feature_map.parameter.float().contiguous()
    softmax = isinstance(key_weight, str)
    key_weight = key_weight.float() if isinstance(key_weight, Tensor) else None
    eager = is_eager(q)

    def attend(v: Tensor) -> Tensor:
        inputs = (
            q, k, v, q_denominator, k_denominator, parameter, key_weight, rope, cu_seqlens, max_seqlen or 0,
            feature_map.name, feature_map.exponent, normalize, scale, eps, softmax,
        )  # fmt: skip
        if not eager:
            return linear_attention_forward(*inputs)[0]
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            return _Eager.apply(*inputs)[0]
        return _attend(_Problem(*inputs), keep_state=False)[0]  # no state for a backward pass that will not come

    signs = 2 if feature_map.signed else 1
    widest = widest_values(q, signs)
    if v.shape[3] <= widest:
        return attend(v)
    # The output is linear in the values: columns can be computed apart, of signed_power the two halves' together.
    parts = v.unflatten(3, (signs, -1)).split(widest // signs, dim=4)
    parts = [attend(part.flatten(3)).transpose(1, 2).unflatten(3, (signs, -1)) for part in parts]
    return torch.cat(parts, dim=4).flatten(3).transpose(1, 2)
