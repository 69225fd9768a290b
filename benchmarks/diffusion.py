"""How fast the attentions for image generation are beside softmax attention, at the sizes of diffusion models.

    python -m benchmarks.diffusion [--parts operator layer sparse] [--tokens 4096 65536]
    python -m benchmarks.diffusion --plot-only       # table and plot again, from the CSV file

- operator: LinFusion's linear attention against scaled_dot_product_attention, forward and backward, in the
  self-attention of SDXL (2 images, 20 heads of 64 channels)
- layer: the whole of LinFusion's layer against the projections and attention that it replaces, forward and backward
- sparse: PISA at density 0.1, with and without use_bias, against scaled_dot_product_attention, forward, in the
  self-attention of Flux (24 heads of 128 channels)

First results are compared with float64; it ends with an error if they differ. Then it measures the time of the kernels,
by replay of a CUDA graph whose calls take turns among inputs that exceed three L2 caches, and the most memory that a
call needs besides its inputs and outputs (for "backward", of forward and backward pass together). Softmax attention is
measured as PyTorch chooses its kernel and with flash attention and cuDNN each (the layer as PyTorch chooses and with
cuDNN); what counts is the fastest.

Rows go to OUTPUT/diffusion.csv, where they replace older ones of the same key; the table (diffusion.md) and the plot
beside it are made from that file alone, of the device just measured, with --plot-only of that with the latest date.
"""

from __future__ import annotations

import argparse
import copy
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import timing
from benchmarks.results import markdown, measured_on, merge_rows, of_one_device, read_rows
from flash_bla import linear_attention, piecewise_sparse_attention
from flash_bla.layers import GeneralizedLinearAttention
from flash_bla.ops.arguments import merge_heads, split_heads

IMAGES, HEADS, WIDTH = 2, 20, 64  # SDXL's; 1280 channels
SPARSE_HEADS, SPARSE_WIDTH, DENSITY = 24, 128, 0.1
CHECKED_TOKENS = 1000

COLUMNS = ("part", "tokens", "method", "dtype", "direction", "time_us", "memory_mb", "kernel", "device", "torch",
           "triton", "timm", "date")  # fmt: skip
KEY = ("part", "tokens", "method", "dtype", "direction", "device")

# --- what is measured -------------------------------------------------------------------------------------------------


class Method(NamedTuple):
    """A function of its leaves, which need gradients."""

    run: Callable[[], Tensor]
    leaves: list[Tensor]


class SoftmaxAttention(nn.Module):
    """What diffusers' ``Attention`` computes as a self-attention."""

    def __init__(self, dim: int, num_heads: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=False, **dd) for _ in range(3))
        self.to_out = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(project(x), self.num_heads) for project in (self.to_q, self.to_k, self.to_v))
        return self.to_out(merge_heads(F.scaled_dot_product_attention(q, k, v)))


def operator(tokens: int, dtype: torch.dtype, device: torch.device) -> dict[str, Method]:
    qkv = _queries_keys_values(IMAGES, HEADS, tokens, WIDTH, dtype, device)
    return {
        "linfusion": Method(lambda: linear_attention(*qkv, feature_map="elu1", eps=1e-4), qkv),
        "softmax": Method(lambda: F.scaled_dot_product_attention(*qkv), qkv),
    }


def layer(tokens: int, dtype: torch.dtype, device: torch.device) -> dict[str, Method]:
    x = torch.randn(IMAGES, tokens, HEADS * WIDTH, device=device, dtype=dtype).requires_grad_()
    layers = {"linfusion": GeneralizedLinearAttention, "softmax": SoftmaxAttention}
    modules = {name: cls(HEADS * WIDTH, HEADS, device=device, dtype=dtype) for name, cls in layers.items()}
    return {name: Method(partial(module, x), [x, *module.parameters()]) for name, module in modules.items()}


def sparse(tokens: int, dtype: torch.dtype, device: torch.device) -> dict[str, Method]:
    qkv = [x.detach() for x in _queries_keys_values(1, SPARSE_HEADS, tokens, SPARSE_WIDTH, dtype, device)]
    return {
        "pisa": Method(lambda: piecewise_sparse_attention(*qkv, DENSITY), qkv),
        "pisa_bias": Method(lambda: piecewise_sparse_attention(*qkv, DENSITY, use_bias=True), qkv),
        "softmax": Method(lambda: F.scaled_dot_product_attention(*qkv), qkv),
    }


def _queries_keys_values(B: int, H: int, N: int, D: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """As three projections give them, whose heads lie side by side."""
    shape = (B, N, H, D)
    return [torch.randn(shape, device=device, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3)]


class Part(NamedTuple):
    """A comparison: its methods by name, and where it is made."""

    make: Callable[[int, torch.dtype, torch.device], dict[str, Method]]
    tokens: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    directions: tuple[str, ...]
    softmax: tuple[str, ...]  # among SOFTMAX
    tolerance: float  # largest relative error against float64, in the Frobenius norm


# Softmax attention as PyTorch runs it by itself, and with the kernels that it has.
SOFTMAX: dict[str, Callable[[], AbstractContextManager]] = {
    "softmax": nullcontext,
    "softmax_flash": partial(sdpa_kernel, SDPBackend.FLASH_ATTENTION),
    "softmax_cudnn": partial(sdpa_kernel, SDPBackend.CUDNN_ATTENTION),
}
HALF = (torch.bfloat16, torch.float16)
SIZES = (4096, 16384, 65536)
PARTS = {
    "operator": Part(operator, SIZES, HALF[:1], ("forward", "backward"), tuple(SOFTMAX), 1e-2),
    # the projections round their results, too
    "layer": Part(layer, SIZES, HALF, ("forward", "backward"), ("softmax", "softmax_cudnn"), 4e-2),
    "sparse": Part(sparse, (4096, 16384, 32768, 65536), HALF[:1], ("forward",), tuple(SOFTMAX), 1e-2),
}

# --- correctness ------------------------------------------------------------------------------------------------------


def check(names: Sequence[str], device: torch.device) -> None:
    """Prints the relative errors of outputs and gradients, and ends the script if one is too large.

    The norm of a gradient counts as at least a hundredth of the largest one's.
    """
    print("Errors against float64")
    wrong = []
    for name in names:
        part = PARTS[name]
        for dtype in part.dtypes:
            for method, pair in _checked(name, dtype, device).items():
                results, expected = (_results(x, "backward" in part.directions) for x in pair)
                norms = [y.norm().item() for y in expected]
                norms[1:] = [max(norm, 1e-2 * max(norms[1:])) for norm in norms[1:]]
                errors = [(y - z).norm().item() / norm for y, z, norm in zip(results, expected, norms, strict=True)]
                worst = max(e if e == e else float("inf") for e in errors)
                what = f"{name} {method} {_short(dtype)}"
                print(f"{what:32s}output {errors[0]:.1e}, worst {worst:.1e}")
                if not worst <= part.tolerance:
                    wrong.append(f"{what}: {worst:.1e}, more than {part.tolerance:.0e}")
    if wrong:
        sys.exit(f"error: the results are wrong, nothing is measured: {'; '.join(wrong)}")


def _checked(name: str, dtype: torch.dtype, device: torch.device) -> dict[str, tuple[Method, Method]]:
    """What is measured, on few tokens, and the same in float64."""
    if name == "layer":
        module = GeneralizedLinearAttention(HEADS * WIDTH, HEADS, device=device, dtype=dtype)
        x = torch.randn(1, CHECKED_TOKENS, HEADS * WIDTH, device=device, dtype=dtype)
        exact = copy.deepcopy(module).double()
        pairs = ((m, x.to(m.to_q.weight.dtype).requires_grad_()) for m in (module, exact))
        return {"linfusion": tuple(Method(partial(m, y), [y, *m.parameters()]) for m, y in pairs)}
    width = WIDTH if name == "operator" else SPARSE_WIDTH
    qkv = _queries_keys_values(1, 2, CHECKED_TOKENS, width, dtype, device)
    qkv = [x.detach().requires_grad_(name == "operator") for x in qkv]
    exact = [x.detach().double().requires_grad_() for x in qkv]
    if name == "operator":
        run = partial(linear_attention, feature_map="elu1", eps=1e-4)
        return {"linfusion": tuple(Method(partial(run, *x), x) for x in (qkv, exact))}
    runs = {bias: partial(piecewise_sparse_attention, density=DENSITY, use_bias=bias) for bias in (False, True)}
    pairs = {f"pisa{'_bias' * bias}": tuple(Method(partial(run, *x), x) for x in (qkv, exact))
             for bias, run in runs.items()}  # fmt: skip
    softmax = Method(partial(F.scaled_dot_product_attention, *exact), exact)
    return pairs | {"pisa, density 1": (Method(lambda: piecewise_sparse_attention(*qkv, 1.0), qkv), softmax)}


def _results(method: Method, gradients: bool) -> list[Tensor]:
    o = method.run()
    torch.manual_seed(1)
    do = torch.randn(o.shape, device=o.device).to(o.dtype)
    return [o.detach(), *(torch.autograd.grad(o, method.leaves, do) if gradients else ())]


# --- measurement ------------------------------------------------------------------------------------------------------


def measure(sets: Sequence[Method], calls: int, direction: str, device: torch.device) -> dict[str, object]:
    """Time of a call, and memory; the sets of inputs take turns."""

    def forward(method: Method) -> list[Tensor]:
        with torch.no_grad():
            return [method.run()]

    def forward_backward(method: Method) -> list[Tensor]:
        o = method.run()
        return [o.detach(), *torch.autograd.grad(o, method.leaves, o.detach())]

    def backward(method: Method) -> Callable[[], Sequence[Tensor]]:
        o = method.run()
        return lambda: torch.autograd.grad(o, method.leaves, o.detach(), retain_graph=True)

    each = [backward(x) if direction == "backward" else partial(forward, x) for x in sets]
    seconds = timing.kernel_seconds([each[i % len(each)] for i in range(calls)], device)
    del each
    whole = partial(forward if direction == "forward" else forward_backward, sets[0])
    return {"time_us": 1e6 * seconds, "memory_mb": timing.extra_bytes(whole, device) / 1e6}


def longest_kernel(call: Callable, device: torch.device) -> str:
    """Its name, without parameters: by it one sees which attention PyTorch has chosen."""
    if device.type != "cuda":
        return ""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call()
        timing.synchronize(device)
    longest = max(profiler.key_averages(), key=lambda event: event.self_device_time_total)
    return re.split(r"[<(]", longest.key.removeprefix("void "))[0]


def measure_all(args: argparse.Namespace, device: torch.device) -> Iterator[dict[str, object]]:
    where = timing.machine(device)
    for name in args.parts:
        part = PARTS[name]
        for tokens in args.tokens or part.tokens:
            for dtype in part.dtypes:
                count, calls = timing.rotation(_input_bytes(name, tokens, dtype), device)
                torch.manual_seed(0)
                sets = [part.make(tokens, dtype, device) for _ in range(count)]
                methods = [method for method in sets[0] if method != "softmax"]
                for method in (*methods, *part.softmax):
                    own = [x[method if method in x else "softmax"] for x in sets]
                    what = {"part": name, "tokens": tokens, "method": method, "dtype": _short(dtype)}
                    for direction in part.directions:
                        try:
                            with SOFTMAX.get(method, nullcontext)():
                                row = measure(own, calls, direction, device)
                            if method == "softmax" and direction == "forward":
                                row["kernel"] = longest_kernel(own[0].run, device)
                        except (torch.OutOfMemoryError, RuntimeError) as error:  # a kernel may not be there
                            print(*what.values(), direction, type(error).__name__, str(error).splitlines()[0])
                            continue
                        print(*what.values(), direction, f"{row['time_us']:.1f} µs", f"{row['memory_mb']:.1f} MB",
                              row.get("kernel", ""), flush=True)  # fmt: skip
                        yield what | {"direction": direction} | row | where
                del sets, own
                if device.type == "cuda":
                    torch.cuda.empty_cache()


def _input_bytes(name: str, tokens: int, dtype: torch.dtype) -> int:
    channels = {"operator": 3 * IMAGES * HEADS * WIDTH, "layer": IMAGES * HEADS * WIDTH,
                "sparse": 3 * SPARSE_HEADS * SPARSE_WIDTH}  # fmt: skip
    return channels[name] * tokens * dtype.itemsize


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- results ----------------------------------------------------------------------------------------------------------

TITLES = {
    "operator": "LinFusion's operator (B = 2, H = 20, D = 64)",
    "layer": "LinFusion's layer (B = 2, C = 1280)",
    "sparse": "PISA, density 0.1 (B = 1, H = 24, D = 128)",
}
METHODS = {
    "linfusion": "LinFusion", "pisa": "PISA", "pisa_bias": "PISA, use_bias", "softmax": "SDPA",
    "softmax_flash": "SDPA, flash", "softmax_cudnn": "SDPA, cuDNN",
}  # fmt: skip

Rows = list[dict[str, str]]


def strongest(rows: Rows) -> dict[str, str] | None:
    """Of rows of one size and direction that of the fastest softmax attention."""
    return min((row for row in rows if row["method"] in SOFTMAX), key=lambda row: float(row["time_us"]), default=None)


def tables(rows: Rows) -> str:
    """The results as Markdown, a table for each part."""
    text = [
        "# Attentions for image generation\n",
        measured_on(rows) + "\n",
        "Times are of the kernels, in ms, by replay of CUDA graphs. SDPA is scaled_dot_product_attention as PyTorch\n"
        "chooses its kernel; the factors compare with the fastest of its kernels. Memory is what a call needs besides\n"
        "its inputs and outputs, in MB, for the backward pass that of both passes; SDPA's is of PyTorch's choice.\n",
    ]
    for part in (name for name in PARTS if any(row["part"] == name for row in rows)):
        own = [row for row in rows if row["part"] == part]
        shown = [method for method in METHODS if any(row["method"] == method for row in own)]
        ours = [method for method in shown if method not in SOFTMAX]
        header = ["tokens", "type", "direction", *(METHODS[method] for method in shown),
                  *(f"{METHODS[method]}: times as fast" for method in ours), "memory", "memory of SDPA"]  # fmt: skip
        body = []
        for key in dict.fromkeys((row["tokens"], row["dtype"], row["direction"]) for row in own):
            group = [row for row in own if (row["tokens"], row["dtype"], row["direction"]) == key]
            by_method = {row["method"]: row for row in group}
            best = strongest(group)
            memory = [by_method.get(method, {}).get("memory_mb") for method in (ours[0], "softmax")]
            body.append([
                *key,
                *(_milliseconds(by_method.get(method)) for method in shown),
                *(_factor(by_method.get(method), best) for method in ours),
                *(f"{float(x):.0f}" if x else "–" for x in memory),
            ])  # fmt: skip
        chosen = dict.fromkeys(row["kernel"] for row in own if row["method"] == "softmax" and row["kernel"])
        note = f"PyTorch's choice: {', '.join(f'`{name}`' for name in chosen)}.\n" if chosen and part != "layer" else ""
        text += [f"## {TITLES[part]}\n", markdown(header, body), note]
    return "\n".join(text)


def _milliseconds(row: dict[str, str] | None) -> str:
    return f"{float(row['time_us']) / 1000:.3g}" if row else "–"


def _factor(row: dict[str, str] | None, best: dict[str, str] | None) -> str:
    return f"{float(best['time_us']) / float(row['time_us']):.3g}" if row and best else "–"


def draw(rows: Rows) -> Figure:
    """Time over the number of tokens, with the fastest softmax attention, a panel for each part."""
    rows = [row for row in rows if row["dtype"] == "bfloat16"]
    parts = [name for name in PARTS if any(row["part"] == name for row in rows)]
    figure = Figure(figsize=(4.5 * len(parts), 4), layout="constrained")
    for axes, part in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        for direction, line in (("forward", "o-"), ("backward", "s--")):
            own = [row for row in rows if (row["part"], row["direction"]) == (part, direction)]
            lines = {METHODS[m]: [row for row in own if row["method"] == m] for m in METHODS if m not in SOFTMAX}
            sizes = dict.fromkeys(row["tokens"] for row in own)
            best = [strongest([row for row in own if row["tokens"] == tokens]) for tokens in sizes]
            lines["SDPA, the fastest"] = [row for row in best if row]
            for i, (label, points) in enumerate(lines.items()):
                points = sorted((int(row["tokens"]), float(row["time_us"]) / 1000) for row in points)
                if points:
                    axes.plot(*zip(*points, strict=True), line, color=f"C{i}", label=f"{label}, {direction}")
        axes.set(xscale="log", yscale="log", title=TITLES[part], xlabel="tokens", ylabel="ms, bfloat16")
        axes.set_xscale("log", base=2)
        axes.title.set_fontsize(9)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.suptitle(rows[0]["device"])
    return figure


def write_report(output: Path, measured: str | None) -> None:
    """The table and plot of OUTPUT/diffusion.csv, see `of_one_device`."""
    rows = of_one_device(read_rows(output / "diffusion.csv"), measured)
    if not rows:
        sys.exit(f"error: there is nothing in {output / 'diffusion.csv'}")
    (output / "diffusion.md").write_text(tables(rows), encoding="utf-8")
    draw(rows).savefig(output / "diffusion.png", dpi=150)


# --- command line -----------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"), help="folder of CSV, table and plot")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="all by default")
    parser.add_argument("--tokens", nargs="+", type=int, help="each part's own by default")
    parser.add_argument("--plot-only", action="store_true", help="measure nothing")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Correctness, measurements, report."""
    args = parse(argv)
    measured = None
    if not args.plot_only:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with timing.side_stream(device):
            check(args.parts, device)
            for row in measure_all(args, device):
                merge_rows(args.output / "diffusion.csv", COLUMNS, KEY, [row])
                measured = row["device"]
    write_report(args.output, measured)


if __name__ == "__main__":
    main()
