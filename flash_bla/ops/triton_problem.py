"""What the launches of linear attention share: the inputs, what they ask for, and memory for what they give."""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from flash_bla.ops.feature_maps import LOOP_FEATURE_MAPS, TRITON_FEATURE_MAPS
from flash_bla.ops.triton_norm_ratios import encoding_strides, multiply, ratios_shape, split_ratios
from flash_bla.ops.triton_support import (
    Record,
    cdiv,
    has_products_in_registers,
    is_hopper,
    padded,
    power_of_two,
    precision,
)
from flash_bla.ops.triton_tiles import Config
from flash_bla.ops.triton_tuning import Tuning, plan


class Problem(NamedTuple):
    """What the launches of both directions share. Without a record it is for the shapes of outputs alone."""

    record: Record | None
    q: Tensor
    k: Tensor
    v: Tensor
    q_denominator: Tensor | None
    k_denominator: Tensor | None
    parameter: Tensor | None
    key_weight: Tensor | None
    key_encoding: Tensor | None  # (H, M, D)
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
    masked: bool = False  # the keys have weights besides norm ratios

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
    def centers_state(self) -> bool:
        """Whether the state is kept for the backward pass without the values' mean, and rounded.

        So it is of few tokens, of which a backward program has so little to do that it should begin at once. Of more
        tokens the forward pass would take as much longer, and wide tiles have no registers left for it.
        """
        D, D_v = self.q.shape[3], self.v.shape[3]
        return self.plain and self.short and max(D, D_v) <= 64 and D % 8 == D_v % 8 == 0

    @property
    def single(self) -> bool:
        """Whether the kernels for sequences of one tile do all that is asked for."""
        return (
            self.sums_keys_again and self.longest <= 64 and max(self.q.shape[3], self.v.shape[3]) <= 64
            and self.q.dtype == torch.bfloat16 and self.normalize and self.q_denominator is None
        )  # fmt: skip

    @property
    def ratios_in_loops(self) -> bool:
        """Whether the loops compute the norm ratios: those of heads that have all channels of their tokens.

        Not where their weights are the ratios' products with others, where the backward pass would write them again,
        and where a wide tile leaves no registers for it.
        """
        return (
            self.feature_map == "focusing_power" and self.q.shape[1] == 1 and not self.masked
            and not self.sums_keys_again and max(self.q.shape[3], self.v.shape[3]) <= 64
        )  # fmt: skip

    @property
    def query_ratios_in_outputs(self) -> bool:
        """Whether the loop that writes the outputs computes the queries' norm ratios: that of all heads of a token."""
        _, H, _, D = self.q.shape
        return (
            self.feature_map == "focusing_power" and not self.ratios_in_loops and not self.short and self.normalize
            and self.cu_seqlens is None and self.q.dtype == torch.bfloat16 and max(D, self.v.shape[3]) <= 64
            and H * max(16, power_of_two(D)) <= 128
        )  # fmt: skip

    @property
    def few(self) -> bool:
        """Whether keys may be so few that z of ``sum_keys`` must sum rounded features, as that of other loops does."""
        others = self.softmax or self.ratios_in_loops or self.rope is not None or self.q_denominator is not None
        return others and (self.cu_seqlens is not None or self.k.shape[2] <= 4 * self.q.shape[3])

    @property
    def plain(self) -> bool:
        """Whether the loops of triton_plain.py do all that is asked for."""
        others = self.q_denominator, self.parameter, self.key_weight, self.rope
        return self.q.dtype == torch.bfloat16 and not self.softmax and all(x is None for x in others)

    def new_empty(self, *shape: int) -> Tensor:
        return (self.record or self.q).new_empty(shape, dtype=torch.float32)

    def empty_state(self, splits: int) -> Tensor:
        """S, z as its next row, and of a softmax two more, for each split."""
        _, H, _, D = self.q.shape
        rows = self.v.shape[3] + (3 if self.softmax else 1)
        return self.new_empty(splits, self.sequences, H, self.signs, rows, D)

    def saved_state(self) -> Tensor | None:
        """What the forward pass leaves for the backward pass."""
        if self.sums_keys_again:
            return None
        if self.centers_state:  # numbers of two bytes and of four, see ``store_centered_state``
            (_, H, _, D), D_v = self.q.shape, self.v.shape[3]
            shape = self.sequences, H, D * D_v + 2 * (D + D_v)
            return (self.record or self.q).new_empty(shape, dtype=torch.int16)
        return self.empty_state(1)[0]

    def empty_ratios(self) -> Tensor | None:
        """The norm ratios and inverse norms of queries and keys, beside each other."""
        if self.feature_map != "focusing_power":
            return None
        return self.new_empty(*ratios_shape(self.q, self.k))

    def with_ratios(self, ratios: Tensor | None) -> Problem:
        """The norm ratios are weights of queries and keys, and multiply other weights of the keys."""
        if ratios is None:
            return self
        query_weight, key_weight = (x.expand(-1, self.q.shape[1], -1) for x in split_ratios(ratios, self.q, self.k))
        if self.key_weight is not None:
            key_weight = multiply(self.record, self.key_weight, key_weight)
        return self._replace(query_weight=query_weight, key_weight=key_weight)

    def empty_output(self) -> Tensor:
        B, H, N, _ = self.q.shape
        # laid out as (B, N, H, Dv), which the projection after an attention reads without a copy
        return self._empty((B, N, H, self.v.shape[3]), self.v.dtype).transpose(1, 2)

    def empty_like(self, x: Tensor | None) -> Tensor | None:
        """A gradient of x, also laid out as (B, N, H, D); of a packed one as it is packed."""
        if x is None or x.ndim != 4:
            return None if x is None else self._empty(x.shape, x.dtype)
        return self._empty(x.transpose(1, 2).shape, x.dtype).transpose(1, 2)

    def empty_weights(self, like: Tensor | None) -> Tensor | None:
        """A gradient of weights of tokens ``(B, H, N)``, in padded rows."""
        if like is None:
            return None
        B, H, N = like.shape
        return self._empty((B, H, padded(N)), torch.float32)[:, :, :N]

    def _empty(self, shape, dtype: torch.dtype) -> Tensor:
        memory = self.record or self.q
        # packed tokens that belong to no sequence must not come out as garbage
        return (memory.new_empty if self.cu_seqlens is None else memory.new_zeros)(shape, dtype=dtype)

    def plan(self, kernel) -> tuple[Config, Tuning]:
        _, H, _, D = self.q.shape
        flags = (
            self.exponent, self.signs == 2, self.parameter is not None, self.normalize,
            self.normalize and self.rope is None and self.q_denominator is None, self.rope is not None,
            self.q_denominator is not None, self.query_weight is not None, self.key_weight is not None, self.softmax,
            self.cu_seqlens is not None, self.scale is None, self.few,
            any(is_wide(x) for x in (self.q, self.k, self.v)), self.align, self.ratios_in_loops, self.plain,
            self.ordered,
        )  # fmt: skip
        return plan(kernel, D, self.v.shape[3], H, self.q.dtype, is_hopper(self.record.device), flags)

    @property
    def align(self) -> int:
        """What divides all strides but the columns'; those of outputs and of rotary tables are multiples of widths."""
        return gcd(16, self.q.shape[3], self.v.shape[3], *(stride for x in self.inputs for stride in x.stride()[:-1]))

    @property
    def ordered(self) -> bool:
        """Whether tiles may have their columns in the order of triton_order.py: each input's are neighbours."""
        neighbours = all(x.stride(-1) == 1 for x in self.inputs)
        return neighbours and self.q.dtype.itemsize == 2 and has_products_in_registers(self.record.device)

    @property
    def inputs(self) -> list[Tensor]:
        """All that have channels."""
        inputs = (self.q, self.k, self.v, self.q_denominator, self.k_denominator, self.key_encoding)
        return [x for x in inputs if x is not None]

    def programs(self, C: Config) -> int:
        return self.sequences * cdiv(self.q.shape[1], C.GROUP)

    def arguments(self) -> dict:
        """The arguments of the kernels that stand for inputs."""
        maps = TRITON_FEATURE_MAPS if self.plain or self.single else LOOP_FEATURE_MAPS
        phi, phi_rounded, phi_dx, phi_da, pad = maps[self.feature_map]
        tensors = dict(
            q=self.q, k=self.k, v=self.v, qd=self.q_denominator, kd=self.k_denominator, wq=self.query_weight,
            wk=self.key_weight,
        )  # fmt: skip
        return with_strides(tensors) | dict(
            e_ptr=self.key_encoding, e_strides=encoding_strides(self.key_encoding), a_ptr=self.parameter,
            rope_ptr=self.rope, rope_strides=_rope_strides(self.rope), cu_seqlens=self.cu_seqlens, query_sum_ptr=None,
            query_splits=0, query_length=self.q.shape[2], key_length=self.k.shape[2], heads=self.q.shape[1],
            HEADS=self.q.shape[1], scale=self.scale or 0.0, eps=self.eps, PHI=phi, PHI_ROUNDED=phi_rounded,
            PHI_DX=phi_dx, PHI_DA=phi_da, PAD=pad, **precision(self.q.dtype),
        )  # fmt: skip


def is_wide(x: Tensor) -> bool:
    """Whether offsets in a tile, of up to 64 rows and 4 heads, do not fit into 32 bits."""
    _, head, row, column = x.stride()
    return 4 * head + 64 * row + x.shape[3] * column >= 1 << 31


def with_strides(tensors: dict[str, Tensor | None]) -> dict:
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
