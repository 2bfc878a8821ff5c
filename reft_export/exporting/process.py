"""Runs another project's exporter in a process of its own: it prints, changes sys.path, and keeps a second copy of the weights."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from reft_export.base.load import Base
from runtimes.bound_process import bound
from runtimes.errors import ExportError


def folder_of(base: Base) -> Path:
    """What another process reads the base from. Raises ExportError for one that is in memory alone."""
    if base.folder is None:
        raise ExportError(f"{base.info.name} is in memory, and the exporter reads a folder; save it with save_pretrained()")
    return base.folder


def run_exporter(module: str, arguments: Sequence[str | Path], scratch: Path, *, what: str) -> None:
    """``python -m module arguments`` in the new folder ``scratch``, without a network. Raises ExportError with its last line on failure."""
    scratch.mkdir()
    # The working folder comes first on that process's sys.path: the user's own could hold modules that shadow the exporter's.
    done = subprocess.run(
        bound([sys.executable, "-m", module, *map(str, arguments)]),
        cwd=scratch,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ExportError(f"{what}: {reason[:300]}; use --exporter dynamo")
