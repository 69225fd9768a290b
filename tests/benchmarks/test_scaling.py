"""The scaling benchmark: runs of train.py under torchrun that see the same images in the same updates."""

from __future__ import annotations

import csv

import pytest

from benchmarks import scaling

TINY = "--pictures 64 --size 32 --batch-size 8 --epochs 3 --workers 0 --device cpu --threads 1 --drop-path 0".split()
TINY += ["--model-kwargs", "embed_dim=8", "depths=[1, 1, 1, 1]", "num_heads=[1, 1, 2, 2]"]


@pytest.mark.parametrize(
    ("speeds", "median"),
    [(["5"], 5.0), (["5", ""], 5.0), (["5", "8"], 8.0), (["5", "", "8", "9"], 8.5), (["", "5", "9"], 7.0)],
)
def test_the_first_epoch_counts_where_it_is_alone(speeds, median):
    rows = [{"epoch": str(i), "images_per_second": speed, "train_loss": "2"} for i, speed in enumerate(speeds, 1)]
    (row,) = scaling.table({4: rows})
    assert (row["images_per_second"], row["ratio"]) == (median, 1.0)


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
