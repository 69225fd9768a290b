"""Swin against timm's, and what is Swin's and CSWin's own; what all hierarchical backbones share is tested together."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from timm.models._features_fx import create_feature_extractor

from flash_bla.models.cswin import CSwinTransformer
from flash_bla.models.swin import SwinTransformer

SMALL = {"embed_dim": 8, "depths": (1, 2, 2, 2), "num_heads": (2, 2, 2, 4), "num_classes": 5}


def images(*size, batch=1, dtype=torch.float32):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1)).to(dtype)


def give_weights(ours, theirs):
    """Gives timm's Swin the weights of ours; its tables are smaller where the map is smaller than the window."""
    entries = {}
    for key, value in ours.state_dict().items():
        key = key.replace("stages.0.downsample.", "patch_embed.").replace("stages.", "layers.")
        if key.endswith("relative_position_bias_table"):
            attention = theirs.get_submodule(key.rpartition(".")[0])
            height, width = (2 * side - 1 for side in attention.window_size)
            side = math.isqrt(len(value))
            top, left = (side - height) // 2, (side - width) // 2
            value = value.view(side, side, -1)[top : top + height, left : left + width].flatten(0, 1)
        entries[key] = value
    theirs.load_state_dict(entries)


def randomize(model):
    """Tables and biases begin at nearly zero: make them matter."""
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "bias_table")):
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


@pytest.mark.parametrize("img_size", [(224, 224), (256, 320)])
def test_swin_tiny_is_that_of_timm(img_size):
    torch.manual_seed(0)
    options = {"depths": (2, 2, 2, 2), "dtype": torch.float64}
    ours = randomize(SwinTransformer(**options))
    name = "swin_tiny_patch4_window7_224"
    theirs = timm.create_model(name, img_size=img_size, strict_img_size=False, **options).eval()
    give_weights(ours, theirs)
    x = images(*img_size, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("img_size", [(128, 128), (96, 160), (64, 288), (100, 168)])
def test_small_swin_is_that_of_timm(img_size):
    """Maps that are padded, shifted, or smaller than the window, on one side or both."""
    torch.manual_seed(0)
    ours = randomize(SwinTransformer(window_size=4, dtype=torch.float64, **SMALL))
    padded = tuple(math.ceil(side / 4) * 4 for side in img_size)
    theirs = timm.models.SwinTransformer(
        img_size=padded, window_size=4, strict_img_size=False, drop_path_rate=0.0, dtype=torch.float64, **SMALL
    ).eval()
    give_weights(ours, theirs)
    x = images(*img_size, batch=2, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (SwinTransformer, {"attention": ["pola", "focused", "window", "window"]}),
        (CSwinTransformer, {"attention": ["focused_lepe", "pola", "cross_window", "cross_window"]}),
    ],
)
def test_weights_of_224_serve_other_sizes(cls, options):
    torch.manual_seed(0)
    option = "window_size" if cls is SwinTransformer else "split_size"
    entries = randomize(cls(**options, **SMALL)).state_dict()
    for size in (7, 12):
        model = cls(img_size=(320, 448), **{option: size}, **options, **SMALL)
        model.load_state_dict(entries)
        logits = model(images(320, 448))
        logits.square().sum().backward()
        assert logits.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters())

        resized = cls(**options, **SMALL)
        resized.load_state_dict(entries)
        resized.set_input_size((320, 448), size)
        torch.testing.assert_close(resized(images(320, 448)), logits)


def test_windows_by_stage():
    def sizes(model):
        return [stage.blocks[0].attn.window_size for stage in model.stages]

    assert sizes(SwinTransformer(window_size=(4, 8), **SMALL)) == [(4, 8)] * 4
    model = SwinTransformer(window_size=[8, 7, [4, 6], 3], **SMALL)
    assert sizes(model) == [(8, 8), (7, 7), (4, 6), (3, 3)]
    assert [block.attn.shift for block in model.stages[2].blocks] == [False, True]
    model.set_input_size(window_size=5)
    assert sizes(model) == [(5, 5)] * 4
    assert model(images(64, 96)).shape == (1, 5)
    model.prune_intermediate_layers([1])
    model.set_input_size(img_size=128, window_size=[6, 7, 7, 7][:2])
    assert sizes(model) == [(6, 7), (6, 7)]  # two numbers are a height and a width

    model = CSwinTransformer(split_size=[1, 2, 7, 7], **SMALL)
    assert [stage.blocks[0].attn.split_size for stage in model.stages] == [1, 2, 7, 7]
    model.set_input_size(split_size=3)
    assert [stage.blocks[0].attn.split_size for stage in model.stages] == [3] * 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: SwinTransformer(window_size=[7, 7, 7], **SMALL),
            r"window_size .* 4 of these, got \[7, 7, 7\]",
        ),
        (lambda: SwinTransformer(window_size=[7, 7, 7, 0], **SMALL), "window_size must be positive"),
        (lambda: CSwinTransformer(split_size=[7, 7], **SMALL), r"split_size must be .* 4 numbers, got \[7, 7\]"),
        (lambda: SwinTransformer(attention_args={"split_size": 3}, **SMALL), "option 'split_size'"),
    ],
)
def test_errors_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("cls", [SwinTransformer, CSwinTransformer])
def test_windows_in_every_stage_compile_and_trace(cls):
    torch.manual_seed(0)
    model = cls(**{**SMALL, "depths": (1, 2, 1, 1)}).eval()
    extractor = create_feature_extractor(model, {"stages.1": "map", "head": "logits"})
    for size in ((64, 96), (128, 100)):
        x = images(*size)
        logits = model(x)
        torch.testing.assert_close(extractor(x)["logits"], logits)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), logits)
