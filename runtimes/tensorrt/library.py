"""TensorRT and TensorRT-RTX: which Python package serves which target, their versions, plugins and the GPUs they build for.

Two targets, one API: ``tensorrt`` builds for the GPU that it runs on; ``tensorrt-rtx`` builds on any machine, for a list of GPUs.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from runtimes.artifacts.engine import TARGETS, Engine
from runtimes.errors import BackendUnavailable, InputError
from runtimes.files.hashes import sha256_of
from runtimes.machine import hidden_tensorrt, this_machine

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
RTX_LIBRARY = "libtensorrt_rtx.so"


def module_name(target: str) -> str:
    """The Python package of a target; raises InputError for an unknown one."""
    if target not in MODULES:
        raise InputError(f"target {target!r} is unknown; known: {', '.join(TARGETS)}")
    return MODULES[target]


def is_installed(target: str) -> bool:
    return find_spec(module_name(target)) is not None


def load_tensorrt(target: str) -> ModuleType:
    """The imported package of ``target``; raises BackendUnavailable where it is missing or its libraries do not load."""
    name = module_name(target)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as e:
        if (e.name or "").partition(".")[0] != name:
            raise BackendUnavailable(f"{name} does not load: {e.name} is missing; {install_line(target)}") from None
        raise BackendUnavailable(f"{name} is not installed; {install_line(target)}") from None
    except (ImportError, OSError) as e:
        raise BackendUnavailable(f"{name} does not load: {_one_line(e)}; check its CUDA libraries, or install it again") from None


def install_line(target: str) -> str:
    """The line that brings the Python package of ``target`` to this machine and environment."""
    if target == "tensorrt" and (hidden := hidden_tensorrt()):
        return f"the system has it ({hidden}), and this environment does not see it: python3 -m venv --system-site-packages .venv"
    return this_machine().install_tensorrt(target)


def tensorrt_version(tensorrt: ModuleType) -> str:
    return str(tensorrt.__version__)


def load_plugin(tensorrt: ModuleType, library: Path) -> None:
    """Registers the plugins of ``library``; raises BackendUnavailable where it does not load."""
    if not library.is_file():
        raise BackendUnavailable(f"{library} is not a file; name the plugin library libreft_trt.so")
    try:
        handle, reason = tensorrt.get_plugin_registry().load_library(str(library.resolve())), ""
    except Exception as e:  # the registry's own exceptions share no base
        handle, reason = None, f" ({_one_line(e)})"
    if handle is None:
        raise BackendUnavailable(
            f"plugin library {library} does not load in {tensorrt.__name__} {tensorrt.__version__}{reason}; `reft-export doctor` says how "
            "to build it"
        )


def builder_environment(target: str, folder: Path) -> dict[str, str]:
    """The environment for a process that parses graphs.

    TensorRT-RTX's parser opens libtensorrt_rtx.so by that name at the first plugin, and its package ships libtensorrt_rtx.so.1 only:
    the link that is missing is made in ``folder``, which the loader is told to search. The process starts elsewhere, so a relative
    PYTHONPATH is made absolute.
    """
    environment = dict(os.environ)
    if environment.get("PYTHONPATH"):
        environment["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, environment["PYTHONPATH"].split(os.pathsep)))
    libraries = find_spec("tensorrt_rtx_libs") if target == "tensorrt-rtx" else None
    for place in [] if libraries is None else libraries.submodule_search_locations or []:
        if not (Path(place) / RTX_LIBRARY).exists() and (numbered := sorted(Path(place).glob(f"{RTX_LIBRARY}.*"))):
            (folder / RTX_LIBRARY).symlink_to(numbered[0].absolute())
            paths = (str(folder), environment.get("LD_LIBRARY_PATH", ""))
            environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, paths))
    return environment


COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR = 75, 76
"""CUdevice_attribute of cuda.h."""


def present_compute_capability() -> str | None:
    """ "8.6" of the first GPU, asked of the driver; None where there is no driver or no GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count, device = ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    values = []
    for attribute in (COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR):
        value = ctypes.c_int()
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
        values.append(value.value)
    return f"{values[0]}.{values[1]}"


def check_device(engine: Engine, tensorrt_version: str, compute_capability: str | None) -> None:
    """Raises BackendUnavailable, with the command that builds it again, for an engine that does not fit this device.

    A plan loads in the very release that built it only (both targets), on the GPUs it was built for, with the plugin it was built with.
    ``compute_capability`` is "8.6"; None where there is no GPU.
    """
    e = engine.engine
    where = f"{engine.folder} (built by {e.target} {e.tensorrt_version} for compute capability {', '.join(e.compute_capabilities)})"
    remedy = f"build it again: {e.rebuild}"
    if not _same_version(e.tensorrt_version, tensorrt_version):
        raise BackendUnavailable(f"{where} does not load in {e.target} {tensorrt_version}, which is installed here; {remedy}")
    if compute_capability is None:
        raise BackendUnavailable(f"{where} needs a GPU, and this device has none; run the bundle that it was built from on the CPU")
    if compute_capability not in e.compute_capabilities:
        here = f" --sm {compute_capability.replace('.', '')}" if e.target == "tensorrt-rtx" else ""
        raise BackendUnavailable(f"{where} does not run on this GPU, which is of compute capability {compute_capability}; {remedy}{here}")
    if e.plugin is not None and engine.plugin_path is not None and sha256_of(engine.plugin_path) != e.plugin.sha256:
        raise BackendUnavailable(f"{where} was built with another plugin than {engine.plugin_path}; {remedy}")


def _same_version(built: str, installed: str) -> bool:
    """Compares the numbers that both state: trtexec says 10.3.0, the Python package 10.3.0.26."""
    return all(a == b for a, b in zip(built.split("."), installed.split("."), strict=False))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
