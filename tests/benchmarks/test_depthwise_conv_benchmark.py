"""The convolution's benchmark on maps small enough for a test."""

from __future__ import annotations

import pytest
import torch

from benchmarks import depthwise_conv
from benchmarks.results import read_rows
from flash_bla.ops.triton_support import HAS_TRITON


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_from_measurement_to_table(tmp_path, monkeypatch):
    monkeypatch.setattr(depthwise_conv, "BATCH", 1)
    monkeypatch.setattr(depthwise_conv, "DTYPE", torch.float32)
    monkeypatch.setattr(depthwise_conv, "SHAPES", [depthwise_conv.Shape(3, 2, 16, 8, 3)])
    depthwise_conv.main(["--output", str(tmp_path)])
    rows = read_rows(tmp_path / "depthwise_conv.csv")
    assert len(rows) == 4 + 3 * 4  # PyTorch has no call for both gradients but the sum of the two
    assert all(float(row["error"]) < 1e-5 for row in rows if row["backend"] == "triton")
    assert all(float(row["time_us"]) > 0 for row in rows)
    times = {(row["pass"], row["backend"]): float(row["time_us"]) for row in rows}
    best = min(times["input", name] + times["filters", name] for _, name in times if name != "triton")
    line = next(line for line in (tmp_path / "depthwise_conv.md").read_text().splitlines() if "| both |" in line)
    assert line.startswith("| 3x3s2_c8x2_3 | both |") and f"| {best:.0f} (" in line


def test_floor():
    """Bytes of x and y in half precision; y has a quarter of the places."""
    shape = depthwise_conv.Shape(3, 2, 64, 64, 8)
    x = depthwise_conv.BATCH * 8 * 8 * 64 * 2
    floors = [depthwise_conv.floor_bytes(shape, which) for which in depthwise_conv.PASSES]
    assert floors == [1.25 * x, 1.25 * x, 1.25 * x, 2.25 * x]
