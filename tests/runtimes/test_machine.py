"""What kind of NVIDIA machine this is, and that every hint is the one of the machine it appears on."""

from __future__ import annotations

import ctypes
import os
from types import SimpleNamespace

import pytest

from runtimes import machine as module
from runtimes.errors import BackendUnavailable
from runtimes.machine import Machine, hidden_tensorrt, this_machine
from runtimes.tensorrt import library
from runtimes.tensorrt.cuda_device import load_cuda

R36 = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 01:49:37 UTC 2025\n"
JETSON = Machine(architecture="aarch64", tegra=(36, 4, 3), driver=(12, 6), binding=None)
SBSA = Machine(architecture="aarch64", tegra=None, driver=(13, 0), binding=(13, 4))
DESKTOP = Machine(architecture="x86_64", tegra=None, driver=(12, 8), binding=(13, 4))
BOARD = Machine(architecture="aarch64", tegra=None, driver=None, binding=None)


@pytest.fixture
def on(monkeypatch, tmp_path):
    """Makes this machine one of those: its processor, its release file, and a driver that states its CUDA."""

    def become(architecture: str, release: str | None, driver: int | None, binding: str | None = None) -> Machine:
        monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(machine=architecture))
        monkeypatch.setattr(module, "TEGRA_RELEASE", tmp_path / "nv_tegra_release")
        if release is not None:
            (tmp_path / "nv_tegra_release").write_text(release)

        def load(name: str) -> SimpleNamespace:
            assert name == "libcuda.so.1"
            if driver is None:
                raise OSError("libcuda.so.1: cannot open shared object file")

            def version(pointer: object) -> int:
                ctypes.cast(pointer, ctypes.POINTER(ctypes.c_int))[0] = driver
                return 0

            return SimpleNamespace(cuDriverGetVersion=version)

        def stated(name: str) -> str:
            if binding is None:
                raise module.metadata.PackageNotFoundError(name)
            return binding

        monkeypatch.setattr(module.ctypes, "CDLL", load)
        monkeypatch.setattr(module.metadata, "version", stated)
        return this_machine()

    return become


@pytest.mark.parametrize(
    ("release", "jetpack", "linux"),
    [
        (R36, "6.2", "36.4.3"),
        (R36.replace("4.3", "4.0"), "6.1", "36.4.0"),
        (R36.replace("4.3", "3.0"), "6.0", "36.3.0"),
        (R36.replace("R36", "R35").replace("4.3", "6.1"), "5", "35.6.1"),
        (R36.replace("R36", "R38").replace("4.3", "2.0"), "7", "38.2.0"),
        (R36.replace("R36", "R41"), "unknown", "41.4.3"),
        ("something else", "unknown", "0.0.0"),
    ],
)
def test_a_jetson_and_its_jetpack(on, release, jetpack, linux) -> None:
    found = on("aarch64", release, 12060)
    assert found.is_jetson and found.name == f"Jetson, JetPack {jetpack} (Jetson Linux {linux})"
    assert found.driver == (12, 6) and found.binding is None


def test_other_machines(on) -> None:
    assert on("aarch64", None, 13000, "13.4.0") == SBSA and SBSA.name.startswith("SBSA")
    assert on("x86_64", None, 12080, "13.4.0") == DESKTOP and DESKTOP.name == "x86_64 with an NVIDIA driver"
    assert on("aarch64", None, None) == BOARD and BOARD.name == "aarch64 without an NVIDIA driver"


def test_a_driver_older_than_the_binding_names_the_mend() -> None:
    assert DESKTOP.driver_is_too_old() == (
        "the driver serves CUDA 12.8, and cuda-python 13.4 needs one for CUDA 13; pip install 'cuda-python>=12.6,<13'"
    )
    jetson = Machine(architecture="aarch64", tegra=(36, 4, 3), driver=(12, 6), binding=(13, 4))
    assert jetson.driver_is_too_old().endswith("needs one for CUDA 13; pip install 'reft-export[jetson]'")
    for fits in (SBSA, JETSON, BOARD, Machine(architecture="x86_64", tegra=None, driver=(13, 0), binding=(12, 9))):
        assert fits.driver_is_too_old() is None


def test_hints_are_right_for_their_machine() -> None:
    assert DESKTOP.install_onnxruntime("cuda") == "pip uninstall -y onnxruntime && pip install 'onnxruntime-gpu[cuda,cudnn]'"
    for machine in (JETSON, SBSA, BOARD):
        for provider in ("cuda", "tensorrt"):
            hint = machine.install_onnxruntime(provider)
            assert "onnxruntime-gpu[" not in hint and "pip install" not in hint and "--provider cpu" in hint
    assert JETSON.install_onnxruntime("cpu") == "pip install onnxruntime"
    assert JETSON.install_tensorrt("tensorrt").startswith("sudo apt install python3-libnvinfer, and a venv that sees it")
    assert "does not run on a Jetson" in JETSON.install_tensorrt("tensorrt-rtx")
    assert DESKTOP.install_tensorrt("tensorrt") == SBSA.install_tensorrt("tensorrt") == "pip install 'reft-export[tensorrt]'"
    assert JETSON.install_cuda_python() == "pip install 'reft-export[jetson]'"
    assert SBSA.install_cuda_python() == "pip install 'cuda-python>=13,<14'"
    assert "major version of the driver's CUDA" in BOARD.install_cuda_python()


def test_errors_carry_the_hint_of_this_machine(on, monkeypatch, tmp_path) -> None:
    on("aarch64", R36, 12060)
    for name in ("tensorrt", "cuda", "cuda.bindings", "cuda.bindings.runtime", "cuda.cudart"):
        monkeypatch.setitem(module.sys.modules, name, None)
    monkeypatch.setattr(library, "hidden_tensorrt", lambda: None)
    with pytest.raises(BackendUnavailable, match="tensorrt is not installed; sudo apt install python3-libnvinfer") as caught:
        library.load_tensorrt("tensorrt")
    assert caught.value.exit_code == 4
    monkeypatch.setattr(library, "hidden_tensorrt", lambda: tmp_path)
    with pytest.raises(BackendUnavailable, match=f"the system has it \\({tmp_path}\\).*--system-site-packages"):
        library.load_tensorrt("tensorrt")
    with pytest.raises(BackendUnavailable, match=r"cuda-python is not installed; pip install 'reft-export\[jetson\]'"):
        load_cuda()


def test_a_venv_that_does_not_see_the_systems_tensorrt(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(module, "SYSTEM_PACKAGES", tmp_path)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert hidden_tensorrt() is None
    package = tmp_path / "python3" / "dist-packages" / "tensorrt"
    package.mkdir(parents=True)
    assert hidden_tensorrt() == package
    monkeypatch.setattr(module, "find_spec", lambda name: object())
    assert hidden_tensorrt() is None
