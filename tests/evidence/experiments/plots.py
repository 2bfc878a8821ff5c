"""The picture of docs/experiments.md: parameters against accuracy, and strength against effect and fluency."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from evidence.experiments.rows import Row
from evidence.experiments.setups import LORA

PICTURE = "experiments.png"
GREY, BLUE, RED, GRID = "#8a93a3", "#0b7285", "#c92a2a", "#e5e8ec"


def plot(rows: Sequence[Row], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    strengths = sorted((row for row in rows if row.setup.section == "strength"), key=lambda row: row.setup.strength)
    figure = Figure(figsize=(6 * (1 + bool(strengths)), 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 1 + bool(strengths), squeeze=False)[0]
    for axes in panels:
        axes.spines["top"].set_visible(False)
        axes.grid(color=GRID)
        axes.set_axisbelow(True)
    _parameters(panels[0], rows)
    if strengths:
        _strength(panels[1], strengths)
    figure.savefig(path, dpi=100, metadata={"Software": None})


def _parameters(axes: Any, rows: Sequence[Row]) -> None:
    """Rows of one name are a point."""
    named: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.parameters and "films" in row.figures and row.setup.section != "few":
            named.setdefault((row.setup.section, row.setup.name), []).append(row)
    for (_, name), seeds in named.items():
        lora = seeds[0].setup.method in LORA
        x, y = seeds[0].parameters, 100 * fmean(row.figures["films"] for row in seeds)
        axes.plot([x], [y], "s" if lora else "o", color=GREY if lora else BLUE)
        axes.annotate(name, (x, y), xytext=(4, 3), textcoords="offset points", fontsize=6)
    base = [row.figures["films"] for row in rows if row.setup.name == "base" and "films" in row.figures]
    if base:
        axes.axhline(100 * base[0], color=BLUE, linewidth=0.8, linestyle=":", label="base")
        axes.legend(frameon=False)
    axes.set_xscale("log")
    axes.set(title="Sentiment, 60 steps", xlabel="trained parameters", ylabel="accuracy on 200 films, %")


def _strength(axes: Any, rows: Sequence[Row]) -> None:
    at = [row.setup.strength for row in rows]
    axes.plot(at, [100 * row.figures["upper"] for row in rows], "o-", color=BLUE)
    axes.set(title="Strength of one edit", xlabel="strength", ylabel="answers in upper case, %")
    axes.yaxis.label.set_color(BLUE)
    other = axes.twinx()
    other.spines["top"].set_visible(False)
    other.plot(at, [row.figures["base loss"] for row in rows], "s--", color=RED)
    other.set_ylabel("the base's loss on them, nats", color=RED)
