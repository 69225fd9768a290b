"""Processes, seeds and signals: one process or many, started by `python` or by `torchrun`."""

from __future__ import annotations

import hashlib
import os
import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from timm.utils.distributed import init_distributed_device_so, is_distributed_env, world_info_from_env

from flash_bla.engine.config import RunError


@dataclass
class Processes:
    """This process and how many there are."""

    device: torch.device
    rank: int
    count: int

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean of a tensor over all processes."""
        return self.sum(values) / self.count

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all processes."""
        if self.count > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """A small object of every process, by rank."""
        if self.count == 1:
            return [value]
        values = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def close(self) -> None:
        """Ends the process group."""
        if self.count > 1:
            dist.destroy_process_group()


def _restarted(url: str, timeout: timedelta = dist.default_pg_timeout, **options: Any) -> Iterator[tuple]:
    """The meeting of `env://`, in a store of its own for each restart by torchrun.

    torchrun keeps one store over all restarts, in which processes may find the addresses of those before them and wait
    for these until the time is out. On several nodes the counts of restarts can differ; there torchrun itself can be
    told not to (TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1).
    """
    for store, rank, count in dist.rendezvous("env://", timeout=timeout):
        yield dist.PrefixStore(f"restart_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store), rank, count


dist.register_rendezvous_handler("restarted", _restarted)


def start_processes(device: str | None = None, threads: int | None = None) -> Processes:
    """Joins the process group where torchrun (or Slurm) started several processes, and takes this process's device.

    Args:
        device: Its kind (`cuda`, `cpu`, ...); None takes the GPU where there is one. The backend follows: nccl on CUDA,
            gloo on the CPU.
        threads: CPU threads of PyTorch; None leaves the choice to it.

    Raises:
        RunError: There is no such device, or none for this one of several processes.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        kind, count = torch.device(device), torch.cuda.device_count()
        if kind.type != "cuda":  # which would take up memory here, of the first GPU for all processes
            torch.empty(0, device=kind)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise RunError(f"device: this PyTorch has no {device!r}: {str(error).splitlines()[0]}") from error
    if kind.type == "cuda":
        index, wish = kind.index or 0, f"{device} was asked for"
        if is_distributed_env():  # timm gives each process the GPU of its number on this host, whatever the index
            index, _, total = world_info_from_env()
            wish = f"process {index + 1} on this host, of {total} in all, takes a GPU of its own"
        if index >= count:
            raise RunError(f"device: {wish}, but this PyTorch sees {count or 'no'} CUDA device{'s' * (count != 1)}")
    if threads is not None:
        torch.set_num_threads(threads)
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and os.environ["GROUP_WORLD_SIZE"] == "1"
    info = init_distributed_device_so(device, dist_url="restarted://" if restarted else None)
    return Processes(torch.device(info["device"]), info["global_rank"], info["world_size"])


def mixed_seed(*parts: int) -> int:
    """A 63-bit seed from a few numbers; equal numbers give equal seeds, neighbours give unrelated ones."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_host(seed: int) -> None:
    """Seeds the generators that augmentations draw from: Python's, NumPy's and PyTorch's on the CPU."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # torch.manual_seed also queues a seeding of every GPU, which is slow where none is in use, as in a loader process.
    torch.default_generator.manual_seed(seed)


class StopRequest:
    """A wish to stop, by SIGTERM or Ctrl-C, on which all processes agree; and one to save, by their clocks.

    The first signal asks. A second Ctrl-C interrupts at once; more SIGTERMs change nothing, because a process can well
    get one from its group and one from torchrun.
    """

    def __init__(self, processes: Processes):
        self.received = False
        # The answer travels between the hosts' CPUs and is read one update later, so that no GPU waits for it.
        self._group = dist.new_group(backend="gloo") if processes.count > 1 else None
        self._pending: tuple[Any, torch.Tensor] | None = None
        self._before = {sig: signal.signal(sig, self._receive) for sig in (signal.SIGTERM, signal.SIGINT)}

    def _receive(self, signum: int, frame: Any) -> None:
        self.received = True
        signal.signal(signal.SIGINT, self._before[signal.SIGINT])

    def close(self) -> None:
        """Waits for the answer under way and gives the signals back to who had them before."""
        if self._pending is not None:
            self._pending[0].wait()
        for sig, handler in self._before.items():
            signal.signal(sig, handler)

    def agreed(self, save: bool = False) -> tuple[bool, bool]:
        """Whether to stop now, and whether to save. To be called by all processes equally often.

        Args:
            save: Whether this process wishes that all of them save, as its clock has it: clocks differ.

        Returns:
            Whether any process wishes so, the same on all of them.
        """
        if self._group is None:
            return self.received, save
        answer = [False, False]
        if self._pending is not None:
            work, flags = self._pending
            work.wait()
            answer = flags.bool().tolist()
        flags = torch.tensor([self.received, save and not answer[1]], dtype=torch.int32)  # granted now: not again
        self._pending = (dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._group, async_op=True), flags)
        return answer[0], answer[1]
