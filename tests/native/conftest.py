"""Fixtures of the TensorRT plugins' tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from plugin_host import DOUBLE, HERE, NATIVE, compile_plugin, compile_with


@pytest.fixture(scope="session")
def host_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_with(DOUBLE, HERE / "plugin_host.cc", tmp_path_factory.mktemp("host") / "host.so", "-shared", "-fPIC")


@pytest.fixture(scope="session")
def plugin_on_host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plugins over the CPU kernels."""
    kernels = [NATIVE / "cpu" / name for name in ("edit_cpu.cc", "rows_portable.cc")]
    return compile_plugin(tmp_path_factory.mktemp("on-host") / "libreft_trt.so", HERE / "launch_on_host.cc", *kernels)
