"""Adapters on the command line that a hub holds: pulled before a verb begins."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from reft_export.console import progress


def here(adapters: Sequence[Path] | None) -> list[Path]:
    """As given, with a folder in the place of each ``owner/name`` that is none (reft_export/hub/adapters.py)."""
    from reft_export.hub.adapters import is_on_hub, local_folders

    given = list(adapters or [])
    if not any(map(is_on_hub, given)):
        return given
    with progress() as report:
        return local_folders(given, report)


def folder_here(adapter: Path | None) -> Path | None:
    """Of one adapter, whose name does not count."""
    from reft_export.hub.adapters import is_on_hub, local_folder

    if adapter is None or not is_on_hub(adapter):
        return adapter
    with progress() as report:
        return local_folder(adapter, report)
