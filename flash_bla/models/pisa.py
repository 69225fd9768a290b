"""PISA: piecewise sparse attention for the self-attention of diffusers' transformers (Flux, Wan and their like).

    from flash_bla.models.pisa import reset_processor, set_processor

    set_processor(pipeline, density=0.1)  # nothing is trained, and no weight changes
    image = pipeline("a portrait of a human growing colorful flowers from her hair").images[0]
    reset_processor(pipeline)

Processors keep their projections, norms and rotary embeddings: a processor's own code runs, with another function where
it calls diffusers' ``dispatch_attention_fn``.

Reference: Li et al., "PISA: Piecewise Sparse Attention Is Wiser for Efficient Diffusion Transformers", 2026.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from types import FunctionType

from torch import Tensor, nn

from flash_bla.ops import piecewise_sparse_attention
from flash_bla.ops.piecewise_sparse import check_options

DISPATCH = "dispatch_attention_fn"


def set_processor(pipeline_or_transformer, density: float = 0.1, block_size: int = 64, use_bias: bool = False):
    """Gives the self-attention of a transformer piecewise sparse attention, until ``reset_processor``.

    Text and image tokens that attend to each other jointly, as in Flux, are one sequence. Cross-attention stays as it
    is, and so does what a processor computes with a mask, with dropout or spread over several devices. A further call
    replaces the settings of an earlier one.

    Args:
        pipeline_or_transformer: A pipeline of diffusers, all of whose transformers are meant; or a transformer, or
            a part of one, as ``transformer.transformer_blocks[4:]``, which leaves the first blocks exact.
        density: As in ``piecewise_sparse_attention``, like those that follow.
        block_size: Tokens in a block.
        use_bias: Whether to rank blocks by what is lost without them, too.

    Returns:
        The pipeline or transformer.

    Raises:
        ImportError: No diffusers, or one too old.
        ValueError: No transformer, none whose self-attention can be replaced, or settings out of their range.
    """
    dispatch = _import_dispatch()
    check_options(density, block_size)
    modules = [m for root in _transformers(pipeline_or_transformer) for m in _self_attentions(root, dispatch)]
    if not modules:
        raise ValueError(
            f"{type(pipeline_or_transformer).__name__} has no self-attention whose processor calls {DISPATCH} of "
            "diffusers, as those of the Flux and Wan transformers do"
        )
    attention = _sparse_attention(dispatch, density, block_size, use_bias)
    classes = {}
    for module in modules:
        exact = getattr(module.processor, "exact_processor", module.processor)
        if type(exact) not in classes:
            classes[type(exact)] = _with_attention(type(exact), attention)
        sparse = copy.copy(exact)
        sparse.__class__ = classes[type(exact)]
        sparse.__dict__["exact_processor"] = exact  # not an attribute, which a module would list among its parts
        module.set_processor(sparse)
    return pipeline_or_transformer


def reset_processor(pipeline_or_transformer):
    """Undoes ``set_processor``: the very processors from before it are in place again.

    Args:
        pipeline_or_transformer: What ``set_processor`` was called with, or what contains it.

    Returns:
        The pipeline or transformer.
    """
    for root in _transformers(pipeline_or_transformer):
        for module in list(root.modules()):
            exact = getattr(getattr(module, "processor", None), "exact_processor", None)
            if exact is not None:
                module.set_processor(exact)
    return pipeline_or_transformer


def _import_dispatch() -> Callable:
    try:
        from diffusers.models.attention_dispatch import dispatch_attention_fn
    except ImportError as error:
        raise ImportError(
            "set_processor needs diffusers 0.35 or newer, which comes with: pip install flash-bla[diffusion]"
        ) from error
    return dispatch_attention_fn


def _transformers(pipeline_or_transformer) -> list[nn.Module]:
    if isinstance(pipeline_or_transformer, nn.Module):
        return [pipeline_or_transformer]
    parts = getattr(pipeline_or_transformer, "components", {})  # Wan 2.2 has a transformer and a transformer_2
    found = [part for name, part in parts.items() if name.startswith("transformer") and isinstance(part, nn.Module)]
    if not found:
        raise ValueError(
            "pipeline_or_transformer must be a transformer, or a pipeline that has one, got "
            f"{type(pipeline_or_transformer).__name__}" + (f" of {', '.join(sorted(parts))}" if parts else "")
        )
    return found


def _self_attentions(root: nn.Module, dispatch: Callable) -> Iterator[nn.Module]:
    for name, module in root.named_modules():
        processor = getattr(module, "processor", None)
        processor = getattr(processor, "exact_processor", processor)
        run = type(processor).__call__ if callable(processor) else None
        replaceable = isinstance(run, FunctionType) and run.__globals__.get(DISPATCH) is dispatch
        if replaceable and DISPATCH in run.__code__.co_names and name.split(".")[-1] != "attn2":  # cross-attention
            yield module


def _with_attention(cls: type, attention: Callable) -> type:
    """A subclass whose ``__call__`` is that of ``cls`` with another function for ``dispatch_attention_fn``."""
    run = cls.__call__
    # without a name, by which torch.compile would look the function up in the module that the code is from
    names = {name: value for name, value in run.__globals__.items() if name != "__name__"} | {DISPATCH: attention}
    sparse_run = FunctionType(run.__code__, names, run.__name__, run.__defaults__, run.__closure__)
    sparse_run.__kwdefaults__ = run.__kwdefaults__
    return type(f"PiecewiseSparse{cls.__name__}", (cls,), {"__call__": sparse_run})


def _sparse_attention(dispatch: Callable, density: float, block_size: int, use_bias: bool) -> Callable:
    """What stands in for ``dispatch_attention_fn``: tokens come as ``(B, N, H, D)``."""

    def attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, *,
        backend=None, **options,
    ) -> Tensor:  # fmt: skip
        plain = attn_mask is None and not (dropout_p or is_causal or any(options.values()))
        if not plain or not query.shape == key.shape == value.shape:
            return dispatch(query, key, value, attn_mask, dropout_p, is_causal, scale, backend=backend, **options)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return piecewise_sparse_attention(q, k, v, density, block_size, scale, use_bias).transpose(1, 2)

    return attention
