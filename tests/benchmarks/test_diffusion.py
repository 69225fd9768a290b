"""The benchmark of the attentions for image generation: its methods, its check, and the way to table and plot."""

from __future__ import annotations

import pytest
import torch

from benchmarks import diffusion, timing
from benchmarks.results import merge_rows, read_rows
from flash_bla.layers import GeneralizedLinearAttention

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few heads and tokens."""
    for name, value in {"HEADS": 2, "WIDTH": 8, "SPARSE_HEADS": 2, "SPARSE_WIDTH": 16, "CHECKED_TOKENS": 70}.items():
        monkeypatch.setattr(diffusion, name, value)
    monkeypatch.setattr(timing, "HOST_SECONDS", 0.001)
    torch.set_num_threads(1)


def test_softmax_attention_is_that_of_diffusers():
    attention_processor = pytest.importorskip("diffusers.models.attention_processor")
    theirs = attention_processor.Attention(query_dim=16, heads=2, dim_head=8).double()
    ours = diffusion.SoftmaxAttention(16, 2, dtype=torch.float64)
    ours.load_state_dict({name.replace("to_out.0", "to_out"): x for name, x in theirs.state_dict().items()})
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("part", diffusion.PARTS)
def test_methods(part):
    """Both sides of a comparison have the same inputs; what LinFusion mounts is what is measured."""
    torch.manual_seed(0)
    methods = diffusion.PARTS[part].make(130, torch.float64, CPU)
    shapes = {name: method.run().shape for name, method in methods.items()}
    expected = {"operator": (2, 2, 130, 8), "layer": (2, 130, 16), "sparse": (1, 2, 130, 16)}
    assert set(shapes.values()) == {expected[part]}
    assert all(method.leaves[0] is methods["softmax"].leaves[0] for method in methods.values())
    if part == "layer":
        assert isinstance(methods["linfusion"].run.func, GeneralizedLinearAttention)
    else:
        q, k, v = methods["softmax"].leaves
        expected = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1) @ v
        torch.testing.assert_close(methods["softmax"].run(), expected)


@pytest.mark.parametrize("wrong", [1.1, float("nan")])
def test_wrong_results_end_the_script_before_it_measures(wrong, tmp_path, monkeypatch):
    right = diffusion.linear_attention

    def run_wrong(q, k, v, **options):
        return right(q, k, v, **options) * (wrong if q.dtype != torch.float64 else 1)

    monkeypatch.setattr(diffusion, "linear_attention", run_wrong)
    with pytest.raises(SystemExit, match="results are wrong, nothing is measured: operator linfusion bfloat16"):
        diffusion.main(["--output", str(tmp_path), "--parts", "operator", "sparse", "--tokens", "20"])
    assert not list(tmp_path.iterdir())


def test_from_measurement_to_table_and_plot(tmp_path):
    flags = ["--output", str(tmp_path), "--tokens", "20", "40"]
    diffusion.main([*flags, "--parts", "operator", "sparse"])
    diffusion.main([*flags, "--parts", "layer", "sparse"])  # replaces rows
    rows = read_rows(tmp_path / "diffusion.csv")
    keys = {tuple(row[name] for name in diffusion.KEY) for row in rows}
    assert len(keys) == len(rows)
    for part, methods in (("operator", 1), ("layer", 1), ("sparse", 2)):
        ours = [row for row in rows if row["part"] == part and row["method"] not in diffusion.SOFTMAX]
        sizes = diffusion.PARTS[part]
        assert len(ours) == 2 * methods * len(sizes.dtypes) * len(sizes.directions)
        assert all(float(row["time_us"]) > 0 for row in ours)
    files = {"diffusion.csv", "diffusion.md", "diffusion.png"}
    assert {path.name for path in tmp_path.iterdir()} == files
    for name in files - {"diffusion.csv"}:
        (tmp_path / name).unlink()
    diffusion.main(["--output", str(tmp_path), "--plot-only"])
    assert (tmp_path / "diffusion.png").read_bytes().startswith(b"\x89PNG")
    assert "| 40 | float16 | backward |" in (tmp_path / "diffusion.md").read_text()
    # Another device with a later date: it is shown unless this one was just measured.
    others = [row | {"device": "other", "date": "9999-01-01"} for row in rows]
    merge_rows(tmp_path / "diffusion.csv", diffusion.COLUMNS, diffusion.KEY, others)
    for flags, device in ((["--plot-only"], "other"), (["--parts", "sparse", "--tokens", "20"], rows[0]["device"])):
        diffusion.main(["--output", str(tmp_path), *flags])
        assert f"Measured on one {device}, " in (tmp_path / "diffusion.md").read_text()


def test_the_table():
    shared = {"part": "sparse", "tokens": "32768", "dtype": "bfloat16", "direction": "forward", "device": "H200",
              "torch": "2.11", "triton": "3.6", "timm": "", "date": "2026-11-24", "memory_mb": "12.4"}  # fmt: skip
    rows = [
        shared | {"method": "softmax", "time_us": "30000", "kernel": "flash_fwd_kernel"},
        shared | {"method": "softmax_cudnn", "time_us": "20000", "kernel": "sdpa_sm90", "memory_mb": "1"},
        shared | {"method": "pisa", "time_us": "5000", "kernel": "attention_kernel"},
    ]
    assert [line for line in diffusion.tables(rows).splitlines() if line.startswith(("|", "PyTorch"))] == [
        "| tokens | type | direction | PISA | SDPA | SDPA, cuDNN | PISA: times as fast | memory | memory of SDPA |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| 32768 | bfloat16 | forward | 5 | 30 | 20 | 4 | 12 | 12 |",
        "PyTorch's choice: `flash_fwd_kernel`.",
    ]
