"""What the machine is: its card, its CUDA, and the versions of the packages that take part."""

from __future__ import annotations

import datetime
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from typing import Any

from gpu.process import PATH, ROOT

PACKAGES = ("torch", "cupy-cuda13x", "cupy-cuda12x", "transformers", "numpy", "onnx", "onnxruntime", "pytest")


def tool(name: str) -> str | None:
    """The path of one of CUDA's programs, or None."""
    return shutil.which(name, path=PATH)


def machine() -> dict[str, Any]:
    """Facts by their names in the report; None for what cannot be found out."""
    card, driver, capability = _of_the_card()
    return {
        "card": card,
        "compute capability": capability,
        "driver": driver,
        "CUDA": _release(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _told("git", "-C", str(ROOT), "rev-parse", "HEAD") if shutil.which("git") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


def _of_the_card() -> tuple[str | None, str | None, str | None]:
    """Name, driver and compute capability ("9.0") of the first GPU; of the driver alone where there is no nvidia-smi, as on a Jetson."""
    smi = tool("nvidia-smi")
    told = _told(smi, "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader") if smi else None
    if told and len(fields := [field.strip() for field in told.splitlines()[0].split(",")]) == 3:
        return fields[0], fields[1], fields[2]
    # In a process of its own: what starts the stages needs nothing but Python.
    program = "from runtimes.tensorrt.library import present_compute_capability; print(present_compute_capability() or '')"
    return None, None, _told(sys.executable, "-c", program) or None


def _release() -> str | None:
    nvcc = tool("nvcc")
    match = re.search(r"release (\S+),", _told(nvcc, "--version") or "") if nvcc else None
    return match[1] if match else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _told(*command: str) -> str | None:
    """What a program prints, or None where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
