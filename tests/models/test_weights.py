"""Official files as they are, downloads, and files that are damaged, unsafe or of another model."""

from __future__ import annotations

import argparse
import http.server
import json
import os
import pickle
import re
import sys
import threading
import types
from collections import OrderedDict

import numpy as np
import pytest
import timm
import torch
from test_golden import FIXED, FOLDER, GOLDEN
from timm.models import PretrainedCfg, load_checkpoint, save_for_hf

import eval as eval_script
from flash_bla.engine.config import RunError, parse_eval
from flash_bla.models import register_config, weights

SMALL = {
    "img_size": 32, "embed_dims": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 4], "num_classes": 10,
}  # fmt: skip


def pvt(name: str = "pola_pvt_tiny", **kwargs) -> torch.nn.Module:
    """A small PVT in evaluation mode."""
    return timm.create_model(name, **(SMALL | kwargs)).eval()


def official(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a PVT under PolaFormer's names: joined otherwise, and with a final norm that is never used."""
    entries = {"norm.weight": torch.ones(32), "norm.bias": torch.zeros(32)}
    for key, value in model.state_dict().items():
        key = re.sub(r"^stages\.(\d)\.downsample\.pos_embed$", lambda match: f"pos_embed{int(match[1]) + 1}", key)
        key = re.sub(r"^stages\.(\d)\.downsample", lambda match: f"patch_embed{int(match[1]) + 1}", key)
        key = re.sub(r"^stages\.(\d)\.blocks", lambda match: f"block{int(match[1]) + 1}", key)
        key = key.replace("head.fc", "head")
        if ".qkvg." in key:
            q, k, v, gate = value.chunk(4)
            entries[key.replace(".qkvg.", ".qg.")] = torch.cat([q, gate])
            entries[key.replace(".qkvg.", ".kv.")] = torch.cat([k, v])
        else:
            entries[key] = value
    return entries


class Bomb:
    """Pickled code: makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Tests run in a folder of their own, with an empty cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def yacs(monkeypatch):
    """Makes a configuration as yacs pickles it; whoever constructs one on reading fails."""
    module = types.ModuleType("yacs.config")
    module.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})

    def save(content: dict, path: str) -> None:
        node = module.CfgNode(TRAIN=module.CfgNode(BASE_LR=5e-4), TAG="default", AMP=True)
        vars(node).update({"__immutable__": True, "__deprecated_keys__": set()})
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
            patch.setitem(sys.modules, "yacs.config", module)
            torch.save(content | {"config": node}, path)

    return save


@pytest.fixture
def save(yacs):
    """Saves entries as the official scripts do: Swin's and its descendants', or DeiT's and its descendants'."""

    def save(entries: dict, path: str = "official.pth", script: str = "swin", **more) -> str:
        optimizer = {"state": {0: {"step": 1, "exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 5e-4, "params": [0]}]}
        content = {"optimizer": optimizer, "lr_scheduler": {"values": [0.1]}, "epoch": 299, **more}
        if script == "swin":
            yacs({"model": entries, "max_accuracy": np.float64(78.8), "scaler": {"scale": 65536.0}, **content}, path)
        else:
            entries = {f"module.{key}": value for key, value in entries.items()}
            torch.save({"model": entries, "args": argparse.Namespace(lr=5e-4, data_set="IMNET"), **content}, path)
        return path

    return save


def assert_equal_outputs(first: torch.nn.Module, second: torch.nn.Module, size: int = 32, in_chans: int = 3) -> None:
    x = torch.randn(2, in_chans, size, size)
    assert torch.equal(first(x), second(x))


# Official files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["swin", "deit"])
def test_official_files_are_taken_as_they_are(save, script):
    source = pvt()
    file = save(official(source), script=script)
    overlay = {"file": file}
    assert_equal_outputs(pvt(checkpoint_path=file), source)
    loaded = pvt(pretrained=True, pretrained_cfg_overlay=overlay)
    assert_equal_outputs(loaded, source)
    assert "state_dict" not in loaded.pretrained_cfg  # they would be in the memory twice

    other = pvt(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(other.forward_features(x), source.forward_features(x)) and other(x).shape == (2, 3)
    grey = pvt(pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1)
    torch.testing.assert_close(grey(x[:, :1]), source(x[:, :1].expand(-1, 3, -1, -1)))
    features = pvt(pretrained=True, pretrained_cfg_overlay=overlay, features_only=True)(x)
    assert torch.equal(features[-1].permute(0, 2, 3, 1), source.forward_features(x))
    larger = pvt(checkpoint_path=file, img_size=64)  # its encodings are resampled, as the source does in each call
    torch.testing.assert_close(larger(torch.ones(1, 3, 64, 64)), source(torch.ones(1, 3, 64, 64)))


@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema"])
def test_the_averaged_weights_are_taken_unless_refused(save, key):
    raw, averaged = pvt(), pvt()
    file = save(official(raw), **{key: official(averaged)})
    assert_equal_outputs(pvt(checkpoint_path=file), averaged)
    assert_equal_outputs(pvt(pretrained=True, pretrained_cfg_overlay={"file": file}), averaged)
    model = pvt()
    load_checkpoint(model, file, use_ema=False)
    assert_equal_outputs(model, raw)
    for flag, wanted in (("--use-ema", averaged), ("--no-use-ema", raw)):
        arguments = {key: value for key, value in SMALL.items() if key != "num_classes"}
        flags = ["--model", "pola_pvt_tiny", "--model-kwargs", *(f"{key}={value}" for key, value in arguments.items())]
        flags += ["--num-classes", str(SMALL["num_classes"])]
        assert_equal_outputs(eval_script.load_model(parse_eval(["--checkpoint", file, flag, *flags]))[0].eval(), wanted)


def test_settings_are_read_as_plain_containers_even_if_yacs_is_installed(save, monkeypatch):
    save(official(pvt()))
    yacs = types.ModuleType("yacs.config")
    yacs.CfgNode = Bomb
    monkeypatch.setitem(sys.modules, "yacs.config", yacs)
    content = torch.load("official.pth", weights_only=True)
    assert type(content["config"]) is OrderedDict and content["config"]["TRAIN"] == {"BASE_LR": 5e-4}


def test_files_of_this_project(folder):
    source = pvt(num_classes=7)
    content = {"model": {"name": "x", "family": "pvt", "args": {}}, "state_dict": source.state_dict()}
    torch.save(content | {"state_dict_ema": None, "config": {}}, "own.pth")
    assert_equal_outputs(pvt(num_classes=7, checkpoint_path="own.pth"), source)
    for cfg in ({"file": "own.pth", "num_classes": 7}, PretrainedCfg(file="own.pth")):  # in place of the model's own
        assert_equal_outputs(pvt(num_classes=7, pretrained=True, pretrained_cfg=cfg), source)
    # The configuration says 1000 classes, but the head fits.
    loaded = pvt(num_classes=7, pretrained=True, pretrained_cfg_overlay={"file": "own.pth"})
    assert_equal_outputs(loaded, source)
    assert loaded.pretrained_cfg["num_classes"] == 7
    with pytest.raises(RuntimeError, match="size mismatch for head.fc.weight"):
        pvt(num_classes=1000, pretrained=True, pretrained_cfg_overlay={"file": "own.pth"})


@pytest.mark.filterwarnings("ignore:.*meta parameter")
@pytest.mark.parametrize("name", GOLDEN)
def test_an_official_file_of_every_family(save, name):
    with np.load(FOLDER / f"{name}.npz") as golden:
        shapes = json.loads(str(golden["entries"]))
    # One number for all of an entry's places keeps the file small; what the architecture fixes must not be taken.
    entries = {
        key: torch.tensor(float("nan") if key.rsplit(".", 1)[-1] in FIXED[:-1] else 0.5).expand(shape)
        for key, shape in shapes.items()
    }
    file = save(entries, model_ema=entries)
    loaded = timm.create_model(name, checkpoint_path=file).state_dict()
    assert not any(value.isnan().any() for value in loaded.values())
    config = {"pretrained": True, "pretrained_cfg_overlay": {"file": file}, "num_classes": 3, "device": "meta"}
    timm.create_model(name, in_chans=1, **config)
    sibling = name.replace("tiny", "small").replace("b0", "b1")
    with pytest.raises(RuntimeError, match=f"not those of {sibling}|size mismatch for stages"):
        timm.create_model(sibling, **config)
    with pytest.raises(RuntimeError, match="size mismatch for|[Mm]issing"):
        timm.create_model(sibling, checkpoint_path=file, device="meta")


# Files that do not fit, or are none ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("pola_pvt_tiny", {"depths": [1, 1, 1, 1]}),
        ("pola_pvt_tiny", {"depths": [1, 1, 3, 1]}),
        ("pola_pvt_tiny", {"embed_dims": [8, 16, 32, 32]}),
        ("flatten_pvt_tiny", {}),
    ],
)
def test_the_file_of_another_variant_is_an_error_that_lists_what_does_not_fit(save, name, change):
    file = save(official(pvt(name="pola_pvt_tiny")))
    names = "stages.2.(blocks|downsample)|qkvg|positional_encoding"
    for num_classes in (10, 3):
        with pytest.raises(RuntimeError, match=names):
            pvt(name, **change, pretrained=True, num_classes=num_classes, pretrained_cfg_overlay={"file": file})
    with pytest.raises(RuntimeError, match=names):
        pvt(name, **change, checkpoint_path=file)


def test_the_file_of_another_architecture_is_an_error(save):
    torch.save(timm.create_model("pit_ti_224").state_dict(), "other.pth")
    with pytest.raises(RuntimeError, match="(?s)Missing key.*Unexpected key.*transformers.0.blocks.0.attn.qkv"):
        pvt(checkpoint_path="other.pth")
    torch.save({"block1.0.attn.q.weight": torch.ones(8, 8)}, "other.pth")  # without the kv that it is joined with
    with pytest.raises(RuntimeError, match=re.escape("1 are unknown (stages.0.blocks.0.attn.q.weight)")) as error:
        pvt(pretrained=True, pretrained_cfg_overlay={"file": "other.pth"})
    assert "these weights are not those of pola_pvt_tiny" in str(error.value)


def harmed(file: str, harm: str) -> None:
    if harm == "truncated":
        os.truncate(file, os.path.getsize(file) // 2)
    elif harm == "empty":
        os.truncate(file, 0)
    elif harm == "bomb":
        torch.save(torch.load(file, weights_only=True) | {"bomb": Bomb()}, file)
    elif harm == "pickle":
        with open(file, "wb") as stream:
            pickle.dump(Bomb(), stream, protocol=2)


@pytest.mark.parametrize("harm", ["truncated", "empty", "bomb", "pickle"])
def test_bad_files_are_refused_and_never_executed(save, harm):
    file = save(official(pvt()))
    harmed(file, harm)
    with pytest.raises(RuntimeError, match=f"{file} is damaged, or no file of weights"):
        pvt(pretrained=True, pretrained_cfg_overlay={"file": file})
    with pytest.raises((RuntimeError, EOFError, OSError)):  # timm reads it before anything here could
        pvt(checkpoint_path=file)
    with pytest.raises(RunError, match=file):
        eval_script.main(["--checkpoint", file, "--model", "pola_pvt_tiny", "--device", "cpu"])
    assert not os.path.exists("exploded")
    pickle.loads(pickle.dumps(Bomb()))
    assert os.path.exists("exploded")  # the bomb is one


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match="no such file of weights: nowhere.pth"):
        pvt(pretrained=True, pretrained_cfg_overlay={"file": "nowhere.pth"})


# Downloads -----------------------------------------------------------------------------------------------------------


def test_without_network_the_error_says_what_to_do(monkeypatch):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(weights, "download_cached_file", offline)
    monkeypatch.setattr(weights, "download_from_hf", offline)
    for name, order in [
        ("mlla_tiny", "download https://cloud.tsinghua.edu.cn/f/7a19712877cb4242889c/?dl=1 as mlla_tiny.in1k.pth"),
        ("ravlt_small", "download RAVLT_S.pth from https://huggingface.co/aldjalkdf/RAVLT"),
        ("pola_swin_tiny", "get it from https://huggingface.co/ZachMeng/PolaFormer"),
    ]:
        with pytest.raises(RuntimeError) as error:
            timm.create_model(name, pretrained=True)
        message = str(error.value)
        assert order in message and f"create_model('{name}', checkpoint_path=PATH)" in message
        assert "pretrained=True, pretrained_cfg_overlay=dict(file=PATH)" in message
        assert ("OSError: no network" in message) == (name != "pola_swin_tiny")
    with pytest.raises(RuntimeError, match="No pretrained weights exist for pola_pvt_large"):
        timm.create_model("pola_pvt_large", pretrained=True)


@pytest.fixture
def server():
    """A server whose address has no name of a file in it, like the official ones: (address, its answers)."""
    answers = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answers.pop(0))

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}/f/0123456789/?dl=1", answers
        httpd.shutdown()
        thread.join()


def test_downloads(save, server, folder):
    address, answers = server
    source = pvt()
    file = save(official(source))
    arguments = {"pretrained": True, "pretrained_cfg_overlay": {"url": address, "origin_url": None, "num_classes": 10}}
    answers.append(b"<html>This link has expired</html>")
    with pytest.raises(RuntimeError, match=re.escape(f"download {address} as pola_pvt_tiny.in1k.pth")):
        pvt(**arguments)
    with open(file, "rb") as stream:
        answers.append(stream.read())  # the page is not taken from the cache
    assert_equal_outputs(pvt(**arguments), source)
    assert_equal_outputs(pvt(**arguments), source)  # from the cache: the server has nothing more to say
    assert (folder / "cache" / "hub" / "checkpoints" / "pola_pvt_tiny.in1k.pth").exists()
    answers.append((folder / file).read_bytes())
    assert_equal_outputs(pvt(**arguments, cache_dir=folder / "mine"), source)
    assert (folder / "mine" / "pola_pvt_tiny.in1k.pth").exists()


def test_downloads_from_the_hub(save, monkeypatch):
    source = pvt()
    file = save(official(source))
    calls = []
    monkeypatch.setattr(weights, "download_from_hf", lambda *call: calls.append(call) or file)
    overlay = {"hf_hub_id": "someone/something", "hf_hub_filename": "T.pth"}
    assert_equal_outputs(pvt(pretrained=True, pretrained_cfg_overlay=overlay), source)
    assert calls == [("someone/something", "T.pth", None)]


# Hugging Face's format, and eval.py ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("pola_pvt_tiny", {"embed_dims": [8, 16, 24, 32], "num_heads": [1, 2, 2, 4]}),
        ("flatten_pvt_v2_b0", {"embed_dims": [8, 16, 40, 64]}),
        ("flatten_swin_tiny", {"embed_dim": 12}),
        ("flatten_cswin_tiny", {"embed_dim": 16}),
        ("mlla_tiny", {"embed_dim": 16}),
        ("ravlt_tiny", {"embed_dims": [16, 32, 64, 128]}),
        ("pola_vit_tiny", {"embed_dim": 24, "depth": 2}),
    ],
)
def test_saved_for_the_hub_and_loaded_again(name, kwargs):
    kwargs = {**kwargs, "img_size": 64, "in_chans": 1, "num_classes": 5}
    source = timm.create_model(name, **kwargs).eval()
    save_for_hf(source, "saved", model_args=kwargs)  # timm 1.0.29 forgets arguments that it is not given
    loaded = timm.create_model("local-dir:saved", pretrained=True).eval()
    assert_equal_outputs(loaded, source, 64, 1)


def test_eval_takes_official_files(save, folder):
    (folder / "weights_pvt.yaml").write_text(
        "family: pvt\nmodel: {attention: pola, img_size: 32, embed_dims: [8, 16, 24, 32], depths: [1, 1, 2, 1], "
        "num_heads: [1, 2, 2, 4], num_classes: 10}\n"
    )
    (folder / "weights_pvt_deeper.yaml").write_text((folder / "weights_pvt.yaml").read_text().replace("2, 1]", "3, 1]"))
    register_config("weights_pvt.yaml")
    register_config("weights_pvt_deeper.yaml")
    flags = ["--dataset", "digits", "--device", "cpu", "--workers", "0", "--batch-size", "180"]
    results = {}
    for script, more in (("swin", {}), ("deit", {"model_ema": official(pvt())})):
        file = save(official(pvt()), f"{script}.pth", script, **more)
        for size in ("32", "48"):
            (results[script, size],) = eval_script.main(
                ["--checkpoint", file, "--model", "weights_pvt", "--img-size", size, *flags]
            )
    assert [result["weights"] for result in results.values()] == ["model", "model", "ema", "ema"]
    assert all(result["images"] == 360 for result in results.values())
    assert results["swin", "48"]["input_size"] == [3, 48, 48]
    with pytest.raises(RunError, match="(?s)swin.pth is the checkpoint of another model.*stages.2.blocks.2"):
        eval_script.main(["--checkpoint", "swin.pth", "--model", "weights_pvt_deeper", *flags])
    with pytest.raises(RunError, match="does not say which model it is of: name it with --model"):
        eval_script.main(["--checkpoint", "swin.pth", *flags])
