"""The parts that the benchmarks share: what is captured and divided by what, and rows that replace each other."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from benchmarks import depthwise_conv, diffusion, models, operators, results, timing

CUDA = torch.device("cuda")
L2 = 60 * 2**20


@pytest.mark.parametrize("set_bytes", [1000, 2**20, 77 * 10**6, L2, 3 * L2, 3 * 2**30])
def test_inputs_that_take_turns_exceed_three_caches(set_bytes, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=L2))
    sets, calls = timing.rotation(set_bytes, CUDA)
    assert sets * set_bytes >= 3 * L2 > (sets - 1) * set_bytes
    assert calls % sets == 0 and (calls >= 16 or calls * set_bytes >= 2**30)
    assert calls < sets + 16 and (calls == sets or (calls - sets) * set_bytes < 2**30)


def test_a_graph_of_all_calls_is_replayed_and_its_time_shared(monkeypatch):
    """With stand-ins for CUDA: a replay takes 1 ms a captured call, but the first ones take ten."""
    log, clock = [], [0.0]

    class Graph:
        replays, calls = 0, 0

        def replay(self):
            Graph.replays += 1
            clock[0] += self.calls * (10.0 if Graph.replays <= 12 else 1.0)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = clock[0]

        def elapsed_time(self, end):
            return end.time - self.time

    @contextmanager
    def capture(graph, stream):
        assert stream == "side"
        before = len(log)
        yield
        graph.calls = len(log) - before

    for name, stand_in in (("CUDAGraph", Graph), ("Event", Event), ("graph", capture)):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "side")
    monkeypatch.setattr(timing, "synchronize", lambda device: None)
    calls = [lambda i=i: log.append(i) for i in range(6)]
    assert timing.kernel_seconds(calls, CUDA) == pytest.approx(1e-3)
    assert log == [0, 1, 2, 3, 4, 5] * 2  # a warm-up, then the capture


def test_rows_replace_those_of_the_same_key(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    columns, key = ("name", "size", "value", "note"), ("name", "size")
    results.merge_rows(path, columns, key, [{"name": "a", "size": 1, "value": 12345.678, "note": None},
                                            {"name": "b", "size": 1, "value": float("nan")}])  # fmt: skip
    merged = results.merge_rows(path, columns, key, [{"name": "a", "size": 1, "value": 0.0123456, "note": "x, y"},
                                                     {"name": "a", "size": 2, "value": 7}])  # fmt: skip
    assert path.read_text() == 'name,size,value,note\na,1,0.012346,"x, y"\nb,1,,\na,2,7,\n'
    assert merged == results.read_rows(path)


@pytest.mark.parametrize("benchmark", [depthwise_conv, diffusion, models, operators])
def test_rows_of_another_device_stay(benchmark, tmp_path):
    def measure(device: str, date: str, latest: str) -> list[str]:
        row = {name: "x" for name in benchmark.COLUMNS} | {"device": device, "date": date}
        rows = results.merge_rows(tmp_path / "rows.csv", benchmark.COLUMNS, benchmark.KEY, [row])
        for measured, shown in ((device, device), (None, latest)):
            assert {row["device"] for row in results.of_one_device(rows, measured)} == {shown}
        return [row["device"] for row in rows]

    assert measure("H200", "2026-11-20", latest="H200") == ["H200"]
    assert measure("laptop", "2026-11-21", latest="laptop") == ["H200", "laptop"]
    assert measure("H200", "2026-11-21", latest="laptop") == ["H200", "laptop"]  # which has the last row of that day
    assert measure("H200", "2026-11-22", latest="H200") == ["H200", "laptop"]
    assert results.of_one_device([], None) == []


def test_a_sentence_for_each_machine():
    row = {"device": "H200", "torch": "2.11", "triton": "3.6", "timm": "", "date": "2026-11-21"}
    rows = [row, row | {"date": "2026-11-20"}, row | {"triton": "3.7"}, row]
    assert results.measured_on(rows) == (
        "Measured on one H200, torch 2.11, triton 3.6, on 2026-11-20 and 2026-11-21.\n"
        "Measured on one H200, torch 2.11, triton 3.7, on 2026-11-21."
    )
