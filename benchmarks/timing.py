"""What the benchmarks measure with: time of kernels, of calls and of copies, memory, and the machine they ran on.

All of it works on the CPU too, where "kernels" are timed by the clock: enough to try a script, no figure to publish.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from math import ceil
from typing import Any

import torch
from torch import Tensor

REPEATS = 20
REPLAY_SECONDS = 0.5  # fewer repeats, but three at least, of what would take longer
HOST_SECONDS = 0.5
L2_MULTIPLE = 3  # the inputs that take turns exceed the L2 cache that many times
CALLS, CALLS_BYTES = 16, 2**30  # a graph holds that many calls, or fewer if their inputs exceed these bytes


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def side_stream(device: torch.device) -> AbstractContextManager:
    """Where everything has to run that ``kernel_seconds`` captures, the forward pass of a captured backward included:
    autograd runs a backward on its forward's stream, and the default stream cannot be captured."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


def kernel_seconds(calls: Sequence[Callable[[], Any]], device: torch.device) -> float:
    """Device time of one of the calls: all are captured in one CUDA graph, median of its replays by their number."""
    for call in calls:  # compiles, and fills autograd's and the allocator's caches
        call()
    if device.type != "cuda":
        return statistics.median(_clock(call) for _ in range(3) for call in calls)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(device)):
        # Each call's outputs are kept: one buffer that all of them wrote would stay in the L2 cache.
        kept = [call() for call in calls]
    seconds = _replay_seconds(graph.replay, device) / len(calls)
    del kept
    return seconds


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy on the device."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**24, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    seconds = _replay_seconds(copy, device) if device.type == "cuda" else min(_clock(copy) for _ in range(5))
    return 2 * source.numel() / seconds


def rotation(set_bytes: int, device: torch.device) -> tuple[int, int]:
    """How many sets of inputs must take turns so that none is found in the L2 cache, and how many calls to capture."""
    if device.type != "cuda":
        return 1, 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    sets = ceil(L2_MULTIPLE * cache / set_bytes)
    return sets, sets * ceil(min(CALLS, CALLS_BYTES / set_bytes) / sets)


def host_seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Median time until the call returns to Python, whether the device has finished or not."""
    times, start = [], time.perf_counter()
    while len(times) < 10 * REPEATS and time.perf_counter() - start < HOST_SECONDS:
        synchronize(device)  # a full queue would make a call wait for the device
        times += [_clock(call) for _ in range(10)]
    return statistics.median(times)


def finished_seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Time of one call until the device has finished."""
    synchronize(device)

    def finish() -> None:
        call()
        synchronize(device)

    return _clock(finish)


def extra_bytes(call: Callable[[], Sequence[Tensor]], device: torch.device) -> float:
    """The most memory that a call held at a time besides its inputs and outputs; NaN where nobody counts."""
    if device.type != "cuda":
        return float("nan")
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    outputs = call()
    return torch.cuda.max_memory_allocated(device) - before - sum(x.numel() * x.element_size() for x in outputs)


def machine(device: torch.device) -> dict[str, str]:
    """Columns that say where, with what and when a row was measured."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = {package: _version(package) for package in ("torch", "triton", "timm")}
    return {"device": name, **versions, "date": datetime.now(timezone.utc).date().isoformat()}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _clock(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _replay_seconds(replay: Callable[[], None], device: torch.device) -> float:
    for _ in range(2):
        replay()
    repeats = min(REPEATS, max(3, int(REPLAY_SECONDS / finished_seconds(replay, device))))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        replay()
        end.record()
    synchronize(device)
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1000
