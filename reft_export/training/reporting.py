"""Where a run's figures are sent while it trains, by transformers' own integrations."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from reft_export.training.settings import NO_REPORT
from runtimes.errors import BackendUnavailable

TENSORBOARD = "tensorboard"


def check_reporting(name: str) -> None:
    """Raises BackendUnavailable where the package is not installed."""
    if name != NO_REPORT and find_spec(name) is None:
        raise BackendUnavailable(f"report_to {name} needs {name}; pip install {name}, or leave it out")


def reporting_callbacks(name: str, folder: Path) -> list[Any]:
    """What Trainer calls. tensorboard's events go to ``folder``; wandb and mlflow go by their own settings.

    Trainer's default for events lies in the working folder, which is gone once the adapter is saved.
    """
    if name == NO_REPORT:
        return []
    if name == TENSORBOARD:
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations.integration_utils import TensorBoardCallback

        return [TensorBoardCallback(SummaryWriter(log_dir=str(folder)))]
    from transformers.integrations.integration_utils import get_reporting_integration_callbacks

    return [callback() for callback in get_reporting_integration_callbacks([name])]


def events_folder(working_folder: Path) -> Path:
    """Beside the adapter: ``<output>.tensorboard``."""
    return working_folder.with_name(f"{working_folder.name.rpartition('.')[0]}.{TENSORBOARD}")
