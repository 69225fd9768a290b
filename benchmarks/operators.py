"""How fast the operators are, and how far from what the memory allows.

    python -m benchmarks.operators [--quick] [--ops elu1 rope] [--shapes vit_s 2,16,4096,64] [--no-baselines]
    python -m benchmarks.operators --plot-only       # tables and plots again, from the CSV file

First the results of each operator in bfloat16 are compared with float64; it ends with an error if they differ. Then it
measures, forward and backward, for each operator and shape:

- the kernels' time, by replay of a CUDA graph whose calls take turns among inputs that exceed three L2 caches, and the
  time that the fewest bytes take to be copied on the same device, the roofline
- the time until the eager call returns to Python, which is what bounds small shapes
- the time of the first call at a length never seen before
- the memory besides inputs and outputs

q, k and v are views of one projection's output (B, N, 3, H, D), as in models, and the output's gradient is laid out as
(B, N, H, D). Rows go to OUTPUT/operators.csv, where they replace older ones of the same key; the tables
(operators.md) and plots beside it are made from that file alone, of the device just measured, with --plot-only of that
with the latest date.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import isqrt
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from torch._functorch import config as functorch_config

from benchmarks import timing
from benchmarks.results import markdown, measured_on, merge_rows, of_one_device, read_rows
from flash_bla import linear_attention, simple_la, varlen_linear_attention
from flash_bla.layers.rope import axial_rope
from flash_bla.ops import focusing_power, signed_power

DTYPE = torch.bfloat16
TOLERANCE = 1e-2  # largest relative error of bfloat16 against float64, in the Frobenius norm
CHECKED_SHAPE = (2, 4, 784, 64)
SDPA_TOKENS = 65536  # softmax attention takes seconds a call for more

COLUMNS = (
    "op", "shape", "B", "H", "N", "D", "direction", "backend", "layout", "dtype", "time_us", "floor_us",
    "percent_of_roofline", "host_us", "first_call_ms", "extra_mb", "copy_tb_s", "device", "torch", "triton", "timm",
    "date",
)  # fmt: skip
KEY = ("op", "shape", "direction", "backend", "layout", "dtype", "device")

# --- shapes: (B, H, N, D) ---------------------------------------------------------------------------------------------

MODEL_SHAPES = {
    "pvt_stage1": (64, 1, 3136, 64),
    "swin_stage1": (64, 3, 3136, 32),
    "mlla_stage2": (128, 4, 784, 32),
    "mlla_stage4": (256, 16, 49, 32),
    "vit_s": (256, 6, 196, 64),
    "4k": (2, 16, 4096, 64),
    "16k": (2, 16, 16384, 64),
    "64k": (1, 16, 65536, 64),
    "1m": (1, 8, 1048576, 64),
}
SWEEP = {f"sweep_{N // 1024}k": (1, 16, N, 64) for N in (1024, 4096, 16384, 262144, 1048576)}  # and the shape 64k
WIDTHS = {f"width_{D}": (8, 8, 4096, D) for D in (16, 24, 32, 48, 64, 72, 96, 128)}
# The stages of the papers' models at 224 x 224 and a batch of 128.
PVT = {f"pvt_{i}": (128, H, N, 64) for i, (H, N) in enumerate(((1, 3136), (2, 784), (5, 196), (8, 49)), 1)}
SWIN = {f"swin_{i}": (128, H, N, 32) for i, (H, N) in enumerate(((3, 3136), (6, 784)), 1)}
MLLA = {f"mlla_{i}": (128, H, N, 32) for i, (H, N) in enumerate(((2, 3136), (4, 784), (8, 196), (16, 49)), 1)}
RAVLT = {f"ravlt_{i}": (128, H, N, 64) for i, (H, N) in enumerate(((1, 3136), (2, 784)), 1)}
RAGGED = {name: MODEL_SHAPES[name] for name in ("pvt_stage1", "vit_s", "4k")}
SHAPES = MODEL_SHAPES | SWEEP | WIDTHS | PVT | SWIN | MLLA | RAVLT

# --- operators --------------------------------------------------------------------------------------------------------


class Inputs(NamedTuple):
    """One set of inputs: q, k, v and the parameter are leaves; ``do`` is the output's gradient."""

    q: Tensor
    k: Tensor
    v: Tensor
    parameter: Tensor | None
    constant: Tensor | None
    do: Tensor

    @property
    def leaves(self) -> dict[str, Tensor]:
        leaves = {"q": self.q, "k": self.k, "v": self.v, "parameter": self.parameter}
        return {name: x for name, x in leaves.items() if x is not None}


class Op(NamedTuple):
    """An operator and what is measured of it."""

    run: Callable[[Inputs], Tensor]
    shapes: dict[str, tuple[int, int, int, int]]
    forward_tensors: int  # of the size of q that must at least be read or written
    backward_tensors: int
    parameter: Callable[[Tensor], Tensor] | None = None  # from uniform random numbers (H, N, D)
    constant: Callable[[Tensor], Tensor] | None = None  # from q: what has no gradient


def rope(q: Tensor) -> Tensor:
    """Rotary tables of a square grid, or of a row of tokens where there is none."""
    N, D = q.shape[2:]
    side = isqrt(N)
    return axial_rope(q[:, 0], (side, side) if side**2 == N else (1, N), D, endpoint=True)


def padding_mask(q: Tensor) -> Tensor:
    """Key weights ``(B, 1, N)``, 1 for a sequence's tokens and 0 for its padding: lengths from N / 2 to N."""
    B, _, N, _ = q.shape
    lengths = torch.linspace(N / 2, N, B, device=q.device)[:, None, None]
    return (torch.arange(N, device=q.device) < lengths).float()


def sequence_starts(q: Tensor) -> Tensor:
    """Cumulative lengths of B sequences that are packed one after the other."""
    B, _, N, _ = q.shape
    return torch.arange(0, (B + 1) * N, N, dtype=torch.int32, device=q.device)


def varlen(x: Inputs) -> Tensor:
    q, k, v = (y.transpose(1, 2).flatten(0, 1) for y in (x.q, x.k, x.v))
    B, _, N, _ = x.q.shape
    o = varlen_linear_attention(q, k, v, x.constant, N, feature_map="elu1")
    return o.unflatten(0, (B, N)).transpose(1, 2)


# Tensors that must at least move. Forward: q, k, v in, o out. Backward: q, k, v, do in, dq, dk, dv out.
# focusing: its norms run over all heads. Where each head is a program of its own, k is read for the norm first, and
# k and v once more for the norm's gradient. rala: a key's weight needs the mean of all queries (q once more), and the
# mean's gradient comes from the keys, whose own need all queries before (q and do once more). key_encoding: the sum of
# its gradient over the batch reads dk once more.
OPS = {
    "elu1": Op(lambda x: linear_attention(x.q, x.k, x.v, feature_map="elu1"), MODEL_SHAPES | SWEEP | WIDTHS, 4, 7),
    "relu": Op(lambda x: linear_attention(x.q, x.k, x.v, feature_map="relu"),
               {"pvt_1": PVT["pvt_1"], "vit_s": MODEL_SHAPES["vit_s"]}, 4, 7),
    "simple_la": Op(lambda x: simple_la(x.q, x.k, x.v), {"pvt_1": PVT["pvt_1"], "vit_s": MODEL_SHAPES["vit_s"]}, 4, 7),
    "rope": Op(lambda x: linear_attention(x.q, x.k, x.v, feature_map="elu1", rope=x.constant), MLLA, 4, 7,
               constant=rope),
    "focusing": Op(lambda x: linear_attention(x.q, x.k, x.v, feature_map=focusing_power(x.parameter, 3)),
                   PVT | SWIN, 5, 9, parameter=lambda u: 0.5 + u[:, 0]),
    "signed_power": Op(lambda x: linear_attention(x.q, x.k, x.v, feature_map=signed_power(x.parameter)),
                       PVT | SWIN, 4, 7, parameter=lambda u: 1 + 4 * u[:, 0]),
    "rala": Op(lambda x: linear_attention(x.q, x.k, x.v, feature_map="elu1", key_weight="softmax", rope=x.constant),
               RAVLT, 5, 9, constant=rope),
    "key_encoding": Op(lambda x: linear_attention(x.q, x.k, x.v, feature_map="elu1", key_encoding=x.parameter),
                       PVT, 4, 8, parameter=lambda u: u),
    "padding_mask": Op(lambda x: linear_attention(x.q, x.k, x.v, feature_map="elu1", key_weight=x.constant),
                       RAGGED, 4, 7, constant=padding_mask),
    "varlen": Op(varlen, RAGGED, 4, 7, constant=sequence_starts),
}  # fmt: skip


def make_inputs(op: Op, shape: Sequence[int], layout: str, device: torch.device, seed: int = 0) -> Inputs:
    """Random inputs; the layout is "packed" or "contiguous", q, k and v each (B, H, N, D)."""
    B, H, N, D = shape
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=DTYPE)

    if layout == "packed":
        q, k, v = randn(B, N, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
    else:
        q, k, v = (randn(B, H, N, D) for _ in range(3))
    parameter = op.parameter and op.parameter(torch.rand(H, N, D, generator=generator, device=device)).requires_grad_()
    constant = op.constant and op.constant(q)
    do = randn(B, N, H, D).transpose(1, 2)
    return Inputs(*(x.detach().requires_grad_() for x in (q, k, v)), parameter, constant, do)


def forward(run: Callable, x: Inputs) -> tuple[Tensor]:
    with torch.no_grad():
        return (run(x),)


def forward_backward(run: Callable, x: Inputs) -> tuple[Tensor, ...]:
    o = run(x)
    return (o.detach(), *torch.autograd.grad(o, list(x.leaves.values()), x.do))


def backward(run: Callable, x: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    """The backward pass alone: its forward pass is done once, here."""
    o = run(x)
    return lambda: torch.autograd.grad(o, list(x.leaves.values()), x.do, retain_graph=True)


# --- what they are compared with --------------------------------------------------------------------------------------


def sdpa(x: Inputs) -> Tensor:
    return F.scaled_dot_product_attention(x.q, x.k, x.v)


def baselines(name: str, shape_name: str, N: int) -> list[str]:
    """The names of what else is measured: the operator in plain PyTorch, and for the plain one softmax attention."""
    if name != "elu1":
        return ["eager"]
    compiled = [] if shape_name in WIDTHS else ["compile"]  # compiles anew for each shape, some ten seconds
    return ["eager", *compiled, *(["sdpa"] if N <= SDPA_TOKENS else [])]


@contextmanager
def backend(name: str, op: Op) -> Iterator[Callable[[Inputs], Tensor]]:
    """The function of a backend: "flash_bla", as users call it, or one of the baselines."""
    if name in ("flash_bla", "sdpa"):
        yield op.run if name == "flash_bla" else sdpa
        return
    before = os.environ.get("FLASH_BLA_BACKEND")
    os.environ["FLASH_BLA_BACKEND"] = "reference"
    try:
        yield torch.compile(op.run, dynamic=False) if name == "compile" else op.run
    finally:
        torch.compiler.reset()
        os.environ.pop("FLASH_BLA_BACKEND")
        if before is not None:
            os.environ["FLASH_BLA_BACKEND"] = before


# --- correctness ------------------------------------------------------------------------------------------------------


def check(names: Sequence[str], shape: Sequence[int], layout: str, device: torch.device) -> None:
    """Prints the relative errors of outputs and gradients, and ends the script if one is too large.

    The norm of a gradient counts as at least a hundredth of the largest one's.
    """
    print(f"Errors of {str(DTYPE).removeprefix('torch.')} against float64 at {tuple(shape)}")
    worst = 0.0
    for name in names:
        op = OPS[name]
        x = make_inputs(op, shape, layout, device)
        exact = x._replace(do=x.do.double(), **{n: y.detach().double().requires_grad_() for n, y in x.leaves.items()})
        results = forward_backward(op.run, x)
        with backend("eager", op) as reference:
            expected = forward_backward(reference, exact)
        norms = [y.norm().item() for y in expected]
        norms[1:] = [max(norm, 1e-2 * max(norms[1:])) for norm in norms[1:]]
        errors = [(y - z).norm().item() / norm for y, z, norm in zip(results, expected, norms, strict=True)]
        labels = ("o", *(f"d{n}" for n in x.leaves))
        print(f"{name:13s}" + "  ".join(f"{label} {e:.1e}" for label, e in zip(labels, errors, strict=True)))
        worst = max(worst, *(e if e == e else float("inf") for e in errors))
    if not worst <= TOLERANCE:
        sys.exit(f"error: the results are wrong by {worst:.1e}, more than {TOLERANCE:.0e}; nothing is measured")


# --- measurement ------------------------------------------------------------------------------------------------------


def measure(
    name: str, shape: Sequence[int], backend_name: str, layout: str, device: torch.device, bandwidth: float
) -> Iterator[dict[str, object]]:
    """The columns of a row for each direction; host time and memory of "backward" include the forward pass."""
    op = OPS[name]
    B, H, N, D = shape
    tensor_bytes = B * H * N * D * DTYPE.itemsize
    count, calls = timing.rotation(3 * tensor_bytes, device)
    sets = [make_inputs(op, shape, layout, device, seed) for seed in range(count)]
    with backend(backend_name, op) as run:
        for direction, whole, tensors in (
            ("forward", forward, op.forward_tensors),
            ("backward", forward_backward, op.backward_tensors),
        ):
            each = [partial(forward, run, x) if direction == "forward" else backward(run, x) for x in sets]
            seconds = timing.kernel_seconds([each[i % count] for i in range(calls)], device)
            del each
            floor = tensors * tensor_bytes / bandwidth
            call = partial(whole, run, sets[0])
            row = {
                "direction": direction,
                "time_us": 1e6 * seconds,
                "floor_us": 1e6 * floor,
                "percent_of_roofline": 100 * floor / seconds,
                "host_us": 1e6 * timing.host_seconds(call, device),
                "extra_mb": timing.extra_bytes(call, device) / 1e6,
                "copy_tb_s": bandwidth / 1e12,
            }
            if backend_name == "flash_bla":
                new_length = N + 1 if direction == "forward" else N + 2
                x = make_inputs(op, (B, H, new_length, D), layout, device)
                row["first_call_ms"] = 1e3 * timing.finished_seconds(partial(whole, run, x), device)
            yield row


def measure_all(args: argparse.Namespace, device: torch.device) -> Iterator[dict[str, object]]:
    bandwidth = timing.copy_bandwidth(device)
    print(f"copy: {bandwidth / 1e12:.2f} TB/s read and written")
    functorch_config.donated_buffer = False  # or compiled code could not keep its graph for a second backward pass
    where = timing.machine(device) | {"layout": args.layout, "dtype": str(DTYPE).removeprefix("torch.")}
    for name in args.ops:
        for shape_name, shape in shapes_of(name, args).items():
            others = [] if args.quick or args.no_baselines else baselines(name, shape_name, shape[2])
            for backend_name in ("flash_bla", *others):
                what = {"op": name, "shape": shape_name, **dict(zip("BHND", shape, strict=True))}
                try:
                    for row in measure(name, shape, backend_name, args.layout, device, bandwidth):
                        print(f"{name:13s}{shape_name:12s}{row['direction']:9s}{backend_name:10s}"
                              f"{row['time_us']:9.1f} µs {row['percent_of_roofline']:5.1f} %"
                              f"   host {row['host_us']:7.1f} µs", flush=True)  # fmt: skip
                        yield what | row | {"backend": backend_name} | where
                except torch.OutOfMemoryError:
                    print(f"{name:13s}{shape_name:12s}{backend_name}: out of memory", flush=True)
                if device.type == "cuda":
                    torch.cuda.empty_cache()


def shapes_of(name: str, args: argparse.Namespace) -> dict[str, tuple[int, int, int, int]]:
    """The shapes of an operator: those asked for, or its own."""
    if args.shapes:
        return args.shapes
    own = OPS[name].shapes
    return {key: shape for key, shape in own.items() if not (args.quick and key in SWEEP | WIDTHS)}


# --- results ----------------------------------------------------------------------------------------------------------

TITLES = {"flash_bla": "flash_bla", "eager": "PyTorch eager", "compile": "torch.compile", "sdpa": "softmax SDPA"}


def by_shape(rows: list[dict[str, str]]) -> dict[tuple[str, ...], dict[tuple[str, str], dict[str, str]]]:
    """For each operator, shape and layout its rows, by backend and direction."""
    groups = {}
    for row in rows:
        group = groups.setdefault((row["op"], row["shape"], row["layout"]), {})
        group[row["backend"], row["direction"]] = row
    return groups


def title(shape_name: str, layout: str) -> str:
    return shape_name if layout == "packed" else f"{shape_name}, {layout}"


def tables(rows: list[dict[str, str]]) -> str:
    """The results as Markdown, a table for each operator; pairs are forward and backward."""

    def pair(group: dict, backend_name: str, column: str, digits: int = 0) -> str:
        values = [group.get((backend_name, direction), {}).get(column) for direction in ("forward", "backward")]
        return " / ".join(f"{float(x):.{digits}f}" if x else "–" for x in values) if any(values) else ""

    copies = sorted({float(row["copy_tb_s"]) for row in rows})
    text = [
        "# Operators\n",
        measured_on(rows),
        f"Copy bandwidth, read and written, measured in the same run: "
        f"{' to '.join(dict.fromkeys(f'{x:.2f}' for x in (copies[0], copies[-1])))} TB/s.\n",
        "Pairs are forward / backward; host time and memory of the second include the forward pass. Times are of the\n"
        "kernels, in µs, by replay of CUDA graphs; the floor is the fewest bytes over the copy bandwidth; host is the\n"
        "time until an eager call returns to Python; memory is what a call needs besides its inputs and outputs.\n",
    ]
    groups = by_shape(rows)
    for name in dict.fromkeys(key[0] for key in groups):
        own = {key: group for key, group in groups.items() if key[0] == name}
        others = [other for other in TITLES if any((other, "forward") in group for group in own.values())]
        header = ["shape", "B, H, N, D", "floor", *(TITLES[other] for other in others), "% of roofline", "host, µs",
                  "first call at a new length, ms", "memory, MB"]  # fmt: skip
        body = []
        for (_, shape_name, layout), group in own.items():
            row = next(iter(group.values()))
            body.append([
                title(shape_name, layout),
                ", ".join(row[dimension] for dimension in "BHND"),
                pair(group, row["backend"], "floor_us"),
                *(pair(group, other, "time_us") for other in others),
                pair(group, "flash_bla", "percent_of_roofline"),
                pair(group, "flash_bla", "host_us"),
                pair(group, "flash_bla", "first_call_ms", 1),
                pair(group, "flash_bla", "extra_mb", 1),
            ])  # fmt: skip
        text += [f"## {name}\n", markdown(header, body)]
    return "\n".join(text)


def draw_sweep(rows: list[dict[str, str]]) -> Figure | None:
    """Time of the plain operator over the number of tokens, with the roofline; None if no sweep was measured."""
    alike = {"op": "elu1", "layout": "packed", "B": "1", "H": "16", "D": "64"}
    rows = [row for row in rows if all(row[name] == value for name, value in alike.items())]
    if len({row["N"] for row in rows}) < 2:
        return None
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, direction in zip(figure.subplots(1, 2, sharey=True), ("forward", "backward"), strict=True):
        for other, label in TITLES.items():
            points = sorted(
                (int(row["N"]), float(row["time_us"]), float(row["floor_us"]))
                for row in rows
                if (row["backend"], row["direction"]) == (other, direction)
            )
            if points:
                tokens, times, floors = zip(*points, strict=True)
                axes.plot(tokens, times, "o-", label=label)
                if other == "flash_bla":
                    axes.plot(tokens, floors, "k--", label="roofline")
        axes.set(yscale="log", title=direction, xlabel="tokens N (B = 1, H = 16, D = 64)")
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("µs, bfloat16")
    figure.axes[0].legend()
    figure.suptitle(f"Linear attention, elu + 1, {rows[0]['device']}")
    return figure


def draw_roofline(rows: list[dict[str, str]]) -> Figure:
    """How much of the roofline's speed each operator has at each shape."""
    groups = [(key, group) for key, group in by_shape(rows).items() if ("flash_bla", "forward") in group]
    labels = [f"{name} {title(shape_name, layout)}" for (name, shape_name, layout), _ in groups]
    figure = Figure(figsize=(7, 1.5 + 0.28 * len(groups)), layout="constrained")
    axes = figure.subplots()
    for direction, shift in (("forward", -0.2), ("backward", 0.2)):
        values = [float(group.get(("flash_bla", direction), {}).get("percent_of_roofline", 0)) for _, group in groups]
        axes.barh([i + shift for i in range(len(groups))], values, height=0.4, label=direction)
    axes.set_yticks(range(len(groups)), labels, fontsize=7)
    axes.set(xlabel="% of the roofline's speed", ylim=(len(groups) - 0.4, -0.6), title=rows[0]["device"])
    axes.axvline(100, color="black", linestyle="--")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower right")
    return figure


def write_report(output: Path, measured: str | None) -> None:
    """The tables and plots of OUTPUT/operators.csv, see `of_one_device`."""
    rows = of_one_device(read_rows(output / "operators.csv"), measured)
    if not rows:
        sys.exit(f"error: there is nothing in {output / 'operators.csv'}")
    (output / "operators.md").write_text(tables(rows), encoding="utf-8")
    for name, figure in (("operators_sweep.png", draw_sweep(rows)), ("operators_roofline.png", draw_roofline(rows))):
        if figure is not None:
            figure.savefig(output / name, dpi=150)


# --- command line -----------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"), help="folder of CSV, table and plots")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS), help="all by default")
    parser.add_argument("--shapes", nargs="+", metavar="SHAPE", help=f"B,H,N,D or a name: {', '.join(SHAPES)}")
    parser.add_argument("--layout", choices=("packed", "contiguous"), default="packed")
    parser.add_argument("--quick", action="store_true", help="no sweeps of length and width, and no baselines")
    parser.add_argument("--no-baselines", action="store_true")
    parser.add_argument("--plot-only", action="store_true", help="measure nothing")
    args = parser.parse_args(argv)
    try:
        args.shapes = {name: SHAPES.get(name) or _parse_shape(name) for name in args.shapes or ()}
    except ValueError:
        parser.error(f"--shapes takes B,H,N,D or names among {', '.join(SHAPES)}")
    return args


def _parse_shape(text: str) -> tuple[int, ...]:
    shape = tuple(int(size) for size in text.split(","))
    if len(shape) != 4 or min(shape) < 1:
        raise ValueError(text)
    return shape


def main(argv: Sequence[str] | None = None) -> None:
    """Correctness, measurements, report."""
    args = parse(argv)
    measured = None
    if not args.plot_only:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with timing.side_stream(device):
            check(args.ops, CHECKED_SHAPE, args.layout, device)
            for row in measure_all(args, device):
                merge_rows(args.output / "operators.csv", COLUMNS, KEY, [row])
                measured = row["device"]
    write_report(args.output, measured)


if __name__ == "__main__":
    main()
