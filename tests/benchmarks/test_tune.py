"""The search for entries of the tables, with a clock that prefers one."""

from __future__ import annotations

import pytest

from benchmarks import timing, tune
from flash_bla.ops.triton_tuning import TUNING


@pytest.mark.parametrize(("op", "table"), [("elu1", "plain"), ("signed_power", "signed")])
def test_the_fastest_candidate_is_kept(op, table, monkeypatch):
    monkeypatch.setenv("FLASH_BLA_BACKEND", "triton")
    monkeypatch.setattr(tune, "RESIDENT", (1, 3))
    monkeypatch.setattr(tune, "STAGES", (1, 2))
    monkeypatch.setattr(tune, "REGISTERS", (None,))
    before = dict(TUNING[table])
    monkeypatch.setitem(TUNING, table, dict(before))

    passes = []

    def clock(calls, device):
        passes.append(calls)
        if len(passes) <= 2:  # the first forward and backward pass tell which kernels there are
            calls[0]()
        return sum(abs(t.resident - 3) + abs(t.num_stages - 2) for _, t in TUNING[table].values())

    monkeypatch.setattr(timing, "kernel_seconds", clock)
    found = tune.tune(op, (1, 1, 300, 64), tune.torch.device("cpu"))
    if table == "signed":
        expected = {"signed_state_kernel", "signed_output_kernel", "signed_query_kernel", "signed_key_kernel"}
    else:
        expected = {"state_kernel", "output_kernel", "query_gradient_kernel", "key_gradient_kernel"}
    assert expected <= set(found)
    assert all((t.resident, t.num_stages) == (3, 2) for t in found.values())
    names = {kernel: kernel.__name__ for kernel in before}
    for kernel, (narrow, wide) in TUNING[table].items():
        assert narrow == before[kernel][0]  # heads of 64 channels are wide
        assert wide == found.get(names[kernel], before[kernel][1])
