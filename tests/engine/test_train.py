"""Training runs, in this process: what they write, how they go on, and what they do when something goes wrong."""

from __future__ import annotations

import csv
import errno
import json
import os
import signal

import pytest
import timm
import torch
from runs import UPDATES, Crash, assert_same_run, crash, interrupt, tensors

import eval as eval_script
import train as train_script
from flash_bla.engine import checkpoint as checkpoint_module
from flash_bla.engine.config import RunError, parse_train
from flash_bla.engine.evaluation import Scores
from flash_bla.engine.processes import StopRequest


def test_a_run_and_what_it_writes(train, load, tmp_path, capsys):
    assert train("run", "--ema-decay", "0.9", "--num-classes", "10") == 0
    folder = tmp_path / "run"
    written = "last.pt previous.pt best.pt log.csv config.yaml preview.png curve.png summary.json tensorboard"
    assert {file.name for file in folder.iterdir()} == set(written.split())
    rows = list(csv.DictReader((folder / "log.csv").open()))
    assert [(row["epoch"], row["updates"]) for row in rows] == [("1", "5"), ("2", "10")]
    assert all(float(row[key]) > 0 for row in rows for key in ("train_loss", "val_loss", "top1", "top5", "lr"))
    assert all(0.05 < float(row["memory_gib"]) < 50 for row in rows)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["best"]["top1"] == max(float(row["top1"]) for row in rows)
    assert (summary["settings"]["train_images"], summary["settings"]["val_images"]) == (1437, 360)
    assert (summary["skipped_updates"], summary["unreadable_images"]) == (0, [])
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    last = load("run")
    assert (last["epoch"], last["update"], last["model"]["name"]) == (2, 0, "tiny_pola_vit")
    assert last["class_names"] == [str(digit) for digit in range(10)]
    assert last.keys() == {*checkpoint_module.STATE, "data"}  # which is for others: a run finds its own
    assert "optimizer" not in load("run", "best")
    output = capsys.readouterr().out
    assert "rates    lr 0.01, warmup_lr 1e-06" in output and "curve.png" in output

    # Started again it has nothing to do, and changes nothing.
    assert train("run", "--ema-decay", "0.9", "--num-classes", "10", "--workers", "1") == 0
    assert_same_run(last, load("run"))
    assert "goes on from epoch 2, update 0" in capsys.readouterr().out


def test_another_run_is_not_overwritten(train, load, tmp_path):
    assert train("run", "--epochs", "2") == 0
    before = {file: file.read_bytes() for file in (tmp_path / "run").glob("*.*")}
    with pytest.raises(RunError, match=r"holds another run(.|\n)*lr: 0.01 -> 0.5\n  epochs|epochs: 2 -> 3(.|\n)*lr:"):
        train("run", "--lr", "0.5", "--epochs", "3")
    with pytest.raises(RunError, match="model: "):
        train("run", "--model-kwargs", "embed_dim=32")
    assert before == {file: file.read_bytes() for file in (tmp_path / "run").glob("*.*")}


def test_files_that_are_not_of_the_run_are_not_overwritten(train, on_loss, model_yaml, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    own = folder / "config.yaml"
    own.write_bytes(model_yaml.read_bytes().replace(b"family", b"name: kept_vit\nfamily", 1))
    before = own.read_bytes()
    with pytest.raises(RunError, match="output: the run keeps its settings in .*run/config.yaml, the file of --config"):
        train("run", "--config", str(own))
    with pytest.raises(RunError, match="run holds config.yaml, which the run would overwrite, but no checkpoint"):
        train("run")
    assert [file.read_bytes() for file in folder.iterdir()] == [before]
    for name in ("log.csv", "preview.png", "curve.png", "summary.json"):
        own = own.rename(folder / name)
        with pytest.raises(RunError, match=f"run holds {name}, which"):
            train("run")

    for name in ("last.pt", "previous.pt"):
        (tmp_path / name).mkdir()
        file = tmp_path / name / name
        torch.save({"model": {"weight": torch.ones(1)}, "epoch": 3}, file)
        before = file.read_bytes()
        with pytest.raises(
            RunError, match=f"{file} is not where a run of train.py stands, it lacks state_dict, .*meter"
        ):
            train(name)
        assert [file.read_bytes() for file in file.parent.iterdir()] == [before]

    on_loss(crash(0))
    with pytest.raises(Crash):
        train("killed")
    assert {"config.yaml", "preview.png"} <= {file.name for file in (tmp_path / "killed").iterdir()}
    (tmp_path / "killed" / "last.pt").unlink()  # as if it had been killed before
    assert train("killed") == 0  # that is one of its own, and begins anew
    on_loss(crash(0))
    with pytest.raises(Crash):
        train("early")
    assert train("early", "--lr", "2e-3") == 0  # it had no update to lose


@pytest.mark.parametrize("stop_at", [2, UPDATES - 1, UPDATES])
def test_sigterm_saves_and_the_run_goes_on_bit_for_bit(train, load, on_loss, stop_at):
    flags = ("--ema-decay", "0.9", "--aa", "rand-m5", "--reprob", "0.3", "--mixup", "0.5", "--drop-path", "0.2")
    flags += ("--mesa", "1.5", "--sched-on-epochs", "--epochs", "3")
    assert train("whole", *flags) == 0
    before = signal.getsignal(signal.SIGTERM)
    on_loss(interrupt(stop_at))
    assert train("stopped", *flags) == train_script.STOPPED == 75
    assert signal.getsignal(signal.SIGTERM) is before
    stopped = load("stopped")
    assert stopped["epoch"] * UPDATES + stopped["update"] == stop_at + 1
    assert train("stopped", *flags, "--workers", "2") == 0
    assert_same_run(load("whole"), load("stopped"))
    assert_same_run(load("whole", "best"), load("stopped", "best"))


def test_sigterm_ends_an_evaluation(train, load, monkeypatch):
    assert train("whole") == 0
    update, batches = Scores.update, []

    def interrupted(scores, *batch):
        batches.append(len(batch[0]))
        os.kill(os.getpid(), signal.SIGTERM)
        return update(scores, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(Scores, "update", interrupted)
        assert train("stopped") == 75
    assert batches == [240]  # of 360
    stopped = load("stopped")
    assert (stopped["epoch"], stopped["update"], stopped["history"]) == (0, UPDATES, [])
    assert train("stopped") == 0
    assert_same_run(load("whole"), load("stopped"))


def test_signals(one_process):
    outside = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes ignore it
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    stop = StopRequest(one_process)
    assert stop.agreed() == (False, False)
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.agreed(save=True) == (True, True)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()
    stop.close()
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    signal.signal(signal.SIGINT, outside)


def test_killed_with_a_best_checkpoint_alone(train, load, on_loss):
    train("whole", "--save-epochs", "9")
    on_loss(crash(UPDATES + 1))
    with pytest.raises(Crash):
        train("run", "--save-epochs", "9")
    assert (load("run", "best")["epoch"], load("run")["epoch"], load("run")["update"]) == (1, 0, 0)
    assert train("run", "--save-epochs", "9") == 0
    assert_same_run(load("whole"), load("run"))


def test_checkpoints_within_an_epoch(train, load, on_loss):
    train("whole")
    on_loss(crash(8))
    with pytest.raises(Crash):
        train("run", "--save-updates", "3")
    assert (load("run")["epoch"], load("run")["update"]) == (1, 1)
    assert (load("run", "previous")["epoch"], load("run", "previous")["update"]) == (1, 0)
    assert train("run") == 0
    assert_same_run(load("whole"), load("run"))


@pytest.mark.parametrize("mixing", [(), ("--mixup", "0.8", "--cutmix", "1.0", "--mesa", "2", "--ema-decay", "0.8")])
def test_accumulation_equals_a_larger_batch(train, load, mixing):
    train("large", "--epochs", "2", "--clip-grad", "1.0", *mixing)
    train("parts", "--epochs", "2", "--clip-grad", "1.0", *mixing, "--batch-size", "60", "--grad-accum", "4")
    large, parts = load("large"), load("parts")
    for key, value in large["state_dict"].items():
        assert torch.allclose(value, parts["state_dict"][key], atol=1e-4), key
    assert parts["history"][0]["train_loss"] == pytest.approx(large["history"][0]["train_loss"], abs=1e-4)
    assert train("large", "--clip-grad", "1.0", *mixing, "--batch-size", "60", "--grad-accum", "4") == 0  # the same run


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision(train, load, precision):
    flags = ("--ema-decay", "0.5", "--mesa", "0.1")
    assert train("run", "--precision", precision, "--warmup-epochs", "0", "--epochs", "3", *flags) == 0
    history = load("run")["history"]
    assert history[-1]["val_loss"] < history[0]["val_loss"] < 2.5
    assert history[-1]["skipped_updates"] == 0
    assert (load("run")["scaler"]["scale"] > 1) == (precision == "fp16")


def test_further_settings_train(train, load):
    flags = ("--grad-checkpointing", "--cooldown-epochs", "1", "--ema-decay", "0.9", "--ema-warmup", "--opt", "lion")
    flags += ("--repeated-aug", "3", "--eval-every", "2", "--save-epochs", "2", "--color-jitter", "0.4")
    assert train("run", *flags) == 0
    assert (load("run")["epoch"], load("run", "previous")["epoch"]) == (3, 2)
    assert [("top1" in row) for row in load("run")["history"]] == [False, True, True]
    assert load("run")["history"][-1]["lr"] == pytest.approx(1e-5)


def test_a_loss_that_is_not_finite_is_skipped_and_counted(train, load, on_loss):
    weights = []

    def act(call, loss):
        weights.append({key: value.clone() for key, value in train_model().items()})
        return loss * {3: float("nan"), 4: float("inf")}.get(call, 1.0)

    optimizers = []
    create = train_script.create_optimizer

    def remember(model, *settings):
        optimizers.append(model)
        return create(model, *settings)

    def train_model():
        return dict(optimizers[0].named_parameters())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_script, "create_optimizer", remember)
        on_loss(act)
        assert train("run") == 0
    assert [row["skipped_updates"] for row in load("run")["history"]] == [2, 0]
    assert all(torch.isfinite(tensor).all() for tensor in tensors(load("run")).values())

    def changed(a, b):
        return any(not torch.equal(weights[a][key], weights[b][key]) for key in weights[a])

    assert [changed(step, step + 1) for step in range(1, 7)] == [True, True, False, False, True, True]
    assert float(next(iter(load("run")["optimizer"]["state"].values()))["step"]) == 2 * UPDATES - 2


def test_too_many_in_a_row_end_the_run(train, load, on_loss):
    on_loss(lambda call, loss: loss * (float("nan") if call >= 6 else 1.0))
    with pytest.raises(RunError, match="3 updates in a row had no finite loss"):
        train("run", "--max-nonfinite", "3", "--epochs", "4")
    last = load("run")
    assert last["epoch"] == 1
    assert all(torch.isfinite(tensor).all() for tensor in tensors(last).values())


def test_a_full_disk_does_not_end_the_run(train, load, monkeypatch, capsys):
    write, calls = checkpoint_module.write_atomically, []

    def fails_in_between(path, *rest):
        calls.append(path)
        if str(path).endswith("last.pt") and sum(str(p).endswith("last.pt") for p in calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, *rest)

    monkeypatch.setattr(checkpoint_module, "write_atomically", fails_in_between)
    assert train("run", "--epochs", "3") == 0
    assert "last.pt: No space left on device. What was saved before is intact" in capsys.readouterr().err
    assert (load("run")["epoch"], load("run", "previous")["epoch"]) == (3, 1)

    def fails(path, *rest):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_module, "write_atomically", fails)
    with pytest.raises(RunError, match="its end could not be saved"):
        train("full")

    def fails_for_best(path, *rest):
        (fails if str(path).endswith("best.pt") else write)(path, *rest)

    monkeypatch.setattr(checkpoint_module, "write_atomically", fails_for_best)
    with pytest.raises(RunError, match="its best weights could not be saved"):
        train("no_best")


def test_linear_probe_leaves_the_backbone_as_it_is(train, load, tmp_path):
    train("base", "--epochs", "2")
    flags = ("--freeze-backbone", "--ema-decay", "0.9", "--drop-path", "0.5", "--epochs", "3")
    assert train("probe", "--weights", str(tmp_path / "base" / "best.pt"), *flags) == 0
    base, probe = load("base", "best"), load("probe")
    for key, value in base["state_dict"].items():
        fixed = not key.startswith("head.")
        assert torch.equal(value, probe["state_dict"][key]) == fixed, key
        assert torch.equal(value, probe["state_dict_ema"][key]) == fixed, key
    assert probe["history"][-1]["top1"] > base["history"][-1]["top1"]


def test_a_linear_probe_keeps_running_statistics(train, load):
    model = ("--model", "test_byobnet", "--dataset", "digits", "--img-size", "32", "--workers", "0", "--epochs", "1")
    flags = ("--freeze-backbone", "--warmup-epochs", "0", "--batch-size", "240", "--seed", "3", "--in-chans", "1")
    assert train("probe", *model, *flags) == 0
    fresh = timm.create_model("test_byobnet", in_chans=1)
    for key, value in fresh.state_dict().items():
        if "running" in key:
            assert torch.equal(load("probe")["state_dict"][key], value)


@pytest.mark.parametrize("way", ["weights", "pretrained"])
def test_weights_are_read_at_the_start_of_a_run_alone(train, load, on_loss, model_yaml, tmp_path, way):
    file, path = tmp_path / "begin.pth", tmp_path / f"tiny_{way}.yaml"
    path.write_text(f"{model_yaml.read_text()}pretrained: {{own: {{file: {file}, num_classes: 10}}}}\n")
    flags = ("--config", str(path), *(("--weights", str(file)) if way == "weights" else ("--pretrained",)))
    torch.manual_seed(7)
    torch.save(timm.create_model(parse_train(["--config", str(path)]).model, num_classes=10).state_dict(), file)
    assert train("whole", *flags) == 0
    on_loss(interrupt(6))
    assert train("run", *flags) == 75
    file.unlink()
    assert train("run", *flags) == 0
    assert_same_run(load("whole"), load("run"))
    with pytest.raises(RunError, match=r"no such .*begin\.pth"):
        train("other", *flags)


def test_fine_tuning_with_other_classes_and_another_resolution(train, load, pictures, tmp_path, capsys):
    train("base")
    flags = ("--data-dir", str(pictures()), "--dataset", "folder", "--batch-size", "12", "--in-chans", "1")
    weights = ("--weights", str(tmp_path / "base" / "best.pt"))
    assert train("tuned", *flags, *weights, "--img-size", "16", "24", "--epochs", "12") == 0
    assert "best.pt has 10 classes: new classifier for 3 classes" in capsys.readouterr().out
    tuned = load("tuned", "best")
    assert tuned["class_names"] == ["dark", "grey", "light"]
    assert tuned["data"]["input_size"] == [1, 16, 24]
    # The checkpoint is enough to evaluate it: model, classes, input and data set are in it.
    (result,) = eval_script.main(
        ["--checkpoint", str(tmp_path / "tuned" / "best.pt"), "--device", "cpu", "--workers", "0"]
    )
    assert result["images"] == 9
    assert result["top1"] == pytest.approx(load("tuned", "best")["best"])
    with pytest.raises(RunError, match="checkpoint of another model"):
        train("other", *flags, *weights, "--model-kwargs", "embed_dim=32")
    with pytest.raises(RunError, match="the head has 10 classes, but the data set 'folder' has 3"):
        train("other", *flags, "--num-classes", "10")
    assert not (tmp_path / "other").exists()


def test_unreadable_images(train, load, pictures, tmp_path, capsys):
    root = pictures()
    flags = ("--dataset", "folder", "--data-dir", str(root), "--batch-size", "12", "--epochs", "3", "--in-chans", "1")
    (root / "train" / "grey" / "1.png").write_bytes(b"no picture")
    held_out = root / "val" / "grey" / "1.png"
    held_out.write_bytes(held_out.read_bytes()[:50])
    with pytest.raises(RunError, match=f"evaluation: cannot read {held_out}"):
        train("run", *flags)
    assert capsys.readouterr().err.count(f"skipped: cannot read {root}/train/grey/1.png") == 1
    assert (load("run")["epoch"], load("run")["update"]) == (0, 2)  # the epoch is not lost
    held_out.unlink()
    assert train("run", *flags) == 0
    assert "warning: val_images: 9 -> 8" in capsys.readouterr().err
    assert load("run")["config"]["val_images"] == 8
    assert [row["unreadable_images"] for row in load("run")["history"]] == [1, 1, 1]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert len(summary["unreadable_images"]) == 1


def test_data_in_another_folder(train, pictures, on_loss, capsys):
    here, there = pictures("here"), pictures("there")
    flags = ("--dataset", "folder", "--batch-size", "12", "--in-chans", "1", "--data-dir")
    on_loss(interrupt(2))
    assert train("run", *flags, str(here)) == 75
    assert train("run", *flags, str(there)) == 0
    assert f"warning: data_dir: {here} -> {there}" in capsys.readouterr().err
    with pytest.raises(RunError, match=f"data_dir: {there} -> {here}, and the run is complete"):
        train("run", *flags, str(here))
    assert train("run", *flags, f"{there}/../{there.name}/") == 0


def test_a_state_of_other_shapes_is_not_gone_on_with(train, on_loss, tmp_path):
    """The same settings may build another model in another version of the package."""
    on_loss(interrupt(2))
    assert train("run") == 75
    for name in ("last.pt", "previous.pt"):
        if (file := tmp_path / "run" / name).exists():
            content = torch.load(file, weights_only=True)
            content["state_dict"]["pos_embed"] = content["state_dict"]["pos_embed"][:, 1:]
            torch.save(content, file)
    with pytest.raises(RunError, match=r"pos_embed: \(1, \d+, \d+\) -> \(1, \d+, \d+\)"):
        train("run")


def test_any_timm_model(train, load, tmp_path):
    model = ("--model", "test_vit", "--dataset", "digits", "--img-size", "32", "--workers", "0", "--epochs", "1")
    assert train("run", *model, "--warmup-epochs", "0", "--batch-size", "240", "--in-chans", "1") == 0
    assert load("run")["model"]["family"] is None
    assert load("run")["data"]["input_size"] == [1, 32, 32]
    with pytest.raises(RunError, match="grad_checkpointing: not with model 'hrnet_w18_small': .*not supported"):
        train("other", "--model", "hrnet_w18_small", "--dataset", "digits", "--grad-checkpointing")
    with pytest.raises(RunError, match="no model is called 'pola_vit_tini'; did you mean 'pola_vit_tiny'"):
        train("other", "--model", "pola_vit_tini", "--data-dir", str(tmp_path / "nowhere"))
