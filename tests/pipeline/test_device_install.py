"""A bundle runs where only the device install is: no torch, no transformers, no onnx."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
CONSTRAINTS = ROOT / ".ci" / "constraints.txt"


def _run(*command: object, **kwargs: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, **kwargs)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a fresh environment with the wheel and its extra ``cpu``, and nothing else."""
    folder = tmp_path_factory.mktemp("device")
    wheels = folder / "wheels"
    _run(sys.executable, "-m", "pip", "-q", "wheel", "--no-deps", "-w", wheels, ROOT)
    (wheel,) = wheels.glob("reft_export-*.whl")
    _run(sys.executable, "-m", "venv", folder / "venv")
    python = folder / "venv" / "bin" / "python"
    _run(python, "-m", "pip", "-q", "install", "-c", CONSTRAINTS, f"{wheel}[cpu]")
    return python.parent


@pytest.mark.slow
def test_bundle_runs_on_the_device_install(device, bundle_folder, tmp_path) -> None:
    installed = _run(device / "python", "-m", "pip", "list", "--format=freeze").stdout.lower()
    assert not [name for name in ("torch", "transformers", "onnx==", "onnx-ir", "matplotlib") if f"\n{name}" in f"\n{installed}"]
    tool = device / "reft-export"
    for precision in ("fp32", "int4"):
        bundle = bundle_folder("llama", precision)
        steered = _run(tool, "run", bundle, "-p", "hello", "-a", "tied", "-n", 8, cwd=tmp_path)
        assert steered.stdout
        assert "pass" in _run(tool, "parity", bundle, cwd=tmp_path).stdout
    _run(tool, "bench", bundle, "--prompt-tokens", 8, "--new-tokens", 2, "--repeats", 1, "-a", "tied", cwd=tmp_path)
    assert "tied" in _run(tool, "inspect", bundle, cwd=tmp_path).stdout
    assert "host" in _run(tool, "doctor", cwd=tmp_path, env={"COLUMNS": "200", "PATH": str(device)}).stdout
    # The host's verbs say what to install instead of failing with a traceback.
    done = subprocess.run([tool, "export", "-m", "x", "-o", "y"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 4 and "pip install 'reft-export[host]'" in done.stderr, done.stderr
