"""The plain vision transformers: what timm asks of a model, at any image size, for every attention."""

from __future__ import annotations

import copy
import fnmatch
import math

import pytest
import timm
import torch
from timm.models import group_parameters
from torch.export import Dim

import flash_bla.models  # noqa: F401
from flash_bla.models.vit import VisionTransformer

ATTENTIONS = ["linear", "focused", "pola", "mlla", "rala"]
NAMES = [f"{attention}_vit_tiny" for attention in ATTENTIONS]
PREFIX = {"class_token": True, "reg_tokens": 2}


def create(name, **kwargs):
    torch.manual_seed(0)
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_classes": 5, **kwargs}
    return timm.create_model(name, **kwargs).eval()


def images(*size, batch=2):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("linear_vit_tiny", 5717032),  # timm's vit_tiny_patch16_224 less its class token and one position: 5717416
        ("linear_vit_small", 22049896),
        ("linear_vit_base", 86566120),
        ("focused_vit_tiny", 6190888),
        ("pola_vit_small", 24756328),
        ("mlla_vit_base", 72484072),
        ("rala_vit_base", 93892840),
    ],
)
def test_parameters(name, parameters):
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.blocks) == 12 and model.patch_embed.patch_size == (16, 16)


@pytest.mark.parametrize("name", NAMES)
def test_default_cfg_and_feature_info(name):
    model = create(name)
    cfg = timm.create_model(name, device="meta").default_cfg
    assert cfg["input_size"] == (3, 224, 224) and cfg["num_classes"] == 1000 and cfg["architecture"] == name
    state_dict = model.state_dict()
    assert f"{cfg['classifier']}.weight" in state_dict and f"{cfg['first_conv']}.weight" in state_dict
    assert model.feature_info == [{"module": f"blocks.{i}", "num_chs": 48, "reduction": 8} for i in range(2)]
    assert model.num_features == model.head_hidden_size == 48
    assert timm.data.resolve_data_config(model=timm.create_model(name, device="meta"))["mean"] == cfg["mean"]


@pytest.mark.parametrize("name", NAMES)
def test_parameter_groups(name):
    model = create(name, **PREFIX)
    names = {key for key, _ in model.named_parameters()}
    groups = group_parameters(model, model.group_matcher(coarse=False))
    assert {key for group in groups.values() for key in group} == names and len(groups) == 4  # stem, 2 blocks, head
    for pattern in model.no_weight_decay():
        exists = any(fnmatch.fnmatch(key, pattern) for key in names)
        assert exists or getattr(model, pattern, None) is None
    assert {"pos_embed", "cls_token", "reg_token"} <= model.no_weight_decay()


@pytest.mark.parametrize("kwargs", [{}, PREFIX, {**PREFIX, "no_embed_class": True, "global_pool": "token"}])
@pytest.mark.parametrize("name", NAMES)
def test_intermediates_are_the_features(name, kwargs):
    model, x = create(name, **kwargs), images(32, 48)
    features = model.forward_features(x)
    prefix = model.num_prefix_tokens
    assert features.shape == (2, prefix + 24, 48)
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(final, features)
    assert [tuple(y.shape) for y in maps] == [(2, 48, 4, 6)] * 2
    tokens, prefix_tokens = (
        model.forward_intermediates(
            x, indices=[1], norm=True, output_fmt="NLC", return_prefix_tokens=True, output_dict=True
        )["image_intermediates"],
        features[:, :prefix],
    )
    torch.testing.assert_close(torch.cat([prefix_tokens, tokens[0]], dim=1), features)
    torch.testing.assert_close(model.forward_intermediates(x, 1, stop_early=True, intermediates_only=True)[0], maps[1])
    torch.testing.assert_close(model.get_intermediate_layers(x, n=1, reshape=True)[0], maps[1])
    pairs = model.forward_intermediates(x, return_prefix_tokens=True, intermediates_only=True)
    assert not prefix or pairs[0][1].shape == (2, prefix, 48)
    with pytest.raises(ValueError, match="NCHW"):
        model.forward_intermediates(x, output_fmt="NHWC")

    extractor = create(name, features_only=True, out_indices=[0, 1], **kwargs)
    for actual, expected in zip(extractor(x), maps, strict=True):
        torch.testing.assert_close(actual, expected)
    assert extractor.feature_info.channels() == [48, 48] and extractor.feature_info.reduction() == [8, 8]

    pruned = copy.deepcopy(model)
    assert pruned.prune_intermediate_layers([0], prune_norm=True) == [0]
    assert len(pruned.blocks) == 1 and pruned.num_classes == 0
    torch.testing.assert_close(pruned.forward_intermediates(x, [0], intermediates_only=True)[0], maps[0])


@pytest.mark.parametrize("name", NAMES)
def test_reset_classifier(name):
    model, x = create(name, **PREFIX), images(32, 32)
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(7)
    assert model(x).shape == (2, 7) and model.get_classifier().out_features == 7
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), pooled)
    model.reset_classifier(3, "token")
    assert model(x).shape == (2, 3)


@pytest.mark.parametrize("kwargs", [{}, PREFIX, {**PREFIX, "no_embed_class": True}])
@pytest.mark.parametrize("name", NAMES)
def test_any_input_size(name, kwargs):
    model = create(name, **kwargs)
    with torch.no_grad():  # encodings begin at zero: make them matter
        for key, parameter in model.named_parameters():
            if "pos" in key:
                parameter.normal_()
    for size in [(40, 56), (24, 72), (8, 8), (30, 35), (5, 20)]:
        x = images(*size)
        logits = model(x)
        assert logits.shape == (2, 5) and logits.isfinite().all()
        resized = copy.deepcopy(model).requires_grad_(False)
        resized.set_input_size(img_size=size)
        assert not any(p.requires_grad for p in resized.parameters())
        grid = tuple(math.ceil(side / 8) for side in size)
        assert resized.patch_embed.grid_size == grid
        for block in resized.blocks:
            assert getattr(block.attn, "grid_size", grid) == grid
        torch.testing.assert_close(resized(x), logits)

        other = create(name, **{**kwargs, "img_size": size})
        if size != (24, 72):  # 27 tokens, not 16: but one grid of 27 tokens is as good as another
            other.load_state_dict(model.state_dict())
            torch.testing.assert_close(other(x), resized(x))


def test_224_takes_336_by_448():
    model = timm.create_model("pola_vit_tiny", depth=1, num_classes=2).eval()
    logits = model(images(336, 448, batch=1))
    model.set_input_size((336, 448))
    assert model.pos_embed.shape == model.blocks[0].attn.positional_encoding.shape == (1, 21 * 28, 192)
    torch.testing.assert_close(model(images(336, 448, batch=1)), logits)


def test_set_input_size_keeps_what_fits():
    model = create("pola_vit_tiny")
    before = dict(model.named_parameters())
    model.set_input_size(32)
    assert all(before[key] is parameter for key, parameter in model.named_parameters())
    with torch.no_grad():
        model.pos_embed.normal_()
    expected = model(images(16, 64))
    model.set_input_size((16, 64))  # as many tokens, in another grid
    torch.testing.assert_close(model(images(16, 64)), expected)
    model.set_input_size(patch_size=4)
    assert model.patch_embed.grid_size == model.blocks[0].attn.grid_size == (4, 16)


def test_padding_gives_zeros_at_the_right_and_below():
    model, x = create("rala_vit_tiny"), images(30, 35)
    torch.testing.assert_close(model(x), model(torch.nn.functional.pad(x, (0, 5, 0, 2))))


def test_state_dict_of_another_size_loads_under_a_prefix():
    small, large = create("focused_vit_tiny", **PREFIX), create("focused_vit_tiny", img_size=48, **PREFIX)
    torch.nn.Sequential(large).load_state_dict({f"0.{key}": value for key, value in small.state_dict().items()})
    expected = copy.deepcopy(small)
    expected.set_input_size(48)
    for (key, value), wanted in zip(large.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(value, wanted, msg=key)
    with pytest.raises(RuntimeError, match="size mismatch for pos_embed"):
        create("focused_vit_tiny").load_state_dict(create("focused_vit_tiny", img_size=(32, 48)).state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing(name):
    gradients = []
    for enable in (False, True):
        model = create(name, drop_path_rate=0.1, init_values=0.1, **PREFIX).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(2)
        (model(images(32, 40)).square().sum() + model.forward_intermediates(images(32, 32))[0].sum()).backward()
        gradients.append({key: p.grad for key, p in model.named_parameters()})
        assert all(grad is not None and grad.isfinite().all() for grad in gradients[-1].values())
    for key, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], grad, msg=key)


def test_attention_by_block():
    attention = ["pola", "pola", "softmax"]
    model = create(
        "linear_vit_tiny",
        depth=3,
        attention=attention,
        attention_args={"alpha": 2.0, "kernel_size": 3},
        attn_drop_rate=0.1,
        proj_drop_rate=0.2,
        qkv_bias=False,
        **PREFIX,
    )
    kinds = [type(block.attn).__name__ for block in model.blocks]
    assert kinds == ["PolaLinearAttention", "PolaLinearAttention", "SoftmaxAttention"]
    pola, softmax = model.blocks[0].attn, model.blocks[2].attn
    assert (pola.alpha, pola.dwc.kernel_size, pola.proj_drop.p, pola.qkvg.bias) == (2.0, (3, 3), 0.2, None)
    assert (softmax.attn_drop.p, softmax.proj_drop.p, softmax.qkv.bias) == (0.1, 0.2, None)
    assert model(images(40, 32)).shape == (2, 5)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"attention": "polar"}, ValueError, "no attention is called 'polar'; did you mean 'pola'"),
        ({"attention": ["pola"]}, ValueError, "list of depth=2 names, got 1"),
        ({"attention_args": {"alhpa": 1}}, ValueError, "option 'alhpa'; did you mean 'alpha'"),
        ({"global_pool": "token"}, ValueError, "needs class_token=True"),
        ({"num_heads": 5}, ValueError, "dim=48 cannot be divided into 5 heads"),
        ({"not_an_argument": 1}, TypeError, "not_an_argument"),
    ],
)
def test_errors(kwargs, error, message):
    with pytest.raises(error, match=message):
        create("pola_vit_tiny", **kwargs)


@pytest.mark.parametrize("name", NAMES)
def test_devices_and_types(name):
    model = create(name, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    assert model(images(32, 40).to("meta", torch.bfloat16)).shape == (2, 5)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    model.init_weights()
    logits = model(images(32, 40).bfloat16())
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()

    model, x = create(name), images(32, 40)
    expected = model(x)
    torch.testing.assert_close(copy.deepcopy(model).double()(x.double()).float(), expected, rtol=1e-3, atol=1e-4)
    half = copy.deepcopy(model).bfloat16()(x.bfloat16())
    torch.testing.assert_close(half.float(), expected, rtol=0.1, atol=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(x).float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", ["pola_vit_tiny", "rala_vit_tiny"])  # learned and rotary encodings
def test_compile_trains_at_every_size(name):
    torch._dynamo.reset()
    model = create(name, depth=1, class_token=True)
    # Inductor without its code generation.
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager_decomp_partition")
    for size in [(32, 32), (20, 64), (40, 40)]:
        x = images(*size)
        gradients = []
        for f in (model, compiled):
            model.zero_grad()
            loss = f(x).square().mean()
            loss.backward()
            gradients.append([loss, *(p.grad.clone() for p in model.parameters())])
        for expected, actual in zip(*gradients, strict=True):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", NAMES)
def test_export_takes_every_size(name):
    model = create(name, depth=1, class_token=True)
    shapes = {"x": {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}}
    exported = torch.export.export(model, (images(32, 40),), dynamic_shapes=shapes).module()
    for x in (images(32, 40), images(32, 32, batch=3), images(50, 23, batch=1)):
        torch.testing.assert_close(exported(x), model(x))


@pytest.mark.parametrize("name", NAMES)
def test_fx_features(name):
    model, x = create(name, class_token=True), images(32, 40)
    extractor = timm.models.create_feature_extractor(model, {"blocks.0": "block", "head": "logits"})
    torch.testing.assert_close(extractor(x)["logits"], model(x))


def test_copies_are_independent():
    model = create("pola_vit_tiny")
    clone = copy.deepcopy(model)
    clone.set_input_size(48)
    assert model.patch_embed.grid_size == model.blocks[0].attn.grid_size == (4, 4)
    model.load_state_dict(clone.state_dict())  # the copy's hooks and the original's each know their own grid
    clone.load_state_dict(model.state_dict())
    assert clone.pos_embed.shape[1] == 36 and model.pos_embed.shape[1] == 16


def test_a_convolutional_stem():
    """Three convolutions of stride 2 for patches of 8, four of stride 1 around them, and one of 1 x 1."""
    model = create("pola_vit_tiny", conv_stem=True)
    stem = model.patch_embed
    shapes = {key: tuple(value.shape) for key, value in stem.named_parameters() if value.ndim == 4}
    widths = [(6, 3), (12, 6), (12, 12), (24, 12), (24, 24), (48, 24), (48, 48)]
    assert list(shapes.values()) == [*((*width, 3, 3) for width in widths), (48, 48, 1, 1)]
    x = images(32, 32)
    y = x
    layers = [stem.proj, *stem.convs]
    for place, (conv, norm) in enumerate(zip(layers[:-1:3], layers[1::3], strict=True)):
        y = torch.conv2d(y, conv.weight, stride=1 + place % 2, padding=1)
        mean, scale = norm.running_mean, norm.weight / (norm.running_var + norm.eps).sqrt()
        y = ((y - mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]).clamp(min=0)
    expected = torch.einsum("bchw,dc->bhwd", y, stem.convs[-1].weight[:, :, 0, 0]) + stem.convs[-1].bias
    torch.testing.assert_close(stem(x), expected, atol=1e-5, rtol=1e-4)

    padded = torch.zeros(2, 3, 48, 40)
    padded[:, :, :41, :38] = images(41, 38)
    torch.testing.assert_close(model(padded[:, :, :41, :38]), model(padded))
    model.set_input_size(64)
    assert stem.grid_size == (8, 8) and model(images(64, 64)).shape == (2, 5)
    assert f"{model.pretrained_cfg['first_conv']}.weight" in model.state_dict()
    groups = group_parameters(model, model.group_matcher(coarse=False))
    assert {key for group in groups.values() for key in group} == {key for key, _ in model.named_parameters()}
    with pytest.raises(ValueError, match="patch_size of a conv_stem stays"):
        model.set_input_size(patch_size=4)
    for kwargs in ({"patch_size": 6}, {"patch_size": 1}, {"patch_size": (4, 8)}, {"embed_dim": 50, "num_heads": 2}):
        with pytest.raises(ValueError, match="conv_stem halves"):
            create("pola_vit_tiny", conv_stem=True, **kwargs)


def test_direct_construction():
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, attention="mlla")
    assert model(images(32, 32)).shape == (2, 1000)
