"""Environments of other onnxruntimes than the one that the tests run in: numpy and nothing else, made once."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from shared_folders import shared_folder

ROOT = Path(__file__).parent.parent


def python_with(version: str) -> Path:
    """The interpreter of an environment with that onnxruntime; skips the test where it does not install."""
    environment = ROOT / f".venv-onnxruntime-{version}"  # kept between runs; of one run's workers, one makes it
    shared_folder(f"onnxruntime-{version}", lambda _: _install(environment, version))
    return environment / "bin" / "python"


def _install(environment: Path, version: str) -> None:
    if (environment / "ready").exists():
        return
    shutil.rmtree(environment, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    # Wheels before 1.19 were compiled against numpy 1.
    numpy = "numpy<2" if version.startswith("1.18.") else "numpy"
    install = [environment / "bin" / "python", "-m", "pip", "-q", "install", f"onnxruntime=={version}", numpy]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"onnxruntime {version} does not install here: {done.stderr.strip().splitlines()[-1]}")
    (environment / "ready").touch()
