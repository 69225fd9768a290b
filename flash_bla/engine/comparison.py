"""Results of several evaluations side by side: one table, and accuracy over throughput as a plot."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from flash_bla.engine.config import RunError
from flash_bla.engine.logs import csv_text, prepare_output, write_output

# Column of the table: what it shows of a row.
COLUMNS = {
    "data set": lambda row: row["dataset"],
    "result": lambda row: row["result"],
    "model": lambda row: row["model"],
    "size": lambda row: "x".join(str(side) for side in row["input_size"][1:]),
    "parameters": lambda row: f"{row['parameters'] / 1e6:.2f} M",
    "images/s": lambda row: f"{row['throughput']:.0f}",
    "top-1": lambda row: f"{row['top1']:.2f}",
    "top-5": lambda row: f"{row['top5']:.2f}",
    "loss": lambda row: f"{row['loss']:.3f}",
    "ECE": lambda row: f"{row['ece']:.2f}",
}


def compare(files: Sequence[str], output: str | None) -> list[dict[str, Any]]:
    """Prints the results as a Markdown table: data set by data set, and within one the best top-1 first.

    With `output` the rows are written to OUTPUT.csv with all that they hold, and drawn in OUTPUT.png.

    Args:
        files: Results of eval.py, its OUTPUT.json.
        output: Path without ending, or None.

    Returns:
        The rows, each with its file's name as `result`, or its path where several have one name.

    Raises:
        RunError: A file is not there, or is no such result, or OUTPUT.csv is one of an evaluation or a training run,
            or cannot be written.
    """
    if output:
        for file in files:
            stem = Path(file).with_suffix("")
            if Path(f"{output}.csv").resolve() in (Path(f"{stem}{end}").resolve() for end in (".csv", ".classes.csv")):
                raise RunError(f"output: {output}.csv belongs to {file}, choose another name")
    paths = dict.fromkeys(Path(file) for file in files)
    stems = Counter(path.stem for path in paths)
    rows = [
        row for path in paths for row in _read(path, path.stem if stems[path.stem] == 1 else str(path.with_suffix("")))
    ]
    order = list(dict.fromkeys(row["dataset"] for row in rows))
    if output is not None:
        prepare_output(output, (".csv", ".png"))
    rows.sort(key=lambda row: (order.index(row["dataset"]), -row["top1"]))
    table = [list(COLUMNS), ["---"] * len(COLUMNS), *([show(row) for show in COLUMNS.values()] for row in rows)]
    for cells in table:
        print(f"| {' | '.join(cells)} |")
    if output:
        write_output(output, {".csv": csv_text(rows).encode(), ".png": draw(rows)})
        print(f"\nwritten to {output}.csv and {output}.png")
    return rows


def _read(file: Path, name: str) -> list[dict[str, Any]]:
    try:
        rows = [{"result": name} | row for row in json.loads(file.read_text(encoding="utf-8"))]
        for row in rows:
            for show in COLUMNS.values():
                show(row)
    except OSError as error:
        raise RunError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise RunError(f"{file} is no result of eval.py --output: {error!r}") from error
    return rows


def draw(rows: Sequence[dict[str, Any]]) -> bytes:
    """Top-1 over throughput as PNG: a panel for each data set, a line for each result through its sizes."""
    datasets = list(dict.fromkeys(row["dataset"] for row in rows))
    figure = Figure(figsize=(5.5 * len(datasets), 4.5), layout="constrained")
    for axes, dataset in zip(figure.subplots(1, len(datasets), squeeze=False)[0], datasets, strict=True):
        for result in dict.fromkeys(row["result"] for row in rows):
            points = [row for row in rows if (row["dataset"], row["result"]) == (dataset, result)]
            points.sort(key=lambda row: row["throughput"])
            axes.plot([row["throughput"] for row in points], [row["top1"] for row in points], "o-", label=result)
            for row in points:
                place = row["throughput"], row["top1"]
                axes.annotate(COLUMNS["size"](row), place, (0, 5), textcoords="offset points", ha="center", fontsize=7)
        axes.set(title=dataset, xlabel="images/s, forward pass of one device", ylabel="top-1, %")
        axes.margins(0.12)
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()
