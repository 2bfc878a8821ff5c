"""The command: it says where it listens, answers, and stops when it is told to."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import openai
import pytest
from served import toy_bundle_of_version_1

from runtimes.artifacts.bundle import Bundle

COMMAND = [sys.executable, "-m", "reft_export.cli.main", "serve"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_until_it_is_told_to_stop(bundle: Bundle, sent: signal.Signals) -> None:
    environment = {**ENVIRONMENT, "REFT_API_KEY": "one two"}
    started = subprocess.Popen([*COMMAND, str(bundle.folder), "--port", "0"], stderr=subprocess.PIPE, text=True, env=environment)
    assert started.stderr is not None
    try:
        found = re.fullmatch(r"serving .* at (http://127.0.0.1:\d+)/v1\n", started.stderr.readline())
        assert found is not None
        assert httpx.get(f"{found[1]}/v1/models").status_code == 401
        client = openai.OpenAI(base_url=f"{found[1]}/v1", api_key="two", max_retries=0)
        assert client.completions.create(model="all", prompt="Hi", max_tokens=3).usage.completion_tokens == 3
        started.send_signal(sent)
        assert started.wait(20) == 0
        lines = started.stderr.read().splitlines()
        assert len(lines) == 2 and all(line.startswith("{") for line in lines)
    finally:
        started.kill()
        started.wait()


def test_it_loads_no_framework(bundle: Bundle) -> None:
    code = (
        "import sys; import runtimes.serving.process, reft_export.cli.serve\n"
        "bad = {'torch', 'transformers', 'onnx', 'onnx_ir', 'onnxscript'} & set(sys.modules)\nassert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_what_cannot_be_served_costs_one_line(bundle: Bundle, tmp_path: Path) -> None:
    refused = {
        (str(tmp_path / "none"),): (2, "is not a folder"),
        (str(bundle.folder), "--adapters", str(tmp_path / "none")): (2, "cannot be listed"),
        (str(bundle.folder), "--adapters", str(bundle.folder / "adapters")): (2, "lies inside the bundle"),
        (str(toy_bundle_of_version_1(tmp_path / "old")),): (2, "of version 1"),
        (str(bundle.folder), "--host", "256.0.0.1"): (1, "nothing can listen at"),
        (str(bundle.folder), "--api-key", ""): (2, "is empty"),
    }
    for arguments, (code, said) in refused.items():
        done = subprocess.run(
            [*COMMAND, *arguments, "--port", "0"], capture_output=True, text=True, env=ENVIRONMENT, timeout=60, check=False
        )
        assert done.returncode == code and said in done.stderr, done.stderr
        assert done.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr
