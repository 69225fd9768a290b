"""Fine-tuning: another attention, partial freezing and adapters."""

from __future__ import annotations

import math
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from runs import assert_same_run, interrupt
from timm.models.vision_transformer import VisionTransformer as TimmViT
from timm.models.vision_transformer import checkpoint_filter_fn
from timm.optim import create_optimizer_v2

import eval as eval_script
import flash_bla  # noqa: F401 - registers the models
import train as train_script
from flash_bla.engine.checkpoint import load_weights, state_dict_of
from flash_bla.engine.config import RunError, TrainConfig, parse_train
from flash_bla.engine.finetune import add_adapters, choose_trained, replace_attention, start_training
from flash_bla.models.vit import VisionTransformer

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
PROJECTIONS = {
    "linear": ("qkv", 72), "focused": ("qkv", 72), "softmax": ("qkv", 72), "pola": ("qkvg", 72), "rala": ("qkvo", 72),
    "rala_softmax": ("qkvo", 72), "mlla": ("qk", 48),
}  # fmt: skip


def softmax_vit(**changes) -> TimmViT:
    """timm's model, with weights that are nowhere 0 or 1."""
    torch.manual_seed(1)
    model = TimmViT(**(SIZES | {"num_classes": 10} | changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def linear_vit(attention: str = "pola", **changes) -> VisionTransformer:
    torch.manual_seed(2)
    return VisionTransformer(**(SIZES | {"num_classes": 3, "attention": attention} | changes))


# Another attention ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", PROJECTIONS)
def test_all_but_the_attention_is_taken_over(attention):
    file, model = softmax_vit().state_dict(), linear_vit(attention)
    fresh = linear_vit(attention).state_dict()
    notes = "; ".join(replace_attention(model, {"model": file}, "deit.pth"))
    projection, rows = PROJECTIONS[attention]
    for key, value in model.state_dict().items():
        leaf = key.rpartition(".")[2]
        if key.startswith("head.") or ".dwc." in key or ".lepe." in key:
            assert not value.any(), key
        elif key == "pos_embed":
            assert torch.equal(value, file[key][:, 1:])
        elif f".{projection}." in key:
            assert torch.equal(value[:rows], file[key.replace(projection, "qkv")][:rows]), key
            assert torch.equal(value[72:], torch.full_like(value[72:], leaf == "bias")), key
        elif key not in file and not key.startswith("fc_norm."):
            assert torch.equal(value, fresh[key]), key
            assert key.rpartition(".")[0] + ".*" and key.replace(".0.", ".*.").replace(".1.", ".*.") in notes
        else:
            assert torch.equal(value, file[key.removeprefix("fc_")]), key
    assert "deit.pth with another attention" in notes and "norm as fc_norm" in notes
    assert "left out: cls_token" in notes and "head.weight, head.bias" in notes
    assert ("q and k of qkv as qk;" in notes) == (attention == "mlla")
    assert ("with a gate of 1" in notes) == (attention in ("pola", "rala", "rala_softmax"))
    loss = F.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.tensor([0, 1, 2, 0]))
    assert loss.item() == pytest.approx(math.log(3))


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, {}),
        ({}, {"no_embed_class": True}),
        ({"no_embed_class": True}, {}),
        ({"init_values": 1.0}, {}),
        ({}, {"init_values": 1e-5}),
        ({"init_values": 1.0, "reg_tokens": 4, "no_embed_class": True}, {"reg_tokens": 4}),
        ({"init_values": 1.0, "reg_tokens": 4}, {"reg_tokens": 4, "init_values": 1e-5}),
        ({"qkv_bias": False}, {}),
        ({"class_token": False, "global_pool": "avg", "fc_norm": False}, {"class_token": False, "global_pool": "avg"}),
        ({}, {"img_size": (48, 32)}),
        ({"no_embed_class": True, "reg_tokens": 2}, {"reg_tokens": 2, "img_size": 64}),
    ],
)
def test_with_the_same_attention_the_features_are_the_same(theirs, ours):
    source = softmax_vit(**theirs).eval()
    ours = {"class_token": True, "global_pool": "token", "fc_norm": False} | ours
    model = linear_vit("softmax", **ours).eval()
    replace_attention(model, source.state_dict(), "vit.pth")
    size = model.patch_embed.img_size
    if size != (32, 32):
        resized = softmax_vit(**theirs, img_size=size).eval()
        resized.load_state_dict(checkpoint_filter_fn(source.state_dict(), resized))
        source = resized
    images = torch.randn(2, 3, *size)
    assert torch.allclose(model.forward_features(images), source.forward_features(images), atol=1e-4)


def test_the_last_norm_and_other_tokens():
    pooled = softmax_vit(class_token=False, global_pool="avg", fc_norm=True).state_dict()
    model = linear_vit("pola", fc_norm=False, class_token=True, reg_tokens=2)
    notes = replace_attention(model, pooled, "vit.pth")
    assert "fc_norm as norm" in notes
    assert any(note.startswith("new: cls_token, reg_token, blocks.*.attn") for note in notes)
    assert torch.equal(model.norm.weight, pooled["fc_norm.weight"])
    assert torch.equal(model.pos_embed, F.pad(pooled["pos_embed"], (0, 0, 3, 0)))

    distilled = timm.create_model("deit_tiny_distilled_patch16_224", **SIZES | {"img_size": 64}).state_dict()
    notes = replace_attention(model := linear_vit("pola"), distilled, "deit.pth")
    assert "pos_embed resampled from 8x8 to 4x4" in notes
    assert notes[-2] == "left out: cls_token, dist_token, head.weight, head.bias, head_dist.weight, head_dist.bias"
    assert torch.equal(model.patch_embed.proj.weight, distilled["patch_embed.proj.weight"])


def test_what_does_not_fit_is_an_error():
    file = softmax_vit().state_dict()
    with pytest.raises(RunError, match=r"checkpoint of another model:\n(.|\n)*train.py --replace-attention"):
        load_weights(linear_vit(), file, "deit.pth")
    with pytest.raises(RunError, match=r"outside the attention and the classifier:\n(.|\n)*Unexpected.*blocks.1.norm1"):
        replace_attention(linear_vit(depth=1), file, "deit.pth")
    with pytest.raises(RunError, match="Missing.*blocks.2.norm1"):
        replace_attention(linear_vit(depth=3), file, "deit.pth")
    with pytest.raises(RunError, match="size mismatch for patch_embed"):
        replace_attention(linear_vit(patch_size=16), file, "deit.pth")
    with pytest.raises(RunError, match="the gate needs a bias"):
        replace_attention(linear_vit(qkv_bias=False), file, "deit.pth")
    with pytest.raises(RunError, match="pos_embed of 12 rows, 1 of them for tokens, fits no square"):
        replace_attention(linear_vit(), file | {"pos_embed": torch.zeros(1, 12, 24)}, "deit.pth")
    with pytest.raises(RunError, match="holds no vision transformer"):
        replace_attention(linear_vit(), timm.create_model("test_byobnet").state_dict(), "byob.pth")
    with pytest.raises(RunError, match="family vit"):
        replace_attention(timm.create_model("test_vit"), file, "deit.pth")


def test_pola_vit_small_from_deit_small():
    file = timm.create_model("deit_small_patch16_224").state_dict()
    model = timm.create_model("pola_vit_small", num_classes=100)
    replace_attention(model, file, "deit_small.pth")
    own = model.state_dict()
    shared = [key for key in own if key in file and own[key].shape == file[key].shape]
    assert len(shared) == 2 + 12 * 10  # the patches' embedding; of a block two norms, proj, fc1 and fc2
    assert all(torch.equal(own[key], file[key]) for key in shared)
    with torch.no_grad():
        loss = F.cross_entropy(model(torch.randn(2, 3, 224, 224)), torch.tensor([3, 42]))
    assert loss <= math.log(100) + 0.1


def test_a_run_with_another_attention(train, load, on_loss, tmp_path, capsys):
    source = softmax_vit(img_size=16, patch_size=4, in_chans=1, embed_dim=16)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "vit.pth")
    losses = []
    on_loss(lambda call, loss: losses.append(loss.item()) or loss)
    flags = ("--weights", str(tmp_path / "vit.pth"), "--lr", "1e-3", "--warmup-epochs", "0")
    with pytest.raises(RunError, match="--replace-attention"):
        train("run", *flags)
    assert train("run", *flags, "--replace-attention", "--freeze", "patch_embed.*", "*.mlp.*") == 0
    for key, value in load("run")["state_dict"].items():
        if key in source.state_dict() and not key.startswith(("pos_embed", "head.")):
            fixed = key.startswith("patch_embed.") or ".mlp." in key
            assert torch.equal(value, source.state_dict()[key]) == fixed, key
    assert losses[0] == pytest.approx(math.log(10)) and losses[-1] < min(losses[:3]) and max(losses) < 2.5
    assert "pos_embed resampled from 4x4 to 2x2" in capsys.readouterr().out


# What is trained -----------------------------------------------------------------------------------------------------


def test_frozen_parameters_and_statistics_stay():
    model = timm.create_model("mlla_tiny", embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], num_classes=3)
    config = TrainConfig(freeze=["stages.0.*", "stages.[12].blocks.*"])
    choose_trained(model, config)
    start_training(model, config)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    create_optimizer_v2(model, opt="adamw", lr=0.1, weight_decay=0.5).step()
    assert any(key.startswith("stages.0.") and key.endswith("running_var") for key in before)
    assert any(not key.startswith("stages.0.") and key.endswith("running_var") for key in before)
    for key, value in model.state_dict().items():
        frozen = key.startswith(("stages.0.", "stages.1.blocks.", "stages.2.blocks."))
        assert torch.equal(value, before[key]) == frozen, key


def test_both_heads_of_a_distilled_model_are_its_classifier():
    arguments = SIZES | {"num_classes": 3}
    model = timm.create_model("deit_tiny_distilled_patch16_224", **arguments)
    config = TrainConfig(freeze_backbone=True)
    choose_trained(model, config)
    heads = {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == heads
    start_training(model, config)
    assert {name for name, module in model.named_modules() if module.training} == {"head", "head_dist"}
    file = timm.create_model("deit_tiny_distilled_patch16_224", **arguments | {"num_classes": 10}).state_dict()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert load_weights(model, file, "deit.pth") == ["deit.pth has 10 classes: new classifier for 3 classes"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, (before if name in heads else file)[name]), name


def test_patterns_are_checked():
    model = linear_vit()
    with pytest.raises(RunError, match=r"freeze: no parameter matches 'blocks.7.\*'; they are named pos_embed, "):
        choose_trained(model, TrainConfig(freeze=["blocks.0.*", "blocks.7.*"]))
    with pytest.raises(RunError, match="nothing is left to train"):
        choose_trained(model, TrainConfig(freeze=["*"]))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--replace-attention"], "replace_attention: name the file"),
        (["--lora", "0"], "lora: a rank of at least 1"),
        (["--lora", "4", "--freeze-backbone"], "freeze_backbone: says what to train, and so does lora"),
        (["--weights", "x", "--replace-attention", "--lora", "4"], "lora: would leave the new attention untrained"),
        (["--distill-alpha", "1.5"], "distill_alpha: between 0 and 1"),
        (["--distill-tau", "0"], "distill_tau: more than 0"),
    ],
)
def test_contradictions(flags, message):
    with pytest.raises(RunError, match=message):
        parse_train(["--model", "resnet18", *flags])


# Adapters ------------------------------------------------------------------------------------------------------------


def test_adapters_are_few_and_change_nothing_at_first():
    pytest.importorskip("peft")
    model = timm.create_model("pola_vit_small", num_classes=1000, img_size=64).eval()
    images = torch.randn(1, 3, 64, 64)
    expected = model(images)
    add_adapters(model, 8)
    torch.testing.assert_close(model(images), expected)  # not to the bit: pola's scale then is no longer in the weights
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert sum(trained.values()) < 0.05 * sum(p.numel() for p in model.parameters())
    layers = ("attn.qkvg", "attn.proj", "mlp.fc1", "mlp.fc2")
    expected = {f"blocks.{i}.{layer}.lora_{m}.default.weight" for i in range(12) for layer in layers for m in "AB"}
    assert trained.keys() == expected | {"head.weight", "head.bias"}
    with pytest.raises(RunError, match="no linear layers in blocks"):
        add_adapters(torch.nn.Linear(2, 2), 8)


FAMILIES = ["pola_pvt_tiny", "flatten_pvt_v2_b0", "pola_swin_tiny", "flatten_cswin_tiny", "mlla_tiny", "ravlt_tiny"]


@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_of_every_family(name):
    pytest.importorskip("peft")
    model = timm.create_model(name, depths=[1, 1, 1, 1], img_size=32, num_classes=3).eval()
    images, entries = torch.randn(1, 3, 32, 32), model.state_dict()
    expected = model(images)
    add_adapters(model, 2)
    torch.testing.assert_close(model(images), expected)
    assert all(torch.equal(value, entries[key]) for key, value in state_dict_of(model.state_dict()).items())
    torch.nn.init.normal_(next(p for key, p in model.named_parameters() if "blocks.0" in key and "lora_B" in key))
    changed = model(images)
    assert not torch.equal(changed, expected)
    plain = timm.create_model(name, depths=[1, 1, 1, 1], img_size=32, num_classes=3).eval()
    load_weights(plain, model.state_dict(), "last.pt")
    assert torch.allclose(plain(images), changed, atol=1e-5)


def test_adapters_need_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(RunError, match="pip install peft"):
        add_adapters(linear_vit(), 2)


def test_a_run_with_adapters(train, load, on_loss, tmp_path):
    pytest.importorskip("peft")
    train("base", "--epochs", "2")
    weights = ("--weights", str(tmp_path / "base" / "best.pt"))
    flags = (*weights, "--lora", "2", "--ema-decay", "0.8", "--layer-decay", "0.8", "--drop-path", "0.1")
    flags += ("--epochs", "2")
    assert train("whole", *flags) == 0
    on_loss(interrupt(6))
    assert train("run", *flags) == train_script.STOPPED
    assert train("run", *flags) == 0
    assert_same_run(load("whole"), load("run"))

    base, last, best = load("base", "best")["state_dict"], load("run"), load("run", "best")
    for key in ("state_dict", "state_dict_ema"):
        assert best[key].keys() == base.keys()
        for name, value in base.items():
            trained = name.startswith("head.") or f"{name.removesuffix('weight')}lora_A.default.weight" in last[key]
            assert torch.equal(best[key][name], value) != trained, name
    # As any other checkpoint: evaluated, and trained further.
    device = ("--device", "cpu", "--workers", "0")
    for name, expected in (("best", best["best"]), ("last", last["history"][-1]["top1"])):
        (result,) = eval_script.main(["--checkpoint", str(tmp_path / "run" / f"{name}.pt"), *device])
        assert result["top1"] == pytest.approx(expected)
    assert train("further", "--weights", str(tmp_path / "run" / "last.pt"), "--freeze-backbone", "--epochs", "2") == 0
