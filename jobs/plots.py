"""The report's plots, as SVG text that can stand in a page."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_COLOURS = {
    "published": "#1f5fa8",
    "distribution": "#5aa0dc",
    "text_knn": "#7b858f",
    "text_profile": "#979fa8",
    "popularity": "#b3bac2",
    "random": "#d5dadf",
}
# Of lines that must be told apart; beyond these they come again, dashed and then dotted.
_LINES = ("#1f5fa8", "#d1495b", "#2e8b57", "#d98e04", "#7b4fa3", "#5aa0dc", "#8d6e53")
_BINS = 40  # of a histogram
_INK, _GRID = "#30363d", "#e4e8ec"


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots(1, columns, squeeze=False, sharey=columns > 1)[0]
    for axis in axes:
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.spines["bottom"].set_color(_GRID)
        axis.tick_params(colors=_INK, labelsize=9, length=0)
        axis.set_axisbelow(True)
    return figure, axes


def _svg(figure: Any) -> str:
    import matplotlib

    buffer = io.StringIO()
    # Text stays text; ids and dates are fixed, so that the same plot is the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def metrics(rows: Sequence[dict[str, Any]], metric: str, systems: Sequence[str]) -> str:
    """Bars with intervals of one metric, a panel a split. `rows` are of schemas/metrics.yaml."""
    shown = [row for row in rows if row["metric"] == metric]
    splits = [split for split in ("overall", "cold", "warm") if any(row["split"] == split for row in shown)]
    present = [system for system in systems if any(row["system"] == system for row in shown)]
    figure, axes = _figure(9, 0.9 + 0.34 * len(present), len(splits))
    for axis, split in zip(axes, splits, strict=True):
        for row in (row for row in shown if row["split"] == split):
            at, value = -present.index(row["system"]), row["value"]
            axis.barh(at, value, height=0.62, color=_COLOURS.get(row["system"], _INK))
            if row["low"] is not None:
                axis.plot([row["low"], row["high"]], [at, at], color=_INK, linewidth=1.2)
            end = max(value, row["high"] or 0)
            axis.annotate(
                f"{value:.3f}", (end, at), (5, 0), textcoords="offset points", va="center", fontsize=9, color=_INK
            )
        axis.set_title(split, fontsize=10, color=_INK, loc="left")
        axis.set_yticks([-i for i in range(len(present))], present)
        axis.grid(axis="x", color=_GRID)
        axis.margins(x=0.2)
        axis.set_xlim(left=0)
    return _svg(figure)


def bins(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Edges [41] of bins of equal width on a logarithmic axis, from the least value to the greatest."""
    low, high = float(values.min()), float(values.max())
    if high < 1.1 * low:
        low, high = low / 1.1, high * 1.1
    edges = np.geomspace(low, high, _BINS + 1)
    edges[[0, -1]] = low, high  # rounding would lose the values at the ends
    return edges


def probability_histogram(probabilities: NDArray[np.float64]) -> str:
    """How many (cold item, user) pairs have which probability, on a logarithmic axis."""
    figure, (axis,) = _figure(4.4, 2.5)
    axis.hist(probabilities, bins=bins(probabilities), color=_COLOURS["published"], rwidth=0.92)
    axis.set_xscale("log")
    axis.set_xlabel("p(user | item)", fontsize=9, color=_INK)
    axis.set_ylabel("pairs", fontsize=9, color=_INK)
    axis.grid(axis="y", color=_GRID)
    return _svg(figure)


def reliability(predicted: NDArray[np.float64], observed: NDArray[np.float64]) -> str:
    """Mean observed share against mean predicted probability of each bin, on logarithmic axes, with the diagonal.

    A bin in which nothing was observed has no place on the axis: it is an open triangle at the lower edge.
    """
    figure, (axis,) = _figure(4.4, 3.4)
    seen = observed > 0
    shown = np.concatenate([predicted[predicted > 0], observed[seen]])
    low, high = (shown.min() / 2, min(1.5, shown.max() * 2)) if len(shown) else (1e-3, 1.0)
    axis.plot([low, high], [low, high], color=_INK, linewidth=1, linestyle=(0, (4, 3)))
    axis.plot(predicted[seen], observed[seen], color=_COLOURS["published"], marker="o", markersize=4)
    axis.plot(
        np.maximum(predicted[~seen], low), np.full((~seen).sum(), low), color=_COLOURS["published"], marker="v", markersize=5,
        linestyle="none", fillstyle="none", clip_on=False,
    )  # fmt: skip
    axis.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    axis.set_xlabel("predicted p(user | item)", fontsize=9, color=_INK)
    axis.set_ylabel("observed share", fontsize=9, color=_INK)
    axis.grid(color=_GRID)
    return _svg(figure)


def probability_by_rank(ranks: NDArray[np.int64], probabilities: NDArray[np.float64]) -> str:
    """The median and the 5-95 % band over cold items of the probability at each rank."""
    figure, (axis,) = _figure(4.4, 2.5)
    order = np.argsort(ranks, kind="stable")
    distinct, starts = np.unique(ranks[order], return_index=True)
    groups = np.split(probabilities[order], starts[1:])
    low, median, high = np.array([np.quantile(group, [0.05, 0.5, 0.95]) for group in groups]).T
    axis.fill_between(distinct, low, high, color=_COLOURS["distribution"], alpha=0.3, linewidth=0)
    axis.plot(distinct, median, color=_COLOURS["published"], marker="o" if len(distinct) < 30 else None, markersize=3)
    axis.set_yscale("log")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("rank of the user", fontsize=9, color=_INK)
    axis.set_ylabel("p(user | item)", fontsize=9, color=_INK)
    axis.grid(axis="y", color=_GRID)
    return _svg(figure)


def curves(lines: dict[str, list[tuple[float, float]]], x: str, y: str) -> str:
    """One line a name through its (x, y) points; x on a logarithmic axis with a tick at each point."""
    figure, (axis,) = _figure(5.4, 3.2)
    looks = itertools.cycle((style, colour) for style in ("-", "--", ":") for colour in _LINES)
    for (name, points), (style, colour) in zip(lines.items(), looks, strict=False):
        xs, ys = zip(*sorted(points), strict=True)
        axis.plot(xs, ys, color=colour, linestyle=style, marker="o", markersize=4, label=name)
    ticks = sorted({at for points in lines.values() for at, _ in points})
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    axis.minorticks_off()
    axis.set_xlabel(x, fontsize=9, color=_INK)
    axis.set_ylabel(y, fontsize=9, color=_INK)
    axis.set_ylim(bottom=0)
    axis.grid(axis="y", color=_GRID)
    axis.legend(frameon=False, fontsize=9, labelcolor=_INK)
    return _svg(figure)
