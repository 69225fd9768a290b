"""The pictures: rows of attention matrices against dense ones, and the batch that a run shows before it begins."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from runs import assert_same_run
from timm.data import Mixup
from torch.utils._python_dispatch import TorchDispatchMode

import attention_map as script
from flash_bla.engine.checkpoint import write_atomically
from flash_bla.engine.config import RunError
from flash_bla.engine.pictures import attention_layers, attention_map, draw_attention, draw_batch, pixels
from flash_bla.layers import axial_rope
from flash_bla.models.mlla import MLLA
from flash_bla.models.swin import SwinTransformer
from flash_bla.models.vit import VisionTransformer
from flash_bla.ops.arguments import split_heads
from flash_bla.ops.reference import rotate

GRID = (6, 4)
HEADS, DIM = 2, 16


def vit(attention: str, seed: int = 0, **arguments) -> VisionTransformer:
    """Two blocks on a grid of 6x4 in float64, with parameters that are not as simple as at the start."""
    torch.manual_seed(seed)
    options = {"img_size": (12, 8), "patch_size": 2, "embed_dim": DIM, "depth": 2, "num_heads": HEADS}
    model = VisionTransformer(**options, attention=attention, num_classes=3, **arguments).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return model


def input_of(module, model, image):
    """What a module gets when the model runs."""
    inputs = []
    hook = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        model(image)
    hook.remove()
    return inputs[0]


def normalised(scores, k):
    return scores / (scores.sum(dim=-1, keepdim=True) + 1e-6 * k.shape[2])


def softmax(q, k, bias=0.0):
    return (q @ k.mT / q.shape[-1] ** 0.5 + bias).softmax(dim=-1)


def dense(name, attention, x, grid):
    """The attention matrices (heads · streams, N, N), by their definitions."""
    weights = next(getattr(attention, p) for p in ("qkv", "qkvg", "qkvo", "qk") if hasattr(attention, p))
    q, k = weights(x).split(DIM, dim=-1)[:2]
    if hasattr(attention, "positional_encoding"):
        k = k + F.pad(attention.positional_encoding, (0, 0, x.shape[1] - grid[0] * grid[1], 0))
    if name.startswith("focused"):
        scale = F.softplus(attention.scale)
        q, k = ((y.relu() + 1e-6) / scale for y in (q, k))
        q, k = (y**3 * y.norm(dim=-1, keepdim=True) / (y**3).norm(dim=-1, keepdim=True) for y in (q, k))
    if name == "pola":
        q, k = (y / F.softplus(attention.scale) for y in (q, k))
    q, k = split_heads(q, HEADS), split_heads(k, HEADS)
    if name == "pola":
        power = 1 + 4 * attention.power.sigmoid()
        positive, negative = ((y.relu() ** power for y in (q, -q)), (y.relu() ** power for y in (k, -k)))
        (q_p, q_n), (k_p, k_n) = positive, negative
        equal, opposite = q_p @ k_p.mT + q_n @ k_n.mT, q_n @ k_p.mT + q_p @ k_n.mT
        return torch.stack([normalised(equal, k), normalised(opposite, k)], dim=2)[0].flatten(0, 1)
    if name.startswith("focused"):
        return normalised(q @ k.mT, k)[0]
    if name == "linear":
        return normalised((F.elu(q) + 1) @ (F.elu(k) + 1).mT, k)[0]
    if name in ("mlla", "rala"):
        rope = axial_rope(x, grid, DIM, HEADS) if name == "mlla" else axial_rope(x, grid, DIM // HEADS, endpoint=True)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        if name == "rala":
            k = k * k.shape[2] * softmax(q.mean(dim=2, keepdim=True), k).mT
        return (rotate(q, rope) @ rotate(k, rope).mT / ((q @ k.mT).sum(dim=-1, keepdim=True) + 1e-6 * k.shape[2]))[0]
    if name == "rala_softmax":
        rope = axial_rope(x, grid, DIM // HEADS, endpoint=True)
        q, k = (rotate(y, rope).float().double() for y in (q, k))
        return softmax(q, k)[0]
    if name == "softmax":
        return softmax(q, k)[0]
    row, column = (i.flatten() for i in torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij"))
    if name == "cross_window":
        together = torch.stack([column // 3, row // 3])
        together = together[:, :, None] == together[:, None]
        return softmax(q, k, torch.zeros(together.shape).masked_fill(~together, float("-inf")))[0]
    # Windows of 3x2; shifted they begin at (1, 1), and what is above and left of that lies at the other end.
    shift = (1, 1) if attention.shift else (0, 0)
    windows = [(row - shift[0]).div(3, rounding_mode="floor"), (column - shift[1]).div(2, rounding_mode="floor")]
    windows = torch.stack(windows)
    together = (windows[:, :, None] == windows[:, None]).all(dim=0)
    dy, dx = (i[:, None] - i for i in (row, column))
    index = ((dy + 2) * 3 + dx + 1).clamp(0, 14)
    bias = attention.relative_position_bias_table[index].permute(2, 0, 1)
    return softmax(q, k, bias.masked_fill(~together, float("-inf")))[0]


CASES = {
    "linear": {},
    "focused": {},
    "focused_lepe": {},
    "pola": {},
    "mlla": {},
    "rala": {},
    "rala_softmax": {},
    "softmax": {},
    "window": {"attention_args": {"window_size": (3, 2)}},
    "window shifted": {"attention_args": {"window_size": (3, 2), "shift": True}},
    "cross_window": {"attention_args": {"split_size": 3}},
}


@pytest.mark.parametrize("case", CASES)
def test_rows_are_those_of_the_dense_matrix(case):
    name = case.split()[0]
    prefix = 0 if "window" in name else 2
    model = vit(name, class_token=prefix > 0, reg_tokens=prefix // 2, **CASES[case])
    image = torch.randn(1, 3, 12, 8, dtype=torch.float64)
    module = model.blocks[1].attn
    with torch.no_grad():
        expected = dense(name, module, input_of(module, model, image), GRID)
    random_state = torch.get_rng_state()
    for token in [(0, 0), (5, 3), (3, 2), *range(prefix)]:
        result = attention_map(model, image, token=token)
        place = token if isinstance(token, int) else prefix + token[0] * GRID[1] + token[1]
        row = torch.cat([result.prefix, result.rows.flatten(1)], dim=1)
        torch.testing.assert_close(row, expected[:, place], rtol=1e-6, atol=1e-9)
        if name not in ("mlla", "rala"):  # the rotation is in the numerator alone
            atol = 1e-2 if name.startswith("focused") else 1e-4  # its cubes of small features are not far above ε
            torch.testing.assert_close(row.sum(dim=1), torch.ones(len(row)).double(), rtol=0, atol=atol)
        assert (result.token, result.reduction, result.rows.shape[1:]) == (token, 2, GRID)
        torch.testing.assert_close(result.mean, result.rows.mean(dim=0))
    streams = [", equal signs", ", opposite signs"] if name == "pola" else [""]
    assert result.labels == [f"head {head}{stream}" for head in range(HEADS) for stream in streams]
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("attention", ["linear", "focused", "pola", "mlla", "rala", "softmax", "rala_softmax"])
def test_no_matrix_of_all_rows(attention):
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    self.size = max(self.size, tensor.numel())
            return result

    model = vit(attention).float()
    tokens = 48 * 48
    with Largest() as largest:
        result = attention_map(model, torch.randn(3, 96, 96))
    assert result.rows.shape == (HEADS * (2 if attention == "pola" else 1), 48, 48)
    assert largest.size <= 8 * DIM * tokens < tokens**2 // 10


def test_hierarchical_models():
    torch.manual_seed(0)
    sizes = {"embed_dim": 8, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 2, 4), "num_classes": 3}
    model = SwinTransformer(img_size=64, window_size=4, **sizes).eval()
    blocks = ("0.blocks.0", "1.blocks.0", "1.blocks.1", "2.blocks.0", "3.blocks.0")
    assert attention_layers(model) == [f"stages.{block}.attn" for block in blocks]
    image = torch.randn(3, 72, 64)  # stage 1 has 9x8 tokens, in windows of 4 that are padded
    result = attention_map(model, image, "stages.1.blocks.0", (1, 5))
    assert (result.layer, result.reduction, result.rows.shape) == ("stages.1.blocks.0.attn", 8, (2, 9, 8))
    assert result.rows[:, 4:].abs().max() == result.rows[:, :, :4].abs().max() == 0 < result.rows[:, :4, 4:].min()
    torch.testing.assert_close(result.rows.sum(dim=(1, 2)), torch.ones(2))
    # The last window of rows has one that is not padding, which takes the rest.
    assert (attention_map(model, image, 1, (8, 5)).rows.sum(dim=(1, 2)) < 0.9).all()
    with torch.inference_mode():
        assert torch.equal(attention_map(model, image, 1, (1, 5)).rows, result.rows)
    by_number = [attention_map(model, image, layer, (1, 5)) for layer in (1, -4)]
    assert all(torch.equal(result.rows, other.rows) for other in by_number)
    other = MLLA(img_size=64, **sizes).eval()
    assert attention_map(other.bfloat16(), image.bfloat16(), -1).rows.shape == (4, 3, 2)


def test_what_cannot_be_shown_is_an_error():
    model, image = vit("linear", class_token=True).float(), torch.randn(3, 12, 8)
    for token in ((6, 0), (0, -1), 1):
        with pytest.raises(ValueError, match=r"grid is 6x4, with 1 prefix tokens"):
            attention_map(model, image, token=token)
    for layer in (2, -3, "blocks.7"):
        with pytest.raises(ValueError, match=r"it has 2: blocks.0.attn, blocks.1.attn"):
            attention_map(model, image, layer)
    with pytest.raises(ValueError, match="one image"):
        attention_map(model, torch.randn(2, 3, 12, 8))
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        attention_map(model.train(), image)
    model.eval().blocks[0].attn.forward = lambda x, grid: x
    with pytest.raises(ValueError, match="calls none of linear_attention"):
        attention_map(model, image, 0)


def opened(picture: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))


def test_drawing_of_a_map():
    model, data = vit("pola", class_token=True).float(), {"mean": [0.5] * 3, "std": [0.25] * 3}
    image = torch.randn(1, 3, 11, 8)
    for token in ((0, 3), 0):
        result = attention_map(model, image, token=token)
        small = opened(draw_attention(result, pixels(image, data)[0]))
        large = opened(draw_attention(result, pixels(image, data)[0], each_head=True))
        assert small.std() > 0 and small.shape[1] < large.shape[1] and small.shape[0] < large.shape[0]


def test_the_script(train, tmp_path, capsys, monkeypatch):
    assert train("run", "--epochs", "1", "--warmup-epochs", "0") == 0
    monkeypatch.chdir(tmp_path)
    Image.new("L", (9, 7), 128).save("digit.png")
    flags = ["--checkpoint", "run/last.pt", "--image", "digit.png"]
    assert script.main(flags).rows.shape == (4, 2, 2)
    drawn = (tmp_path / "attention.png").read_bytes()
    Image.fromarray(np.full((7, 9), 128 * 257, np.uint16)).save("digit.png")  # the same picture with 16 bits
    script.main(flags)
    assert np.array_equal(opened((tmp_path / "attention.png").read_bytes()), opened(drawn))
    more = "--img-size 16 12 --layer blocks.0 --token 3 1 --each-head --output 0.png"
    result = script.main([*flags, *more.split()])
    assert (result.layer, result.token, result.rows.shape) == ("blocks.0.attn", (3, 1), (4, 4, 3))
    assert "blocks.0.attn: token (3, 1) of 4x3 and 0 prefix tokens, 4 rows\nwritten to 0.png" in capsys.readouterr().out
    wrong = {"--layer 5": "no attention 5", "--token 0": "no token 0", "--token 1 2 3": "token: row"}
    for more, message in wrong.items():
        with pytest.raises(RunError, match=message):
            script.main([*flags, *more.split()])
    with pytest.raises(RunError, match="cannot read nothing.png"):
        script.main([*flags[:2], "--image", "nothing.png"])
    with pytest.raises(RunError, match="name the model"):
        script.main(flags[2:])


def test_preview_of_the_first_batch(train, load, tmp_path, monkeypatch):
    flags = ("--aa", "rand-m5", "--reprob", "0.3", "--mixup", "0.5", "--cutmix", "1", "--drop-path", "0.2")
    flags += ("--epochs", "1", "--warmup-epochs", "0")
    assert train("without", *flags, "--no-preview") == 0
    assert not (tmp_path / "without" / "preview.png").exists()

    seen = []
    forward = VisionTransformer.forward
    monkeypatch.setattr(VisionTransformer, "forward", lambda self, x: seen.append(x.clone()) or forward(self, x))
    assert train("with", *flags) == 0
    assert_same_run(load("without"), load("with"))
    sheet = opened((tmp_path / "with" / "preview.png").read_bytes())
    expected = pixels(seen[0], load("with")["data"])
    step = sheet.shape[1] // 8
    assert sheet.shape[0] < 4 * (step + 40)
    for number in (0, 1, 8):  # 8x8 pixels, enlarged to 112x112
        x, y = number % 8 * step, number // 8 * (sheet.shape[0] // 4)
        np.testing.assert_array_equal(sheet[y + 7 : y + 112 : 14, x + 7 : x + 112 : 14], expected[number])

    # A run that goes on has had its first batch, and no run ends because of a picture.
    (tmp_path / "with" / "preview.png").write_bytes(b"")
    assert train("with", *flags) == 0
    assert (tmp_path / "with" / "preview.png").read_bytes() == b""

    def full(path, content):
        if path.name == "preview.png":
            raise OSError("No space left on device")
        write_atomically(path, content)

    monkeypatch.setattr("flash_bla.engine.pictures.write_atomically", full)
    assert train("full", *flags) == 0


def test_preview_names_what_was_mixed(monkeypatch):
    texts = []
    monkeypatch.setattr("PIL.ImageDraw.ImageDraw.text", lambda self, xy, text, *args: texts.append(text))
    images, targets = torch.randn(4, 1, 10, 30), torch.tensor([0, 1, 2, 2])
    data, names = {"mean": [0.5], "std": [0.2]}, ["cat", "dog", "a name that is much too long for a picture"]
    assert opened(draw_batch(images, targets, data, names)).shape[1] >= 4 * 90
    assert texts[:2] == ["cat", "dog"] and texts[2] == texts[3] and texts[2] in names[2][:-1]
    texts.clear()
    mixup = Mixup(mixup_alpha=1.0, label_smoothing=0.1, num_classes=3)
    monkeypatch.setattr(mixup, "_params_per_batch", lambda: (0.75, False))
    images, targets = mixup(images, targets)  # image i with image 3 - i
    draw_batch(images, targets, data, smoothing=0.1)
    mixed = [["0.75 class 0", "0.25 class 2"], ["0.75 class 1", "0.25 class 2"]]
    assert [texts[:2], texts[2:4]] == mixed and texts[4:6] == ["0.75 class 2", "0.25 class 1"]
    texts.clear()
    draw_batch(images[:1], torch.tensor([[0.95, 0.05]]), data, smoothing=0.1)
    assert texts == ["class 0"]
