"""What tests on real models share: where the models lie, the command line, and what was made of SmolLM2."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from reft_export.base.load import Base

ROOT = Path(__file__).parent.parent.parent


def gguf(name: str) -> Path:
    path = ROOT / "real-models" / f"{name}.gguf"
    if not path.is_file():
        pytest.fail(f"{path} is missing; `make test-real` downloads it first")
    return path


def cli(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "reft_export.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


@dataclass(frozen=True)
class Real:
    model: Path
    base: Base
    folder: Path
    """Of the quickstart: upper/, fp32/, int8/, report.html."""
    bundle: Path
    """fp32, with all three adapters."""
    adapters: dict[str, Path]
