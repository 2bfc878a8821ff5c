"""How a training run can end before its last step: what is said of it, with the step, and what is left to go on from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from reft_export.base.load import Base
from reft_export.training.checkpoints import StepRecord, discard, last_checkpoint
from reft_export.training.processes import LOST, ProcessFailed, leads, lost_process, process_count
from reft_export.training.settings import TrainSettings
from runtimes.errors import ReftError
from runtimes.files.folders import NO_SPACE, disk_is_full


class TrainingInterrupted(ReftError):
    """Ctrl-C while training; the message says how to go on."""

    exit_code = 130


class NotFinite(Exception):
    """What became non-finite; ``endings`` adds the step."""


@contextmanager
def endings(model: nn.Module, base: Base, settings: TrainSettings, history: list[StepRecord], total: int, folder: Path) -> Iterator[None]:
    """What can go wrong inside, said with the step at which it did and what to do."""
    try:
        yield
    except NotFinite as e:
        _discard(folder)
        raise ReftError(
            f"{e} is not finite at step {len(history) + 1} of {total} (last loss "
            f"{history[-1].loss if history else 'none'}, lr {settings.lr:g}, base in {base.dtype}); "
            "no adapter was written; lower the learning rate, or train with a base in float32"
        ) from None
    except torch.OutOfMemoryError:
        raise (ReftError if process_count() == 1 else ProcessFailed)(
            f"out of memory at step {len(history) + 1} with batches of {settings.batch_size}; lower the batch size and "
            "raise gradient accumulation by as much, or lower max_length"
        ) from None
    except KeyboardInterrupt:
        raise TrainingInterrupted(f"stopped at step {len(history)} of {total}; no adapter was written; {_to_go_on(folder)}") from None
    except Exception as e:
        if process_count() > 1 and lost_process(e):
            raise ProcessFailed(
                f"{LOST} at step {len(history) + 1} of {total}, and its own message or the launcher's says why; no adapter was written; "
                f"{_to_go_on(folder)}"
            ) from None
        if not disk_is_full(e):
            raise
        raise ReftError(f"{NO_SPACE} at step {len(history)} of {total}; no adapter was written; {_to_go_on(folder)}") from None
    finally:
        model.zero_grad(set_to_none=True)


def _to_go_on(folder: Path) -> str:
    """What is left of a run that ended early, and how to go on; half-written checkpoints are removed."""
    last = last_checkpoint(folder)
    if last is None:
        _discard(folder)
        return "there was no checkpoint yet to go on from"
    for other in folder.glob("checkpoint-*"):
        if other != last:
            _discard(other)
    return f"{last} is kept: pass --resume to go on from it"


def _discard(folder: Path) -> None:
    if leads():
        discard(folder)
