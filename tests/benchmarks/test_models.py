"""The models' benchmark on a model small enough for a test: steps, failures, tables and plots."""

from __future__ import annotations

import pytest
import timm
import torch

import flash_bla
from benchmarks import models
from benchmarks.results import read_rows

CPU = torch.device("cpu")
YAML = """\
family: vit
model: {img_size: 8, patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2, attention: linear}
"""


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> str:
    monkeypatch.setattr(models, "WARM_UP", 1)
    path = tmp_path / "tiny_linear_vit_for_benchmarks.yaml"
    path.write_text(YAML)
    return flash_bla.register_config(path)


@pytest.fixture
def created(monkeypatch) -> list[torch.nn.Module]:
    """The models that the benchmark creates."""
    made = []
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: made.append(create(*args, **kwargs)) or made[-1])
    return made


@pytest.mark.parametrize("mode", models.MODES)
def test_steps(mode, tiny, created, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, **_: compiled.append(model) or model)
    step = models.make_step(tiny, mode, 12, 3, CPU)
    (model,) = created
    shapes = []
    model.register_forward_hook(lambda module, inputs, output: shapes.append((inputs[0].shape, output.dtype)))
    assert model.patch_embed.grid_size == (3, 3)
    before = [p.detach().clone() for p in model.parameters()]
    step()
    changed = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
    assert all(changed) if mode.startswith("training") else not any(changed)
    assert model.training == mode.startswith("training")
    assert shapes == [((3, 3, 12, 12), torch.bfloat16)]
    assert compiled == ([model] if mode.endswith("-compiled") else [])
    assert all(p.grad is None for p in model.parameters())


def test_from_measurement_to_table_and_plots(tiny, tmp_path):
    output = tmp_path / "output"
    flags = ["--output", str(output), "--models", tiny, "no_such_model", "--seconds", "0.01"]
    models.main([*flags, "--sizes", "8:2", "12:1", "--modes", "inference", "training"])
    rows = read_rows(output / "models.csv")
    assert len(rows) == 2 * 2 * 2
    for row in rows:
        if row["model"] == tiny:
            assert float(row["images_s"]) > 0 and float(row["first_step_s"]) > 0 and not row["error"]
        else:
            assert "no_such_model" in row["error"] and not row["images_s"]
    models.main([*flags, "--sizes", "8:2", "--modes", "training"])  # replaces two of the rows
    assert len(read_rows(output / "models.csv")) == len(rows)
    files = {"models.csv", "models.md", "models_inference.png", "models_training.png"}
    assert {path.name for path in output.iterdir()} == files
    assert (output / "models_training.png").read_bytes().startswith(b"\x89PNG")
    (output / "models.md").unlink()
    models.main(["--output", str(output), "--plot-only"])
    assert "## 12 × 12, batch 1" in (output / "models.md").read_text()


def test_processes_measure_in_turn():
    cases = [("linear_vit_tiny", "inference", 32, 2), ("no_such_model", "inference", 32, 2)]
    (first, figures), (second, failure) = models.measure_apart(cases, 0.01)
    assert (first, second) == tuple(cases)
    assert figures["images_s"] > 0 and "no_such_model" in failure["error"]


def test_the_table():
    shared = {"size": "1024", "batch": "8", "device": "H200", "torch": "2.11", "triton": "3.6", "timm": "1.0.29",
              "date": "2026-11-21", "error": "", "images_s": "", "peak_gb": ""}  # fmt: skip
    rows = [
        shared | {"model": "pvt_v2_b2", "mode": "training", "images_s": "91.4", "peak_gb": "30.25"},
        shared | {"model": "mlla_tiny", "mode": "inference", "images_s": "210.6", "peak_gb": "4.04"},
        shared | {"model": "mlla_tiny", "mode": "inference-compiled", "error": "out of memory"},
        shared | {"model": "mlla_tiny", "mode": "training", "error": "RuntimeError: a|b"},
    ]
    lines = models.tables(rows).splitlines()
    assert "## 1024 × 1024, batch 8, H200" in lines
    assert [line for line in lines if line.startswith("|")][2:] == [
        "| mlla_tiny | 211 / out of memory | RuntimeError / – | 4.0 / out of memory | RuntimeError / – |",
        "| pvt_v2_b2 | – / – | 91 / – | – / – | 30.2 / – |",
    ]


def test_the_kernels_of_a_step(tiny, tmp_path):
    models.main(["--output", str(tmp_path), "--profile", tiny, "--sizes", "8:2", "--modes", "training"])
    lines = (tmp_path / f"profile_{tiny}_training.txt").read_text().splitlines()
    assert lines[0] == f"{tiny}, 8 x 8, batch 2: a step of training on cpu"
    times = [float(line.split()[0]) for line in lines[5:]]
    assert times == sorted(times, reverse=True)
    assert any("aten::addmm" in line for line in lines)


def test_the_share_of_copies():
    kernels = [("void at::native::elementwise_kernel<direct_copy_kernel_cuda>", 3, 1.0), ("gemm", 2, 6.0),
               ("Memcpy DtoD (Device -> Device)", 1, 0.5), ("CatArrayBatchedCopy<2>", 1, 0.5),
               ("cudnn::nchwToNhwcKernel", 2, 2.0)]  # fmt: skip
    lines = models.kernel_table("title", kernels).splitlines()
    assert lines[:3] == ["title", "all kernels: 9 launches, 10.00 ms, 100.0 %", "copies: 7 launches, 4.00 ms, 40.0 %"]
    assert lines[5].split() == ["6.000", "60.00", "2", "gemm"]


def test_all_models_exist_and_an_error_is_named():
    assert all(timm.is_model(name) for names in models.GROUPS.values() for name in names)
    assert models.describe(torch.OutOfMemoryError("CUDA out of memory. Tried")) == "out of memory"
    assert models.describe(ValueError("first\nsecond")) == "ValueError: first"
    assert models.parse(["--sizes", "224:128", "384:48"]).sizes == [(224, 128), (384, 48)]
