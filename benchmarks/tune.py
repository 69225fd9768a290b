"""Finds how the kernels of linear attention run fastest on a chip, and prints the entries of their tables.

    python -m benchmarks.tune [--op elu1] [--shape vit_s]

For one operator and shape of benchmarks/operators.py, the kernels that its forward and backward pass launch are taken
one after the other, and of each all candidates are tried: the programs on a multiprocessor at a time, the stages of the
loads' pipeline and the registers of a thread. What counts is the time of all kernels together, by replay of a CUDA
graph. The entries belong in TUNING of flash_bla/ops/triton_tuning.py, for tiles as wide as the shape's; check them with
benchmarks/operators.py, since a shape tells nothing of others.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from triton import TritonError

from benchmarks import timing
from benchmarks.operators import DTYPE, OPS, SHAPES, backward, forward, make_inputs
from flash_bla.ops import triton_support
from flash_bla.ops.triton_tiles import Config
from flash_bla.ops.triton_tuning import Tuning, plan, tuning_table

RESIDENT, STAGES, REGISTERS = (1, 2, 3, 4, 5, 6), (1, 2, 3, 4), (None, 128, 168)


def seconds(name: str, shape: Sequence[int], device: torch.device) -> float:
    """Time of the kernels of both passes with the tables as they are; infinite if a kernel does not fit."""
    plan.cache_clear()
    triton_support._RECORDS.clear()
    op, total = OPS[name], 0.0
    count, calls = timing.rotation(3 * math.prod(shape) * 2, device)
    sets = [make_inputs(op, shape, "packed", device, seed) for seed in range(count)]
    try:
        for make in (lambda x: partial(forward, op.run, x), lambda x: backward(op.run, x)):
            each = [make(x) for x in sets]
            total += timing.kernel_seconds([each[i % count] for i in range(calls)], device)
    except TritonError as error:  # the kernels ask for too much
        print(f"    {error}")
        return math.inf
    return total


def launched() -> dict[Any, Config]:
    """The kernels with entries that ran since the records were cleared."""
    return {
        launch.kernel: value
        for record in triton_support._RECORDS.values()
        for launch in record.launches
        for value in launch.values
        if isinstance(value, Config)
    }


def candidates(now: Tuning) -> Iterator[Tuning]:
    for resident, num_stages, maxnreg in itertools.product(RESIDENT, STAGES, REGISTERS):
        yield now._replace(resident=resident, num_stages=num_stages, maxnreg=maxnreg)


def tune(name: str, shape: Sequence[int], device: torch.device) -> dict[str, Tuning]:
    """The best entries by the names of their kernels; the tables hold them, too."""
    best = seconds(name, shape, device)
    print(f"{name} {tuple(shape)}: {1e6 * best:.1f} µs")
    found = {}
    for kernel, C in launched().items():
        table, wide = tuning_table(C, DTYPE, triton_support.is_hopper(device)), max(C.BLOCK_D, C.BLOCK_DV) > 32
        for tuning in candidates(table[kernel][wide]):
            before = table[kernel]
            table[kernel] = (before[0], tuning) if wide else (tuning, before[1])
            time = seconds(name, shape, device)
            if time < best:
                best = time
                print(f"  {kernel.__name__} {tuning}: {1e6 * best:.1f} µs", flush=True)
            else:
                table[kernel] = before
        found[kernel.__name__] = table[kernel][wide]
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, Tuning]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=OPS, default="elu1")
    parser.add_argument("--shape", choices=SHAPES, default="vit_s", metavar="SHAPE", help=f"{', '.join(SHAPES)}")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with timing.side_stream(device):
        found = tune(args.op, SHAPES[args.shape], device)
    for kernel, tuning in found.items():
        print(f"{kernel}: {tuning}")
    return found


if __name__ == "__main__":
    main()
