"""What a run leaves beside its adapter, for people: ``training.json`` with its history and samples, and a picture of the history.

Both lie in the adapter's folder and are no part of the adapter: no reader takes them, adapter.json holds no digest of them, and what this
project writes from the adapter does not have them.
"""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from reft_export.training.settings import LOSS, TrainSettings
from reft_export.training.trainer import TrainResult
from runtimes.files.records import to_json

RECORD_FILE = "training.json"
PICTURE_FILE = "learning_curve.png"
COLORS = {"training": "#8a93a3", "held out": "#0b7285", "kept": "#c92a2a", "grid": "#e5e8ec"}


def write_training_record(result: TrainResult, settings: TrainSettings, folder: Path) -> list[Path]:
    """The files that were written, whole each: the picture where matplotlib is there. Raises OSError."""
    record = {
        "metric": settings.metric,
        "kept": to_json(result.kept),
        "history": to_json(result.history),
        "data": to_json(result.statistics),
        **({"answers": dict(result.answers)} if result.answers else {}),
        "samples": [
            {"prompt": before.prompt, "before": before.text, "after": after.text}
            for before, after in zip(result.samples_before, result.samples_after, strict=True)
        ],
    }
    written = [folder / RECORD_FILE]
    _put(written[0], json.dumps(record, ensure_ascii=False, indent=1).encode())
    if find_spec("matplotlib") is not None:
        written.append(folder / PICTURE_FILE)
        partial = _partial(written[1])
        draw(result, settings, partial)
        os.replace(partial, written[1])
    return written


def draw(result: TrainResult, settings: TrainSettings, path: Path) -> None:
    """Loss by step, of the training batches and of the held-out examples, and the metric below where the run has one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured = [record for record in result.history if record.metric is not None]
    figure = Figure(figsize=(7, 5.5 if measured else 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(2 if measured else 1, 1, sharex=True, squeeze=False)[:, 0]
    panels[0].plot(
        [r.step for r in result.history], [r.loss for r in result.history], color=COLORS["training"], linewidth=1, label="training batches"
    )
    evaluated = [(record.step, record.eval_loss) for record in result.history if record.eval_loss is not None]
    if evaluated:
        panels[0].plot(*zip(*evaluated, strict=True), color=COLORS["held out"], marker="o", markersize=3, label="held out")
    panels[0].set_ylabel("loss, nats")
    if measured:
        name = settings.metric if settings.metric != LOSS else "metric"
        panels[1].plot([r.step for r in measured], [r.metric for r in measured], color=COLORS["held out"], marker="o", markersize=3)
        panels[1].set_ylabel(f"{name.rpartition(':')[2]}, held out")
        panels[1].set_ylim(-0.02, 1.02)
    for axes in panels:
        axes.axvline(result.kept.step, color=COLORS["kept"], linestyle=":", linewidth=1, label=f"saved: step {result.kept.step}")
        axes.grid(color=COLORS["grid"])
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(fontsize=8, frameon=False)
    panels[-1].set_xlabel("optimizer step")
    figure.savefig(path, dpi=110, format="png", metadata={"Software": None})


def _put(path: Path, content: bytes) -> None:
    partial = _partial(path)
    partial.write_bytes(content)
    os.replace(partial, path)


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")
