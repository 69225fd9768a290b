"""The scaling benchmark: runs of train.py under torchrun that see the same images in the same updates."""

from __future__ import annotations

import csv

import pytest

from benchmarks import scaling

TINY = "--pictures 64 --size 32 --batch-size 8 --epochs 3 --workers 0 --device cpu --threads 1 --drop-path 0".split()
TINY += ["--model-kwargs", "embed_dim=8", "depths=[1, 1, 1, 1]", "num_heads=[1, 1, 2, 2]"]


def test_two_processes_and_one(tmp_path, capfd):
    flags = ["--processes", "1", "2", "--output", str(tmp_path), *TINY]
    one, two = scaling.main(flags)
    assert (one["processes"], two["processes"], one["ratio"]) == (1, 2, 1.0)
    assert two["ratio"] == pytest.approx(two["images_per_second"] / one["images_per_second"], rel=1e-2)
    for epoch in (1, 2, 3):  # both have batch norms over 8 images of their own, and the same 16 images in an update
        assert two[f"loss_{epoch}"] == pytest.approx(one[f"loss_{epoch}"], rel=1e-3)
    with (tmp_path / "scaling.csv").open() as file:
        assert [row["processes"] for row in csv.DictReader(file)] == ["1", "2"]
    capfd.readouterr()
    assert scaling.main(flags) == [one, two]
    assert "epoch 1" not in capfd.readouterr().out  # nothing is run again
    with pytest.raises(SystemExit):
        scaling.main(["--processes", "2", "3", "--output", str(tmp_path)])
