"""Batch norms in training: what their running statistics are after an update, and whose images they see."""

from __future__ import annotations

import torch
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from flash_bla.engine.logs import warn
from flash_bla.engine.processes import Processes


def sync_batch_norms(model: nn.Module, processes: Processes) -> nn.Module:
    """Lets the batch norms of a model normalise by the images of all processes; its state dict stays the same.

    PyTorch can do so on CUDA alone. On the CPU the model stays as it is, with a warning, and each process normalises by
    its own images.
    """
    if processes.count == 1:
        return model
    if processes.device.type != "cuda":
        if processes.first:
            warn(f"sync_bn: not on the {processes.device.type}; each process normalises by its own images")
        return model
    return convert_sync_batchnorm(model)


class RunningStatistics:
    """The running means and variances of a model's batch norms, as part of an update.

    A norm changes them in every forward pass, by its process's images. With this they are part of the update: the same
    in all processes, as the mean over them, so that an average or a checkpoint of the weights is the same whoever
    makes it; and left as they were by an update that is left out, so that no overflow stays in them. Norms in
    evaluation mode are not touched.
    """

    def __init__(self, model: nn.Module, processes: Processes):
        self._norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
        self._processes = processes

    def start_update(self) -> None:
        """To be called before the first forward pass of an update."""
        self._now = [t for norm in self._norms if norm.training for t in (norm.running_mean, norm.running_var)]
        self._before = torch.cat(self._now) if self._now else None

    def finish_update(self, grad_norm: torch.Tensor) -> None:
        """To be called once after the forward passes; the update is left out if the gradient's norm is not finite."""
        if self._now:
            mean = self._processes.mean(torch.cat(self._now))
            settled = torch.where(torch.isfinite(grad_norm), mean, self._before)
            for tensor, value in zip(self._now, settled.split([len(t) for t in self._now]), strict=True):
                tensor.copy_(value)
