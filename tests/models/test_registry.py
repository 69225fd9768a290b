"""YAML files: reading, registering, describing and rebuilding models."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.data import create_transform, resolve_data_config
from torchvision.transforms import CenterCrop, Resize

import flash_bla
from flash_bla.configs import config_path, load_yaml
from flash_bla.models import build_model, describe_model, read_config, register_config
from flash_bla.models.registry import FAMILIES

VITS = [f"{a}_vit_{s}" for a in ("linear", "focused", "pola", "mlla", "rala") for s in ("tiny", "small", "base")]
YAML = """family: vit
model: {img_size: 32, patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2, num_classes: 7, attention: [pola, softmax]}
recipe: deit
train: {lr: 5e-4}
"""


@pytest.fixture
def write(tmp_path):
    def write(text, name="model.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_packaged_models_are_registered():
    assert set(VITS) <= set(timm.list_models(module=list(FAMILIES)))
    assert set(timm.list_models(module=list(FAMILIES), include_tags=True)) >= set(VITS)
    for name in VITS:
        config = read_config(config_path(name))
        assert config.name == name and config.recipe == "deit" and name.startswith(config.args["attention"])
        assert timm.get_pretrained_cfg(name).architecture == name
        entrypoint = timm.model_entrypoint(name)
        assert (entrypoint.__name__, entrypoint.__module__) == (name, "flash_bla.models.vit")
        assert name in sys.modules["flash_bla.models.vit"].__all__


def test_no_weights_exist_and_that_is_said():
    assert not timm.list_pretrained("*pola_vit*")
    with pytest.raises(RuntimeError, match="No pretrained weights exist for pola_vit_tiny"):
        timm.create_model("pola_vit_tiny", pretrained=True)


def test_numbers_of_yaml(write):
    assert load_yaml(write("{a: 5e-4, b: -1E3, c: .5e2, d: 3, e: null, f: 1.5}")) == {
        "a": 5e-4, "b": -1000.0, "c": 50.0, "d": 3, "e": None, "f": 1.5,
    }  # fmt: skip


def test_user_model(write):
    path = write(YAML, "user_model_a.yaml")
    assert register_config(path) == register_config(str(path)) == "user_model_a"
    model = timm.create_model("user_model_a")
    assert model.default_cfg["input_size"] == (3, 32, 32) and model.num_classes == 7
    assert [type(block.attn).__name__ for block in model.blocks] == ["PolaLinearAttention", "SoftmaxAttention"]
    assert timm.create_model("user_model_a", depth=1, attention="rala", num_classes=3).num_classes == 3
    assert read_config(path).train == {"lr": 5e-4}

    path.write_text(YAML.replace("lr: 5e-4", "lr: 1e-3"))  # other training, same model
    assert register_config(path) == "user_model_a"
    path.write_text(YAML.replace("depth: 2", "depth: 3").replace("[pola, softmax]", "pola"))
    with pytest.raises(ValueError, match="defines another model 'user_model_a'; choose a new name"):
        register_config(path)


def test_packaged_file_copied_to_a_new_name(write):
    text = config_path("mlla_vit_tiny").read_text()
    assert register_config(write(text, "user_model_b.yaml")) == "user_model_b"
    assert register_config(write("name: user_model_c\n" + text)) == "user_model_c"
    assert register_config(write(text, "mlla_vit_tiny.yaml")) == "mlla_vit_tiny"  # the same model


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("family: vit\nmodl: {}", "model.yaml: unknown key 'modl'; did you mean 'model'"),
        ("family: vitt", "model.yaml: no family is called 'vitt'; did you mean 'vit'"),
        ("model: {}", "model.yaml: the key 'family' is missing"),
        (
            "family: vit\nmodel: {embed_dims: 64}",
            "model.yaml: model: unknown key 'embed_dims'; did you mean 'embed_dim'",
        ),
        ("family: vit\nmodel: {embed_dim: wide}", "model.yaml: model: embed_dim must be int, got 'wide'"),
        ("family: vit\nmodel: {depth: 1.5}", "model: depth must be int, got 1.5"),
        ("family: vit\nmodel: {class_token: 1}", "model: class_token must be bool, got 1"),
        ("family: vit\nmodel: {img_size: [32, 32, 3]}", r"img_size must be int \| tuple\[int, int\]"),
        ("family: vit\nmodel: {global_pool: mean}", "global_pool must be Literal"),
        ("family: vit\nmodel: {device: cpu}", "unknown key 'device'"),
        ("family: vit\nmodel: {attention: polaa}", "model.yaml: the model cannot be built: .*did you mean 'pola'"),
        ("family: vit\nmodel: {attention: [pola]}", "cannot be built: .*depth=12"),
        ("family: vit\nmodel: {global_pool: token}", "cannot be built: .*needs class_token"),
        ("family: vit\nmodel: [1]", r"model must be dict\[str, Any\] \| None"),
        ("family: vit\npretrained: {in1k: {urll: x}}", "pretrained: in1k: unknown key 'urll'; did you mean 'url'"),
        ("family: vit\npretrained: {in1k: 3}", r"pretrained: in1k must be dict\[str, Any\]"),
        ("family: vit\npretrained: {in1k: {reported_top1: high}}", "in1k: reported_top1 must be float, got 'high'"),
        ("family: vit\nname: a.b", "'a.b' is no name for a model"),
        ("family: vit\nname: pola_vit_tiny", "defines another model 'pola_vit_tiny'"),
        ("family: vit\nname: resnet18", "'resnet18' exists already"),
        ("family: vit\nname: Block", "'Block' exists already"),
        ("family: [", "model.yaml: not a YAML file"),
        ("- 1", "model.yaml: expected keys and values, found list"),
        ("", "model.yaml: expected keys and values, found NoneType"),
    ],
)
def test_bad_files(write, text, message):
    models = timm.list_models()
    with pytest.raises(ValueError, match=message):
        register_config(write(text))
    assert timm.list_models() == models


def test_missing_files():
    with pytest.raises(FileNotFoundError):
        register_config("no_such_file.yaml")
    with pytest.raises(ValueError, match="no config is called 'pola_vit_smal'; did you mean 'pola_vit_small'"):
        config_path("pola_vit_smal")


def test_describe_and_build(write):
    name = register_config(write(YAML, "user_model_d.yaml"))
    description = describe_model(name, num_classes=4, drop_path_rate=None)
    assert description["name"] == name and description["family"] == "vit"
    assert json.loads(json.dumps(description)) == description
    model = timm.create_model(name, num_classes=4)
    rebuilt = build_model(description)
    rebuilt.load_state_dict(model.state_dict())
    assert rebuilt.default_cfg["architecture"] == name and rebuilt.default_cfg["num_classes"] == 4
    assert build_model(description, num_classes=2, device="meta").num_classes == 2
    assert description["args"]["num_classes"] == 4

    description = describe_model("resnet18.a1_in1k", num_classes=3, in_chans=1)
    assert description == {"name": "resnet18.a1_in1k", "family": None, "args": {"num_classes": 3, "in_chans": 1}}
    assert build_model(description).num_classes == 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: describe_model("pola_vit_smal"), "no model is called 'pola_vit_smal'; did you mean 'pola_vit_small'"),
        (lambda: describe_model("pola_vit_small", attention_args={"alpha": torch.ones(1)}), "attention_args="),
        (lambda: build_model({"name": "x"}), "keys name, family and args"),
        (lambda: build_model({"name": "x", "family": "vot", "args": {}}), "no family is called 'vot'"),
    ],
)
def test_bad_descriptions(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_weights_of_another_model_are_refused(tmp_path):
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2}
    weights = timm.create_model("pola_vit_tiny", num_classes=10, **kwargs).state_dict()
    torch.save(weights, tmp_path / "weights.pth")
    source = {"file": str(tmp_path / "weights.pth"), "num_classes": 10}

    def load(name, **more):
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=source, **{**kwargs, **more})

    model = load("pola_vit_tiny", num_classes=3, img_size=48, in_chans=1)
    torch.testing.assert_close(model.blocks[0].attn.qkvg.weight, weights["blocks.0.attn.qkvg.weight"])
    for name, more in [("pola_vit_tiny", {"depth": 3}), ("pola_vit_tiny", {"depth": 1}), ("rala_vit_tiny", {})]:
        with pytest.raises(RuntimeError, match=f"these weights are not those of {name}: "):
            load(name, num_classes=3, **more)


def test_another_process_in_a_folder_with_models_of_its_own(write, tmp_path):
    """The package is imported from elsewhere; a YAML model is rebuilt without its YAML."""
    folder = tmp_path / "elsewhere"
    (folder / "models").mkdir(parents=True)
    (folder / "models" / "__init__.py").write_text("raise ImportError('not these models')")
    (folder / "configs").mkdir()
    name = register_config(path := write(YAML, "user_model_e.yaml"))
    state_dict = timm.create_model(name).state_dict()
    torch.save({"model": describe_model(name), "state_dict": state_dict}, folder / "checkpoint.pt")
    path.unlink()
    script = (
        "import torch, flash_bla.models as zoo\n"
        "checkpoint = torch.load('checkpoint.pt', weights_only=True)\n"
        "model = zoo.build_model(checkpoint['model'])\n"
        "model.load_state_dict(checkpoint['state_dict'])\n"
        "print(tuple(model(torch.zeros(1, 3, 40, 32)).shape))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(flash_bla.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == "(1, 7)", run.stderr


# Pretrained tags -----------------------------------------------------------------------------------------------------

OURS = timm.list_models(module=list(FAMILIES))  # before other tests register models of their own
TAGGED = [(name, tag) for name in OURS for tag in read_config(config_path(name)).pretrained if tag != "untrained"]
OFFICIAL = [
    "mlla_tiny", "mlla_small", "mlla_base", "flatten_pvt_tiny", "flatten_pvt_v2_b0", "flatten_swin_tiny",
    "flatten_swin_small", "flatten_swin_base", "flatten_swin_base_384", "flatten_cswin_tiny",
    "ravlt_tiny", "ravlt_small", "ravlt_base", "ravlt_large",
]  # fmt: skip


def test_models_with_an_official_file_are_pretrained():
    listed = {name for name in timm.list_pretrained() if name.split(".")[0] in OURS}
    assert listed == {f"{name}.in1k" for name in OFFICIAL}


@pytest.mark.parametrize(("name", "tag"), TAGGED)
def test_tags_say_where_the_weights_are_and_what_they_are(name, tag):
    cfg = timm.get_pretrained_cfg(f"{name}.{tag}")
    assert timm.get_pretrained_cfg(name) == cfg  # the default
    assert cfg.num_classes == 1000 and cfg.interpolation == "bicubic" and cfg.license
    figure = read_config(config_path(name)).pretrained[tag]["reported_top1"]
    assert cfg.notes == (f"top-1 accuracy reported by the paper: {figure} %",)
    place = cfg.url or cfg.hf_hub_filename and f"https://huggingface.co/{cfg.hf_hub_id}" or cfg.origin_url
    assert re.match(r"https://(cloud\.tsinghua\.edu\.cn/f/\w{20}/\?dl=1|huggingface\.co/\w+/\w+)$", place)


@pytest.mark.parametrize(
    ("name", "resized", "size"),
    [
        ("mlla_tiny", 256, 224), ("ravlt_tiny", 256, 224), ("flatten_pvt_tiny", (256, 256), 224),
        ("flatten_pvt_v2_b0", (256, 256), 224), ("pola_swin_tiny", (256, 256), 224),
        ("flatten_cswin_tiny", (256, 256), 224), ("pola_swin_base_384", (384, 384), 384),
        ("flatten_swin_base_384", (384, 384), 384), ("flatten_cswin_base_384", (438, 438), 384),
    ],
)  # fmt: skip
def test_images_are_resized_and_cropped_as_officially(name, resized, size):
    cfg = timm.get_pretrained_cfg(name).to_dict()
    steps = create_transform(**resolve_data_config({}, pretrained_cfg=cfg)).transforms
    resize, crop = (next(step for step in steps if isinstance(step, kind)) for kind in (Resize, CenterCrop))
    assert resize.size == resized and tuple(crop.size) == (size, size)
