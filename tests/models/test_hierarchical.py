"""The hierarchical backbones: what timm asks of a model, at any image size, with any attention in any stage."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.models._features_fx import create_feature_extractor
from timm.utils import ModelEmaV3
from torch._dynamo.testing import CompileCounter

import flash_bla.models  # noqa: F401
from flash_bla.layers.position import resample_encoding
from flash_bla.models import hierarchical

# One small instance of each family: heads of different widths, two blocks where blocks alternate.
SMALL = {
    "pola_pvt_tiny": {"embed_dims": (16, 24, 32, 48), "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 3)},
    "flatten_pvt_v2_b0": {"embed_dims": (16, 24, 32, 48), "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 3)},
    "pola_swin_tiny": {"embed_dim": 8, "depths": (1, 1, 2, 2), "num_heads": (1, 2, 2, 4), "window_size": 3},
    "flatten_cswin_tiny": {"embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 4), "split_size": 3},
    "mlla_tiny": {"embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 4)},
    "ravlt_tiny": {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 4)},
}
NAMES = list(SMALL)


def create(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **{"img_size": 96, "num_classes": 5, **SMALL[name], **kwargs}).eval()


def images(*size, batch=2, dtype=None):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1)).to(dtype)


def widths(model):
    return [info["num_chs"] for info in model.feature_info]


@pytest.mark.parametrize("name", NAMES)
def test_default_cfg(name):
    cfg = timm.create_model(name, device="meta").default_cfg
    assert cfg["input_size"] == (3, 224, 224) and cfg["pool_size"] == (7, 7) and cfg["num_classes"] == 1000
    assert timm.create_model(name, device="meta", img_size=320).default_cfg["input_size"] == (3, 224, 224)  # as timm's
    entries = create(name).state_dict()
    assert f"{cfg['first_conv']}.weight" in entries and f"{cfg['classifier']}.weight" in entries
    assert timm.data.resolve_data_config({}, model=timm.create_model(name, device="meta"))["crop_pct"] == 0.875
    with pytest.raises(TypeError, match="no_such_argument"):
        timm.create_model(name, no_such_argument=1)


@pytest.mark.parametrize("name", NAMES)
def test_features(name):
    model, x = create(name), images(64, 97)
    grids = [(16, 25), (8, 13), (4, 7), (2, 4)]
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    assert final.shape == (2, 2, 4, model.num_features)
    assert [tuple(y.shape) for y in maps] == [(2, dim, *grid) for dim, grid in zip(widths(model), grids, strict=True)]
    assert [info["reduction"] for info in model.feature_info] == [4, 8, 16, 32]
    normed = model.forward_intermediates(x, 1, norm=True, output_fmt="NHWC", intermediates_only=True)
    torch.testing.assert_close(normed[0], final)
    early, second = model.forward_intermediates(x, [1], stop_early=True)
    torch.testing.assert_close(second[0], maps[1])
    torch.testing.assert_close(early.permute(0, 3, 1, 2), maps[1])
    with pytest.raises(ValueError, match="NHWC"):
        model.forward_intermediates(x, output_fmt="NLC")

    extractor = create(name, features_only=True, out_indices=(0, 2))
    for actual, expected in zip(extractor(x), maps[::2], strict=True):
        torch.testing.assert_close(actual, expected)
    assert extractor.feature_info.channels() == widths(model)[::2] and extractor.feature_info.reduction() == [4, 16]

    pruned = copy.deepcopy(model)
    assert pruned.prune_intermediate_layers([1]) == [1] and len(pruned.stages) == 2
    torch.testing.assert_close(pruned(x), maps[1].permute(0, 2, 3, 1))
    pruned.reset_classifier(3, "avg")
    assert pruned(x).shape == (2, 3)


@pytest.mark.parametrize("name", NAMES)
def test_reset_classifier(name):
    model, x = create(name), images(64, 64)
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean(dim=(1, 2)))
    assert pooled.shape == (2, model.head_hidden_size) and model.get_classifier().in_features == model.head_hidden_size
    model.reset_classifier(7)
    assert model(x).shape == (2, 7) and model.num_classes == 7
    model.reset_classifier(3, "catavgmax")
    assert model(x).shape == (2, 3) and model.head_hidden_size == 2 * model.num_features
    model.reset_classifier(0, "avg")
    torch.testing.assert_close(model(x), pooled)
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), features)
    headless = create(name, num_classes=0, global_pool="")
    headless.load_state_dict(model.state_dict())
    torch.testing.assert_close(headless(x), features)


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_keeps_the_gradients(name):
    plain, saving, x = create(name), create(name), images(64, 64)
    saving.set_grad_checkpointing()
    for model in (plain, saving):
        model(x).square().sum().backward()
    for (key, expected), actual in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert expected.grad is not None, key
        torch.testing.assert_close(actual.grad, expected.grad, msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_parameter_groups(name):
    model = create(name)
    names = {key for key, _ in model.named_parameters()}
    for coarse, layers in ((True, 4 + 2), (False, sum(SMALL[name]["depths"]) + 2)):  # stem and head
        groups = group_parameters(model, model.group_matcher(coarse=coarse))
        assert {key for group in groups.values() for key in group} == names and len(groups) == layers
    assert model.no_weight_decay() == {key for key in names if "relative_position_bias_table" in key}
    average = ModelEmaV3(model, decay=0.5)
    average.update(model)
    torch.testing.assert_close(average.module(images(64, 64)), model(images(64, 64)))


@pytest.mark.parametrize("name", NAMES)
def test_images_of_any_size(name):
    model = create(name).train()
    for size in ((32, 32), (33, 70), (96, 64)):
        model.zero_grad()
        loss = model(images(*size)).square().sum()
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    for size in ((16, 16), (64, 31)):
        with pytest.raises(ValueError, match=rf"at least 32x32.*\({size[0]}, {size[1]}\)"):
            model(images(*size))
    with pytest.raises(ValueError, match="shape"):
        model(images(64, 64)[0])


@pytest.mark.parametrize("name", NAMES)
def test_another_input_size(name):
    """Weights of one size serve another: resampled in the call, by ``set_input_size``, and on loading."""
    model, x = create(name), images(64, 128)
    expected = model(x)
    loaded = create(name, img_size=(64, 128))
    loaded.load_state_dict(model.state_dict())
    torch.testing.assert_close(loaded(x), expected, rtol=1e-4, atol=1e-5)
    model.set_input_size((64, 128))
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["pola_pvt_tiny", "flatten_pvt_v2_b0", "pola_swin_tiny", "flatten_cswin_tiny"])
def test_resampled_encodings_follow_a_smooth_function(name):
    def smooth(height, width):
        y, x = ((torch.arange(n) + 0.5) / n for n in (height, width))
        return torch.cos(3 * y)[:, None] + torch.sin(2 * x)[None] + 1

    model = timm.create_model(name, depths=(1, 1, 1, 1))
    state_dict = model.state_dict()
    encodings = [key for key in state_dict if key.endswith(("pos_embed", "positional_encoding"))]
    for key in encodings:
        side = math.isqrt(state_dict[key].shape[1])
        state_dict[key] = smooth(side, side).flatten()[None, :, None].expand_as(state_dict[key])
    large = timm.create_model(name, depths=(1, 1, 1, 1), img_size=(320, 448))
    large.load_state_dict(state_dict)
    assert encodings
    for key, encoding in large.state_dict().items():
        if key in encodings:
            grid = hierarchical.stage_grids((320, 448))[int(key.split(".")[1])]
            expected = smooth(*grid).flatten()[None, :, None].expand_as(encoding)
            assert (encoding - expected).norm() <= 0.02 * expected.norm(), key
    logits = large(images(320, 448, batch=1))
    logits.sum().backward()
    assert torch.isfinite(logits).all() and all(torch.isfinite(p.grad).all() for p in large.parameters())


@pytest.mark.parametrize("attention", ["linear", "focused", "pola", "mlla", "rala", "softmax", "window"])
@pytest.mark.parametrize("name", NAMES)
def test_any_attention_in_any_family(name, attention):
    attentions = [attention, "linear", attention, "softmax"]
    model, x = create(name, attention=attentions, num_heads=(1, 1, 2, 2)), images(64, 64)
    assert type(model.stages[0].blocks[0].attn) is type(model.stages[2].blocks[0].attn)
    model(x).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_bad_arguments(name):
    with pytest.raises(ValueError, match="'pola'"):
        create(name, attention="polar")
    with pytest.raises(ValueError, match="list of 4 names, got 3"):
        create(name, attention=["linear"] * 3)
    with pytest.raises(ValueError, match="kernel"):
        create(name, attention="linear", attention_args={"kernel_sizes": 3})


@pytest.mark.parametrize("name", NAMES)
def test_torch_fx_extracts_features(name):
    model, x = create(name), images(64, 64)
    extractor = create_feature_extractor(model, {"stages.0": "first", "stages.3": "last"})
    torch.testing.assert_close(extractor(x)["last"], model.stages(x.permute(0, 2, 3, 1)))
    assert extractor(images(96, 64))["first"].shape[1:3] == (24, 16)


@pytest.mark.parametrize("name", NAMES)
def test_dtype_and_device_at_construction(name):
    model = create(name, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(images(64, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert create(name, device="meta")(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(create(name)(images(64, 64))).all()


@pytest.mark.parametrize("name", NAMES)
def test_compile_and_export(name):
    model, x = create(name, depths=(1, 0, 0, 1)), images(64, 64)  # a block with the attention of the first stages
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), expected)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", NAMES)
def test_traces(name):
    model = create(name)
    for size in ((96, 96), (64, 97)):  # that of the encodings, and one that is padded
        traced = torch.jit.trace(model, images(*size, batch=1))  # traces twice and compares
        torch.testing.assert_close(traced(images(*size)), model(images(*size)))


def test_a_short_side_pads_and_a_grid_rounds_up():
    assert hierarchical.stage_grids((65, 130)) == [(17, 33), (9, 17), (5, 9), (3, 5)]
    x = torch.ones(1, 5, 6, 2)
    padded = hierarchical.pad_to_multiple(x, 4, 3)
    assert padded.shape == (1, 8, 6, 2) and padded.sum() == x.sum()
    encoding = torch.randn(1, 12, 3)
    assert resample_encoding(encoding, (3, 4), (3, 4)) is encoding


def test_one_graph_pads_maps_of_any_size():
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(lambda x: hierarchical.pad_to_multiple(x, 2) + 1, backend=counter)
    for height in range(4, 12):
        for width in range(4, 12, 3):
            x = torch.zeros(1, height, width, 2)
            assert compiled(x).shape == hierarchical.pad_to_multiple(x, 2).shape
    assert counter.frame_count <= 4  # the first size, then sizes in general: with one side fixed, and with none
