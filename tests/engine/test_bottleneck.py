"""The command that says what bounds a run: a loader or a model that is made slow must be the one it names."""

from __future__ import annotations

import time

import pytest

from flash_bla.engine import bottleneck, data
from flash_bla.engine.config import parse_train


@pytest.mark.parametrize(
    ("slow", "where"), [("input", ()), ("model", ()), ("model", ("--device-augment",)), ("input", ("--in-memory",))]
)
def test_the_slow_part_is_named(slow, where, model_yaml, one_process, monkeypatch):
    if slow == "input" and where:
        keys = data.image_keys
        monkeypatch.setattr(data, "image_keys", lambda *args: time.sleep(0.4) or keys(*args))
    elif slow == "input":
        read = data.read_image
        monkeypatch.setattr(data, "read_image", lambda *args: time.sleep(0.02) or read(*args))
    else:
        loss = bottleneck.F.cross_entropy
        monkeypatch.setattr(bottleneck.F, "cross_entropy", lambda *args: time.sleep(0.2) or loss(*args))
    flags = ["--batch-size", "20", "--aa", "rand-m5-inc1", "--reprob", "0.3", *where]
    figures = bottleneck.measure(parse_train(["--config", str(model_yaml), *flags]), one_process, seconds=0.5)
    said = bottleneck.verdict(figures)
    assert said.startswith(f"The {slow} is the bottleneck")
    assert ("--device-augment would" in said) == (slow == "input" and not where)


@pytest.mark.parametrize(
    ("flags", "trained"),
    [
        ((), lambda name: True),
        (("--grad-accum", "64", "--lr-batch", "51200"), lambda name: True),  # at one pass lr would be below min_lr
        (("--freeze", "blocks.*"), lambda name: not name.startswith("blocks.")),
        (("--freeze-backbone", "--grad-checkpointing"), lambda name: name.startswith("head.")),
    ],
)
def test_updates_are_those_of_the_run(flags, trained, model_yaml, one_process, monkeypatch):
    made, create = [], bottleneck.create_optimizer
    monkeypatch.setattr(
        bottleneck, "create_optimizer", lambda model, *of: made.append((model, create(model, *of))) or made[-1][1]
    )
    config = parse_train(["--config", str(model_yaml), "--batch-size", "20", *flags])
    bottleneck.measure(config, one_process, seconds=0.01)
    ((model, optimizer),) = made
    assert optimizer.defaults["fused"]
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.05, 0.0}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if trained(name)
    }
    assert model.grad_checkpointing == ("--grad-checkpointing" in flags)
    assert model.blocks[0].training == ("--freeze-backbone" not in flags)


@pytest.mark.parametrize("flags", [(), ("--mixup", "0.8", "--ema-decay", "0.9", "--mesa", "1", "--clip-grad", "5")])
def test_what_is_left_out_is_named(flags, model_yaml, monkeypatch, capsys):
    figures = {"input": 900, "model": 500, "both": 490, "workers": 2}
    monkeypatch.setattr(bottleneck, "measure", lambda *_: figures)
    bottleneck.main(["--config", str(model_yaml), "--device", "cpu", *flags])
    left_out = "which train.py takes longer for: mixup 0.8, ema_decay 0.9, mesa 1.0, clip_grad 5.0.\n"
    assert capsys.readouterr().out.endswith(left_out if flags else "the input gives 900.\n")


def test_the_verdict_says_what_helps():
    def say(figures):
        return bottleneck.verdict(figures | {"host_augments": False})

    assert say({"input": 250, "model": 1000, "both": 240, "workers": 2}) == (
        "The input is the bottleneck: it gives 250 images/s, the model takes 1000; about 8 loader processes "
        "(--workers, now 2) would keep up."
    )
    assert "loader processes (--workers) would run beside it" in say(
        {"input": 250, "model": 1000, "both": 200, "workers": 0}
    )
    assert say({"input": 900, "model": 500, "both": 490, "workers": 2}).endswith("the input gives 900.")
    assert "compete for the same CPU cores" in say({"input": 900, "model": 500, "both": 300, "workers": 2})
