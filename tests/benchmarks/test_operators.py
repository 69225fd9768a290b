"""The operators' benchmark: its inputs, its check, its floors, and the way from measurement to table."""

from __future__ import annotations

import os

import pytest
import torch

from benchmarks import operators, timing
from benchmarks.results import merge_rows, read_rows
from flash_bla import linear_attention

CPU = torch.device("cpu")
SHAPE = (2, 2, 25, 8)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Short measurements, and a check on few tokens."""
    monkeypatch.setattr(timing, "HOST_SECONDS", 0.001)
    monkeypatch.setattr(operators, "CHECKED_SHAPE", (1, 2, 16, 8))
    torch.set_num_threads(1)


def run(tmp_path, *flags: str) -> list[dict[str, str]]:
    operators.main(["--output", str(tmp_path), *flags])
    return read_rows(tmp_path / "operators.csv")


@pytest.mark.parametrize("op", operators.OPS)
@pytest.mark.parametrize("layout", ["packed", "contiguous"])
def test_inputs(op, layout):
    x = operators.make_inputs(operators.OPS[op], SHAPE, layout, CPU)
    B, H, N, D = SHAPE
    token = 3 * H * D if layout == "packed" else D
    for leaf in (x.q, x.k, x.v):
        assert leaf.shape == SHAPE and leaf.is_leaf and leaf.requires_grad and leaf.dtype == torch.bfloat16
        assert leaf.stride() == ((N * token, D, token, 1) if layout == "packed" else (H * N * D, N * D, D, 1))
    assert x.do.transpose(1, 2).is_contiguous() and not x.do.requires_grad
    assert (x.constant is not None) == (op in ("rope", "rala", "padding_mask", "varlen"))
    assert (x.parameter is not None) == (op in ("focusing", "signed_power", "key_encoding"))
    for other in (operators.make_inputs(operators.OPS[op], SHAPE, layout, CPU, seed=1).q, x.k, x.v):
        assert not torch.equal(x.q, other)


@pytest.mark.parametrize("op", operators.OPS)
def test_the_backward_pass_alone_can_be_repeated(op):
    x = operators.make_inputs(operators.OPS[op], SHAPE, "packed", CPU)
    o, *expected = operators.forward_backward(operators.OPS[op].run, x)
    assert torch.equal(o, operators.forward(operators.OPS[op].run, x)[0])
    backward = operators.backward(operators.OPS[op].run, x)
    for _ in range(2):
        gradients = backward()
        assert len(gradients) == len(x.leaves) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("op", ["varlen", "padding_mask"])
def test_sequences_of_several_lengths(op):
    x = operators.make_inputs(operators.OPS[op], (3, 2, 16, 8), "packed", CPU)
    lengths = x.constant.diff() if op == "varlen" else x.constant.sum((1, 2))
    assert lengths.tolist() == ([16, 16, 16] if op == "varlen" else [8, 12, 16])
    o = operators.OPS[op].run(x)
    for i, length in enumerate(lengths.int().tolist()):
        k, v = (y[i : i + 1, :, :length] for y in (x.k, x.v))
        alone = linear_attention(x.q[i : i + 1], k, v, feature_map="elu1")
        torch.testing.assert_close(o[i : i + 1], alone, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("wrong", [1.02, float("nan")])
@pytest.mark.parametrize("gradient", [False, True])
def test_wrong_results_end_the_script_before_it_measures(wrong, gradient, tmp_path, monkeypatch):
    right = operators.OPS["elu1"]

    def run_wrong(x):
        o = right.run(x)
        if x.q.dtype == torch.float64:
            return o
        if not gradient:
            return o * wrong
        o.register_hook(lambda do: do * wrong)
        return o

    monkeypatch.setitem(operators.OPS, "elu1", right._replace(run=run_wrong))
    with pytest.raises(SystemExit, match="the results are wrong"):
        run(tmp_path, "--ops", "relu", "elu1", "--shapes", "1,1,4,8")
    assert not list(tmp_path.iterdir())


# Tensors of the size of q that move at least, counted by hand: forward, backward.
TENSORS = {"elu1": (4, 7), "relu": (4, 7), "simple_la": (4, 7), "rope": (4, 7), "focusing": (5, 9),
           "signed_power": (4, 7), "rala": (5, 9), "key_encoding": (4, 8), "padding_mask": (4, 7),
           "varlen": (4, 7)}  # fmt: skip


@pytest.mark.parametrize("op", operators.OPS)
def test_floors(op):
    bandwidth = 1e9
    rows = list(operators.measure(op, SHAPE, "flash_bla", "packed", CPU, bandwidth))
    assert [row["direction"] for row in rows] == ["forward", "backward"]
    for row, tensors in zip(rows, TENSORS[op], strict=True):
        assert row["floor_us"] == pytest.approx(1e6 * tensors * (2 * 2 * 25 * 8 * 2) / bandwidth)
        assert row["percent_of_roofline"] == pytest.approx(100 * row["floor_us"] / row["time_us"])
        assert row["host_us"] > 0 and row["first_call_ms"] > 0


def test_backends(monkeypatch):
    x = operators.make_inputs(operators.OPS["elu1"], SHAPE, "packed", CPU)
    monkeypatch.setenv("FLASH_BLA_BACKEND", "mine")
    seen = []
    op = operators.OPS["elu1"]._replace(run=lambda x: seen.append(os.environ["FLASH_BLA_BACKEND"]))
    for name in ("flash_bla", "eager"):
        with operators.backend(name, op) as function:
            function(x)
    assert seen == ["mine", "reference"] and os.environ["FLASH_BLA_BACKEND"] == "mine"
    with operators.backend("sdpa", op) as function:
        q, k, v = (y.detach().double() for y in (x.q, x.k, x.v))
        expected = torch.softmax(q @ k.mT / 8**0.5, dim=-1) @ v
        torch.testing.assert_close(function(x).double(), expected, atol=2e-2, rtol=0)
    assert operators.baselines("elu1", "vit_s", 196) == ["eager", "compile", "sdpa"]
    assert operators.baselines("elu1", "width_24", 4096) == ["eager", "sdpa"]
    assert operators.baselines("elu1", "1m", 2**20) == ["eager", "compile"]
    assert operators.baselines("rala", "ravlt_1", 3136) == ["eager"]


def test_from_measurement_to_table_and_plots(tmp_path):
    rows = run(tmp_path, "--ops", "elu1", "--shapes", "1,16,64,64", "1,16,32,64", "--no-baselines")
    assert [(row["N"], row["direction"], row["backend"]) for row in rows] == [
        (N, direction, "flash_bla") for N in ("64", "32") for direction in ("forward", "backward")
    ]
    rows = run(tmp_path, "--ops", "rope", "rala", "--shapes", "1,2,16,8")
    assert len(rows) == 4 + 2 * 2 * 2  # added to those before
    assert {row["backend"] for row in rows[4:]} == {"flash_bla", "eager"}
    files = {"operators.csv", "operators.md", "operators_sweep.png", "operators_roofline.png"}
    assert {path.name for path in tmp_path.iterdir()} == files
    table = (tmp_path / "operators.md").read_text()
    before = float(rows[0]["time_us"]), float(rows[1]["time_us"])
    assert f"| 1,16,64,64 | 1, 16, 64, 64 | {float(rows[0]['floor_us']):.0f} / " in table
    assert f"| {before[0]:.0f} / {before[1]:.0f} |" in table
    # Again: the row is replaced, and the files follow from the CSV alone.
    assert len(run(tmp_path, "--ops", "rope", "--shapes", "1,2,16,8", "--quick")) == len(rows)
    for name in files - {"operators.csv"}:
        (tmp_path / name).unlink()
    operators.main(["--output", str(tmp_path), "--plot-only"])
    assert {path.name for path in tmp_path.iterdir()} == files
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in files if name.endswith(".png"))
    # Another device with a later date: it is shown unless this one was just measured.
    others = [row | {"device": "other", "date": "9999-01-01"} for row in rows]
    merge_rows(tmp_path / "operators.csv", operators.COLUMNS, operators.KEY, others)
    for flags, device in (
        (["--plot-only"], "other"),
        (["--ops", "rope", "--shapes", "1,2,16,8", "--quick"], rows[0]["device"]),
    ):
        operators.main(["--output", str(tmp_path), *flags])
        assert f"Measured on one {device}, " in (tmp_path / "operators.md").read_text()


def test_what_does_not_fit_has_no_row(tmp_path, monkeypatch):
    def measure(op, shape, backend, *rest):
        if backend == "eager":
            raise torch.OutOfMemoryError
        return original(op, shape, backend, *rest)

    original = operators.measure
    monkeypatch.setattr(operators, "measure", measure)
    assert {row["backend"] for row in run(tmp_path, "--ops", "relu", "--shapes", "1,1,4,8")} == {"flash_bla"}


def test_the_table():
    shared = {"op": "elu1", "shape": "vit_s", "layout": "packed", "B": "256", "H": "6", "N": "196", "D": "64",
              "copy_tb_s": "4.25", "device": "H200", "torch": "2.11", "triton": "3.6", "timm": "", "date": "2026-11-21",
              "percent_of_roofline": "81.6", "extra_mb": "3.14", "host_us": "17.3", "first_call_ms": ""}  # fmt: skip
    rows = [
        shared | {"direction": "forward", "backend": "flash_bla", "time_us": "43.9", "floor_us": "36.3"},
        shared | {"direction": "backward", "backend": "flash_bla", "time_us": "80.1", "floor_us": "63.5"},
        shared | {"direction": "forward", "backend": "sdpa", "time_us": "89", "floor_us": "36.3", "host_us": "30"},
    ]
    lines = operators.tables(rows).splitlines()
    assert "Copy bandwidth, read and written, measured in the same run: 4.25 TB/s." in lines
    assert [line for line in lines if line.startswith("|")] == [
        "| shape | B, H, N, D | floor | flash_bla | softmax SDPA | % of roofline | host, µs | "
        "first call at a new length, ms | memory, MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| vit_s | 256, 6, 196, 64 | 36 / 64 | 44 / 80 | 89 / – | 82 / 82 | 17 / 17 |  | 3.1 / 3.1 |",
    ]


def test_command_line():
    args = operators.parse(["--shapes", "vit_s", "1,2,3,4", "--quick"])
    assert args.shapes == {"vit_s": (256, 6, 196, 64), "1,2,3,4": (1, 2, 3, 4)}
    for shape in ("vit", "1,2,3", "1,2,0,4"):
        with pytest.raises(SystemExit):
            operators.parse(["--shapes", shape])
    quick, whole = (operators.shapes_of("elu1", operators.parse(flags)) for flags in (["--quick"], []))
    assert quick == operators.MODEL_SHAPES and {"sweep_1k", "width_24"} <= whole.keys()
    assert operators.shapes_of("rala", operators.parse(["--quick"])) == operators.RAVLT
