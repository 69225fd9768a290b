"""Results of a benchmark: rows of a CSV file, which the tables and plots are made from."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from flash_bla.engine.checkpoint import write_atomically

Row = dict[str, object]


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def merge_rows(path: Path, columns: Sequence[str], key: Sequence[str], rows: Iterable[Row]) -> list[dict[str, str]]:
    """Puts rows into a CSV file, in the place of those of the same key, and returns all that it then holds."""
    merged = {tuple(row[name] for name in key): row for row in read_rows(path)}
    for row in rows:
        text = {name: _text(row.get(name)) for name in columns}
        merged[tuple(text[name] for name in key)] = text
    path.parent.mkdir(parents=True, exist_ok=True)
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(merged.values())
    write_atomically(path, file.getvalue().encode())
    return list(merged.values())


def markdown(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def measured_on(rows: Sequence[dict[str, str]]) -> str:
    """A sentence for each device and versions that the rows were measured with, and when."""
    sentences = {}
    for row in rows:
        where = row["device"], *(f"{name} {row[name]}" for name in ("torch", "triton", "timm") if row[name])
        sentences.setdefault(where, set()).add(row["date"])
    return "\n".join(
        f"Measured on one {', '.join(where)}, on {' and '.join(sorted(dates))}." for where, dates in sentences.items()
    )


def of_one_device(rows: Sequence[dict[str, str]], measured: str | None) -> list[dict[str, str]]:
    """The rows of one device, for tables that have no place to tell devices apart.

    It is the device just measured. If nothing was, it is that of the latest date, and of several then the one with the
    last row: the file, where rows stay in their place, does not say which was measured later that day.
    """
    if measured is None:
        measured = max(reversed(rows), key=lambda row: row["date"], default={"device": None})["device"]
    return [row for row in rows if row["device"] == measured]


def _text(value: object) -> str:
    """Five digits are more than a measurement has; nothing for what could not be measured."""
    if value is None or value != value:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)
