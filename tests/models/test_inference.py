"""Models fused for inference against the models themselves."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.utils import prune

from flash_bla.models import fuse_for_inference
from tests.models.test_hierarchical import SMALL

TINY = {
    **SMALL,
    "pola_vit_tiny": {"depth": 2, "embed_dim": 16, "num_heads": 2, "class_token": True},
    "linear_vit_tiny": {"depth": 1, "embed_dim": 32, "num_heads": 2, "conv_stem": True},
}


def create(name: str, **kwargs) -> nn.Module:
    """A model whose constants are not those that it starts with."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{"img_size": 64, "num_classes": 5, **TINY[name], **kwargs})
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if key.endswith(("scale", "power", "encoding", "gamma_1", "gamma_2", "running_mean", "bias")):
            nn.init.normal_(tensor, std=0.5)
        elif key.endswith("running_var") or (tensor.ndim == 1 and tensor.is_floating_point()):
            nn.init.uniform_(tensor, 0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize("name", TINY)
def test_outputs_are_those_of_the_model(name):
    model = create(name, dtype=torch.float64)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fused = fuse_for_inference(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    for size in ((64, 64), (96, 65)):
        images = torch.randn(2, 3, *size, dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(fused(images), model(images), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", TINY)
def test_half_precision(name, dtype):
    model = create(name)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, logits = model(images), fuse_for_inference(model, dtype)(images.to(dtype))
    assert logits.dtype == dtype
    assert (logits - expected).norm() <= 32 * torch.finfo(dtype).eps * expected.norm()


@pytest.mark.parametrize("name", ["pola_pvt_tiny", "mlla_tiny", "ravlt_tiny"])
def test_what_is_folded(name):
    """The entries that are gone: those of BatchNorm, layer scale and PolaFormer's scale."""
    model = create(name)
    gone = {key.rsplit(".", 1)[1] for key in model.state_dict().keys() - fuse_for_inference(model).state_dict().keys()}
    norms = {"running_mean", "running_var", "num_batches_tracked", "weight", "bias"}
    own = {"pola_pvt_tiny": {"scale"}, "mlla_tiny": norms, "ravlt_tiny": {*norms, "gamma_1", "gamma_2"}}
    assert gone - {"bias"} == own[name] - {"bias"}


@pytest.mark.parametrize("name", ["pola_pvt_tiny", "ravlt_tiny"])
def test_replaced_linear_layers_stay(name):
    class Adapter(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.linear = linear

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) + 1.0

    model = create(name, dtype=torch.float64)
    for module in list(model.modules()):
        for key in ("qkvg", "proj", "fc2"):
            if isinstance(getattr(module, key, None), nn.Linear):
                setattr(module, key, Adapter(getattr(module, key)))
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(fuse_for_inference(model)(images), model(images), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d])
@pytest.mark.parametrize("name", TINY)
def test_pruned_layers_stay(name, kind):
    """Hooks compute their weights from others in each call."""
    model = create(name, dtype=torch.float64)
    for module in list(model.modules()):
        if isinstance(module, kind):
            prune.l1_unstructured(module, "weight", 0.3)
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = model(images)  # and weights without a graph, which copies cannot have
        torch.testing.assert_close(fuse_for_inference(model)(images), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", TINY)
def test_once_more_and_by_timm_nothing_is_folded(name):
    """timm's ``reparameterize_model`` replaces what has a method ``fuse`` by what that returns."""
    model = create(name, dtype=torch.float64)
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    fused = fuse_for_inference(model)
    with torch.no_grad():
        assert torch.equal(fuse_for_inference(fused)(images), fused(images))
        assert torch.equal(reparameterize_model(model)(images), model(images))
