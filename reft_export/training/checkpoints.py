"""The working folder ``<output>.checkpoints``: an interrupted run is resumed from it; gone once the adapter is saved.

run.json             the settings, data and base that the checkpoints belong to
checkpoint-<step>/   the interventions' parameters (safetensors), those of the best step so far where held-out examples say
                     which (best.safetensors), optimiser, schedule and random state (torch files that load with
                     weights_only), the trainer's counters, and history.json, which is written last: a checkpoint without
                     it is half-written and never used
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from reft_export.training.settings import differing
from runtimes.errors import InputError

RUN_FILE = "run.json"
HISTORY_FILE = "history.json"
BEST_FILE = "best.safetensors"


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimiser step."""

    step: int
    loss: float
    """Mean over the step's completion tokens, in nats."""
    lr: float
    eval_loss: float | None = None
    """Loss over the held-out examples after this step, where it was taken."""
    metric: float | None = None
    """The share of them that is done right, where the run has a metric beside the loss."""


def best_step(history: Sequence[StepRecord]) -> StepRecord | None:
    """The first of the highest metric, and of equals of the lowest held-out loss; None where none was taken."""
    evaluated = [((-(record.metric or 0.0), record.eval_loss), record) for record in history if record.eval_loss is not None]
    return min(evaluated, key=lambda each: each[0], default=(None, None))[1]


def stale_evaluations(history: Sequence[StepRecord]) -> int:
    """How many evaluations came after the best one."""
    best = best_step(history)
    return sum(record.eval_loss is not None and best is not None and record.step > best.step for record in history)


def working_folder(output: Path) -> Path:
    output = Path(os.path.abspath(output))
    return output.with_name(output.name + ".checkpoints")


def open_working_folder(output: Path, run: Mapping[str, Any], *, resume: bool, force: bool) -> tuple[Path, Path | None]:
    """(the folder, the checkpoint to go on from or None), after ``check_working_folder``; a fresh run makes the folder."""
    last = check_working_folder(output, run, resume=resume, force=force)
    folder = working_folder(output)
    if resume:
        return folder, last
    discard(folder)
    folder.mkdir(parents=True)
    _write(folder / RUN_FILE, dict(run))
    return folder, None


def check_working_folder(output: Path, run: Mapping[str, Any], *, resume: bool, force: bool) -> Path | None:
    """The last checkpoint that lies there, if any.

    Raises InputError where ``resume`` has nothing to go on from, or something that was run otherwise, and where a fresh
    run would discard checkpoints without ``force``.
    """
    folder = working_folder(output)
    last = last_checkpoint(folder)
    if folder.exists() and not (folder / RUN_FILE).is_file():
        raise InputError(f"{folder} is in the way: it does not hold this tool's checkpoints; move it, or choose another output")
    if resume:
        if not folder.exists():
            raise InputError(f"there is nothing to resume: {folder} does not exist; run without --resume")
        before = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        if changes := differing(dict(run), before):
            raise InputError(f"{folder} was run otherwise ({'; '.join(changes)}); resume it as it was, or start over with --force")
    elif last is not None and not force:
        raise InputError(f"an interrupted run left {last}; pass --resume to go on, or --force to start over")
    return last


def last_checkpoint(folder: Path) -> Path | None:
    complete = [path.parent for path in folder.glob(f"checkpoint-*/{HISTORY_FILE}")]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def complete_checkpoint(checkpoint: Path, history: Sequence[StepRecord], best: Mapping[str, Tensor] | None) -> None:
    """Puts the best step's parameters, if any, and the history beside the trainer's files, which makes the checkpoint one to resume from;
    older ones go."""
    if best is not None:
        save_file(dict(best), checkpoint / BEST_FILE)
    (checkpoint / "training_args.bin").unlink(missing_ok=True)  # a pickle of the trainer's options that nothing reads
    _write(checkpoint / HISTORY_FILE, [asdict(record) for record in history])
    for other in checkpoint.parent.glob("checkpoint-*"):
        if other != checkpoint:
            discard(other)


def read_history(checkpoint: Path | None) -> list[StepRecord]:
    if checkpoint is None:
        return []
    return [StepRecord(**record) for record in json.loads((checkpoint / HISTORY_FILE).read_text(encoding="utf-8"))]


def read_best(checkpoint: Path | None) -> dict[str, Tensor] | None:
    """The parameters of the best step so far; None where no held-out loss was taken."""
    path = None if checkpoint is None else checkpoint / BEST_FILE
    return None if path is None or not path.is_file() else load_file(path)


def discard(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _write(path: Path, value: Any) -> None:
    """Whole or not at all: a killed process leaves the old file, or none."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as f:
        json.dump(value, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, path)
