"""How fast whole models run and train, and the memory they take, beside timm's models of the same size.

    python -m benchmarks.models [--models mlla_tiny deit_small_patch16_224] [--sizes 224:128 1024:8] [--modes training]
    python -m benchmarks.models --profile mlla_tiny --modes training     # where the time of a step goes
    python -m benchmarks.models --plot-only              # tables and plots again, from the CSV file

Random images (channels last) and weights, bfloat16 autocast. Inference is a forward pass, training a forward pass,
cross entropy, backward pass and fused AdamW; "-compiled" is torch.compile with CUDA graphs (mode="reduce-overhead"),
for each image size anew, in a process of its own. JOBS processes compile at a time (with more than one, those of the
eager models, too, whose kernels Triton compiles), and then each is measured alone. Rows go to OUTPUT/models.csv, where
they replace older ones of the same key, so that one table can be measured in several calls; what failed is a row that
says why. The tables (models.md) and plots beside it are made from that file alone, the plots for the device just
measured, with --plot-only for that with the latest date.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

import flash_bla  # noqa: F401  registers its models
from benchmarks import timing
from benchmarks.results import markdown, measured_on, merge_rows, of_one_device, read_rows

# Models to compare with each other; the last one of each group is timm's.
GROUPS = {
    "Swin": ("mlla_tiny", "pola_swin_tiny", "flatten_swin_tiny", "swin_tiny_patch4_window7_224"),
    "PVT": ("pola_pvt_small", "flatten_pvt_small", "ravlt_small", "pvt_v2_b2"),
    "ViT": ("linear_vit_small", "focused_vit_small", "pola_vit_small", "mlla_vit_small", "rala_vit_small",
            "deit_small_patch16_224"),
}  # fmt: skip
SIZES = ("224:128", "384:48", "1024:8", "2048:2")
MODES = ("inference", "inference-compiled", "training", "training-compiled")
WARM_UP = 5  # steps before the measurement
SECONDS = 1.5  # of each measurement

COLUMNS = ("model", "mode", "size", "batch", "images_s", "peak_gb", "first_step_s", "error", "device", "torch",
           "triton", "timm", "date")  # fmt: skip
KEY = ("model", "mode", "size", "batch", "device")

# Kernels of PyTorch and cuDNN that only move or convert data.
COPIES = re.compile(r"copy|memcpy|nchwToNhwc|nhwcToNchw", re.IGNORECASE)

# --- steps ------------------------------------------------------------------------------------------------------------


def make_step(name: str, mode: str, size: int, batch: int, device: torch.device) -> Callable[[], None]:
    """One step of inference or training of a new model."""
    options = {} if name.startswith("pvt_v2") else {"img_size": size}  # timm's PVT v2 has nothing that depends on it
    with device:
        model = timm.create_model(name, **options)
        images = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)
        targets = torch.randint(model.num_classes, (batch,))
    autocast = torch.autocast(device.type, dtype=torch.bfloat16)
    run = torch.compile(model, mode="reduce-overhead") if mode.endswith("-compiled") else model

    def infer() -> None:
        with torch.inference_mode(), autocast:
            run(images)

    if mode.startswith("inference"):
        model.eval()
        return infer
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)

    def train() -> None:
        with autocast:
            loss = F.cross_entropy(run(images), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return train


def measure(
    name: str, mode: str, size: int, batch: int, device: torch.device, seconds: float, wait: Callable = lambda: None
) -> dict[str, object]:
    """Images a second, the most memory held during the steps, and the time of the first one, compilation included.

    After the first step it waits for its turn.
    """
    step = make_step(name, mode, size, batch, device)
    first = timing.finished_seconds(step, device)
    empty_cache(device)
    wait()
    if device.type == "cuda":  # before the graphs are recorded, since a replay allocates nothing
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(WARM_UP):
        step()
    timing.synchronize(device)
    start, steps = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        step()
        steps += 1
    timing.synchronize(device)
    rate = steps * batch / (time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    return {"images_s": rate, "peak_gb": peak, "first_step_s": first}


def measure_all(args: argparse.Namespace, device: torch.device) -> Iterator[dict[str, object]]:
    where = timing.machine(device)
    cases = [(name, mode, size, batch) for size, batch in args.sizes for name in args.models for mode in args.modes]
    here = [case for case in cases if args.jobs == 1 and not case[1].endswith("-compiled")]
    others = [case for case in cases if case not in here]
    results = [measure_here(here, device, args.seconds)]
    results += [measure_apart(others[i : i + args.jobs], args.seconds) for i in range(0, len(others), args.jobs)]
    for (name, mode, size, batch), figures in (result for part in results for result in part):
        text = "  ".join(f"{key} {x:.4g}" if isinstance(x, float) else f"{key} {x}" for key, x in figures.items())
        print(f"{name:30s}{mode:20s}{size:5d}:{batch:<4d} {text}", flush=True)
        yield {"model": name, "mode": mode, "size": size, "batch": batch} | figures | where


Case = tuple[str, str, int, int]


def measure_here(cases: Sequence[Case], device: torch.device, seconds: float) -> Iterator[tuple[Case, dict]]:
    for case in cases:
        yield case, measure_or_describe(case, device, seconds)
        gc.collect()
        empty_cache(device)


def measure_apart(cases: Sequence[Case], seconds: float) -> Iterator[tuple[Case, dict]]:
    """In a process each: all compile at a time; then they are measured one by one."""
    command = [sys.executable, "-m", "benchmarks.models", "--seconds", str(seconds), "--worker"]
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": Path(__file__).parents[1]}
    workers = [subprocess.Popen([*command, json.dumps(case)], **options) for case in cases]
    try:
        answers = [_answer(worker) for worker in workers]
        for case, worker, answer in zip(cases, workers, answers, strict=True):
            if answer == {"ready": True}:
                with suppress(BrokenPipeError):  # it died since: no answer
                    worker.stdin.write("go\n")
                    worker.stdin.flush()
                answer = _answer(worker)
            worker.wait()
            yield case, answer
    finally:
        for worker in workers:
            worker.kill()


def _answer(worker: subprocess.Popen) -> dict:
    """The next line of JSON that a worker writes."""
    line = next((line for line in worker.stdout if line.startswith("{")), None)
    return {"error": "the process died"} if line is None else json.loads(line)


def work(case: Case, device: torch.device, seconds: float) -> None:
    """A process of ``measure_apart``."""

    def wait() -> None:
        print(json.dumps({"ready": True}), flush=True)
        sys.stdin.readline()

    print(json.dumps(measure_or_describe(case, device, seconds, wait)), flush=True)


def measure_or_describe(case: Case, device: torch.device, seconds: float, wait: Callable = lambda: None) -> dict:
    try:
        return measure(*case, device, seconds, wait)
    except Exception as error:  # whatever it is, the other models are measured
        return {"error": describe(error)}


def empty_cache(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def describe(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


# --- profile ----------------------------------------------------------------------------------------------------------


def profile(name: str, mode: str, size: int, batch: int, device: torch.device) -> str:
    """Kernels of one step by their time, and which part of it are copies."""
    step = make_step(name, mode, size, batch, device)
    for _ in range(WARM_UP):
        step()
    timing.synchronize(device)
    on_gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        step()
        timing.synchronize(device)
    events = profiler.key_averages()
    if on_gpu:
        events = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation]
    kernels = [(e.key, e.count, (e.self_device_time_total if on_gpu else e.self_cpu_time_total) / 1000) for e in events]
    title = f"{name}, {size} x {size}, batch {batch}: a step of {mode} on {timing.machine(device)['device']}"
    return kernel_table(title, kernels)


def kernel_table(title: str, kernels: Sequence[tuple[str, int, float]]) -> str:
    """A table of (name, launches, ms), the longest first, under a summary."""
    total = sum(time for _, _, time in kernels)
    copies = [kernel for kernel in kernels if COPIES.search(kernel[0])]

    def share(part: Sequence[tuple[str, int, float]]) -> str:
        spent = sum(time for _, _, time in part)
        return f"{sum(count for _, count, _ in part)} launches, {spent:.2f} ms, {100 * spent / total:.1f} %"

    lines = [
        title,
        f"all kernels: {share(kernels)}",
        f"copies: {share(copies)}",
        "",
        "      ms      %  launches  kernel",
    ]
    for kernel, count, spent in sorted(kernels, key=lambda kernel: -kernel[2]):
        lines.append(f"{spent:8.3f} {100 * spent / total:6.2f} {count:9d}  {kernel}")
    return "\n".join(lines) + "\n"


# --- results ----------------------------------------------------------------------------------------------------------


def tables(rows: list[dict[str, str]]) -> str:
    """The results as Markdown, a table for each image size and device; pairs are eager / compiled."""
    text = [
        "# Models\n",
        measured_on(rows) + "\n",
        "Images/s, eager / compiled, and the most memory held; bfloat16 autocast, random images and weights. Training\n"
        "is forward pass, cross entropy, backward pass and fused AdamW.\n",
    ]
    order = {name: i for i, name in enumerate(name for group in GROUPS.values() for name in group)}
    for size, batch, device in sorted({(int(row["size"]), int(row["batch"]), row["device"]) for row in rows}):
        groups = {}
        for row in rows:
            if (int(row["size"]), int(row["batch"]), row["device"]) == (size, batch, device):
                groups.setdefault(row["model"], {})[row["mode"]] = row
        body = []
        for name in sorted(groups, key=lambda name: (order.get(name, len(order)), name)):
            cells = [
                " / ".join(_cell(groups[name].get(mode), column, digits) for mode in (task, f"{task}-compiled"))
                for column, digits in (("images_s", 0), ("peak_gb", 1))
                for task in ("inference", "training")
            ]
            body.append([name, *cells])
        header = ["model", "inference", "training", "memory in inference, GB", "memory in training, GB"]
        text += [f"## {size} × {size}, batch {batch}, {device}\n", markdown(header, body)]
    return "\n".join(text)


def _cell(row: dict[str, str] | None, column: str, digits: int) -> str:
    """A figure, or in its place the kind of error, which the CSV file has in full."""
    if row is None:
        return "–"
    return f"{float(row[column]):.{digits}f}" if row[column] else row["error"].partition(":")[0] or "–"


def draw(rows: list[dict[str, str]], mode: str) -> Figure:
    """Images/s and memory of an image over the side of the images, a column for each group of models."""
    rows = [row for row in rows if row["mode"] == mode and row["images_s"]]
    grouped = {name for group in GROUPS.values() for name in group}
    others = tuple(dict.fromkeys(row["model"] for row in rows if row["model"] not in grouped))
    groups = {title: names for title, names in {**GROUPS, "others": others}.items()
              if any(row["model"] in names for row in rows)}  # fmt: skip
    sides = sorted({int(row["size"]) for row in rows})
    figure = Figure(figsize=(1 + 4 * len(groups), 7), layout="constrained")
    panels = figure.subplots(2, len(groups), squeeze=False, sharex=True, sharey="row")
    for (above, below), (title, names) in zip(panels.T, groups.items(), strict=True):
        for name in names:
            points = sorted((row for row in rows if row["model"] == name), key=lambda row: int(row["size"]))
            rates = [(int(row["size"]), float(row["images_s"])) for row in points]
            memory = [(int(row["size"]), float(row["peak_gb"]) / int(row["batch"])) for row in points if row["peak_gb"]]
            for axes, line in ((above, rates), (below, memory)):
                if line:
                    axes.loglog(*zip(*line, strict=True), "o-", label=name)
        above.legend(fontsize=7)
        above.set_title(title)
        below.set_xlabel("side of the images")
    for axes in panels.flat:
        axes.minorticks_off()
        axes.set_xticks(sides, [str(side) for side in sides])
        axes.grid(alpha=0.3)
    panels[0, 0].set_ylabel("images/s")
    panels[1, 0].set_ylabel("GB for an image, at the batch measured")
    figure.suptitle(f"{mode}, {rows[0]['device']}")
    return figure


def write_report(output: Path, measured: str | None) -> None:
    """The tables and plots of OUTPUT/models.csv, see `of_one_device`."""
    rows = read_rows(output / "models.csv")
    if not rows:
        sys.exit(f"error: there is nothing in {output / 'models.csv'}")
    (output / "models.md").write_text(tables(rows), encoding="utf-8")
    rows = of_one_device(rows, measured)
    for mode in MODES:
        if any(row["mode"] == mode and row["images_s"] for row in rows):
            draw(rows, mode).savefig(output / f"models_{mode}.png", dpi=150)


# --- command line -----------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"), help="folder of CSV, table and plots")
    parser.add_argument("--models", nargs="+", metavar="MODEL",
                        default=[name for group in GROUPS.values() for name in group])  # fmt: skip
    parser.add_argument("--sizes", nargs="+", metavar="SIDE:BATCH", type=_parse_size,
                        default=[_parse_size(size) for size in SIZES])  # fmt: skip
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each measurement")
    parser.add_argument("--jobs", type=int, default=1, help="compilations at a time")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--profile", metavar="MODEL", help="write the kernels of a step of each mode at the first size")
    parser.add_argument("--plot-only", action="store_true", help="measure nothing")
    return parser.parse_args(argv)


def _parse_size(text: str) -> tuple[int, int]:
    try:
        size, batch = map(int, text.split(":"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"side and batch, as 224:128, got {text!r}") from None
    return size, batch


def main(argv: Sequence[str] | None = None) -> None:
    """Measurements and report, or a profile."""
    args = parse(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.worker:
        work(args.worker, device, args.seconds)
        return
    if args.profile:
        args.output.mkdir(parents=True, exist_ok=True)
        for mode in args.modes:
            text = profile(args.profile, mode, *args.sizes[0], device)
            (args.output / f"profile_{args.profile}_{mode}.txt").write_text(text, encoding="utf-8")
            print("\n".join(text.splitlines()[:25]))
        return
    measured = None
    if not args.plot_only:
        for row in measure_all(args, device):
            merge_rows(args.output / "models.csv", COLUMNS, KEY, [row])
            measured = row["device"]
    write_report(args.output, measured)


if __name__ == "__main__":
    main()
