"""Settings: help, precedence, and errors that name the key, the file and what is valid."""

from __future__ import annotations

from dataclasses import fields
from typing import get_args, get_type_hints

import pytest
from timm.data.transforms import _str_to_torch_interpolation

from flash_bla.configs import FOLDER
from flash_bla.engine.config import EvalConfig, RunError, TrainConfig, differences, parse_eval, parse_train


@pytest.mark.parametrize(("kind", "parse"), [(TrainConfig, parse_train), (EvalConfig, parse_eval)])
def test_help_lists_every_setting_with_its_default(kind, parse, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as exit_info:
        parse(["--help"])
    assert exit_info.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for item in fields(kind):
        flag = "--" + item.name.replace("_", "-")
        assert f" {flag}" in text
        assert f"{item.metadata['help']} (default: " in text
    if kind is TrainConfig:
        assert "learning rate for a total batch of --lr-batch images (default: 0.0005)" in text
        assert "random crop: range of its area (default: 0.08 1)" in text


def test_later_sources_win(tmp_path):
    recipe = tmp_path / "my_recipe.yaml"
    recipe.write_text("epochs: 30\nlr: 1e-3\nmixup: 0.8\n")
    path = tmp_path / "precedence_vit.yaml"
    path.write_text(
        "family: vit\nmodel: {embed_dim: 16, depth: 1, num_heads: 2, attention: linear}\nrecipe: deit\n"
        "train: {lr: 2e-3, smoothing: 0}\n"
    )
    config = parse_train(["--config", str(path)])
    assert (config.model, config.epochs, config.lr, config.mixup, config.smoothing) == (
        "precedence_vit", 300, 2e-3, 0.8, 0.0,
    )  # fmt: skip
    assert config.output == "runs/precedence_vit-folder"
    config = parse_train(["--config", str(path), "--recipe", str(recipe), "--lr", "5e-3", "--img-size", "32", "48"])
    assert (config.epochs, config.lr, config.mixup, config.cutmix) == (30, 5e-3, 0.8, 0.0)
    assert config.img_size == [32, 48]


def test_packaged_model_brings_its_recipe():
    config = parse_train(["--model", "pola_vit_tiny", "--no-compile", "--mixup", "0", "--drop-path", "none"])
    assert (config.epochs, config.aa, config.repeated_aug) == (300, "rand-m9-mstd0.5-inc1", 3)
    assert (config.mixup, config.drop_path) == (0.0, None)
    assert parse_train(["--model", "resnet18"]).epochs == TrainConfig().epochs


def test_the_packaged_examples_are_valid():
    for path in (FOLDER / "examples").glob("*.yaml"):
        assert parse_train(["--config", str(path)]).model == path.stem


def test_model_arguments_are_read_as_yaml():
    flags = ["patch_size=4", "drop_rate=5e-4", "attention=[pola, softmax]", "qkv_bias=false", "global_pool=token"]
    assert parse_train(["--model", "pola_vit_tiny", "--model-kwargs", *flags]).model_kwargs == {
        "patch_size": 4, "drop_rate": 5e-4, "attention": ["pola", "softmax"], "qkv_bias": False, "global_pool": "token",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ("{epohcs: 3}", ["epohcs", "epochs"]),
        ("{epochs: ten}", ["epochs", "int", "ten"]),
        ("{epochs: true}", ["epochs", "True"]),
        ("{lr: fast}", ["lr", "float"]),
        ("{precision: fp8}", ["precision", "bf16", "fp8"]),
        ("{betas: [0.9, x]}", ["betas", "float"]),
        ("{recipe: deit}", ["recipe"]),
    ],
)
def test_yaml_errors_name_key_and_file(tmp_path, train, expected):
    path = tmp_path / "wrong_vit.yaml"
    path.write_text(f"family: vit\nmodel: {{embed_dim: 16, depth: 1, num_heads: 2}}\ntrain: {train}\n")
    with pytest.raises(RunError) as error:
        parse_train(["--config", str(path)])
    for part in [str(path), *expected]:
        assert part in str(error.value)


def test_recipe_errors_name_the_recipe(tmp_path):
    with pytest.raises(RunError, match="deit"):
        parse_train(["--model", "pola_vit_tiny", "--recipe", "diet"])
    path = tmp_path / "recipe.yaml"
    path.write_text("weight_deacy: 0.1\n")
    with pytest.raises(RunError, match=r"recipe\.yaml.*weight_deacy.*weight_decay"):
        parse_train(["--model", "pola_vit_tiny", "--recipe", str(path)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "name the model"),
        (["--model", "a", "--config", "b"], "name the model"),
        (["--config", "/nowhere.yaml"], "nowhere"),
        (["--model", "pola_vit_tiny", "--batch-size", "5"], "even"),
        (["--model", "resnet18", "--batch-size", "0"], "batch_size"),
        (["--model", "resnet18", "--epochs", "5"], "warmup_epochs"),
        (["--model", "resnet18", "--ema-decay", "1"], "ema_decay"),
        (["--model", "resnet18", "--ema-batch", "-1"], "ema_batch"),
        (["--model", "resnet18", "--mesa", "-1"], "mesa: at least 0"),
        (["--model", "resnet18", "--mesa", "1"], "mesa: 1 learns from the averaged weights, but ema_decay is none"),
        (["--model", "mlla_tiny", "--ema-decay", "none"], "mesa"),
        (["--model", "resnet18", "--img-size", "1", "2", "3"], "img_size"),
        (["--model", "resnet18", "--model-kwargs", "num_classes=5"], "model_kwargs: num_classes .* --num-classes"),
        (["--model", "resnet18", "--model-kwargs", "in_chans=1"], "model_kwargs: in_chans .* --in-chans"),
        (["--model", "resnet18", "--cuda-graphs"], "only with compile"),
        (["--model", "resnet18", "--compile", "--cuda-graphs", "--grad-accum", "2"], "cuda_graphs: .* grad_accum 2"),
    ],
)
def test_contradictions(flags, message):
    with pytest.raises(RunError, match=message):
        parse_train(flags)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("clip-grad", ["-1"], "at least 0, or none, got "),
        ("layer-decay", ["0", "1.5"], "more than 0, at most 1, or none, got "),
        ("drop-path", ["-0.1", "1"], "at least 0 and less than 1, or none, got "),
        ("smoothing", ["-0.1", "1"], "at least 0 and less than 1, got "),
        ("scale", ["0 1", "0.5 1.1", "0.8 0.4"], "more than 0 and at most 1, the smaller first, got "),
        ("ratio", ["0 1", "2 1"], "more than 0, the smaller first, got "),
        ("betas", ["0.9 1.5", "-0.1 0.9"], "at least 0 and less than 1, got "),
        ("lr", ["-0.1", "nan"], "at least 0, got "),
        ("warmup-lr", ["-1"], "at least 0, got "),
        ("cooldown-epochs", ["-1"], "at least 0, got "),
        ("weight-decay", ["-0.1"], "at least 0, got "),
        ("hflip", ["-0.1", "3"], "from 0 to 1, got "),
        ("mixup-prob", ["1.5"], "from 0 to 1, got "),
        ("mixup", ["-1"], "at least 0, got "),
        ("crop-pct", ["90", "1.01", "0", "-1", "nan"], "more than 0, at most 1, or none, got "),
        ("cutmix", ["-1"], "at least 0, got "),
        ("opt", ["adamww"], "timm has no optimizer 'adamww'; did you mean 'adamw'"),
        ("aa", ["rnd-m9", "rand-m9-q2", "rand-mx1", "augmix-x1", "rand-m1.5"], "no policy of timm, got "),
    ],
)
def test_values_out_of_range(name, wrong, message):
    for value in wrong:
        with pytest.raises(RunError, match=f"^{name.replace('-', '_')}: {message}"):
            parse_train(["--model", "resnet18", f"--{name}", *value.split()])


def test_names_of_timm_are_known():
    for flags in (
        ["--opt", "Lookahead_AdamW"], ["--opt", "timm_adamw"], ["--aa", "augmix-m5-w4"], ["--aa", "original-mstd0.5"],
        ["--recipe", "none"],
    ):  # fmt: skip
        assert parse_train(["--model", "resnet18", *flags])
    hint = get_type_hints(TrainConfig)["interpolation"]
    assert set(get_args(get_args(hint)[0])) == _str_to_torch_interpolation.keys()


def test_learning_rates_scale_with_the_total_batch():
    config = TrainConfig(lr=5e-4, warmup_lr=1e-6, min_lr=1e-5)
    assert config.learning_rates(1024) == {"lr": 1e-3, "warmup_lr": 1e-6, "min_lr": 1e-5}
    config.lr_scale_all = True
    assert config.learning_rates(1024) == {"lr": 1e-3, "warmup_lr": 2e-6, "min_lr": 2e-5}
    assert config.learning_rates(1)["min_lr"] == 1e-5 / 512
    config.lr_scale_all = False
    with pytest.raises(RunError, match=r"lr: at least min_lr, 1e-05, got 7.8125e-06 \(0.0005 for 512 .* to 8\); lower"):
        config.learning_rates(8)
    config.lr_batch = 0
    assert config.learning_rates(8) == {"lr": 5e-4, "warmup_lr": 1e-6, "min_lr": 1e-5}
    config.lr = 0.0
    with pytest.raises(RunError, match="lr: at least min_lr, 1e-05, got 0; lower --min-lr too"):
        config.learning_rates(1024)
    config.min_lr = 0.0
    assert config.learning_rates(1024)["lr"] == 0.0


def test_the_average_reaches_as_far_with_any_total_batch():
    config = TrainConfig(ema_decay=0.9996)
    assert config.averaging(1024) == {"ema_decay": 0.9996}
    config.ema_batch = 4096
    for total_batch in (512, 4096, 8192):  # what is left after equally many images
        assert config.averaging(total_batch)["ema_decay"] ** (2**20 // total_batch) == pytest.approx(0.9996**256)
    assert TrainConfig(ema_batch=4096).averaging(1024) == {}


def test_differences_leave_out_what_has_no_part_in_the_result():
    old = {"lr": 1.0, "workers": 4, "total_batch": 8, "train_images": 90, "val_images": 12}
    new = {"lr": 2.0, "workers": 8, "total_batch": 8, "train_images": 91, "val_images": 11}
    assert differences(old, new) == ["lr: 1.0 -> 2.0", "train_images: 90 -> 91"]


def test_evaluation_wants_something_to_evaluate():
    with pytest.raises(RunError, match="--checkpoint"):
        parse_eval([])
