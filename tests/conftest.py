"""Markers, and the fixtures that every room's tests share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import shared_folders
from shared_folders import shared_folder

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is loaded; tests in parallel need no threads of their own

    import onnxruntime

    class OneThread(onnxruntime.SessionOptions):
        """A session's second thread waits busily for work, on the core of the other worker."""

        def __init__(self) -> None:
            super().__init__()
            self.intra_op_num_threads = 1

    onnxruntime.SessionOptions = OneThread  # pyright: ignore[reportAttributeAccessIssue]

TENSORRT_RTX = "1.7.1.116"
GENAI = "0.18.0"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-gpu", action="store_true", help="fail, rather than skip, tests that need a GPU")
    parser.addoption(
        "--op-kernels", choices=("avx2", "portable"), help="run on an op library of these kernels only, as a lesser processor would"
    )
    parser.addoption("--op-library", type=Path, help="run on this op library in place of the installed package's")
    parser.addoption("--shared", type=Path, help="folder of what is made once, for several runs on the same code")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    import torch

    if torch.cuda.is_available() or config.getoption("--require-gpu"):
        return
    for item in items:
        if item.get_closest_marker("gpu"):  # its keywords have the names of folders, too
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU here; --require-gpu makes this a failure"))


@pytest.fixture(scope="session", autouse=True)
def _shared_folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
    # A worker's own folder lies in that of the run.
    own = tmp_path_factory.getbasetemp()
    kept = request.config.getoption("--shared")
    shared_folders.ROOT = kept.resolve() if kept else (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"


@pytest.fixture(scope="session", autouse=True)
def _shared_exports(_shared_folders: None) -> Iterator[None]:
    import torch
    from shared_exports import shared

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", shared(torch.onnx.export))
        yield


@pytest.fixture(scope="session", autouse=True)
def _another_op_library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """With --op-library, every session of this process finds that one; with --op-kernels, one that holds no other kernels."""
    library, kernels = request.config.getoption("--op-library"), request.config.getoption("--op-kernels")
    if library is None and kernels is None:
        yield
        return
    from runtimes import native_library

    if library is None:
        from native.op_library import LESSER, compile_library, compiler

        library = compile_library(compiler(), tmp_path_factory.mktemp("op-library"), "-O3", rows=LESSER[kernels])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_library, "_find", lambda name: library if name == native_library.library_name() else None)
        yield


@pytest.fixture(scope="session")
def tensorrt_rtx() -> dict[str, str]:
    """The environment of a subprocess that can import the real tensorrt_rtx, whose builder needs no GPU.

    Installed beside the project rather than into it: most users have no use for it. Its parser loads libtensorrt_rtx.so by that
    name at the first plugin, and the package ships libtensorrt_rtx.so.1 only.
    """

    def make(folder: Path) -> None:
        _install(f"tensorrt-rtx-cu13=={TENSORRT_RTX}", folder / "package")
        (folder / "names").mkdir()
        (folder / "names" / "libtensorrt_rtx.so").symlink_to(next((folder / "package").rglob("libtensorrt_rtx.so.1")))

    folder = shared_folder("tensorrt-rtx", make)
    return {**os.environ, "PYTHONPATH": str(folder / "package"), "LD_LIBRARY_PATH": str(folder / "names")}


@pytest.fixture(scope="session")
def tensorrt_plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """libreft_trt.so for one GPU architecture, compiled against a test double of TensorRT's headers; skips where nvcc is missing."""
    from native.plugin_host import DOUBLE, build_plugin

    return build_plugin(tmp_path_factory.mktemp("tensorrt-plugin"), DOUBLE)


@pytest.fixture(scope="session")
def genai_folder() -> Path:
    """A folder to put on sys.path that holds the real onnxruntime-genai, whose builder runs on the project's own packages."""
    return shared_folder("genai-package", lambda folder: _install(f"onnxruntime-genai=={GENAI}", folder, "--no-deps"))


def _install(requirement: str, folder: Path, *options: str) -> None:
    """Beside the project's environment, into a folder that is put on a path."""
    command = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "install", *options, "--target", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def genai_installed(genai_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime-genai as if it were installed, here and in every process that the test starts."""
    monkeypatch.syspath_prepend(genai_folder)
    monkeypatch.setenv("PYTHONPATH", str(genai_folder))
