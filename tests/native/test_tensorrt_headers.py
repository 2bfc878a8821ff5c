"""TensorRT's real headers, where they are: the test double says the same as they do, and the plugin compiles against them."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from plugin_host import DOUBLE, HERE, build_plugin, compile_with, run

from runtimes.native_library import find_tensorrt_headers

# Of the host, not of plugins; TensorRT-RTX (major version 1) moved them at some minor version that its number does not tell.
HOSTS_OWN = ("ILogger", "IPluginRegistry")


@pytest.fixture(scope="module")
def headers() -> Path:
    named = os.environ.get("TENSORRT_INCLUDE_DIR")
    found = Path(named) if named else find_tensorrt_headers()
    if found is None:
        pytest.skip("TensorRT's headers are not installed here; TENSORRT_INCLUDE_DIR names their folder")
    return found


def major_of(headers: Path) -> int:
    return int(re.search(r"(?:NV_TENSORRT|TRT)_MAJOR(?:_[A-Z]+)? +(\d+)", (headers / "NvInferVersion.h").read_text()).group(1))


def abi(headers: Path, folder: Path, *flags: str) -> dict[str, str]:
    folder.mkdir()
    lines = run(compile_with(headers, HERE / "header_abi.cc", folder / "abi", *flags)).stdout.splitlines()
    return dict(line.rsplit(" ", 1) for line in lines)


def test_the_double_is_like_the_real_headers(headers, tmp_path) -> None:
    major = major_of(headers)
    real = abi(headers, tmp_path / "real")
    double = abi(DOUBLE, tmp_path / "double", *(["-DREFT_DOUBLE_OF_TENSORRT_11"] if major >= 11 else []))
    compared = [name for name in double if major >= 10 or not name.startswith(HOSTS_OWN)]
    assert len(compared) > 60
    assert {name: real[name] for name in compared} == {name: double[name] for name in compared}


def test_the_logger_and_the_registry_changed_with_tensorrt_11(tmp_path) -> None:
    """What the plugin's caution is about: a library compiled for one must not call the other's."""
    ten, eleven = abi(DOUBLE, tmp_path / "10"), abi(DOUBLE, tmp_path / "11", "-DREFT_DOUBLE_OF_TENSORRT_11")
    different = {name for name in ten if ten[name] != eleven[name]}
    assert different and all(name.startswith(HOSTS_OWN) for name in different)
    assert (ten["ILogger::log"], eleven["ILogger::log"]) == ("0", "4")


@pytest.mark.slow
def test_the_plugin_compiles_against_the_real_headers(headers, tmp_path) -> None:
    assert build_plugin(tmp_path, headers).is_file()
