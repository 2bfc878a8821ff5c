"""Finds the compiled libraries that the package may carry: onnxruntime's op, and TensorRT's plugin.

Without the op library the function body in the graph carries the edit. The plugin is compiled on the device, against its TensorRT: the
package carries the sources, and ``plugin_build_command`` says how.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import sys
from importlib.resources import files
from pathlib import Path

PACKAGE = "runtimes.native"
FOLDER = "lib"
LIBRARY_NAMES = {"win32": "reft_ort.dll", "darwin": "libreft_ort.dylib"}
"""By ``sys.platform``; everything else is ``libreft_ort.so``."""
PLUGIN_NAMES = {"win32": "reft_trt.dll"}
TENSORRT_HEADERS = ("/usr/include/x86_64-linux-gnu", "/usr/include/aarch64-linux-gnu", "/usr/include", "/usr/local/tensorrt/include")
"""Where TensorRT's packages and archives put NvInferRuntime.h; native/tensorrt/plugin.cmake looks in the same places."""


def library_name() -> str:
    return LIBRARY_NAMES.get(sys.platform, "libreft_ort.so")


def plugin_name() -> str:
    return PLUGIN_NAMES.get(sys.platform, "libreft_trt.so")


def find_op_library() -> Path | None:
    """The onnxruntime op library of the installed package, or None."""
    return _find(library_name())


def find_plugin_library() -> Path | None:
    """The TensorRT plugin of the installed package, or None."""
    return _find(plugin_name())


def _find(name: str) -> Path | None:
    """Looked up through importlib.resources: an editable install keeps libraries away from the source tree."""
    try:
        path = files(PACKAGE) / FOLDER / name
    except ModuleNotFoundError:
        return None
    # A zipped package has no file that a loader could open.
    return Path(str(path)) if isinstance(path, Path) and path.is_file() else None


def library_kernels(library: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The CPU kernels of an op library that this processor runs, the fastest (and active one) first; and its CUDA architectures.

    ("avx512", "avx2", "portable"), ("80", "90") for example. Raises OSError for a library that does not load here.
    """
    cpu, cuda = _texts(library, "reft_cpu_kernels", "reft_cuda_architectures")
    return _names(cpu), _names(cuda)


def plugin_details(library: Path) -> tuple[str, tuple[str, ...]]:
    """What a plugin library says of itself: its version with that of the TensorRT it was compiled for, and its CUDA architectures.

    ("LoReFT 1, RED 1, TensorRT 10.3.0", ("80", "87")) for example. Raises OSError for a library that does not load here.
    """
    version, cuda = _texts(library, "reft_trt_version", "reft_trt_cuda_architectures")
    return version, _names(cuda)


def _texts(library: Path, *functions: str) -> list[str]:
    loaded = ctypes.CDLL(str(library))
    texts = []
    for name in functions:
        try:
            function = getattr(loaded, name)
        except AttributeError:
            raise OSError(f"it has no function {name}: another library, or of another version of reft-export") from None
        function.restype = ctypes.c_char_p
        texts.append(function().decode())
    return texts


def _names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


def find_tensorrt_headers() -> Path | None:
    """The folder of NvInferRuntime.h: below TENSORRT_ROOT where that is set, else where TensorRT is usually installed; or None."""
    root = os.environ.get("TENSORRT_ROOT")
    places = ([Path(root) / "include"] if root else []) + [Path(place) for place in TENSORRT_HEADERS]
    return next((place for place in places if (place / "NvInferRuntime.h").is_file()), None)


def plugin_build_command() -> str:
    """The line that compiles the TensorRT plugin on this machine and installs it where ``find_plugin_library`` looks."""
    source = Path(__file__).parent / "native"
    headers = find_tensorrt_headers()
    include = shlex.quote(str(headers)) if headers else "<folder of NvInferRuntime.h>"
    return (
        f"cmake -S {shlex.quote(str(source))} -B reft-plugin -DREFT_ORT=OFF -DREFT_TENSORRT=ON -DTENSORRT_INCLUDE_DIR={include} && "
        f"cmake --build reft-plugin && cmake --install reft-plugin --strip --prefix {shlex.quote(str(_installed_in()))}"
    )


def _installed_in() -> Path:
    """The folder that holds the package's libraries below runtimes/native/lib."""
    from importlib import metadata  # takes a while, and sessions do not ask

    folder = files(PACKAGE)
    # An editable install shows two folders as one, and libraries lie in that beside its metadata.
    return folder.parent.parent if isinstance(folder, Path) else Path(str(metadata.distribution("reft-export").locate_file("")))
