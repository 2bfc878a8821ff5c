"""An evaluation as one picture: a panel a metric and one of the likelihood, a point with its 95 % interval a row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reft_export.evaluating.evaluation import Evaluation
from reft_export.evaluating.intervals import Interval

BASE, STEERED, GRID = "#8a93a3", "#0b7285", "#e5e8ec"
ROW_HEIGHT, PANEL_WIDTH, NAME_WIDTH = 0.32, 3.2, 2.6
"""Inches."""


def draw(found: Evaluation, path: Path) -> None:
    """Writes a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, metrics = found.rows, found.held_out.metrics
    panels = [(name.rpartition(":")[2], [_percent(row.shares[name].interval) for row in rows], "% of lines, 95 %") for name in metrics]
    what, unit = ("answers", "token") if found.held_out.gold is None else ("labels", "text")
    panels.append((f"NLL of the data's {what}", [row.loss for row in rows], f"nats a {unit}, 95 %"))
    figure = Figure(figsize=(NAME_WIDTH + PANEL_WIDTH * len(panels), 1.2 + ROW_HEIGHT * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    names = [f"{' '.join(dict.fromkeys((row.who.artifact, row.who.precision)))}, {row.who.adapter or 'base'}" for row in rows]
    colors = [BASE if row.who.adapter is None else STEERED for row in rows]
    axes: Any = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for each, (title, intervals, unit) in zip(axes, panels, strict=True):
        _points(each, intervals, colors)
        each.set(title=title, xlabel=unit)
        if unit.startswith("%"):
            each.set_xlim(-4, 104)
    axes[0].set_yticks(range(len(names)), names, fontsize=8)
    axes[0].invert_yaxis()  # of all panels, which share it
    figure.savefig(path, dpi=110, format="png", metadata={"Software": None})


def _percent(interval: Interval) -> Interval:
    return Interval(value=100 * interval.value, low=100 * interval.low, high=100 * interval.high)


def _points(axes: Any, intervals: Sequence[Interval], colors: Sequence[str]) -> None:
    for place, (interval, color) in enumerate(zip(intervals, colors, strict=True)):
        error = [[interval.value - interval.low], [interval.high - interval.value]]
        axes.errorbar(interval.value, place, xerr=error, fmt="o", markersize=4, color=color, capsize=3, linewidth=1.2)
    axes.grid(color=GRID, axis="x")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", labelsize=8)
    axes.title.set_fontsize(10)
