"""A new length compiles nothing: what Triton specialises kernels for is the same at every length of a route."""

import pytest
import torch

from flash_bla import decoupled_la, linear_attention_dwc, simple_la, varlen_linear_attention
from flash_bla.ops import focusing_power, linear_attention, signed_power, triton_support
from flash_bla.ops.triton_support import HAS_TRITON, META, Record
from tests.ops.cases import VARIANTS, make_inputs

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")

B, H, D = 3, 3, 64
ROUTES = [(48, 49, 50, 63), (196, 197, 201), (3136, 3137)]  # one tile, one launch for all of a sequence, several
MAPS = {"focusing_power": focusing_power, "signed_power": signed_power}


def specialization(launch):
    """What another value of makes Triton compile the kernel again, as its launcher computes it."""
    kernel = launch.kernel
    ignored = getattr(kernel, "do_not_specialize", None) or getattr(kernel, "kwargs", {}).get("do_not_specialize") or ()
    starts = {place: start for place, _, start in launch.pointers}
    key = [kernel.__name__, *launch.options.items()]
    for place, (name, value) in enumerate(zip(kernel.arg_names, launch.values, strict=True)):
        if isinstance(value, torch.Tensor):
            key.append((name, value.dtype, name in ignored or starts[place] % 16 == 0))
        elif name[0].isupper() or value is None:  # a constant of compilation
            key.append((name, str(value)))
        else:  # of tuples all elements count
            values, every = (value, False) if isinstance(value, tuple) else ((value,), name in ignored)
            key.append((name, *((type(x), every or (x == 1, isinstance(x, int) and x % 16 == 0)) for x in values)))
    return tuple(key)


@pytest.fixture
def keys(monkeypatch):
    """The specialisations of all launches of what is called on meta tensors."""
    keys = set()

    class Noting(Record):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            keys.update(specialization(launch) for launch in self.launches)

        def replay(self, tensors, pointers):
            tensors += [torch.empty_like(tensors[i], memory_format=torch.contiguous_format) for i in self._sources]
            tensors += [torch.empty_strided(size, stride, dtype=t, device=META) for size, stride, t in self._sizes]
            results = [None if i is None else tensors[i] for i in self._results]
            return tuple(results) if self._is_tuple else results[0]

    monkeypatch.setattr(triton_support, "Record", Noting)
    monkeypatch.setattr(triton_support, "_RECORDS", {})
    return keys


def leaf(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device=META, requires_grad=True)


def attention(name, length):
    variant = VARIANTS[name]
    leaves, rope, _ = make_inputs((B, H, length, length, D, D), variant, torch.bfloat16)
    leaves = {key: x.to(META).requires_grad_() for key, x in leaves.items()}
    parameter, weight = leaves.pop("parameter", None), leaves.pop("key_weight", None)
    phi = MAPS[variant.feature_map](parameter) if parameter is not None else variant.feature_map
    rope = None if rope is None else rope.to(META)
    key_weight = "softmax" if variant.softmax else weight
    return linear_attention(**leaves, feature_map=phi, key_weight=key_weight, rope=rope, **variant.options,
                            backend="triton")  # fmt: skip


def mask(name, length):
    q, k, v = leaf(B, length, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
    weight = torch.empty(B, 1, length, device=META)
    return linear_attention(q, k, v, feature_map=name, key_weight=weight, backend="triton")


def gated(name, length):
    qkvg, weight = leaf(B, length, 4, H, D), leaf(D, 1, 5, 5, dtype=torch.float32)
    parameter, encoding = leaf(H, D, dtype=torch.float32), leaf(length, H, D, dtype=torch.float32).transpose(0, 1)
    options = dict(feature_map=MAPS[name](parameter), key_encoding=encoding) if name in MAPS else dict(
        feature_map="elu1", key_weight="softmax")  # fmt: skip
    return linear_attention_dwc(
        qkvg, (1, length - 1), weight, leaf(D, dtype=torch.float32), **options, backend="triton"
    )


def packed_sequences(name, length):
    q, k, v = (leaf(2 * length, H, D) for _ in range(3))
    phi = MAPS[name](leaf(H, D, dtype=torch.float32)) if name in MAPS else name
    bounds = torch.empty(4, dtype=torch.int32, device=META)
    return varlen_linear_attention(q, k, v, bounds, length, feature_map=phi, backend="triton")


CALLS = (
    [(attention, name) for name in VARIANTS]
    + [(mask, name) for name in ("elu1", "relu")]
    + [(gated, name) for name in ("focusing_power", "signed_power", "rala")]
    + [(packed_sequences, name) for name in ("elu1", "focusing_power", "signed_power")]
    + [(lambda _, N: simple_la(*(leaf(B, H, N, D) for _ in range(3)), backend="triton"), "simple_la")]
    + [(lambda _, N: decoupled_la(*(leaf(B, H, N, D) for _ in range(5)), backend="triton"), "decoupled_la")]
)


@pytest.mark.parametrize("lengths", ROUTES, ids=str)
@pytest.mark.parametrize(("call", "name"), CALLS, ids=lambda x: x if isinstance(x, str) else x.__name__.strip("<>"))
def test_a_new_length_compiles_nothing(call, name, lengths, keys):
    found = []
    for length in lengths:
        keys.clear()
        o = call(name, length)
        o.backward(torch.empty_like(o))
        found.append(set(keys))
        assert found[-1]
    for length, other in zip(lengths[1:], found[1:], strict=True):
        assert not other - found[0], length
