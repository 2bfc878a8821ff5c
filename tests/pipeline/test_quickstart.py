"""The quickstart as a user runs it, offline, and what it promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from runtimes.artifacts.bundle import open_bundle


@pytest.mark.slow
def test_quickstart(tmp_path) -> None:
    output = tmp_path / "story"
    command = [sys.executable, "-m", "reft_export.cli.main", "quickstart", "-o", str(output)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HTTPS_PROXY": "http://127.0.0.1:9", "COLUMNS": "160"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert all(re.match(r"\[ *\d+\.\d s\] ", line) for line in lines), "where nobody watches, stages are lines"
    assert "s] training, step" in done.stderr and lines[-1].endswith(" done")
    assert "FAIL" not in done.stdout and "steered" in done.stdout
    for name in ("fp32", "int8", "int4"):
        bundle = open_bundle(output / name)
        assert bundle.adapter_names == ("pirate",)
        assert (bundle.manifest.quantization is None) == (name == "fp32")
    report = (output / "report.html").read_text()
    assert report.count("<svg") == 5
    assert "http://" not in report.replace("http://www.w3.org/", "") and "<script" not in report
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 2 and "--force" in again.stderr
