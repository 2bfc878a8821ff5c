"""Folders that take seconds to make and that nobody changes: one of each for a whole run, whichever worker asks first."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable
from pathlib import Path

ROOT = Path()
"""Set by conftest.py before the first test; of all workers the same."""


def shared_folder(name: str, make: Callable[[Path], object]) -> Path:
    """The folder ``name``, a path below ROOT, which ``make`` writes; another worker that wants it waits until it is complete."""
    folder = ROOT / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    complete = folder.parent / f".{folder.name}.complete"
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not complete.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of an attempt that failed
            make(folder)
            complete.touch()
    return folder
