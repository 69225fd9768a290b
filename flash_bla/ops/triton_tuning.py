"""How the kernels of linear attention are launched: tables of what runs fastest, and the rule for the tiles' sides."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

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
from flash_bla.ops.triton_signed_kernels import (
    signed_backward_kernel,
    signed_forward_kernel,
    signed_key_kernel,
    signed_output_kernel,
    signed_query_kernel,
    signed_state_kernel,
)
from flash_bla.ops.triton_single import (
    plain_single_backward_kernel,
    plain_single_forward_kernel,
    single_backward_kernel,
    single_forward_kernel,
)
from flash_bla.ops.triton_support import power_of_two
from flash_bla.ops.triton_tiles import Config


class Tuning(NamedTuple):
    """How a kernel runs fastest: found for bfloat16 on an H200."""

    width: int  # of the tiles, to which narrow heads are joined
    resident: int  # programs on a multiprocessor at a time, as far as registers allow
    num_stages: int  # of the loads' pipeline
    maxnreg: int | None  # registers of a thread
    persistent: bool = False  # no more programs than are resident
    warps: int | None = None  # as many as a program's state asks for
    rows: int | None = None  # of the tiles; as many as registers hold
    ordered: bool = True  # columns in the order of triton_order.py, where they can be


# For tiles of at most 32 columns, and for wider ones; `python -m benchmarks.tune` finds those of another chip. Rotary
# encodings, the softmax (with one), the focusing map, and the map of two signs differ where they take more registers.
# Tiles of 128 columns have a table of their own on Hopper chips: a product there takes 64 rows for each four warps, and
# would be computed twice by eight of them if the tile had no more.
_PLAIN = {
    query_sum_kernel: (Tuning(64, 6, 4, None), Tuning(64, 6, 4, None)),
    state_kernel: (Tuning(64, 2, 4, None), Tuning(64, 2, 4, None)),
    output_kernel: (Tuning(64, 4, 3, 128), Tuning(64, 4, 3, 128)),
    query_gradient_kernel: (Tuning(32, 3, 3, 168), Tuning(32, 2, 3, None)),
    key_gradient_kernel: (Tuning(64, 2, 3, None), Tuning(64, 2, 3, None)),
    forward_kernel: (Tuning(64, 4, 3, 128), Tuning(64, 4, 3, 128)),
    backward_kernel: (Tuning(64, 2, 4, None), Tuning(64, 2, 4, 240)),
    single_forward_kernel: (Tuning(0, 5, 3, None, True), Tuning(0, 4, 2, 128, True)),
    single_backward_kernel: (Tuning(0, 4, 1, 128), Tuning(0, 2, 1, None)),
    plain_single_forward_kernel: (Tuning(0, 4, 3, None, True), Tuning(0, 3, 2, None, True)),
    plain_single_backward_kernel: (Tuning(0, 3, 3, 168, True), Tuning(0, 3, 3, 168, True)),  # narrow heads alone
}
_ROPE = _PLAIN | {
    state_kernel: (Tuning(64, 2, 3, None), Tuning(64, 2, 3, None)),
    output_kernel: (Tuning(32, 4, 4, 128), Tuning(64, 4, 3, 128)),
    query_gradient_kernel: (Tuning(64, 2, 3, None), Tuning(64, 2, 3, None)),
    single_forward_kernel: (Tuning(0, 4, 3, 128, True), Tuning(0, 4, 2, 128, True)),
    backward_kernel: (Tuning(64, 2, 3, None), Tuning(64, 2, 3, None)),
}
TUNING = {
    "plain": _PLAIN,
    "rope": _ROPE,
    "softmax": _ROPE
    | {
        state_kernel: (Tuning(64, 3, 3, 168), Tuning(64, 3, 3, 168)),
        output_kernel: (Tuning(32, 4, 3, 128), Tuning(64, 2, 4, 128, ordered=False)),
    },
    "focusing": _PLAIN
    | {
        forward_kernel: (Tuning(64, 3, 3, 168), Tuning(64, 3, 3, 168)),
        query_gradient_kernel: (Tuning(32, 3, 3, 168), Tuning(32, 2, 3, None)),
        focusing_output_kernel: (Tuning(32, 3, 3, 168), Tuning(64, 2, 3, None)),
        single_backward_kernel: (Tuning(0, 4, 1, 128), Tuning(0, 3, 1, 168)),
    },
    "signed": {
        signed_state_kernel: (Tuning(64, 2, 4, None), Tuning(64, 2, 4, None)),
        signed_output_kernel: (Tuning(64, 3, 4, 168), Tuning(64, 3, 4, 168)),
        signed_query_kernel: (Tuning(32, 3, 3, 168), Tuning(64, 2, 3, None)),
        signed_key_kernel: (Tuning(64, 2, 3, None), Tuning(64, 2, 3, None)),
        signed_forward_kernel: (Tuning(64, 3, 4, 168), Tuning(64, 3, 4, 168)),
        signed_backward_kernel: (Tuning(32, 3, 4, 168), Tuning(64, 2, 3, None)),
        single_forward_kernel: _PLAIN[single_forward_kernel],
        single_backward_kernel: (Tuning(0, 3, 1, 168), Tuning(0, 2, 1, None)),
    },
    "wide": {
        query_sum_kernel: (None, Tuning(0, 4, 3, None, warps=4, rows=64)),
        state_kernel: (None, Tuning(0, 1, 3, None, warps=8, rows=64)),
        output_kernel: (None, Tuning(0, 2, 3, 168, warps=4, rows=64)),
        query_gradient_kernel: (None, Tuning(0, 1, 1, None, warps=8, rows=128)),
        key_gradient_kernel: (None, Tuning(0, 2, 2, None, warps=4, rows=64)),
        forward_kernel: (None, Tuning(0, 1, 2, None, warps=8, rows=128)),
        backward_kernel: (None, Tuning(0, 1, 2, None, warps=8, rows=128)),
    },
}


def tuning_table(C: Config, dtype: torch.dtype, hopper: bool) -> dict:
    """The table of ``TUNING`` that has the entries of such a kernel."""
    if C.SIGNED:
        return TUNING["signed"]
    if hopper and max(C.BLOCK_D, C.BLOCK_DV) == 128 and dtype == torch.bfloat16:
        return TUNING["wide"]
    if C.PARAMETER:
        return TUNING["focusing"]
    if C.SOFTMAX:
        return TUNING["softmax"]
    return TUNING["rope" if C.ROPE else "plain"]


@lru_cache(maxsize=1024)
def plan(kernel, D: int, D_v: int, heads: int, dtype: torch.dtype, hopper: bool, flags: tuple) -> tuple[Config, Tuning]:
    """Sides of the tiles, all of D and D_v and as many rows as a program's registers hold, and the tuning."""
    config = Config(D, D_v, 1, 0, 0, 0, *flags)
    group, block_d, block_dv = 1, power_of_two(max(D, 16)), power_of_two(max(D_v, 16))
    if D == D_v and 4 < D <= 32:  # heads stand side by side
        width, pitch = tuning_table(config, dtype, hopper)[kernel][0].width, power_of_two(D)
        if dtype != torch.bfloat16 and kernel in (query_gradient_kernel, key_gradient_kernel):
            width = 32  # their operands are twice as large, and take shared memory
        group = min(max(1, width // pitch), 4, 1 << (heads.bit_length() - 1))
        block_d = block_dv = max(16, pitch * group)
    halves = 2 if config.SIGNED and kernel in (single_forward_kernel, single_backward_kernel) else 1  # tiles of values
    narrowest = min(block_d, block_dv // halves) // group
    config = config._replace(GROUP=group, BLOCK_D=block_d, BLOCK_DV=block_dv)
    table = tuning_table(config, dtype, hopper)
    tuning = table[kernel][max(block_d, block_dv) > 32]
    ordered = config.ORDERED and narrowest >= 32 and tuning.ordered
    if tuning.rows is not None:
        ordered = ordered and tuning.rows == 16 * tuning.warps
        return config._replace(BLOCK_N=tuning.rows, ORDERED=ordered), tuning
    size = 4 if config.SIGNED and dtype != torch.bfloat16 else dtype.itemsize  # of the products' operands
    warps = 4 if block_d * block_dv * (2 if config.SIGNED else 1) <= 8192 else 8
    block_n = max(16, min(64, 2048 * warps // (max(block_d, block_dv) * size)))
    tuning = tuning._replace(warps=warps)
    wide = max(block_d, block_dv) > 64 or size > 2
    if wide and kernel is not query_sum_kernel:  # they need more registers and shared memory
        tuning = tuning._replace(num_stages=1, maxnreg=None)
    extras = config.DECOUPLED or (config.KEY_WEIGHT and not config.PARAMETER)
    if kernel is backward_kernel and extras or kernel is forward_kernel and (extras or config.ROPE):
        tuning = tuning._replace(num_stages=1)  # their pipelines would need too much of both
    if dtype == torch.float16:
        tuning = tuning._replace(num_stages=min(tuning.num_stages, 3))
    return config._replace(BLOCK_N=block_n, ORDERED=ordered and block_n == 16 * warps), tuning


def widest_values(q: Tensor, signs: int) -> int:
    """The widest D_v whose states a program can hold; wider values are cut."""
    block_d = max(16, 1 << (q.shape[-1] - 1).bit_length())
    return (16384 if q.dtype == torch.bfloat16 else 8192) // (block_d * signs)
