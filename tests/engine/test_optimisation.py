"""What an update of the weights is made of: losses, rates, averages and decays."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
import yaml
from runs import UPDATES
from timm.optim import create_optimizer_v2

import train as train_script
from flash_bla.engine.config import parse_train
from flash_bla.engine.data import SeededMixup, ToDevice, TrainOrder, open_dataset, resolve_data, train_loader
from flash_bla.engine.model import create_model
from flash_bla.engine.processes import mixed_seed


def soft_cross_entropy(logits, targets):
    return -(targets * logits.log_softmax(dim=1)).sum(dim=1).mean()


def test_mesa_is_what_its_paper_says(train, load, model_yaml, one_process):
    """A training loop of a few lines, with the same batches and random numbers."""
    flags = ["--ema-decay", "0.8", "--mixup", "0.8", "--drop-path", "0.3", "--weight-decay", "0", "--epochs", "4"]
    flags += ["--lr", "1e-3", "--min-lr", "1e-3", "--warmup-epochs", "0"]  # a constant rate
    assert train("run", *flags, "--mesa", "2") == 0

    config = parse_train(["--config", str(model_yaml), *flags])
    torch.manual_seed(config.seed)
    model, description = create_model(config, 10, drop_path_rate=0.3)
    average = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    dataset, data = open_dataset(config, training=True), resolve_data(config, model, description)
    to_device = ToDevice(data["mean"], data["std"], one_process.device)
    order = TrainOrder(len(dataset), config, one_process)
    for done, (images, classes, _) in enumerate(train_loader(config, dataset, data, order, one_process.device)):
        epoch, update = divmod(done, UPDATES)
        images, targets = SeededMixup(config, 10)(*to_device(images, classes), epoch, update)
        torch.manual_seed(mixed_seed(config.seed, epoch, update, 0, 0))
        logits = model(images)
        loss = soft_cross_entropy(logits, targets)
        if epoch >= 1:  # a quarter of four
            loss = loss + 2 * soft_cross_entropy(logits, average(images).softmax(dim=1).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for mean, value in zip(average.parameters(), model.parameters(), strict=True):
                mean.copy_(value if done == 0 else 0.8 * mean + 0.2 * value)
    run = load("run")
    assert run["history"][-1]["updates"] == done + 1
    for ours, entries in ((model, run["state_dict"]), (average, run["state_dict_ema"])):
        for key, value in ours.state_dict().items():
            assert torch.allclose(entries[key], value, atol=2e-6), key


@pytest.fixture
def steps(monkeypatch):
    """What a run does at each of its updates, as pairs of learning rate and loss."""
    done, losses = [], []
    step, scale = torch.amp.GradScaler.step, torch.amp.GradScaler.scale

    def note_rate(scaler, optimizer):
        done.append((optimizer.param_groups[0]["lr"], losses[-1]))
        return step(scaler, optimizer)

    def note_loss(scaler, loss):
        losses.append(loss.item())
        return scale(scaler, loss)

    monkeypatch.setattr(torch.amp.GradScaler, "step", note_rate)
    monkeypatch.setattr(torch.amp.GradScaler, "scale", note_loss)
    return done


def test_rates_at_chosen_steps(train, steps):
    """Worked out by hand: 1e-4 + 9.9e-3 times a half of 1 + the cosine of 45°, 90°, 135° and 171°."""
    flags = ("--lr", "1e-2", "--min-lr", "1e-4", "--warmup-lr", "0", "--warmup-epochs", "1", "--epochs", "4")
    assert train("run", *flags, "--cooldown-epochs", "1", "--eval-every", "9", "--save-epochs", "9") == 0
    expected = {0: 0, 1: 0.002, 4: 0.008, 5: 0.00855018, 10: 0.00505, 15: 0.00154982, 19: 0.000160943}
    expected |= {20: 1e-4, 24: 1e-4}
    assert len(steps) == 25
    assert {step: steps[step][0] for step in expected} == pytest.approx(expected, rel=1e-5)


def test_mesa_at_chosen_steps(train, steps, monkeypatch):
    """A classifier of zeros at a rate of 0: the loss is ln 10, from a quarter of the epochs on 1 + 1.5 times that."""

    def of_zeros(*arguments, **options):
        model, description = create_model(*arguments, **options)
        torch.nn.init.zeros_(model.head.weight)
        return model, description

    monkeypatch.setattr(train_script, "create_model", of_zeros)
    flags = ("--lr", "0", "--min-lr", "0", "--warmup-epochs", "0", "--epochs", "8", "--eval-every", "9")
    assert train("run", *flags, "--save-epochs", "9", "--ema-decay", "0.9", "--mesa", "1.5", "--mixup", "0.8") == 0
    expected = {0: 2.302585, 9: 2.302585, 10: 5.756463, 39: 5.756463}
    assert {step: steps[step][1] for step in expected} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("per_epoch", [True, False])
def test_learning_rates_follow_the_schedule(train, load, per_epoch):
    flags = ("--epochs", "5", "--warmup-epochs", "2", "--cooldown-epochs", "1", "--lr", "1e-2", "--min-lr", "1e-4")
    train("run", *flags, *(("--sched-on-epochs",) if per_epoch else ()))

    def rate(epochs):
        if epochs < 2:
            return 1e-6 + epochs / 2 * (1e-2 - 1e-6)
        return 1e-4 + (1e-2 - 1e-4) * (1 + math.cos(math.pi * min(epochs / 5, 1))) / 2

    # A row tells the rate after its epoch's last update: the one of the update to come, or of the whole epoch.
    expected = [rate(epoch if per_epoch else epoch + 1) for epoch in range(6)]
    assert [row["lr"] for row in load("run")["history"]] == pytest.approx(expected)


def test_no_warm_up_starts_at_the_full_rate(train, monkeypatch):
    rates, step = [], torch.amp.GradScaler.step

    def note(scaler, optimizer):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(scaler, optimizer)

    monkeypatch.setattr(torch.amp.GradScaler, "step", note)
    train("run", "--warmup-epochs", "0", "--epochs", "2")
    assert rates == pytest.approx([1e-5 + (1e-2 - 1e-5) * (1 + math.cos(math.pi * k / 10)) / 2 for k in range(10)])


def test_the_averages_decay_is_told(train, tmp_path, capsys):
    train("run", "--ema-decay", "0.9996", "--ema-batch", "960", "--epochs", "2")
    assert f"min_lr 1e-05, ema_decay {0.9996**0.25:.6g}" in capsys.readouterr().out
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert settings["rates"]["ema_decay"] == pytest.approx(0.9996 ** (240 / 960))
    assert (settings["ema_decay"], settings["ema_batch"]) == (0.9996, 960)


def test_layer_decay_and_weight_decay_groups(train, load):
    assert train("run", "--layer-decay", "0.5", "--epochs", "2") == 0
    groups = load("run")["optimizer"]["param_groups"]
    assert {group["lr_scale"] for group in groups} == {0.125, 0.25, 0.5, 1.0}  # embedding, two blocks, head
    assert {group["weight_decay"] for group in groups} == {0.0, 0.05}
    assert all(group["lr"] == pytest.approx(groups[-1]["lr"] * group["lr_scale"]) for group in groups)


# The layers of the models below from the images to the classifier: how the names of their parameters begin.
STAGES = [
    ("stages.0.downsample.",),
    ("stages.0.blocks.", "stages.0.norm."),
    ("stages.1.downsample.", "stages.1.blocks.0."),
    ("stages.1.blocks.1.", "stages.1.norm."),
    ("stages.2.",),
    ("stages.3.", "norm."),
    ("head.",),
]
BLOCKS = [("patch_embed.", "pos_embed", "cls_token"), ("blocks.0.",), ("blocks.1.", "norm."), ("head.",)]


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("pola_vit_tiny", BLOCKS),
        ("mlla_vit_tiny", BLOCKS),
        ("pola_pvt_tiny", STAGES),
        ("flatten_pvt_v2_b0", STAGES),
        ("pola_swin_tiny", STAGES),
        ("flatten_cswin_tiny", STAGES),
        ("mlla_tiny", STAGES),
        ("ravlt_tiny", STAGES),
    ],
)
def test_layer_decay_goes_by_the_depth_of_a_parameter(name, layers):
    small = {"depth": 2, "class_token": True, "global_pool": "token"} if "vit_" in name else {"depths": [1, 2, 1, 1]}
    model = timm.create_model(name, img_size=32, **small)
    groups = create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.05, layer_decay=0.5).param_groups
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    found = set()
    for key, parameter in model.named_parameters():
        (depth,) = (depth for depth, starts in enumerate(layers) if key.startswith(starts))
        assert scales[id(parameter)] == 0.5 ** (len(layers) - 1 - depth), key
        found.add(depth)
    assert found == set(range(len(layers)))


@pytest.mark.parametrize(
    ("name", "decayed", "spared"),
    [
        ("pola_vit_tiny", {"scale", "power", "positional_encoding"}, {"pos_embed", "cls_token"}),
        ("pola_pvt_tiny", {"scale", "power", "positional_encoding", "pos_embed"}, set()),
        ("flatten_pvt_v2_b0", {"scale", "positional_encoding"}, set()),
        ("pola_swin_tiny", {"scale", "power", "positional_encoding"}, {"relative_position_bias_table"}),
        ("flatten_cswin_tiny", {"scale", "positional_encoding"}, set()),
        ("mlla_tiny", set(), set()),
        ("ravlt_tiny", {"gamma_1", "gamma_2"}, set()),
    ],
)
def test_weight_decay_reaches_what_it_does_officially(train, monkeypatch, name, decayed, spared):
    """Weights of layers but not of norms, no biases, and of what is neither the parameters named first."""

    class Enough(Exception):
        pass

    create, parameters = train_script.create_optimizer, []

    def look(model, *settings):
        groups = create(model, *settings).param_groups
        decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
        parameters.extend((key, p.ndim, decays[id(p)]) for key, p in model.named_parameters())
        raise Enough

    monkeypatch.setattr(train_script, "create_optimizer", look)
    small = ["depth=1", "class_token=true", "global_pool=token"] if "vit" in name else ["depths=[1, 1, 1, 1]"]
    flags = ("--dataset", "digits", "--img-size", "32", "--batch-size", "16", "--model-kwargs", *small)
    with pytest.raises(Enough):
        train("run", "--model", name, *flags)
    others = {0.05: set(), 0.0: set()}
    for key, ndim, decay in parameters:
        leaf = key.rpartition(".")[2]
        if leaf in ("weight", "bias"):
            assert decay == (0.05 if leaf == "weight" and ndim > 1 else 0.0), key
        else:
            others[decay].add(leaf)
    assert others == {0.05: decayed, 0.0: spared}
