"""LinFusion for Stable Diffusion 1.5, 2.1 and XL: its tables on the meta device, and tiny UNets in pipelines."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import accelerate
from diffusers import DiffusionPipeline, UNet2DConditionModel, UNet2DModel
from tiny_pipelines import tiny_pipeline, tiny_unet

import distill_linfusion
from flash_bla.models import LinFusion
from flash_bla.models.linfusion import PUBLISHED_WEIGHTS

torch.set_num_threads(1)

# --- the published models ---------------------------------------------------------------------------------------------

SD = {"block_out_channels": (320, 640, 1280, 1280)}
XL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
}
# The UNets' public configurations; and (block, attentions, transformer blocks in each, width, heads) in the order of
# their modules: the middle comes last.
UNETS = {
    "Yuanshi/LinFusion-1-5": (
        {**SD, "cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64},
        [("down_blocks.0", 2, 1, 320, 8), ("down_blocks.1", 2, 1, 640, 8), ("down_blocks.2", 2, 1, 1280, 8),
         ("up_blocks.1", 3, 1, 1280, 8), ("up_blocks.2", 3, 1, 640, 8), ("up_blocks.3", 3, 1, 320, 8),
         ("mid_block", 1, 1, 1280, 8)],
        16,
    ),
    "Yuanshi/LinFusion-2-1": (
        {**SD, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True,
         "upcast_attention": True, "sample_size": 96},
        [("down_blocks.0", 2, 1, 320, 5), ("down_blocks.1", 2, 1, 640, 10), ("down_blocks.2", 2, 1, 1280, 20),
         ("up_blocks.1", 3, 1, 1280, 20), ("up_blocks.2", 3, 1, 640, 10), ("up_blocks.3", 3, 1, 320, 5),
         ("mid_block", 1, 1, 1280, 20)],
        16,
    ),
    "Yuanshi/LinFusion-XL": (
        XL,
        [("down_blocks.1", 2, 2, 640, 10), ("down_blocks.2", 2, 10, 1280, 20), ("up_blocks.0", 3, 10, 1280, 20),
         ("up_blocks.1", 3, 2, 640, 10), ("mid_block", 1, 10, 1280, 20)],
        70,
    ),
}  # fmt: skip


def official_entries(width, mid):
    """Names and shapes in the state dict of one attention of the official code."""
    entries = {f"to_{x}.weight": (width, width) for x in "qkv"}
    entries |= {"to_out.0.weight": (width, width), "to_out.0.bias": (width,)}
    for x in "qk":
        entries |= {f"to_{x}_.0.weight": (mid, width), f"to_{x}_.0.bias": (mid,)}
        entries |= {f"to_{x}_.1.weight": (mid,), f"to_{x}_.1.bias": (mid,)}
        entries |= {f"to_{x}_.3.weight": (width, mid), f"to_{x}_.3.bias": (width,)}
    return entries


def shapes(model):
    return {name: tuple(entry.shape) for name, entry in model.state_dict().items()}


@pytest.mark.parametrize("weights", UNETS)
def test_modules_and_entries_of_the_published_models(weights):
    config, blocks, count = UNETS[weights]
    expected = [
        (f"{block}.attentions.{i}.transformer_blocks.{j}.attn1", width, heads)
        for block, attentions, depth, width, heads in blocks
        for i in range(attentions)
        for j in range(depth)
    ]
    assert len(expected) == count
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
        modules = LinFusion.get_default_config(unet=unet)["modules_list"]
        assert modules == [
            {"module_name": name, "dim_n": width, "heads": heads, "projection_mid_dim": None}
            for name, width, heads in expected
        ]
        originals = {name: module for name, module in unet.named_modules() if name.endswith("attn1")}
        linfusion = LinFusion.construct_for(unet=unet, load_pretrained=False)
    assert shapes(linfusion) == {
        f"{i}.{entry}": shape
        for i, (_, width, _) in enumerate(expected)
        for entry, shape in official_entries(width, width).items()
    }
    for i, (name, _, heads) in enumerate(expected):
        assert unet.get_submodule(name) is linfusion.get_submodule(str(i))
        assert unet.get_submodule(name).num_heads == heads
    linfusion.unmount()
    assert all(unet.get_submodule(name) is module for name, module in originals.items())


def test_width_of_the_projections():
    config = LinFusion.get_default_config(unet=tiny_unet("sd"))
    first, second = config["modules_list"][:2]
    first["projection_mid_dim"], second["projection_mid_dim"] = 3, -1
    entries = shapes(LinFusion(**config))
    assert official_entries(8, 3).items() <= {k[2:]: v for k, v in entries.items() if k.startswith("0.")}.items()
    assert not any(name.startswith(("1.to_q_", "1.to_k_")) for name in entries)


def test_attention_to_the_text_stays():
    """The UNet of the upscaler attends to the text in attn1 too, but for its middle."""
    (module,) = LinFusion.get_default_config(unet=tiny_unet("sd", only_cross_attention=True))["modules_list"]
    assert module["module_name"] == "mid_block.attentions.0.transformer_blocks.0.attn1"


def test_weights_are_known_for_each_of_the_three():
    names = {"stable-diffusion-v1-5": "1-5", "stable-diffusion-2-1": "2-1", "stable-diffusion-xl-base-1.0": "XL"}
    for pipeline, version in names.items():
        found = {weights for name, weights in PUBLISHED_WEIGHTS.items() if name.endswith(f"/{pipeline}")}
        assert found == {f"Yuanshi/LinFusion-{version}"}
    assert set(PUBLISHED_WEIGHTS.values()) == set(UNETS)


# --- in pipelines -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["sd", "xl"])
def pipeline(request, tmp_path):
    return tiny_pipeline(request.param, tmp_path)


def image(pipeline):
    generator = torch.Generator().manual_seed(1)
    return pipeline("a cat", num_inference_steps=2, generator=generator, output_type="pt").images


def test_text_to_image_and_back(pipeline):
    first = image(pipeline)
    linfusion = LinFusion.construct_for(pipeline, load_pretrained=False)
    mounted = image(pipeline)
    assert first.shape == mounted.shape == (1, 3, 16, 16) and mounted.isfinite().all()
    assert (mounted - first).abs().max() > 1e-3
    linfusion.unmount()
    assert torch.equal(image(pipeline), first)
    linfusion.unmount()  # nothing left to do
    linfusion.mount_to(pipeline.unet)
    assert torch.equal(image(pipeline), mounted)


def test_attention_slicing(pipeline):
    first = image(pipeline)
    pipeline.enable_attention_slicing("max")
    linfusion = LinFusion.construct_for(pipeline, load_pretrained=False)
    sliced = image(pipeline)
    pipeline.disable_attention_slicing()
    whole = image(pipeline)
    pipeline.enable_attention_slicing("auto")
    torch.testing.assert_close(image(pipeline), sliced, rtol=0, atol=1e-4)
    torch.testing.assert_close(whole, sliced, rtol=0, atol=1e-4)
    linfusion.unmount()
    pipeline.disable_attention_slicing()
    assert torch.equal(image(pipeline), first)


def test_saved_and_loaded(pipeline, tmp_path, monkeypatch):
    linfusion = LinFusion.construct_for(pipeline, load_pretrained=False)
    mounted = image(pipeline)
    linfusion.save_pretrained(tmp_path / "linfusion")
    linfusion.unmount()
    assert {path.name for path in (tmp_path / "linfusion").iterdir()} == {
        "config.json", "diffusion_pytorch_model.safetensors"
    }  # fmt: skip
    loaded = LinFusion.from_pretrained(tmp_path / "linfusion")
    assert loaded.config.modules_list == linfusion.config.modules_list and not loaded.training
    loaded.mount_to(pipeline)
    assert torch.equal(image(pipeline), mounted)
    loaded.unmount()

    # by its place, by the pipeline's name, and by the name that it is said to have
    monkeypatch.setitem(PUBLISHED_WEIGHTS, "someone/pipeline", str(tmp_path / "linfusion"))
    LinFusion.construct_for(unet=pipeline.unet, pretrained_model_name_or_path=tmp_path / "linfusion").unmount()
    LinFusion.construct_for(pipeline, pipe_name_path="someone/pipeline").unmount()
    pipeline.register_to_config(_name_or_path="someone/pipeline")
    LinFusion.construct_for(pipeline)
    assert torch.equal(image(pipeline), mounted)


def test_device_and_type_follow_the_unet():
    unet = tiny_unet("sd").to(torch.bfloat16)
    linfusion = LinFusion.construct_for(unet=unet, load_pretrained=False)
    assert linfusion.dtype == torch.bfloat16
    call = (torch.randn(1, 4, 6, 10, dtype=torch.bfloat16), 3, torch.randn(1, 5, 16, dtype=torch.bfloat16))
    assert unet(*call).sample.dtype == torch.bfloat16
    unet.to("meta")
    linfusion.unmount()
    assert {(p.device.type, p.dtype) for p in unet.parameters()} == {("meta", torch.bfloat16)}


def test_offloaded_weights_are_not_lost():
    """Accelerate's hooks keep the weights of an offloaded UNet, where only they find them, and fetch those of mounted
    modules as they are called."""
    unet = tiny_unet("sd")
    call = torch.randn(1, 4, 6, 10), 3, torch.randn(1, 5, 16)
    before = unet(*call).sample
    linfusion = LinFusion.construct_for(unet=unet, load_pretrained=False)
    mounted = unet(*call).sample
    accelerate.cpu_offload(unet, execution_device=torch.device("cpu"))
    torch.testing.assert_close(unet(*call).sample, mounted)
    with pytest.raises(ValueError, match="Accelerate's hooks keep the UNet's weights elsewhere"):
        linfusion.unmount()
    accelerate.hooks.remove_hook_from_module(unet, recurse=True)
    linfusion.unmount()
    assert torch.equal(unet(*call).sample, before)
    accelerate.cpu_offload(unet, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="Accelerate's hooks keep the UNet's weights elsewhere"):
        linfusion.mount_to(unet=unet)


def test_float16_at_16384_tokens():
    unet = tiny_unet("sd").half().requires_grad_(False)
    LinFusion.construct_for(unet=unet, load_pretrained=False)
    outputs = []
    attention = unet.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn1")
    attention.register_forward_hook(lambda module, args, output: outputs.append((args[0].shape[1], output)))
    sample = 30 * torch.randn(1, 4, 128, 128).half()
    assert unet(sample, 3, torch.randn(1, 5, 16).half()).sample.isfinite().all()
    ((tokens, output),) = outputs
    assert tokens == 16_384 and output.isfinite().all()


def test_compiles():
    unet = tiny_unet("sd").requires_grad_(False)
    block = unet.get_submodule("mid_block.attentions.0.transformer_blocks.0")
    call = torch.randn(1, 12, 16), None, torch.randn(1, 5, 16)  # tokens, no mask, text
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    first = compiled(*call)
    # The wrapper of the whole UNet has other names for its modules.
    linfusion = LinFusion.construct_for(unet=torch.compile(unet), load_pretrained=False)
    mounted = block(*call)
    assert (mounted - first).abs().max() > 1e-3
    torch.testing.assert_close(compiled(*call), mounted)
    linfusion.unmount()
    torch.testing.assert_close(compiled(*call), first)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_unets_that_cannot_be_taken():
    without = UNet2DModel(
        block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4
    )
    with pytest.raises(ValueError, match="attn1; UNet2DModel has none"):
        LinFusion.construct_for(unet=without)
    for call in ({}, {"pipeline": object()}):
        with pytest.raises(ValueError, match="needs a pipeline that has a unet, or unet=..., got"):
            LinFusion.construct_for(**call)
    unet = tiny_unet("sd")
    linfusion = LinFusion.construct_for(unet=unet, load_pretrained=False)
    with pytest.raises(ValueError, match="a LinFusion is mounted in this UNet2DConditionModel already"):
        LinFusion.construct_for(unet=unet, load_pretrained=False)
    with pytest.raises(ValueError, match="this LinFusion is mounted already"):
        linfusion.mount_to(unet=tiny_unet("sd"))


def test_weights_for_another_unet_say_what_differs(tmp_path):
    unet = tiny_unet("sd")
    originals = dict(unet.named_modules())
    LinFusion(**LinFusion.get_default_config(unet=tiny_unet("xl"))).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is for another UNet; modules differ") as error:
        LinFusion.construct_for(unet=unet, pretrained_model_name_or_path=tmp_path)
    message = str(error.value)
    name = "attentions.0.transformer_blocks.0.attn1"
    assert f"down_blocks.1.{name} (width 16 in 2 heads here, none in the UNet)" in message
    assert message.endswith(" and 2 more") and "mid_block.attentions.0.transformer_blocks.0" not in message

    # the same names and shapes, as of Stable Diffusion 1.5 and 2.1, in other heads; and one module more
    config = LinFusion.get_default_config(unet=unet)
    config["modules_list"][0]["heads"] = 4
    with pytest.raises(
        ValueError, match=rf"differ: down_blocks.0.{name} \(width 8 in 4 heads here, width 8 in 2 heads"
    ):
        LinFusion(**config).mount_to(unet)
    config = LinFusion.get_default_config(unet=unet)
    del config["modules_list"][0]
    with pytest.raises(
        ValueError, match=rf"differ: down_blocks.0.{name} \(none here, width 8 in 2 heads in the UNet\)"
    ):
        LinFusion(**config).mount_to(unet)
    assert originals == dict(unet.named_modules())


def test_pipelines_without_known_weights(tmp_path):
    pipeline = tiny_pipeline("sd", tmp_path)
    with pytest.raises(ValueError, match="no LinFusion weights are known for the pipeline None: give pretrained_model"):
        LinFusion.construct_for(pipeline)
    with pytest.raises(ValueError, match="'Lykon/dreamshaper-9'.*did you mean 'Lykon/dreamshaper-8'"):
        LinFusion.construct_for(pipeline, pipe_name_path="Lykon/dreamshaper-9")
    with pytest.raises(ValueError, match="no LinFusion weights are known"):
        LinFusion.construct_for(unet=pipeline.unet)


def test_without_diffusers(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.delitem(sys.modules, "flash_bla.models.linfusion")
    with pytest.raises(ImportError, match=re.escape('LinFusion needs diffusers: pip install "flash-bla[diffusion]"')):
        from flash_bla.models import LinFusion  # noqa: F401
    with pytest.raises(ImportError, match="cannot import name 'Linfusion'"):
        from flash_bla.models import Linfusion  # noqa: F401


# --- distillation -----------------------------------------------------------------------------------------------------


def test_distillation(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "pipeline")
    (tmp_path / "data").mkdir()
    for i, name in enumerate(("cat", "dog")):
        Image.fromarray(np.full((20, 24, 3), 80 * i, np.uint8)).save(tmp_path / "data" / f"{name}.png")
        (tmp_path / "data" / f"{name}.txt").write_text(f"a {name}\n")
    run = ["--pipeline", str(tmp_path / "pipeline"), "--data-dir", str(tmp_path / "data"), "--save-every", "1"]
    run += ["--output", str(tmp_path / "linfusion"), "--batch-size", "2", "--workers", "0", "--device", "cpu"]
    torch.manual_seed(0)
    history = distill_linfusion.main([*run, "--steps", "12", "--lr", "3e-3"])
    assert set(history[0]) == {"noise", "output", "features"}
    assert history[-1]["features"] < 0.7 * history[0]["features"]

    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    LinFusion.construct_for(pipeline, pretrained_model_name_or_path=tmp_path / "linfusion")
    assert image(pipeline).isfinite().all()
    (more,) = distill_linfusion.main([*run, "--steps", "1", "--weights", str(tmp_path / "linfusion"), "--bf16"])
    assert more["features"] < 0.8 * history[0]["features"]


def test_distillation_needs_captions(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "cat.png")
    with pytest.raises(SystemExit, match=r"no pictures with captions in .*: cat.jpg needs a cat.txt beside it"):
        distill_linfusion.CaptionedPictures(str(tmp_path), 4)
