"""Which kind of NVIDIA machine this is, and the line that gets it what it lacks: what is right on a desktop is wrong on a Jetson.

Jetson     aarch64, told by /etc/nv_tegra_release; CUDA and TensorRT are JetPack's apt packages, with Python bindings of the system's
SBSA       any other aarch64 with an NVIDIA driver; PyPI has wheels of CUDA and TensorRT for it, and no onnxruntime-gpu
desktop    x86-64
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

TEGRA_RELEASE = Path("/etc/nv_tegra_release")
SYSTEM_PACKAGES = Path("/usr/lib")
JETPACK = {(35, 0): "5", (36, 3): "6.0", (36, 4, 0): "6.1", (36, 4): "6.2", (38, 0): "7"}
"""By the release of Jetson Linux, its revision, and the revision's number, as far as they are given."""
JETSON_TENSORRT = "sudo apt install python3-libnvinfer, and a venv that sees it: python3 -m venv --system-site-packages .venv"


@dataclass(frozen=True, kw_only=True)
class Machine:
    architecture: str
    """x86_64, aarch64, .."""
    tegra: tuple[int, int, int] | None
    """Jetson Linux: (36, 4, 3) is R36, revision 4.3; None on other machines."""
    driver: tuple[int, int] | None
    """The newest CUDA that the NVIDIA driver serves, (12, 6); None without a driver."""
    binding: tuple[int, int] | None
    """cuda-python's version; None without it."""

    @property
    def is_jetson(self) -> bool:
        return self.tegra is not None

    @property
    def name(self) -> str:
        if self.tegra is not None:
            return f"Jetson, JetPack {_jetpack(self.tegra)} (Jetson Linux {'.'.join(map(str, self.tegra))})"
        if self.architecture == "aarch64":
            return "SBSA, aarch64 with an NVIDIA driver" if self.driver else "aarch64 without an NVIDIA driver"
        return f"{self.architecture} with{'' if self.driver else 'out'} an NVIDIA driver"

    def install_tensorrt(self, target: str) -> str:
        """The line that brings the Python package of a target."""
        if not self.is_jetson:
            return f"pip install 'reft-export[{target}]'"
        if target == "tensorrt-rtx":
            return "TensorRT-RTX does not run on a Jetson: use --target tensorrt"
        return JETSON_TENSORRT

    def install_cuda_python(self) -> str:
        """The line that brings a cuda-python that this driver serves."""
        if self.is_jetson and self.driver is not None and self.driver < (13, 0):
            return "pip install 'reft-export[jetson]'"
        if self.driver is None:
            return "pip install cuda-python, in the major version of the driver's CUDA (nvidia-smi shows it)"
        low = f"{self.driver[0]}.6" if self.driver[0] == 12 else str(self.driver[0])
        return f"pip install 'cuda-python>={low},<{self.driver[0] + 1}'"

    def install_onnxruntime(self, provider: str) -> str:
        """The line that brings onnxruntime with a provider: cpu, cuda or tensorrt."""
        if provider == "cpu":
            return "pip install onnxruntime"
        if self.architecture != "x86_64":
            return (
                f"PyPI has no onnxruntime-gpu for {self.architecture}: run on the CPU (--provider cpu), or build an engine "
                "(reft-export build BUNDLE --target tensorrt -o ENGINE)"
            )
        extra = " tensorrt" if provider == "tensorrt" else ""
        return f"pip uninstall -y onnxruntime && pip install 'onnxruntime-gpu[cuda,cudnn]'{extra}"

    def driver_is_too_old(self) -> str | None:
        """Why the driver does not serve cuda-python, and the line that mends it; None where it does, or either is missing."""
        if self.driver is None or self.binding is None or self.binding[0] <= self.driver[0]:
            return None
        driver, binding = (".".join(map(str, version)) for version in (self.driver, self.binding))
        needs = f"cuda-python {binding} needs one for CUDA {self.binding[0]}"
        return f"the driver serves CUDA {driver}, and {needs}; {self.install_cuda_python()}"


def this_machine() -> Machine:
    return Machine(architecture=os.uname().machine, tegra=_tegra_release(), driver=_driver_version(), binding=_binding_version())


def hidden_tensorrt() -> Path | None:
    """The system's TensorRT package where this environment does not see it; None where it does, or there is none."""
    if find_spec("tensorrt") is not None:
        return None
    python = f"python{sys.version_info.major}"
    folders = (SYSTEM_PACKAGES / python / "dist-packages", SYSTEM_PACKAGES / f"{python}.{sys.version_info.minor}" / "dist-packages")
    return next((folder / "tensorrt" for folder in folders if (folder / "tensorrt").is_dir()), None)


def _jetpack(tegra: tuple[int, int, int]) -> str:
    major, revision, number = tegra
    keys = ((major, revision, number), (major, revision), (major, 0))
    return next((JETPACK[key] for key in keys if key in JETPACK), "unknown")


def _tegra_release() -> tuple[int, int, int] | None:
    """Of "# R36 (release), REVISION: 4.3, GCID: ..": (36, 4, 3)."""
    try:
        text = TEGRA_RELEASE.read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"R(\d+) \(release\), REVISION: (\d+)(?:\.(\d+))?", text)
    return (int(found[1]), int(found[2]), int(found[3] or 0)) if found else (0, 0, 0)


def _driver_version() -> tuple[int, int] | None:
    """Asked of the driver itself, which says 12060 for 12.6."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)):
        return None
    return version.value // 1000, version.value % 1000 // 10


def _binding_version() -> tuple[int, int] | None:
    try:
        major, minor = metadata.version("cuda-python").split(".")[:2]
    except metadata.PackageNotFoundError:
        return None
    return int(major), int(minor)
