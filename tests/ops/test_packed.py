"""Queries, keys and values in one tensor: the results are those of three, and their gradients are one tensor, too."""

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from flash_bla import linear_attention, linear_attention_qkvpacked
from flash_bla.layers import create_attention
from flash_bla.ops import focusing_power, signed_power
from flash_bla.ops.triton_linear_attention import linear_attention_forward
from tests.ops.cases import DEVICE, TOLERANCE, VARIANTS, assert_close, forward_backward, make_inputs

pytest.importorskip("triton")

NAMES = ["elu1", "elu1_rope_weighted", "elu1_rope_softmax", "focusing_power_encoded", "signed_power"]


def packed(q, k, v, **options):
    """``linear_attention`` by way of the packed function."""
    qkv = torch.stack([x.transpose(1, 2) for x in (q, k, v)], dim=2)
    return linear_attention_qkvpacked(qkv, **options).transpose(1, 2)


@pytest.mark.parametrize("shape", [(2, 3, 20, 20, 16, 16), (1, 2, 150, 150, 24, 24)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_equals_three_tensors_bit_for_bit(name, shape):
    inputs = make_inputs(shape, VARIANTS[name], torch.bfloat16)
    leaves, rope, do = inputs
    # with the same strides: a stack is what the packed function gets
    leaves |= dict(zip("qkv", torch.stack([leaves[x] for x in "qkv"]).permute(1, 3, 0, 2, 4).contiguous()
                       .permute(2, 0, 3, 1, 4).unbind(0), strict=True))  # fmt: skip
    expected = forward_backward(linear_attention, VARIANTS[name], inputs, backend="triton")
    results = forward_backward(packed, VARIANTS[name], inputs, backend="triton")
    assert all(torch.equal(results[key], expected[key]) for key in expected)


# the last with values so wide that they are cut
@pytest.mark.parametrize("shape", [(2, 3, 20, 20, 16, 16), (1, 1, 20, 20, 256, 256)], ids=str)
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_equals_reference(backend, shape):
    inputs = make_inputs(shape, VARIANTS["elu1"], torch.float32)
    expected = forward_backward(linear_attention, VARIANTS["elu1"], inputs, torch.float64, backend="reference")
    results = forward_backward(packed, VARIANTS["elu1"], inputs, backend=backend)
    assert_close(results, expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("feature_map", ["elu1", "focusing_power", "signed_power"])
def test_gradient_is_one_tensor(feature_map):
    parameter = torch.full((2, 16), 1.5, device=DEVICE)
    make = {"focusing_power": focusing_power, "signed_power": signed_power}.get(feature_map)
    phi = feature_map if make is None else make(parameter)
    qkv = torch.randn(1, 20, 3, 2, 16, device=DEVICE, requires_grad=True)
    o = linear_attention_qkvpacked(qkv, feature_map=phi, backend="triton")
    assert o.is_contiguous()
    (gradient,) = torch.autograd.grad(o.sum(), qkv)
    assert gradient.is_contiguous() and gradient.untyped_storage().nbytes() == 4 * gradient.numel()


class Calls(TorchDispatchMode):
    """Notes the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["linear", "focused", "pola", "mlla", "rala"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_layers_put_no_gradients_together(name, compiled, monkeypatch):
    monkeypatch.setenv("FLASH_BLA_BACKEND", "triton")
    attention = create_attention(name, 32, 2, offer={"grid_size": (3, 4)}, device=DEVICE)
    x = torch.randn(2, 12, 32, device=DEVICE, requires_grad=True)
    calls = Calls()

    def record(graph, inputs):
        calls.names.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    if compiled:
        torch._dynamo.reset()
        backend = aot_autograd(fw_compiler=lambda graph, inputs: graph, bw_compiler=record)
        torch.compile(attention, fullgraph=True, backend=backend)(x, (3, 4)).sum().backward()
    else:
        y = attention(x, (3, 4)).sum()
        with calls:
            y.backward()
    assert any("flash_bla.linear_attention" in call for call in calls.names) == compiled
    puts_together = ("aten.cat", "aten.stack", "aten.slice_backward", "aten.select_backward")
    assert calls.names and not [call for call in calls.names if call.startswith(puts_together)]


@pytest.mark.parametrize("name", ["elu1_rope_softmax", "focusing_power_encoded"])
def test_opcheck(name):
    variant = VARIANTS[name]
    leaves, rope, _ = make_inputs((1, 2, 20, 20, 16, 16), variant, torch.float32)
    leaves = {key: x.to(DEVICE) for key, x in leaves.items()}
    rope = None if rope is None else rope.to(DEVICE)
    qkv = torch.stack([leaves[x].transpose(1, 2) for x in "qkv"], dim=2).requires_grad_()
    torch.library.opcheck(
        linear_attention_forward,
        (qkv, None, None, None, None, leaves.get("parameter"), None, leaves.get("key_encoding"), rope, None, 0,
         variant.feature_map, 3, True, None, 1e-6, variant.softmax),
    )  # fmt: skip


def test_errors():
    x = torch.rand(2, 8, 3, 4, 16)
    with pytest.raises(ValueError, match=r"qkv must have 5 dimensions \(B, N, 3, H, D\), got \(2, 8, 4, 16\)"):
        linear_attention_qkvpacked(x[:, :, 0])
    with pytest.raises(ValueError, match=r"qkv must have shape .* got \(2, 8, 2, 4, 16\)"):
        linear_attention_qkvpacked(x[:, :, :2])
