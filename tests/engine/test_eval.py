"""Evaluation in this process: resolutions, crops, plain files of weights, single pictures."""

from __future__ import annotations

import csv
import errno
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import eval as eval_script
import train as train_script
from flash_bla.engine.config import RunError
from flash_bla.engine.data import Digits


def run(*flags: str):
    return eval_script.main([*flags, "--device", "cpu", "--workers", "0"])


def evaluate(*flags: str) -> dict:
    """The one row of an evaluation."""
    (row,) = run(*flags)
    return row


@pytest.fixture(autouse=True)
def _short_clock(monkeypatch):
    monkeypatch.setattr("flash_bla.engine.evaluation.THROUGHPUT_SECONDS", 0.01)


@pytest.fixture(scope="module")
def checkpoint(model_yaml, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    flags = ["--config", str(model_yaml), "--output", str(folder), "--device", "cpu", "--epochs", "4"]
    assert train_script.main([*flags, "--batch-size", "60", "--ema-decay", "0.5"]) == 0
    return str(folder / "last.pt")


def test_a_checkpoint_alone(checkpoint, tmp_path, capsys):
    result = evaluate("--checkpoint", checkpoint, "--output", str(tmp_path / "out" / "digits"))
    last = torch.load(checkpoint, weights_only=True)["history"][-1]
    assert (result["images"], result["weights"], result["dataset"]) == (360, "ema", "digits")
    for key, name in (("top1", "top1"), ("top5", "top5"), ("loss", "val_loss")):
        assert result[key] == pytest.approx(last[name])
    assert json.loads((tmp_path / "out" / "digits.json").read_text()) == [result]
    assert (tmp_path / "out" / "digits.csv").read_text().startswith("model,checkpoint,weights,parameters,dataset")
    with open(tmp_path / "out" / "digits.classes.csv", newline="") as file:
        classes = list(csv.DictReader(file))
    assert [row["class"] for row in classes] == [str(digit) for digit in range(10)]
    right = sum(int(row["images"]) * float(row["top1"]) for row in classes)
    assert right / 360 == pytest.approx(result["top1"])
    assert f"top-1 {result['top1']:.2f} %" in capsys.readouterr().out
    raw = evaluate("--checkpoint", checkpoint, "--no-use-ema")
    assert raw["weights"] == "model" and raw["loss"] != result["loss"]


def test_digits_are_in_no_folder(checkpoint, tmp_path, pictures):
    with pytest.raises(RunError, match="data_dir: the digits are embedded"):
        evaluate("--checkpoint", checkpoint, "--data-dir", str(pictures()))
    content = torch.load(checkpoint, weights_only=True)
    content["config"] |= {"dataset": "folder", "data_dir": "somewhere"}
    torch.save(content, tmp_path / "of_a_folder.pt")
    assert evaluate("--checkpoint", str(tmp_path / "of_a_folder.pt"), "--dataset", "digits")["images"] == 360
    content["config"]["dataset"] = "digits"  # of a run that was given a folder, which it had no use for
    del content["data"]
    torch.save(content, tmp_path / "of_a_folder.pt")
    assert evaluate("--checkpoint", str(tmp_path / "of_a_folder.pt"))["images"] == 360


def test_other_resolutions_and_crops(checkpoint):
    flags = ("--checkpoint", checkpoint, "--img-size", "16", "12", "--crop-pct", "1.0", "--crop-mode", "squash")
    result = evaluate(*flags, "--precision", "bf16", "--batch-size", "100")
    assert (result["input_size"], result["crop_pct"], result["crop_mode"]) == ([1, 16, 12], 1.0, "squash")
    assert result["images"] == 360
    assert evaluate("--checkpoint", checkpoint, "--img-size", "3")["input_size"] == [1, 3, 3]  # less than a patch


def test_plain_files_of_weights(tmp_path, pictures):
    model = timm.create_model("test_vit", num_classes=3)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "plain.pth")
    save_file(model.state_dict(), tmp_path / "plain.safetensors")
    flags = ("--data-dir", str(pictures()), "--img-size", "32")
    wanted = evaluate("--model", "test_vit", "--num-classes", "3", "--checkpoint", str(tmp_path / "plain.pth"), *flags)
    other = str(tmp_path / "plain.safetensors")
    assert (
        evaluate("--model", "test_vit", "--num-classes", "3", "--checkpoint", other, *flags)["loss"] == wanted["loss"]
    )
    with pytest.raises(RunError, match="name it with --model"):
        evaluate("--checkpoint", other, *flags)
    with pytest.raises(RunError, match="has 3 classes: new classifier for 1000 classes, which has learned nothing"):
        evaluate("--model", "test_vit", "--checkpoint", other, *flags)
    with pytest.raises(RunError, match="the head has 1000 classes, but the data set 'folder' has 3"):
        evaluate("--model", "test_vit", *flags)


def test_settings_that_would_have_no_effect(checkpoint, tmp_path):
    for name, own in (("num_classes", 10), ("in_chans", 1)):
        flags = ("--checkpoint", checkpoint, f"--{name.replace('_', '-')}")
        with pytest.raises(RunError, match=f"{name}: the model of .*last.pt has {own}, got 3"):
            evaluate(*flags, "3")
        assert evaluate(*flags, str(own))["images"] == 360
    with pytest.raises(RunError, match="output: the classes of single pictures are printed alone"):
        evaluate("--checkpoint", checkpoint, "--image", "x.png", "--output", str(tmp_path / "y"))
    with pytest.raises(RunError, match="sizes: single pictures are looked at in one size"):
        evaluate("--checkpoint", checkpoint, "--image", "x.png", "--sizes", "64")
    with pytest.raises(RunError, match="no model is called 'pola_vit_tini'; did you mean 'pola_vit_tiny'"):
        evaluate("--model", "pola_vit_tini", "--checkpoint", "nowhere.pt")


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("run/log", "log.csv belongs to the training run in .*/run, choose another name"),
        ("run/summary", "summary.json belongs to the training run in .*/run, choose another name"),
        ("new/", "'.*/new/' ends in no name .* give .*/new/NAME, which writes NAME.json, NAME.csv, NAME.classes.csv$"),
        ("run/..", "'.*/run/..' ends in no name for files"),
        ("", "'' ends in no name for files; give NAME, which"),
        ("run/config.yaml/results", "cannot write to .*/run/config.yaml: File exists"),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_anything_is_evaluated(output, message, tmp_path, monkeypatch):
    monkeypatch.setattr(eval_script, "evaluate", pytest.fail)
    (tmp_path / "run").mkdir()
    for name in ("config.yaml", "log.csv", "summary.json"):
        (tmp_path / "run" / name).write_text(name)
    flags = ("--model", "test_vit", "--num-classes", "10", "--in-chans", "1", "--dataset", "digits", "--img-size", "8")
    with pytest.raises(RunError, match=f"^output: .*{message}"):
        evaluate(*flags, "--output", output and f"{tmp_path}/{output}")
    assert all(path.read_text() == path.name for path in (tmp_path / "run").iterdir())


def test_results_that_cannot_be_written_are_an_error_without_traceback(checkpoint, tmp_path, monkeypatch, capsys):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("flash_bla.engine.logs.write_atomically", full)
    with pytest.raises(RunError, match=f"output: cannot write {tmp_path}/x.json: No space left on device"):
        evaluate("--checkpoint", checkpoint, "--output", str(tmp_path / "x"))
    assert "top-1" in capsys.readouterr().out  # the figures are not lost


def test_an_unreadable_image_is_named(pictures):
    root = pictures()
    (root / "val" / "grey" / "0.png").write_bytes(b"no picture")
    flags = ("--model", "test_vit", "--num-classes", "3", "--data-dir", str(root))
    with pytest.raises(RunError, match=f"cannot read {root}/val/grey/0.png"):
        evaluate(*flags)


def test_single_pictures(checkpoint, tmp_path, capsys):
    files = []
    for number in range(2):
        image, _ = Digits(False)[number]
        image.save(tmp_path / f"{number}.png")
        files.append(str(tmp_path / f"{number}.png"))
    answers = run("--checkpoint", checkpoint, "--image", *files)
    assert list(answers) == files
    for best in answers.values():
        assert len(best) == 5 and {name for name, _ in best} <= set("0123456789")
        assert [p for _, p in best] == sorted((p for _, p in best), reverse=True)
    assert files[0] in capsys.readouterr().out
    pixels = np.asarray(image).astype(">u2") * 257  # the same picture with 16 bits
    Image.fromarray(pixels.astype(np.uint16)).save(tmp_path / "16.png")
    (tmp_path / "16.pgm").write_bytes(b"P5 8 8 65535 " + pixels.tobytes())
    for file in (str(tmp_path / "16.png"), str(tmp_path / "16.pgm")):
        assert run("--checkpoint", checkpoint, "--image", file)[file] == answers[files[1]]
    (tmp_path / "no.png").write_text("no picture")
    Image.fromarray(pixels.astype(np.float32)).save(tmp_path / "no.tif")
    for name, why in (("no.png", "cannot identify"), ("no.tif", "a grey picture of 32 bits")):
        with pytest.raises(RunError, match=f"cannot read .*{name}: {why}"):
            evaluate("--checkpoint", checkpoint, "--image", str(tmp_path / name))


def test_imagenet_classes_have_names(tmp_path, capsys):
    Digits(False)[0][0].save(tmp_path / "x.png")
    answers = run("--model", "test_vit", "--image", str(tmp_path / "x.png"), "--precision", "bf16")
    names = [name for name, _ in answers[str(tmp_path / "x.png")]]
    assert all(not name.startswith(("class ", "n0")) for name in names)
