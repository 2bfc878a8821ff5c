"""What concurrent requests give, as a picture."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from runtimes.batch_bench import BatchBench
from runtimes.bench import BASE
from runtimes.errors import BackendUnavailable, InputError
from runtimes.files.placed import placed

COLORS = {"base": "#8a93a3", "steered": "#0b7285", "grid": "#e5e8ec"}
FORMATS = (".png", ".svg", ".pdf")


def drawable(path: Path) -> None:
    """Raises InputError for a name that is no picture's or whose folder is not there, BackendUnavailable without matplotlib."""
    if path.suffix not in FORMATS or not path.parent.is_dir():
        raise InputError(f"--plot {path} is no {', '.join(FORMATS)} file in a folder that exists")
    if find_spec("matplotlib") is None:
        raise BackendUnavailable("--plot needs matplotlib; pip install matplotlib, or leave it out")


def draw(result: BatchBench, path: Path) -> None:
    """Writes throughput, time to first token and time between tokens, the 99th percentile as a line above each bar."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(result.title, fontsize=10)
    names = [m.name for m in result.measurements]
    panels = (
        ("new tokens a second", [m.throughput for m in result.measurements], None),
        ("time to first token, ms", [m.ttft for m in result.measurements], [m.ttft_p99 for m in result.measurements]),
        ("between two tokens, ms", [m.between for m in result.measurements], [m.between_p99 for m in result.measurements]),
    )
    for axes, (title, values, worst) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        _bars(axes, names, values, worst)
        axes.set_title(title, fontsize=9)
    with placed(path) as picture:
        figure.savefig(picture, dpi=110, metadata={"Software": None} if path.suffix == ".png" else None)


def _bars(axes: Any, names: list[str], values: list[float], worst: list[float] | None) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=COLORS["grid"], axis="y")
    axes.set_axisbelow(True)
    bars = axes.bar(names, values, color=[COLORS["base" if name == BASE else "steered"] for name in names], width=0.55)
    axes.bar_label(bars, fmt="%.1f", fontsize=8, label_type="center", color="white")
    if worst:
        above = [max(high - value, 0) for value, high in zip(values, worst, strict=True)]
        axes.errorbar(names, values, yerr=[[0] * len(above), above], fmt="none", ecolor="#222222", capsize=4, linewidth=1)
    axes.tick_params(axis="x", labelsize=8)
