"""Linear attention in Triton: launches of the kernels, and the torch.library operators over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import gcd
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from flash_bla.ops import triton_single as single
from flash_bla.ops.arguments import convert, unpack
from flash_bla.ops.feature_maps import FeatureMap
from flash_bla.ops.triton_focusing import focusing_output_kernel
from flash_bla.ops.triton_kernels import (
    backward_kernel,
    forward_kernel,
    key_gradient_kernel,
    output_kernel,
    query_gradient_kernel,
    query_sum_kernel,
    state_kernel,
)
from flash_bla.ops.triton_norm_ratios import (
    add_ratio_gradients,
    multiply,
    ratio_gradient_programs,
    split_ratios,
    write_norm_ratios,
)
from flash_bla.ops.triton_problem import Problem, is_wide, with_strides
from flash_bla.ops.triton_reductions import merge_states, reduce
from flash_bla.ops.triton_signed_kernels import (
    signed_backward_kernel,
    signed_forward_kernel,
    signed_key_kernel,
    signed_output_kernel,
    signed_query_kernel,
    signed_state_kernel,
)
from flash_bla.ops.triton_support import (
    Record,
    as_outputs,
    cdiv,
    define_operator,
    eager_function,
    is_eager,
    multiprocessors,
    run,
)
from flash_bla.ops.triton_tuning import widest_values

# --- launches ---------------------------------------------------------------------------------------------------------


def _programs(kernel, problem: Problem) -> int:
    """How many work on each split."""
    return problem.sequences if kernel is focusing_output_kernel else problem.programs(problem.plan(kernel)[0])


def _launch(kernel, problem: Problem, arguments: dict, splits: int = 1) -> None:
    C, tuning = problem.plan(kernel)
    programs = _programs(kernel, problem)
    if programs > 0:
        places = tuning.resident * multiprocessors(problem.record.device) if tuning.persistent else programs
        # a loop of one tile needs no pipeline
        num_stages = tuning.num_stages if tuning.persistent or problem.longest > C.BLOCK_N else 1
        grid = (min(programs, places), splits, 1)
        arguments = arguments | dict(C=C._replace(STAGES=num_stages), programs=programs)
        problem.record.launch(kernel, grid, arguments, tuning.warps, num_stages, tuning.maxnreg)


def _split(kernel, problem: Problem, length: int) -> int:
    """Into how many parts to cut sequences so that a kernel's programs fill all multiprocessors once."""
    C, tuning = problem.plan(kernel)
    if problem.cu_seqlens is not None:
        length = problem.max_seqlen
    places = tuning.resident * multiprocessors(problem.record.device)
    return max(1, min(places // max(_programs(kernel, problem), 1), cdiv(length, C.BLOCK_N), 65535))


def _fits(kernel, problem: Problem) -> bool:
    """Whether one launch, with a program for each sequence, is fastest: work enough for all, and not too much code."""
    width, is_bfloat16 = max(problem.q.shape[3], problem.v.shape[3]), problem.q.dtype == torch.bfloat16
    turned = kernel is backward_kernel and problem.rope is not None
    if problem.softmax or kernel is backward_kernel and problem.parameter is not None:
        return False
    if problem.signs == 2 and (width > 64 or not is_bfloat16 or problem.cu_seqlens is not None):
        return False
    if kernel is signed_backward_kernel and problem.sums_keys_again:
        return False
    if turned and (width > 32 or not is_bfloat16 or problem.key_weight is not None):
        return False
    if problem.short:
        return True
    programs, places = problem.programs(problem.plan(kernel)[0]), multiprocessors(problem.record.device)
    if kernel is signed_backward_kernel:  # by two on a multiprocessor, the last ones must not leave it idle
        return programs >= 0.8 * 2 * places * cdiv(programs, 2 * places)
    return programs >= (1.9 if problem.plain or problem.signs == 2 or turned else 2.9) * places


def _row_numbers(p: Problem) -> dict:
    """Memory for the four numbers of each row of signed powers, beside each other, where loops need them."""
    if max(p.q.shape[3], p.v.shape[3]) <= 32:
        return dict(rows_ptr=None, rows_strides=(0, 0))
    B, H, N, _ = p.q.shape
    rows = 16 * cdiv(N, 16)
    return dict(rows_ptr=p.new_empty(B, H, rows, 4), rows_strides=(4 * H * rows, 4 * rows))


def _start(record: Record, tensors: Sequence[Tensor | None], options: tuple) -> tuple[Problem, tuple]:
    """The problem without norm ratios, and its inputs q, k, v, which may be packed."""
    inputs, others = tensors[:3], list(tensors[3:])
    for i in (2, 5, 6):  # the parameter, rope and cu_seqlens
        others[i] = record.contiguous(others[i])
    weight = others[3]
    if weight is not None:
        shared = weight.stride(1) == 0  # by the heads
        others[3] = multiply(record, weight[:, :1] if shared else weight).expand(weight.shape)
    return Problem(record, *unpack(*inputs), *others, *options, masked=weight is not None), inputs


def record_forward(record: Record, *arguments: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The output, and for the backward pass the keys' state and the norm ratios.

    The state is None if it is not kept or the pass sums the keys again. The arguments are those of the operator, its
    options in a tuple, and whether to keep the state.
    """
    *tensors, options, keep_state = arguments
    p, _ = _start(record, tensors, options)
    ratios = p.empty_ratios()
    if ratios is not None and not p.ratios_in_loops:  # whose loops compute them
        queries = not p.query_ratios_in_outputs
        write_norm_ratios(record, ratios, p.q, p.k, p.key_encoding, p.parameter, p.exponent, queries)
    return *_record_output(record, p.with_ratios(ratios), keep_state), ratios


def _record_output(record: Record, p: Problem, keep_state: bool) -> tuple[Tensor, Tensor | None]:
    o = p.empty_output()
    arguments = p.arguments() | with_strides(dict(o=o))
    if p.single:
        plain = p.plain and p.key_encoding is None
        _launch(single.plain_single_forward_kernel if plain else single.single_forward_kernel, p, arguments)
        return o, None
    whole = forward_kernel if p.signs == 1 else signed_forward_kernel
    if not p.query_ratios_in_outputs and _fits(whole, p):
        state = p.saved_state() if keep_state else None
        _launch(whole, p, arguments | dict(state_ptr=state))
        return o, state
    if p.softmax:
        query_splits = _split(query_sum_kernel, p, p.q.shape[2])
        query_sums = p.new_empty(query_splits, *p.q.shape[:2], p.q.shape[3])
        arguments |= dict(query_sum_ptr=query_sums, query_splits=query_splits)
        _launch(query_sum_kernel, p, arguments, query_splits)
    sums, output = (state_kernel, output_kernel) if p.signs == 1 else (signed_state_kernel, signed_output_kernel)
    if p.query_ratios_in_outputs:
        output = focusing_output_kernel
    splits = _split(sums, p, p.k.shape[2])
    state = p.empty_state(splits)
    _launch(sums, p, arguments | dict(state_ptr=state), splits)
    state = merge_states(record, state, query_sums, p.q.shape[2]) if p.softmax else reduce(record, state)
    _launch(output, p, arguments | dict(state_ptr=state), _split(output, p, p.q.shape[2]))
    return o, state if keep_state and not p.sums_keys_again else None


def record_backward(record: Record, do: Tensor, state: Tensor | None, ratios: Tensor | None, *arguments: Any) -> tuple:
    """Gradients of the operator's first seven inputs; the eighth's is a sum of the keys'.

    The arguments are those of the operator, its options in a tuple, and whether the gradients of more than the queries
    are needed.
    """
    *tensors, options, keys = arguments
    return record_gradients(record, do, None, state, ratios, tensors, options, keys)


def record_gradients(
    record: Record, do: Tensor, packed: Tensor | None, state: Tensor | None, ratios: Tensor | None,
    tensors: Sequence[Tensor | None], options: tuple, keys: bool = True,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """``record_backward``; ``packed``, if given, is where the gradient of packed inputs is written."""
    p, inputs = _start(record, tensors, options)
    *gradients, dqd, dkd, da, dwq, dwk = _record_gradients(
        record, do, packed, state, p.with_ratios(ratios), inputs, keys
    )
    if ratios is not None:
        dq, dk, _ = unpack(*gradients)
        dr, (_, key_ratios) = dwk, split_ratios(ratios, p.q, p.k)
        if p.ratios_in_loops:
            dk = dr = None  # the loops have added that
        elif p.key_weight is not None and keys:
            dr, dwk = multiply(record, dwk, p.key_weight), multiply(record, dwk, key_ratios.expand_as(dwk))
        add_ratio_gradients(record, dq, dk, da, dwq, dr, ratios, p.q, p.k, p.key_encoding, p.parameter, p.exponent)
        dwk = None if p.key_weight is None else dwk
    if da is not None:
        # of an empty batch there is no term
        da = reduce(record, da) if da.numel() else record.new_zeros(da.shape[1:], torch.float32)
    return *gradients, dqd, dkd, da, dwk


def _record_gradients(
    record: Record, do: Tensor, packed: Tensor | None, state: Tensor | None, p: Problem,
    inputs: Sequence[Tensor | None], keys: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of q, k, v and denominators, terms of the parameter's, and gradients of the queries' and keys' weights.

    Of the parameter's terms (terms, H, D) ``add_ratio_gradients`` is to write the last, where there are norm ratios.
    """
    q, k, v, parameter = p.q, p.k, p.v, p.parameter
    if is_wide(do) or gcd(p.align, *do.stride()[:3]) < p.align or do.stride(3) != 1:
        # its strides are no part of the plan
        do = record.contiguous(do)
    if packed is None:
        gradients = [p.empty_like(x) for x in (inputs if keys else (q, None, None))]
    else:
        gradients = [packed, None, None]
    dq, dk, dv = unpack(*gradients)
    dqd = p.empty_like(p.q_denominator)
    dkd, dwk = (None, None) if not keys else (p.empty_like(p.k_denominator), p.empty_weights(p.key_weight))
    focusing = p.query_weight is not None
    dwq = p.empty_weights(p.query_weight)
    arguments = p.arguments() | with_strides(dict(do=do, dq=dq, dk=dk, dv=dv, dqd=dqd, dkd=dkd, dwq=dwq, dwk=dwk))

    signed = p.signs == 2
    whole_kernel = signed_backward_kernel if signed else backward_kernel
    whole = p.single or keys and _fits(whole_kernel, p)
    query_splits = 1 if whole else _split(signed_query_kernel if signed else query_gradient_kernel, p, q.shape[2])
    key_kernel = signed_key_kernel if signed else key_gradient_kernel
    key_splits = _split(key_kernel, p, k.shape[2]) if keys and not whole else 0
    da = da_queries = da_keys = None
    if parameter is not None:
        # rows of queries and keys or, if their terms come by the ratios, of those, with the keys' where loops add them
        rows = [query_splits * p.sequences, key_splits * p.sequences]
        if p.ratios_in_loops:
            rows = [p.sequences, rows[1] + ratio_gradient_programs(q, k, False, record.device)]
        elif focusing:
            rows = [p.sequences, ratio_gradient_programs(q, k, keys, record.device)]
        da = p.new_empty(sum(rows), *parameter.shape)
        da_queries, da_keys = da[: rows[0]], da[rows[0] :]
    if whole:
        arguments |= dict(state_ptr=None if p.sums_keys_again else state, da_ptr=da_queries)
        plain = p.plain and p.key_encoding is None and max(q.shape[3], v.shape[3]) <= 32  # wider: too many registers
        kernel = single.plain_single_backward_kernel if plain else single.single_backward_kernel
        if signed and not p.single:
            arguments |= _row_numbers(p)
            arguments["d_state_ptr"] = None if arguments["rows_ptr"] is None else p.empty_state(1)
        _launch(kernel if p.single else whole_kernel, p, arguments)
        return *gradients, dqd, dkd, da, dwq, dwk
    if p.sums_keys_again:
        state = p.empty_state(1)[0]
        _launch(signed_state_kernel if signed else state_kernel, p, arguments | dict(state_ptr=state))
    d_state = p.empty_state(query_splits) if keys or signed else None
    arguments |= dict(
        state_ptr=state, d_state_ptr=d_state, da_ptr=da_queries,
        mean_ptr=p.new_empty(p.sequences, q.shape[1], v.shape[3]), d_mean_ptr=None, sums_ptr=None, splits=key_splits,
    )  # fmt: skip
    if p.softmax:
        arguments["d_mean_ptr"] = arguments["sums_ptr"] = p.new_empty(key_splits, *q.shape[:2], q.shape[3])
    if p.ratios_in_loops:
        arguments["sums_ptr"] = da_keys
    if signed:
        arguments |= _row_numbers(p)
        at_once = arguments["rows_ptr"] is None
        _launch(signed_query_kernel, p, arguments | dict(SUMS=True, GRADIENT=at_once), query_splits)
        if not at_once:
            _launch(signed_query_kernel, p, arguments | dict(SUMS=False, GRADIENT=True), query_splits)
        if keys:
            outputs = dict(d_state_ptr=reduce(record, d_state), da_ptr=da_keys)
            _launch(signed_key_kernel, p, arguments | outputs, key_splits)
        return *gradients, dqd, dkd, da, dwq, dwk
    apart = keys and p.softmax  # the queries' gradients come after those of the keys, whose weights depend on them
    _launch(query_gradient_kernel, p, arguments | dict(SUMS=keys, GRADIENT=not apart), query_splits)
    if keys:
        outputs = dict(d_state_ptr=reduce(record, d_state), da_ptr=da_queries if focusing else da_keys)
        _launch(key_gradient_kernel, p, arguments | outputs, key_splits)
    if apart:
        _launch(query_gradient_kernel, p, arguments | dict(SUMS=False, GRADIENT=True), query_splits)
    return *gradients, dqd, dkd, da, dwq, dwk


# --- operators --------------------------------------------------------------------------------------------------------


def in_type_of_keys(tensors: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """The operator's inputs, the keys' encoding in the type of the keys: its gradient is in that which it came in."""
    return *tensors[:7], convert(tensors[7], tensors[0].dtype), *tensors[8:]


SCHEMA = """
    Tensor q, Tensor? k, Tensor? v, Tensor? q_denominator, Tensor? k_denominator, Tensor? parameter,
    Tensor? key_weight, Tensor? key_encoding, Tensor? rope, Tensor? cu_seqlens, SymInt max_seqlen, str feature_map,
    int exponent, bool normalize, float? scale, float eps, bool softmax
"""


def _forward_operator(*arguments) -> tuple[Tensor, ...]:
    tensors = in_type_of_keys(arguments[:10])
    return as_outputs(run(record_forward, tensors, (arguments[10:], True)), tensors[0])


def _fake_forward(*arguments) -> tuple[Tensor, ...]:
    p = Problem(None, *unpack(*arguments[:3]), *arguments[3:])
    return as_outputs((p.empty_output(), p.saved_state(), p.empty_ratios()), p.q)


def _backward_operator(do: Tensor, state: Tensor, ratios: Tensor, keys: bool, *arguments) -> tuple[Tensor, ...]:
    ratios = ratios if arguments[11] == "focusing_power" else None
    inputs = do, state, ratios, *in_type_of_keys(arguments[:10])
    return as_outputs(run(record_backward, inputs, (arguments[10:], keys)), do)


def _fake_backward(do: Tensor, state: Tensor, ratios: Tensor, keys: bool, *arguments) -> tuple[Tensor, ...]:
    q, k, v, *others = arguments
    p = Problem(None, *unpack(q, k, v), *others)
    dk, dv, dkd = (p.empty_like(x if keys else None) for x in (k, v, p.k_denominator))
    of_queries = p.empty_like(q), p.empty_like(p.q_denominator)
    dwk = p.empty_weights(p.key_weight if keys else None)
    return as_outputs((of_queries[0], dk, dv, of_queries[1], dkd, p.empty_like(p.parameter), dwk), do)


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # of the state and the ratios, which would be written as zeros
    ctx.options = inputs[10:]
    ctx.save_for_backward(*inputs[:10], *output[1:])


def _of_keys(needed: Sequence[bool], q: Tensor, softmax: bool) -> bool:
    """Whether more than the gradient of the queries is needed; through a softmax it takes that of the keys, too."""
    _, k, v, _, *others = needed[:8]
    return softmax or q.ndim == 5 or k or v or any(others)


def _differentiate(ctx, do, *_):
    *tensors, state, ratios = ctx.saved_tensors
    needed = ctx.needs_input_grad
    keys = _of_keys(needed, tensors[0], ctx.options[-1])
    gradients = linear_attention_backward(do, state, ratios, keys, *tensors, *ctx.options)
    de = encoding_gradient(gradients, tensors[7].dtype) if needed[7] else None
    gradients = [g if need else None for g, need in zip(gradients, needed, strict=False)]
    return *gradients, de, *[None] * (2 + len(ctx.options))


def encoding_gradient(gradients: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
    """The gradient of the keys' encoding from those of q, k, v."""
    q, k = gradients[:2]
    dk = q.select(2, 1).transpose(1, 2) if q.ndim == 5 else k
    return dk.sum(0, dtype=torch.float32).to(dtype)


linear_attention_forward = define_operator(
    f"linear_attention_forward({SCHEMA}) -> (Tensor, Tensor, Tensor)", _forward_operator, _fake_forward,
    _differentiate, _setup_context,
)  # fmt: skip
linear_attention_backward = define_operator(
    f"linear_attention_backward(Tensor do, Tensor state, Tensor ratios, bool keys, {SCHEMA})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)", _backward_operator, _fake_backward,
)  # fmt: skip


@eager_function
class _Eager(torch.autograd.Function):
    """The operators' work without their dispatcher, which takes longer than short sequences' kernels."""

    @staticmethod
    def forward(ctx, *inputs):
        *tensors, options, check = inputs
        ctx.options, ctx.encoding_type = options, None if tensors[7] is None else tensors[7].dtype
        tensors = in_type_of_keys(tensors)
        o, *saved = run(record_forward, tensors, (options, True), check)
        ctx.save_for_backward(*tensors, *saved)
        return o

    @staticmethod
    def backward(ctx, do):
        *tensors, state, ratios = ctx.saved_tensors
        needed = ctx.needs_input_grad
        keys = _of_keys(needed, tensors[0], ctx.options[-1])
        gradients = run(record_backward, (do, state, ratios, *tensors), (ctx.options, keys))
        de = encoding_gradient(gradients, ctx.encoding_type) if needed[7] else None
        return *gradients, de, *[None] * 4


@register_flop_formula(torch.ops.flash_bla.linear_attention_forward)
def _forward_flops(q_shape, k_shape, v_shape, *options, **_) -> int:
    """Operations of the matrix products in the reference, for ``torch.utils.flop_counter``."""
    if k_shape is None:
        B, N, _, H, D = q_shape
        q_shape = k_shape = (B, H, N, D)
    (B, H, N, D), M, D_v = q_shape, k_shape[2], (k_shape if v_shape is None else v_shape)[3]
    feature_map, _, normalize = options[8:11]
    streams = 2 if feature_map == "signed_power" else 1
    return 2 * B * H * streams * D * ((M + N) * D_v + (N * streams if normalize else 0))


@register_flop_formula(torch.ops.flash_bla.linear_attention_backward)
def _backward_flops(do_shape, state_shape, ratios_shape, keys, *arguments, **_) -> int:
    return 2 * _forward_flops(*arguments)


def operator_arguments(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    feature_map: FeatureMap,
    *,
    q_denominator: Tensor | None = None,
    k_denominator: Tensor | None = None,
    key_weight: Tensor | str | None = None,
    key_encoding: Tensor | None = None,
    rope: Tensor | None = None,
    normalize: bool = True,
    scale: float | None = None,
    eps: float = 1e-6,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> tuple[tuple[Tensor | None, ...], tuple]:
    """Tensors and options of the forward operator, from checked arguments."""
    if rope is not None:  # bfloat16 needs no more than float16, and reads less
        rope = convert(rope, torch.float16 if q.dtype == torch.bfloat16 else torch.float32)
    parameter, softmax = convert(feature_map.parameter, torch.float32), isinstance(key_weight, str)
    key_weight = None if softmax else convert(key_weight, torch.float32)
    scale = None if scale is None else float(scale)
    tensors = q, k, v, q_denominator, k_denominator, parameter, key_weight, key_encoding, rope, cu_seqlens
    options = max_seqlen or 0, feature_map.name, feature_map.exponent, normalize, scale, float(eps), softmax
    return tensors, options


def linear_attention(
    q: Tensor, k: Tensor | None, v: Tensor | None, feature_map: FeatureMap, check: Callable | None = None,
    **arguments: Any,
) -> Tensor:  # fmt: skip
    """The operator; as ``linear_attention_reference``, but for q, k, v see ``unpack``.

    The arguments have been checked, or q is eager and they are by ``check`` where such ones were not met before.
    """
    tensors, options = operator_arguments(q, k, v, feature_map, **arguments)
    eager = check is not None or is_eager(q)

    def attend(*qkv: Tensor | None) -> Tensor:
        inputs = (*qkv, *tensors[3:])
        if not eager:
            return linear_attention_forward(*inputs, *options)[0]
        if torch.is_grad_enabled() and any([x is not None and x.requires_grad for x in inputs]):
            return _Eager.apply(*inputs, options, check)
        return run(record_forward, in_type_of_keys(inputs), (options, False), check)[0]  # no backward pass will come

    signs = 2 if feature_map.signed else 1
    widest = widest_values(q, signs)
    if (q if v is None else v).shape[-1] <= widest:
        return attend(q, k, v)
    if check is not None:
        check()
    q, k, v = unpack(q, k, v)
    # The output is linear in the values: columns can be computed apart, of signed_power the two halves' together.
    parts = v.unflatten(3, (signs, -1)).split(widest // signs, dim=4)
    parts = [attend(q, k, part.flatten(3)).transpose(1, 2).unflatten(3, (signs, -1)) for part in parts]
    return torch.cat(parts, dim=4).flatten(3).transpose(1, 2)
