"""The quantization report as one picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

FLOAT, STEERED, GRID = "#8a93a3", "#0b7285", "#e5e8ec"
SHOWN_WEIGHTS = 24


def plot(report: Any, path: Path) -> None:
    """Writes a PNG: per-tensor error, and per variant what is left of the steering, task success and perplexity, where they were taken."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: list[Callable[[Any, Any], None]] = [_delta]
    if any(s.success is not None for v in report.variants for s in v.steering):
        panels.append(_success)
    if any(v.perplexity is not None for v in report.variants):
        panels.append(_perplexity)
    if report.weights:
        panels.append(_weights)
    figure = Figure(figsize=(4.6 * len(panels), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    for draw, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=GRID, axis="y")
        axes.set_axisbelow(True)
        draw(axes, report)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _delta(axes: Any, report: Any) -> None:
    _bars(axes, report, lambda s: s.shown and s.shown.cosine, "{:.3f}")
    lowest = min((s.delta.cosine for v in report.variants for s in v.steering if s.shown), default=1.0)
    axes.set(title="delta parity: what is left of (steered - base)", ylabel="cosine", ylim=(max(0.0, min(0.9, lowest) - 0.1), 1.06))


def _success(axes: Any, report: Any) -> None:
    _bars(axes, report, lambda s: s.success, "{:.0%}")
    axes.set(title=f"task: {report.checker}", ylabel="success rate", ylim=(0, 1.15))


def _perplexity(axes: Any, report: Any) -> None:
    names = [v.name for v in report.variants]
    bars = axes.bar(names, [v.perplexity for v in report.variants], color=FLOAT, width=0.5)
    axes.bar_label(bars, fmt="%.2f", fontsize=8)
    axes.set(title="perplexity of the base", ylabel="perplexity")
    axes.tick_params(axis="x", labelsize=8)


def _weights(axes: Any, report: Any) -> None:
    worst = sorted(report.weights, key=lambda w: -w.relative)[:SHOWN_WEIGHTS]
    axes.barh([w.name.removeprefix("model.").removesuffix(".weight") for w in worst], [w.relative for w in worst], color=FLOAT, height=0.7)
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=5.5)
    of = f", {SHOWN_WEIGHTS} worst of {len(report.weights)}" if len(report.weights) > SHOWN_WEIGHTS else ""
    axes.set(title=f"error per tensor{of}", xlabel="|dequantized - original| / |original|")


def _bars(axes: Any, report: Any, value: Callable[[Any], float | None], form: str) -> None:
    """One group of bars per variant, one bar per adapter."""
    adapters: Sequence[str] = list(dict.fromkeys(s.adapter for v in report.variants for s in v.steering))
    width = 0.8 / max(1, len(adapters))
    for i, adapter in enumerate(adapters):
        places, heights = [], []
        for at, variant in enumerate(report.variants):
            found = [value(s) for s in variant.steering if s.adapter == adapter]
            if found and found[0] is not None:
                places.append(at + (i - (len(adapters) - 1) / 2) * width)
                heights.append(found[0])
        shade = 1 - 0.5 * i / max(1, len(adapters))
        bars = axes.bar(places, heights, width=0.9 * width, color=STEERED, alpha=shade, label=adapter)
        axes.bar_label(bars, [form.format(h) for h in heights], fontsize=7)
    axes.set_xticks(range(len(report.variants)), [v.name for v in report.variants], fontsize=8)
    if len(adapters) > 1:
        axes.legend(frameon=False, fontsize=7, ncols=2)
