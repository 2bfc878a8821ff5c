"""Finds the compiled op library that the wheel may carry. Without one, the function body in the graph carries the edit."""

from __future__ import annotations

import ctypes
import sys
from importlib.resources import files
from pathlib import Path

PACKAGE = "runtimes.native"
FOLDER = "lib"
LIBRARY_NAMES = {"win32": "reft_ort.dll", "darwin": "libreft_ort.dylib"}
"""By ``sys.platform``; everything else is ``libreft_ort.so``."""


def library_name() -> str:
    return LIBRARY_NAMES.get(sys.platform, "libreft_ort.so")


def find_op_library() -> Path | None:
    """The onnxruntime op library of the installed package, or None.

    Looked up through importlib.resources: an editable install keeps libraries away from the source tree.
    """
    try:
        path = files(PACKAGE) / FOLDER / library_name()
    except ModuleNotFoundError:
        return None
    # A zipped package has no file that a loader could open.
    return Path(str(path)) if isinstance(path, Path) and path.is_file() else None


def library_kernels(library: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The CPU kernels of an op library that this processor runs, the fastest (and active one) first; and its CUDA architectures.

    ("avx512", "avx2", "portable"), ("80", "90") for example. Raises OSError for a library that does not load here.
    """
    loaded = ctypes.CDLL(str(library))
    names = []
    for function in (loaded.reft_cpu_kernels, loaded.reft_cuda_architectures):
        function.restype = ctypes.c_char_p
        names.append(tuple(filter(None, function().decode().split(","))))
    return names[0], names[1]
