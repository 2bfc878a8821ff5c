"""What the tests of the script for a GPU share: a run, and programs that stand for others."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from gpu.process import Run


@pytest.fixture
def at(tmp_path: Path) -> Run:
    """A run with a minute left, in whose work folder nothing was built."""
    (tmp_path / "work" / "native").mkdir(parents=True)
    log = tmp_path / "gpu.log"
    return Run(work=tmp_path / "work", log=log, wheels=None, dry=False, architecture="90", until=time.monotonic() + 60)


@pytest.fixture
def script() -> Callable[[Path, str], Path]:
    """Writes a shell script that can be started, and gives its path."""

    def write(path: Path, text: str) -> Path:
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return path

    return write
