"""Pictures of what goes into a model and of what it looks at: a training batch, and the attention of a token."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import isfunction
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from flash_bla.engine.checkpoint import write_atomically
from flash_bla.engine.logs import warn
from flash_bla.layers.conv import attend_with_conv
from flash_bla.ops import linear_attention, linear_attention_dwc
from flash_bla.ops.arguments import split_heads

# A training batch -----------------------------------------------------------------------------------------------------

PREVIEWED = 32  # images of a batch that are shown at most
COLUMNS = 8
TILE = 112  # pixels; smaller images are enlarged by a whole factor, so that a pixel stays one
LINE = 12  # pixels from one line of text to the next


def save_preview(
    folder: str | Path,
    images: Tensor,
    targets: Tensor,
    data: dict[str, Any],
    class_names: Sequence[str] | None,
    smoothing: float,
) -> None:
    """Writes `preview.png` into a run's folder (see `draw_batch`). It draws no random number.

    That it cannot be written is a warning: it must not end the run.
    """
    try:
        write_atomically(Path(folder) / "preview.png", draw_batch(images, targets, data, class_names, smoothing))
    except OSError as error:
        warn(f"could not write the preview: {error}")


def draw_batch(
    images: Tensor,
    targets: Tensor,
    data: dict[str, Any],
    class_names: Sequence[str] | None = None,
    smoothing: float = 0.0,
) -> bytes:
    """A PNG of a batch as the model gets it, with each image's class, or its classes and their shares.

    Args:
        images: Normalised images ``(B, C, H, W)``.
        targets: Classes ``(B,)``, or their probabilities ``(B, classes)`` as mixup and cutmix give them.
        data: With the `mean` and `std` that the images were normalised by.
        class_names: Names by index; None writes the index.
        smoothing: Label smoothing that the probabilities contain, to be taken out of them.
    """
    tiles = pixels(images[:PREVIEWED], data)
    captions = [_caption(target, class_names, smoothing) for target in targets[:PREVIEWED].cpu()]
    factor = max(1, TILE // max(tiles.shape[1:3]))
    height, width = factor * tiles.shape[1], factor * tiles.shape[2]
    step = np.array([max(width, TILE) + 4, height + LINE * max(map(len, captions)) + 6])
    columns = min(COLUMNS, len(tiles))
    sheet = Image.new("RGB", tuple(step * [columns, -(-len(tiles) // columns)]), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for number, (tile, lines) in enumerate(zip(tiles, captions, strict=True)):
        x, y = (int(place) for place in step * [number % columns, number // columns])
        sheet.paste(Image.fromarray(tile).resize((width, height), Image.Resampling.NEAREST), (x, y))
        for i, line in enumerate(lines):
            while draw.textlength(line, font) > step[0] - 4:
                line = line[:-1]
            draw.text((x + 1, y + height + 1 + LINE * i), line, "black", font)
    return _png(sheet)


def pixels(images: Tensor, data: dict[str, Any]) -> np.ndarray:
    """Normalised images ``(B, C, H, W)`` as bytes ``(B, H, W, 3)``."""
    mean, std = (torch.tensor(data[key]).view(-1, 1, 1) for key in ("mean", "std"))
    images = images.detach().float().cpu() * std + mean
    images = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
    return images.expand(-1, -1, -1, 3).numpy()


def _caption(target: Tensor, class_names: Sequence[str] | None, smoothing: float) -> list[str]:
    """Lines of text: the class, or the classes that were mixed, each with its share."""
    if target.ndim == 0:
        shares = {int(target): 1.0}
    else:
        best = ((target.float() - smoothing / len(target)) / (1 - smoothing)).topk(min(2, len(target)))
        shares = {int(i): float(share) for share, i in zip(best.values, best.indices, strict=True) if share > 0.005}
    names = {i: class_names[i] if class_names else f"class {i}" for i in shares}
    return [f"{share:.2f} {names[i]}" if len(shares) > 1 else names[i] for i, share in shares.items()]


def _png(sheet: Image.Image) -> bytes:
    picture = io.BytesIO()
    sheet.save(picture, "png")
    return picture.getvalue()


# The attention of a token ---------------------------------------------------------------------------------------------


@dataclass
class AttentionMap:
    """What a token attends to: its row of the attention matrix, for each head.

    Attributes:
        layer: Name of the attention in its model.
        token: Row and column of the token on the grid, or number of the prefix token.
        rows: Weights of the tokens of the grid ``(R, H, W)``.
        prefix: Weights of the prefix tokens ``(R, P)``, the class token first.
        labels: What each of the R rows is: a head, or one of the two streams of a head.
        reduction: Pixels of the image to a token of the grid.
    """

    layer: str
    token: tuple[int, int] | int
    rows: Tensor
    prefix: Tensor
    labels: list[str]
    reduction: int

    @property
    def mean(self) -> Tensor:
        """The mean over heads and streams ``(H, W)``."""
        return self.rows.mean(dim=0)


def attention_layers(model: nn.Module) -> list[str]:
    """Names of the attentions of a model, from its input to its output."""
    return [name for name, _ in model.named_modules() if name.rpartition(".")[2] == "attn"]


def attention_map(
    model: nn.Module, image: Tensor, layer: int | str = -1, token: tuple[int, int] | int | None = None
) -> AttentionMap:
    r"""The row of a token in the attention matrix of a layer, for each head.

    .. math:: o_n = \sum_m A_{nm} v_m

    with, for a linear attention, :math:`A_{nm} = R_n φ(q_n) \cdot w_m R_m φ(k_m) / (φ(q_n) \cdot \sum_l w_l φ(k_l))`,
    R its rotation and w its key weights, if it has any; and the softmax of the biased scores for the others. It is the
    attention alone, without the convolutions and gates around it. Rows sum to 1 but for ε, and for tokens with which a
    window was padded; those of a rotated linear attention sum to what the rotation makes of it, and can be negative.
    Tokens outside a window have the weight 0. PolaFormer's attention has two matrices a head, of the products of equal
    and of opposite signs, each for its half of the values: both rows are given.

    The matrix is never made: A is the derivative of the operator's output by its values, taken for one query by one
    backward pass through the attention, in O(N) memory where the attention itself needs no more.

    Args:
        model: A model of this package, in evaluation mode.
        image: A normalised image ``(C, H, W)`` or ``(1, C, H, W)``.
        layer: Number of the block, counted through all stages from 0, or from the end if negative; or the name of a
            block or of its attention, such as ``"stages.2.blocks.0"``.
        token: Row and column on the layer's grid, or the number of a prefix token, where 0 is the class token; by
            default the middle of the grid.

    Raises:
        ValueError: There is no such layer or token, the model is in training mode, or the attention does not call an
            operator that this can look into.
    """
    if model.training:
        raise ValueError("the model is in training mode: call model.eval() first")
    name = _layer_name(model, layer)
    image = image if image.ndim == 4 else image[None]
    if image.shape[0] != 1:
        raise ValueError(f"one image (C, H, W) or (1, C, H, W) is wanted, got {tuple(image.shape)}")
    module, inputs = model.get_submodule(name), []
    hook = module.register_forward_pre_hook(lambda _, args: inputs.append(args))
    try:
        with torch.no_grad():
            model(image)
    finally:
        hook.remove()
    if not inputs or len(inputs[0]) != 2:
        raise ValueError(f"{name} is not called with tokens and their grid, as the attentions of flash_bla are")
    x, grid = inputs[0]

    prefix = x.shape[1] - grid[0] * grid[1]
    token = (grid[0] // 2, grid[1] // 2) if token is None else token
    if isinstance(token, int) and 0 <= token < prefix:
        place = token
    elif not isinstance(token, int) and 0 <= token[0] < grid[0] and 0 <= token[1] < grid[1]:
        token = (int(token[0]), int(token[1]))
        place = prefix + token[0] * grid[1] + token[1]
    else:
        raise ValueError(f"no token {token} in {name}: its grid is {grid[0]}x{grid[1]}, with {prefix} prefix tokens")

    rows, streams = _attention_rows(module, x, grid, place, name)
    kinds = ("",) if streams == 1 else (", equal signs", ", opposite signs")
    return AttentionMap(
        layer=name,
        token=token,
        rows=rows[:, prefix:].unflatten(1, grid),
        prefix=rows[:, :prefix],
        labels=[f"head {i // streams}{kinds[i % streams]}" for i in range(len(rows))],
        reduction=next(i["reduction"] for i in model.feature_info if name.startswith(f"{i['module']}.")),
    )


def _layer_name(model: nn.Module, layer: int | str) -> str:
    names = attention_layers(model)
    if isinstance(layer, int) and -len(names) <= layer < len(names):
        return names[layer]
    if layer in names:
        return layer
    if f"{layer}.attn" in names:
        return f"{layer}.attn"
    known = f"it has {len(names)}: {', '.join(names)}" if names else "it has none"
    raise ValueError(f"the model has no attention {layer!r}; {known}")


@torch.inference_mode(False)  # gradients are needed wherever this is called
@torch.enable_grad()
def _attention_rows(module: nn.Module, x: Tensor, grid: tuple[int, int], place: int, name: str) -> tuple[Tensor, int]:
    """Rows ``(heads · streams, N)`` of the token at a place of x, and the number of streams."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    attention = copy.deepcopy(module).to(dtype).requires_grad_(False)
    if hasattr(attention, "fused_attn"):  # timm's switch: the operator, or the matrix
        attention.fused_attn = True
    # The operator may see the tokens in windows, rolled and padded. Where a token went is known by what it moves: all
    # tokens get a step along one direction of the channels, as long as their entry of `steps`. Only the values follow
    # it, because the operator's other arguments are cut off below.
    steps = torch.zeros(1, x.shape[1], dtype=dtype, device=x.device, requires_grad=True)
    direction = torch.randn(x.shape[2], generator=torch.Generator().manual_seed(0)).to(steps)
    with _recorded_operators(attention) as calls, torch.autocast(x.device.type, enabled=False):
        attention(x.detach().to(dtype) + steps[..., None] * direction, grid)

        rows = []
        for v, o, streams in calls:
            # Which values (B, H, M, D) does the token move, and how far? The derivative by its step, forwards: that is
            # the derivative of the backward pass, which is linear in what comes in. It is 0 but where the token is.
            back = torch.zeros_like(v, requires_grad=True)
            moved = torch.autograd.grad(v, steps, back, create_graph=True)[0][0, place]
            moved = torch.autograd.grad(moved, back)[0]
            if not moved.any():
                continue  # a window without this token
            # Now o · moved of the token's query n, head by head: by the values of token m it has the derivative
            # A_nm · moved, and by the step of m therefore A_nm ‖moved‖².
            pulled = torch.autograd.grad(o, v, moved, retain_graph=True)[0]
            for head in range(v.shape[1]):
                for half in range(streams):
                    channels = torch.zeros_like(v)
                    channels[:, head].chunk(streams, dim=-1)[half].fill_(1)
                    row = torch.autograd.grad(v, steps, pulled * channels, retain_graph=True)[0][0]
                    rows.append(row / (moved * channels).square().sum())
    if not rows:
        raise ValueError(
            f"{name} calls none of linear_attention, linear_attention_qkvpacked, "
            "linear_attention_dwc and scaled_dot_product_attention with its tokens"
        )
    return torch.stack(rows), streams


@contextmanager
def _recorded_operators(attention: nn.Module) -> Iterator[list[tuple[Tensor, Tensor, int]]]:
    """Lists the values, output and number of streams of each operator that an attention calls.

    The output depends on the values alone: gradients do not reach the operator's other arguments.
    """
    calls: list[tuple[Tensor, Tensor, int]] = []

    def recorded(operator):
        def call(q, k, v, *args, **options):
            args = [_detached(value) for value in args]
            options = {key: _detached(value) for key, value in options.items()}
            o = operator(q.detach(), k.detach(), v, *args, **options)
            calls.append((v, o, 2 if getattr(options.get("feature_map"), "signed", False) else 1))
            return o

        return call

    def recorded_packed(operator):
        attend = recorded(linear_attention)

        def call(qkv, *_, v=None, **options):
            q, k, *others = qkv.transpose(1, 3).unbind(2)
            o = attend(q, k, others[0] if v is None else split_heads(v, qkv.shape[3]), **options).transpose(1, 2)
            return o.flatten(2) if operator is linear_attention_dwc else o  # what the convolution adds plays no part

        return call

    # Attentions find linear_attention among the names of their file or of attend_with_conv's, the other operator in F.
    methods = [value for cls in type(attention).__mro__ for value in vars(cls).values() if isfunction(value)]
    namespaces = {id(method.__globals__): method.__globals__ for method in methods}
    namespaces |= {id(names): names for names in (vars(F), attend_with_conv.__globals__)}
    recorders = {
        "linear_attention": recorded,
        "linear_attention_dwc": recorded_packed,
        "linear_attention_qkvpacked": recorded_packed,
        "scaled_dot_product_attention": recorded,
    }
    replaced = [(space, name, space[name]) for space in namespaces.values() for name in recorders if name in space]
    for space, name, operator in replaced:
        space[name] = recorders[name](operator)
    try:
        yield calls
    finally:
        for space, name, operator in replaced:
            space[name] = operator


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def draw_attention(attention: AttentionMap, image: np.ndarray, each_head: bool = False) -> bytes:
    """A PNG of an image beside its attention map: the mean over the heads, and a panel for each if wanted.

    Args:
        attention: What `attention_map` gave for the image.
        image: Bytes ``(H, W, 3)`` as `pixels` gives them.
        each_head: Whether each head has a panel.
    """
    labels = ["mean", *(attention.labels if each_head else [])]
    maps = [attention.mean, *(attention.rows if each_head else [])]
    prefix = [attention.prefix.mean(dim=0), *(attention.prefix if each_head else [])]
    columns = min(4, len(maps) + 1)
    lines = -(-(len(maps) + 1) // columns)
    figure = Figure(figsize=(3.2 * columns, 0.5 + 3.2 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel in panels:
        panel.set_axis_off()
    for panel in panels[: len(maps) + 1]:
        panel.imshow(image)
        if not isinstance(attention.token, int):
            row, column = (attention.reduction * i - 0.5 for i in attention.token)
            box = Rectangle((column, row), attention.reduction, attention.reduction, fill=False, color="red", lw=1.5)
            panel.add_patch(box)
    grid = attention.mean.shape
    height, width = (attention.reduction * length for length in grid)
    for panel, values, others, label in zip(panels[1:], maps, prefix, labels, strict=False):
        extent = (-0.5, width - 0.5, height - 0.5, -0.5)
        shown = panel.imshow(values.cpu().numpy(), cmap="viridis", alpha=0.7, extent=extent)
        # The grid of an image that was padded ends beyond it.
        panel.set(xlim=(-0.5, image.shape[1] - 0.5), ylim=(image.shape[0] - 0.5, -0.5))
        panel.set_title(label + (f", {float(others.sum()):.2f} on prefix tokens" if len(others) else ""), fontsize=9)
        figure.colorbar(shown, ax=panel, shrink=0.8).ax.tick_params(labelsize=7)
    token = f"prefix token {attention.token}" if isinstance(attention.token, int) else f"token {attention.token}"
    panels[0].set_title(f"{attention.layer}\n{token} of {grid[0]}x{grid[1]}", fontsize=9)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()
