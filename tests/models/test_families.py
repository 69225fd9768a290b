"""What PVTv2, MLLA and RAVLT have of their own; what all hierarchical backbones share is in test_hierarchical.py."""

from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch
from timm.models.pvt_v2 import PyramidVisionTransformerV2 as TimmPyramidVisionTransformerV2
from timm.optim import param_groups_weight_decay
from torch import nn

from flash_bla.layers import DepthwiseConv, Linear, MambaLikeLinearAttention
from flash_bla.models.mlla import MLLA, MambaLikeBlock
from flash_bla.models.pvtv2 import PyramidVisionTransformerV2
from flash_bla.models.ravlt import RAVLT
from flash_bla.ops.triton_support import HAS_TRITON
from tests.ops.cases import DEVICE

WIDTHS = {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 4)}
SMALL = {
    PyramidVisionTransformerV2: WIDTHS,
    MLLA: {"embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 4)},
    RAVLT: {**WIDTHS, "head_hidden_size": 48},
}


def create(family, **kwargs):
    torch.manual_seed(0)
    return family(**{"img_size": 64, "num_classes": 5, **SMALL[family], **kwargs}).eval()


def images(*size, batch=2, dtype=None):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1), dtype=dtype)


def test_pvtv2_with_softmax_attention_is_timms():
    options = {**WIDTHS, "num_classes": 5, "dtype": torch.float64}
    expected = TimmPyramidVisionTransformerV2(sr_ratios=(1, 1, 1, 1), **options).eval()
    model = PyramidVisionTransformerV2(attention="softmax", **options).eval()
    for parameter in expected.parameters():
        nn.init.normal_(parameter, std=0.3)
    state_dict = expected.state_dict()
    model.load_state_dict({key.replace("patch_embed.", "stages.0.downsample."): state_dict[key] for key in state_dict})
    x, x_expected = (images(70, 45, dtype=torch.float64).requires_grad_() for _ in range(2))
    actual, wanted = model(x), expected(x_expected)
    torch.testing.assert_close(actual, wanted)
    actual.sum().backward()
    wanted.sum().backward()
    torch.testing.assert_close(x.grad, x_expected.grad)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("family", [MLLA, RAVLT])
def test_gradients_of_one_image(family, train, layout):
    """Against differences of the loss: for no layout of the image does BatchNorm err as test_golden.py tells."""
    model = create(family, dtype=torch.float64).train(train)
    x = images(64, 96, batch=1, dtype=torch.float64).contiguous(memory_format=layout)
    weights = torch.randn(5, dtype=torch.float64)

    def loss():
        return (model(x) * weights).sum()

    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss(), parameters)
    directions = [torch.randn_like(p) for p in parameters]
    step = 1e-7
    with torch.no_grad():
        losses = []
        for shift in (step, -2 * step):
            torch._foreach_add_(parameters, directions, alpha=shift)
            losses.append(loss())
    expected = (losses[0] - losses[1]) / (2 * step)
    actual = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", SMALL)
def test_tokens_are_channels_last_in_memory(family):
    model, seen = create(family), []
    for stage in model.stages:
        for block in stage.blocks:
            block.register_forward_pre_hook(lambda module, args: seen.append(args[0].is_contiguous()))
    model(images(64, 96))
    assert len(seen) == 5 and all(seen)


@pytest.mark.parametrize("family", SMALL)
def test_own_entries_pass_the_filter_unchanged(family):
    model = create(family)
    state_dict = model.state_dict()
    filtered = model._checkpoint_filter_fn(state_dict, model)
    assert filtered.keys() == state_dict.keys()
    assert all(torch.equal(filtered[key], value) for key, value in state_dict.items())


@pytest.mark.parametrize("family", SMALL)
def test_rates_of_dropout(family):
    model = create(family, drop_path_rate=0.4, proj_drop_rate=0.1, attn_drop_rate=0.2, attention="softmax")
    blocks = [block for stage in model.stages for block in stage.blocks]
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert rates == [getattr(block.drop_path2, "drop_prob", 0.0) for block in blocks]
    for block in blocks:
        assert {m.p for m in block.mlp.modules() if isinstance(m, nn.Dropout)} == {0.1}
        assert (block.attn.attn_drop.p, block.attn.proj_drop.p) == (0.2, 0.1)


def test_initial_convolutions():
    for conv in (m for m in create(PyramidVisionTransformerV2).modules() if isinstance(m, nn.Conv2d)):
        fan_out = math.prod(conv.kernel_size) * conv.out_channels // conv.groups
        assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.25)
        assert conv.bias.abs().max() == 0
    for conv in (m for m in create(RAVLT).modules() if isinstance(m, nn.Conv2d)):
        assert conv.weight.std().item() == pytest.approx(0.02, rel=0.25)
        assert conv.bias.abs().max() == 0


def test_layer_scale_of_ravlt():
    init_values = (1.0, 0.5, 1e-2, 1e-6)
    model = create(RAVLT, init_values=init_values)
    decayed = {
        id(p) for group in param_groups_weight_decay(model, 0.05) if group["weight_decay"] for p in group["params"]
    }
    for stage, init_value, dim in zip(model.stages, init_values, WIDTHS["embed_dims"], strict=True):
        for block in stage.blocks:
            for gamma in (block.gamma_1, block.gamma_2):
                assert gamma.shape == (1, 1, dim) and torch.all(gamma == init_value) and id(gamma) in decayed


def test_head_of_ravlt():
    model, x = create(RAVLT), images(64, 64)
    assert model.num_features == model.head_hidden_size == model.get_classifier().in_features == 48
    assert [info["num_chs"] for info in model.feature_info] == [8, 16, 24, 32]
    features, maps = model.forward_intermediates(x, [3], norm=True)
    assert features.shape == (2, 2, 2, 48)
    torch.testing.assert_close(maps[0], features.permute(0, 3, 1, 2))
    logits = model(x)

    model.prune_intermediate_layers([3], prune_head=False)  # there is nothing to prune
    torch.testing.assert_close(model(x), logits)
    model.prune_intermediate_layers([3], prune_norm=True, prune_head=False)  # the classifier read what the norm gave
    assert model.num_classes == 0 and model.num_features == 32 and model(x).shape == (2, 2, 2, 32)
    model.reset_classifier(3, "avg")
    assert model(x).shape == (2, 3)


@pytest.mark.parametrize("name", [
    "cpe1", "norm1", "act_proj", "in_proj", "dwc", "attn", "attn.qk", "attn.lepe", "out_proj", "cpe2", "norm2", "mlp",
    "mlp.fc1", "mlp.fc2", "mlp.drop",
])  # fmt: skip
def test_layers_with_hooks_are_called(name):
    """And give what the block's halves do, which read their parameters alone."""
    block, calls = MambaLikeBlock(16, 2, "mlla", {}, dtype=torch.float64), []
    x = torch.randn(2, 13, 16, dtype=torch.float64)
    expected = block(x, (3, 4))
    block.get_submodule(name).register_forward_hook(lambda *arguments: calls.append(arguments))
    torch.testing.assert_close(block(x, (3, 4)), expected)
    assert len(calls) == 1


def test_dropout_alone_may_train():
    """As in Monte Carlo dropout."""
    block = MambaLikeBlock(16, 2, "mlla", {}, proj_drop=0.5).eval()
    block.mlp.drop.train()
    x = torch.randn(2, 13, 16)
    assert not torch.equal(block(x, (3, 4)), block(x, (3, 4)))


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_a_wider_attention_trains_in_mixed_precision(monkeypatch):
    block = MambaLikeBlock(16, 2, "mlla", {}).to(DEVICE)
    block.act_proj, block.in_proj, block.out_proj = (Linear(*sizes) for sizes in ((16, 32), (16, 32), (32, 16)))
    block.dwc, block.attn = DepthwiseConv(32, 3), MambaLikeLinearAttention(32, 2)
    block.to(DEVICE)
    x = torch.randn(2, 13, 16, device=DEVICE)
    expected = deepcopy(block).double()(x.double(), (3, 4))
    monkeypatch.setenv("FLASH_BLA_BACKEND", "triton")
    with torch.autocast(DEVICE, torch.bfloat16):
        y = block(x, (3, 4))
    assert (y.double() - expected).norm() <= 2e-2 * expected.norm()
    y.float().sum().backward()
    assert all(parameter.grad is not None for parameter in block.parameters())
