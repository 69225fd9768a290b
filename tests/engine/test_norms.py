"""Batch norms: their running statistics in averages, in resumed runs, over processes and after updates left out."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from runs import UPDATES, assert_same_run, interrupt
from torch import nn

import train as train_script
from flash_bla.engine.norms import RunningStatistics, sync_batch_norms
from flash_bla.engine.processes import Processes


def test_batch_norms_in_averages_and_resumed_runs(train, load, batch_norm_yaml, on_loss):
    flags = ("--config", str(batch_norm_yaml), "--ema-decay", "0.9", "--mesa", "1", "--save-updates", "1")
    assert train("whole", *flags) == 0
    on_loss(interrupt(7))
    assert train("stopped", *flags) == train_script.STOPPED
    last, before = load("stopped"), load("stopped", "previous")
    done = [state["epoch"] * UPDATES + state["update"] for state in (before, last)]
    assert done[1] - done[0] == 1
    assert any("running_var" in key for key in last["state_dict"])
    for key, now in last["state_dict"].items():
        average = last["state_dict_ema"][key]
        if now.is_floating_point():
            assert torch.allclose(average, 0.9 * before["state_dict_ema"][key] + 0.1 * now, atol=1e-6), key
            assert "running" not in key or not torch.equal(now, before["state_dict"][key])
        else:
            assert average == now == done[1]  # batches counted
    assert train("stopped", *flags) == 0
    assert_same_run(load("whole"), load("stopped"))


class TwoProcesses(Processes):
    """This process and another one, whose values are all 6."""

    def __init__(self, kind: str = "cpu"):
        super().__init__(torch.device(kind), rank=0, count=2)

    def sum(self, values):
        return values + 6


@pytest.fixture
def norms():
    return nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2), nn.BatchNorm1d(2), nn.BatchNorm1d(2, affine=False))


@pytest.mark.parametrize("grad_norm", [1.0, math.nan, math.inf])
def test_running_statistics_are_the_mean_over_processes_unless_the_update_is_left_out(norms, grad_norm):
    norms[2].eval()
    statistics = RunningStatistics(norms, TwoProcesses())
    for _ in range(2):
        before = {key: value.clone() for key, value in norms.named_buffers()}
        statistics.start_update()
        norms(torch.randn(8, 3))
        norms(torch.randn(8, 3))
        own = {key: value.clone() for key, value in norms.named_buffers()}
        statistics.finish_update(torch.tensor(grad_norm))
        for key, value in norms.named_buffers():
            if "running" not in key or key.startswith("2."):
                assert torch.equal(value, own[key])
            else:
                assert not torch.equal(own[key], before[key])
                expected = (own[key] + 6) / 2 if math.isfinite(grad_norm) else before[key]
                assert torch.equal(value, expected), key


def test_a_model_without_batch_norms_has_no_statistics():
    statistics = RunningStatistics(nn.Linear(2, 2), TwoProcesses())
    statistics.start_update()
    statistics.finish_update(torch.tensor(1.0))


def test_sync_bn(norms, one_process, capsys):
    assert sync_batch_norms(norms, one_process) is norms
    assert type(sync_batch_norms(norms, TwoProcesses())[0]) is nn.BatchNorm1d
    assert "sync_bn: not on the cpu; each process normalises by its own images" in capsys.readouterr().err
    entries = norms.state_dict()
    synced = sync_batch_norms(norms, TwoProcesses("cuda"))
    assert [type(norm) for norm in synced] == [nn.SyncBatchNorm, nn.Linear, nn.SyncBatchNorm, nn.SyncBatchNorm]
    assert synced.state_dict().keys() == entries.keys()
    # timm's norms have an activation inside, which must not be lost.
    model = timm.create_model("test_byobnet").eval()
    images = torch.randn(1, 3, 64, 64)
    expected = model(images)
    assert torch.equal(sync_batch_norms(model, TwoProcesses("cuda"))(images), expected)
