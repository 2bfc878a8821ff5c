"""The op library compiled file by file, as CMakeLists.txt compiles it: for another processor, or with a sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from runtimes.native_library import library_name

NATIVE = Path(__file__).parent.parent.parent / "runtimes" / "native"
COMPILERS = ("c++", "g++", "clang++")
SOURCES = (
    *("cpu/edit_cpu.cc", "cpu/rows_portable.cc", "c_api/reft.cc"),
    *("ort/op.cc", "ort/lo_reft_op.cc", "ort/red_op.cc", "ort/register.cc"),
)
ROWS = {
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": (
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
        *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),
    ),
    "neon": (),
}
"""The compiler's flags of each instruction set's rows; the portable ones are always there."""
LESSER = {"avx2": ("avx2",), "portable": ()}
"""What a processor without AVX-512, and one without any of these, has."""


def run(*command: object, **kwargs: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, **kwargs)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done


def compiler() -> str:
    found = next(filter(None, map(shutil.which, COMPILERS)), None)
    return found or pytest.skip("no C++ compiler here")


def rows_here() -> tuple[str, ...]:
    """What CMakeLists.txt compiles on this machine."""
    return ("avx2", "avx512") if os.uname().machine in ("x86_64", "amd64") else ("neon",)


def compile_library(cxx: str, folder: Path, *flags: str, rows: Sequence[str]) -> Path:
    """The op library in ``folder``; each instruction set has flags of its own."""
    sources = {**dict.fromkeys(SOURCES, ()), **{f"cpu/rows_{name}.cc": ROWS[name] for name in rows}}
    common = ["-std=c++17", "-fPIC", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden", f"-I{NATIVE}", f"-I{NATIVE}/include", *flags]
    common += [f"-DREFT_{name.upper()}_ROWS" for name in rows]
    objects = []
    for source, own in sources.items():
        objects.append(folder / (Path(source).stem + ".o"))
        run(cxx, "-c", *common, *own, NATIVE / source, "-o", objects[-1])
    output = folder / library_name()
    run(cxx, "-shared", *flags, *objects, "-o", output)
    return output
