"""Tables of what was measured, in Markdown, with the mean and the spread of repeated measurements."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], note: str = "") -> dict[str, Any]:
    """One table as a benchmark returns it (JSON-able): `rows` hold a cell a column; a note stands below.

    Raises:
        ValueError: a row has more or fewer cells than there are columns.
    """
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"table {title!r} has {len(columns)} columns, a row {len(row)} cells: {row}")
    return {"title": title, "columns": list(columns), "rows": [list(row) for row in rows], "note": note}


def markdown(tables: Sequence[dict[str, Any]]) -> str:
    """The Markdown of `table`s, one after the other; None is an empty cell, numbers are aligned to the right."""
    parts = []
    for one in tables:
        cells = [[_cell(cell) for cell in row] for row in one["rows"]]
        widths = [max(3, *map(len, column)) for column in zip(one["columns"], *cells, strict=True)]
        right = [_numeric(column) for column in zip(*one["rows"], strict=True)] or [False] * len(widths)
        rule = ["-" * (w - 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True)]
        lines = [_line(one["columns"], widths, right), "| " + " | ".join(rule) + " |"]
        lines += [_line(row, widths, right) for row in cells]
        parts.append("\n".join([f"### {one['title']}", "", *lines, *(["", one["note"]] if one["note"] else [])]))
    return "\n\n".join(parts) + "\n"


def mean_and_spread(values: Sequence[float], digits: int = 4) -> str:
    """`0.2247 ± 0.0012`: the mean and the sample standard deviation; of one value, the value; of none, nothing."""
    if not values:
        return ""
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def best_and_spread(seconds: Sequence[float]) -> str:
    """`12.3 ms (+8 %)`: the shortest of repeated timings, and how far above it the median lies."""
    if not seconds:
        return ""
    best = min(seconds)
    middle = sorted(seconds)[len(seconds) // 2]
    above = f" (+{100 * (middle / best - 1):.0f} %)" if len(seconds) > 1 else ""
    return (f"{best:.2f} s" if best >= 1 else f"{1000 * best:.3g} ms") + above


def _numeric(column: Sequence[Any]) -> bool:
    return any(isinstance(cell, int | float) for cell in column)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _line(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    padded = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True)]
    return "| " + " | ".join(padded) + " |"
