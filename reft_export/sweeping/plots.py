"""A sweep in pictures: quality by layers and rank (and method), the front, the layers' scores, what mattered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any

import numpy as np

from reft_export.sweeping.outcome import SweepResult
from reft_export.sweeping.results import TrialResult, complete
from runtimes.edits.methods import METHODS

GRAY, TEAL, RED, GRID = "#8a93a3", "#0b7285", "#c92a2a", "#e5e8ec"
COLOURS = "viridis"
LAYERS, FRONT, FIRST_PASS, IMPORTANCES = "layers.png", "front.png", "first_pass.png", "importances.png"


def draw(result: SweepResult, quality: str, *, maximized: bool) -> dict[str, bytes]:
    """By file name, PNGs."""
    pictures = {LAYERS: _heat_maps(result, quality, maximized=maximized), FRONT: _front(result, quality)}
    pictures[FIRST_PASS] = _first_pass(result)
    if result.importances:
        pictures[IMPORTANCES] = _importances(result)
    return pictures


def _figure(panels: int, width: float, height: float) -> tuple[Any, Sequence[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.set_axisbelow(True)
    return figure, list(axes)


def _png(figure: Any) -> bytes:
    content = BytesIO()
    figure.savefig(content, dpi=110, format="png", metadata={"Software": None})
    return content.getvalue()


def _heat_maps(result: SweepResult, quality: str, *, maximized: bool) -> bytes:
    """The best quality of a cell; without a colour of trials that were ended early, of which it is the last."""
    space, trials = result.space, complete(result.trials)
    pruned = [each for each in result.trials if each.ended == "pruned" and each.quality is not None]
    panels: list[tuple[str, tuple[str, ...], Callable[[TrialResult], str]]] = []
    if any(not METHODS[method].full_rank for method in space.methods):
        panels.append(("rank", tuple(map(str, space.ranks)), lambda each: str(each.point.rank)))
    if len(space.methods) > 1 or not panels:
        panels.append(("method", space.methods, lambda each: each.point.method))
    if len(space.positions) > 1:
        panels.append(("positions", space.positions, lambda each: each.point.positions))
    widest = max(len(names) for _, names, _ in panels)
    figure, all_axes = _figure(len(panels), 1.6 + len(panels) * max(2.6, 0.75 * widest), 1.6 + 0.32 * max(4, len(space.layers)))
    values = [each.value for each in trials]
    low, high = min(values), max(values)
    for axes, (name, columns, column_of) in zip(all_axes, panels, strict=True):
        cells, early = (_cells(each, result, columns, column_of, maximized=maximized) for each in (trials, pruned))
        image = axes.imshow(cells, aspect="auto", cmap=COLOURS if maximized else f"{COLOURS}_r", vmin=low, vmax=high)
        for (row, column), value in np.ndenumerate(np.where(np.isnan(cells), early, cells)):
            if np.isfinite(value):
                shade = (value - low) / ((high - low) or 1.0)
                dark = shade < 0.5 if maximized else shade > 0.5
                colour = GRAY if np.isnan(cells[row, column]) else "white" if dark else "black"
                axes.text(column, row, f"{value:.3g}", ha="center", va="center", fontsize=7, color=colour)
        axes.set_xticks(range(len(columns)), columns, fontsize=8)
        axes.set_yticks(range(len(space.layers)), [_short(each) for each in space.layers] if axes is all_axes[0] else [], fontsize=8)
        axes.set_xlabel(name)
    all_axes[0].set_ylabel("layers")
    figure.colorbar(image, ax=all_axes, label=f"{quality} (gray: ended early)" if pruned else quality)
    return _png(figure)


def _cells(
    trials: Sequence[TrialResult],
    result: SweepResult,
    columns: Sequence[str],
    column_of: Callable[[TrialResult], str],
    *,
    maximized: bool,
) -> np.ndarray:
    """[layers, columns], the best quality of each; NaN without a trial."""
    cells = np.full((len(result.space.layers), len(columns)), np.nan)
    for each in trials:
        if (column := column_of(each)) in columns:
            at = result.space.layers.index(each.point.layers), columns.index(column)
            cells[at] = (np.fmax if maximized else np.fmin)(cells[at], each.value)
    return cells


def _front(result: SweepResult, quality: str) -> bytes:
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    figure, (left, right) = _figure(2, 9.4, 3.8)
    on_front = {each.number for each in result.front}
    for axes, name, value in (
        (left, "parameters", lambda each: each.parameters),
        (right, "multiply-adds of an example", lambda each: each.cost),
    ):
        for chosen, colour, label in ((False, GRAY, "beaten"), (True, TEAL, "front")):
            shown = [each for each in complete(result.trials) if (each.number in on_front) == chosen]
            axes.scatter([value(each) for each in shown], [each.value for each in shown], color=colour, s=26, label=label)
            for each in shown if chosen else ():
                axes.annotate(str(each.number), (value(each), each.value), xytext=(4, 4), textcoords="offset points", fontsize=7)
        axes.set(xscale="log", xlabel=name)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(color=GRID)
    left.set_ylabel(quality)
    left.legend(frameon=False, fontsize=8)
    return _png(figure)


def _first_pass(result: SweepResult) -> bytes:
    found = result.first_pass
    figure, (axes,) = _figure(1, 7, 3.4)
    layers = [each.layer for each in found.layers]
    for positions, shade in zip(found.layers[0].scores, np.linspace(1.0, 0.35, len(found.layers[0].scores)), strict=True):
        axes.plot(
            layers, [each.scores[positions] for each in found.layers], color=TEAL, alpha=shade, marker="o", markersize=3, label=positions
        )
    axes.set(xlabel="layer", ylabel="score, nats a token")
    axes.grid(color=GRID)
    axes.legend(frameon=False, fontsize=8)
    if found.answers:
        other = axes.twinx()
        other.plot(layers, [each.accuracy for each in found.layers], color=RED, linewidth=1, linestyle="--")
        other.set_ylabel("accuracy of a linear map", color=RED)
        other.set_ylim(0, 1.05)
    return _png(figure)


def _importances(result: SweepResult) -> bytes:
    figure, (axes,) = _figure(1, 5, 2.6)
    bars = axes.barh(list(result.importances), list(result.importances.values()), color=TEAL, height=0.6)
    axes.bar_label(bars, fmt="{:.0%}", fontsize=8, padding=3)
    axes.invert_yaxis()
    axes.set(xlabel="share of the quality's variance", xlim=(0, 1.1 * max(result.importances.values())))
    return _png(figure)


def _short(layers: str) -> str:
    return layers if len(layers) <= 14 else f"{layers[:12]}.."
