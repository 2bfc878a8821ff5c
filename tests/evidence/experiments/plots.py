"""The picture of docs/experiments.md: parameters against accuracy, and strength against effect and fluency."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from evidence.experiments.rows import Row
from evidence.experiments.setups import BASE, LORA

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
        lora, x = seeds[0].setup.method in LORA, seeds[0].parameters
        shape, color = ("s", GREY) if lora else ("o", BLUE)
        films, products = (100 * fmean(row.figures[kind] for row in seeds) for kind in ("films", "products"))
        axes.plot([x], [films], shape, color=color)
        axes.plot([x], [products], shape, color=color, fillstyle="none")
        axes.annotate(name, (x, films), xytext=(6, -3), textcoords="offset points", fontsize=7)
    for row in rows:
        if row.setup.name == BASE and "films" in row.figures:
            for kind, style in (("films", "-"), ("products", ":")):
                axes.axhline(100 * row.figures[kind], color=BLUE, linewidth=0.8, linestyle=style, label=f"the base, {kind}")
            axes.legend(frameon=False, loc="center right")
    axes.set_xscale("log")
    axes.set_xlim(1e3, 2e7)
    axes.set(title="Sentiment, 60 steps", xlabel="trained parameters", ylabel="accuracy on films (full) and products (open), %")


def _strength(axes: Any, rows: Sequence[Row]) -> None:
    at = [row.setup.strength for row in rows]
    axes.plot(at, [100 * row.figures["upper"] for row in rows], "o-", color=BLUE)
    axes.set(title="Strength of one edit", xlabel="strength", ylabel="answers in upper case, %")
    axes.yaxis.label.set_color(BLUE)
    other = axes.twinx()
    other.spines["top"].set_visible(False)
    other.plot(at, [row.figures["base loss"] for row in rows], "s--", color=RED)
    other.set_ylabel("the base's loss on them, nats", color=RED)
