"""How fast the depthwise convolution on tokens is, beside PyTorch's own, and how far from what the memory allows.

    python -m benchmarks.depthwise_conv [--shapes 3x3_c64_56 ...] [--no-baselines]
    python -m benchmarks.depthwise_conv --plot-only      # the table again, from the CSV file

For every depthwise convolution of the models at 224 x 224 and a batch of 128, in bfloat16: the time of the forward
pass, of the input's gradient, of the filters' gradient, and of both in one call, by replay of a CUDA graph whose calls
take turns among inputs that exceed three L2 caches; and the time that the fewest bytes take to be copied on the same
device, the roofline. The baselines are ``F.conv2d`` with and without cuDNN on maps in both memory layouts, without
bias. Each result is first compared with float32. Rows go to OUTPUT/depthwise_conv.csv, where they replace older ones of
the same key; the table beside it is of the device just measured, with --plot-only of that with the latest date.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.results import markdown, measured_on, merge_rows, of_one_device, read_rows
from flash_bla.ops.triton_depthwise_conv import depthwise_conv_backward, depthwise_conv_forward

BATCH = 128
DTYPE = torch.bfloat16
TOLERANCE = 1e-2  # largest relative error of bfloat16 against float32, in the Frobenius norm

COLUMNS = ("shape", "kernel_size", "stride", "channels", "filters", "side", "pass", "backend", "time_us", "floor_us",
           "percent_of_roofline", "error", "copy_tb_s", "device", "torch", "triton", "timm", "date")  # fmt: skip
KEY = ("shape", "pass", "backend", "device")


class Shape(NamedTuple):
    """One convolution of a model."""

    kernel_size: int
    stride: int
    channels: int
    filters: int  # fewer than channels: shared by the heads
    side: int

    @property
    def name(self) -> str:
        heads = f"x{self.channels // self.filters}" if self.filters < self.channels else ""
        stride = "s2" if self.stride == 2 else ""
        return f"{self.kernel_size}x{self.kernel_size}{stride}_c{self.filters}{heads}_{self.side}"

    @property
    def out_side(self) -> int:
        return -(-self.side // self.stride)


SHAPES = [
    # MLLA's CPE, LePE and dwc; RAVLT's CPE
    *(Shape(3, 1, C, C, side) for C, side in ((64, 56), (128, 28), (256, 14), (320, 14), (512, 7))),
    # RAVLT's and PVT v2's feed-forward networks
    *(Shape(3, 1, C, C, side) for C, side in ((224, 56), (448, 28), (1120, 14), (1792, 7))),
    *(Shape(3, 1, C, C, side) for C, side in ((512, 56), (1024, 28), (1280, 14), (2048, 7))),
    # MLLA's mergings
    *(Shape(3, 2, C, C, side) for C, side in ((512, 56), (1024, 28), (2048, 14))),
    # RAVLT's LePE
    *(Shape(5, 1, C, C, side) for C, side in ((64, 56), (128, 28), (320, 14), (512, 7))),
    # PolaFormer and FLatten on PVT, Swin, ViT-S
    *(Shape(5, 1, C, 64, side) for C, side in ((128, 28), (320, 14), (512, 7), (384, 14))),
    *(Shape(5, 1, C, 32, side) for C, side in ((96, 56), (192, 28))),
]  # fmt: skip
PASSES = {"forward": (), "input": (True, False), "filters": (False, True), "both": (True, True)}


class Inputs(NamedTuple):
    """x and the output's gradient as tokens (B, N, C), and the filters."""

    x: Tensor
    dy: Tensor
    weight: Tensor


def make_inputs(shape: Shape, device: torch.device) -> Inputs:
    _, _, C, filters, side = shape
    k = shape.kernel_size
    x = torch.randn(BATCH, side**2, C, device=device, dtype=DTYPE)
    dy = torch.randn(BATCH, shape.out_side**2, C, device=device, dtype=DTYPE)
    return Inputs(x, dy, torch.randn(filters, 1, k, k, device=device, dtype=DTYPE) / k)


def ours(shape: Shape, which: str, inputs: Inputs) -> Callable[[], Sequence[Tensor]]:
    x, dy, weight = inputs
    arguments = (x, weight, None, None, None, shape.side, shape.side, shape.stride, False, None, None)
    if which == "forward":
        return lambda: [depthwise_conv_forward(*arguments)]
    needed = [*PASSES[which], False, False, False]
    return lambda: [g for g in depthwise_conv_backward(dy, needed, *arguments)[:2] if g.numel()]


def baseline(shape: Shape, which: str, inputs: Inputs, cudnn: bool, channels_last: bool) -> Callable:
    """``F.conv2d`` or its backward pass; maps and filters are prepared beforehand, gradients stay maps."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    image = _image(inputs.x, shape.side).contiguous(memory_format=layout)
    gradient = _image(inputs.dy, shape.out_side).contiguous(memory_format=layout)
    weight = inputs.weight.repeat(shape.channels // shape.filters, 1, 1, 1)
    rest = ([shape.stride] * 2, [shape.kernel_size // 2] * 2, [1, 1], False, [0, 0], shape.channels)

    def call() -> Sequence[Tensor]:
        with torch.backends.cudnn.flags(enabled=cudnn, benchmark=False):
            if which == "forward":
                return [torch.ops.aten.convolution(image, weight, None, *rest)]
            mask = [*PASSES[which], False]
            return [
                g for g in torch.ops.aten.convolution_backward(gradient, image, weight, None, *rest, mask)[:2]
                if g is not None
            ]  # fmt: skip

    return call


def _image(tokens: Tensor, side: int) -> Tensor:
    return tokens.unflatten(1, (side, side)).permute(0, 3, 1, 2)


BACKENDS = {
    "triton": ours,
    "cudnn, channels last": lambda *arguments: baseline(*arguments, True, True),
    "cudnn, nchw": lambda *arguments: baseline(*arguments, True, False),
    "native, channels last": lambda *arguments: baseline(*arguments, False, True),
    "native, nchw": lambda *arguments: baseline(*arguments, False, False),
}


def floor_bytes(shape: Shape, which: str) -> int:
    """The fewest bytes: x and y forward; dy and dx, dy and x, or all three backward."""
    x, y = (BATCH * side**2 * shape.channels * 2 for side in (shape.side, shape.out_side))
    return {"forward": x + y, "input": y + x, "filters": y + x, "both": y + 2 * x}[which]


def check(shape: Shape, device: torch.device) -> float:
    """Largest relative error of our forward pass and gradients, on a few images, against ``F.conv2d`` in float32."""
    inputs = make_inputs(shape, device)
    small = Inputs(inputs.x[:2], inputs.dy[:2], inputs.weight)
    x, weight = (a.detach().float().requires_grad_() for a in (small.x, small.weight))
    heads = shape.channels // shape.filters
    with torch.backends.cudnn.flags(enabled=False):
        y = torch.nn.functional.conv2d(_image(x, shape.side), weight.repeat(heads, 1, 1, 1), None, shape.stride,
                                       shape.kernel_size // 2, groups=shape.channels)  # fmt: skip
        want = [y, *torch.autograd.grad(y, (x, weight), _image(small.dy.float(), shape.out_side))]
    want[0] = want[0].flatten(2).transpose(1, 2)
    got = [*ours(shape, "forward", small)(), *ours(shape, "both", small)()]
    return max(((a.float() - b).norm() / b.norm()).item() for a, b in zip(got, want, strict=True))


def measure(shape: Shape, which: str, backend: str, device: torch.device) -> float:
    """Seconds of one call."""
    sets, calls = timing.rotation(floor_bytes(shape, which), device)
    with timing.side_stream(device):
        functions = [BACKENDS[backend](shape, which, make_inputs(shape, device)) for _ in range(sets)]
        return timing.kernel_seconds([functions[i % sets] for i in range(calls)], device)


def measure_all(args: argparse.Namespace, device: torch.device) -> Iterator[dict[str, object]]:
    where = timing.machine(device)
    copy = timing.copy_bandwidth(device)
    backends = ["triton"] if args.no_baselines else list(BACKENDS)
    for shape in SHAPES:
        if args.shapes and shape.name not in args.shapes:
            continue
        error = check(shape, device)
        if not error < TOLERANCE:
            print(f"WRONG: {shape.name} differs from float32 by {error:.1e}", flush=True)
        for which in PASSES:
            floor = floor_bytes(shape, which) / copy
            line = f"{shape.name:18s}{which:9s} floor {1e6 * floor:7.1f}"
            for backend in backends if which != "both" else backends[:1]:  # PyTorch's is the sum of the two
                seconds = measure(shape, which, backend, device)
                line += f"  {backend} {1e6 * seconds:8.1f} ({100 * floor / seconds:3.0f} %)"
                yield shape._asdict() | where | {
                    "shape": shape.name, "pass": which, "backend": backend, "time_us": 1e6 * seconds,
                    "floor_us": 1e6 * floor, "percent_of_roofline": 100 * floor / seconds, "copy_tb_s": copy / 1e12,
                    "error": error if backend == "triton" else None,
                }  # fmt: skip
            print(line, flush=True)


def table(rows: list[dict[str, str]]) -> str:
    """The results as Markdown: for each shape and pass ours, its share of the roofline, and the best of PyTorch's."""
    groups: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
    for row in rows:
        groups.setdefault((row["shape"], row["pass"]), {})[row["backend"]] = row
    body = []
    for (shape, which), by_backend in groups.items():
        if (mine := by_backend.get("triton")) is None:
            continue
        parts = [groups.get((shape, part), {}) for part in (("input", "filters") if which == "both" else (which,))]
        names = set.intersection(*(set(part) for part in parts)) - {"triton"}
        others = [(sum(float(part[name]["time_us"]) for part in parts), name) for name in names]
        best = "{:.0f} ({})".format(*min(others)) if others else "–"
        share = f"{float(mine['percent_of_roofline']):.0f} %"
        body.append([shape, which, f"{float(mine['time_us']):.0f}", share, best])
    text = (
        "Time in µs; batch 128, bfloat16. The name of a shape is filters, stride, channels and the side of the map;\n"
        "for both gradients PyTorch's time is the sum of the two."
    )
    header = ["shape", "pass", "Triton", "of the roofline", "best of PyTorch"]
    return "\n".join(["# Depthwise convolution\n", measured_on(rows) + "\n", text + "\n", markdown(header, body)])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"), help="folder of CSV and table")
    parser.add_argument("--shapes", nargs="+", choices=[shape.name for shape in SHAPES], metavar="SHAPE")
    parser.add_argument("--no-baselines", action="store_true", help="measure this library alone")
    parser.add_argument("--plot-only", action="store_true", help="measure nothing")
    args = parser.parse_args(argv)
    path = args.output / "depthwise_conv.csv"
    measured = None
    if not args.plot_only:
        for row in measure_all(args, torch.device("cuda" if torch.cuda.is_available() else "cpu")):
            merge_rows(path, COLUMNS, KEY, [row])
            measured = row["device"]
    rows = of_one_device(read_rows(path), measured)
    if not rows:
        sys.exit(f"error: there is nothing in {path}")
    (args.output / "depthwise_conv.md").write_text(table(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
