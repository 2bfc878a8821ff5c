"""Replicas on Ray Serve, on this machine: one is killed in the middle, and nobody is the worse for it."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from served import until
from test_adapters import NEW
from test_replicas import front_of

from runtimes.artifacts.bundle import Bundle
from runtimes.edits.adapter import save_adapter
from runtimes.generation import GenerationSettings, generate
from runtimes.ort.session import OrtSession
from runtimes.serving.front import ATTEMPTS
from runtimes.serving.settings import BatchSettings, ServeSettings
from runtimes.text.tokenizer import Tokenizer

pytest.importorskip("ray", reason="ray is not installed (extra cluster)")

from machines import LONG, stalled  # noqa: E402

from runtimes.serving.cluster import ClusterSettings, RayReplicas, replicas  # noqa: E402

pytestmark = pytest.mark.slow

ASKED = [
    {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": temperature, "seed": 7, "stream": stream}
    for prompt, tokens in (("The fox", 40), ("Once upon", 50), ("Hello", 45), ("A", 55))
    for model in ("all", "ends", "base")
    for temperature in (0, 1)
    for stream in (False, True)
]
CLIENTS = 12


@pytest.fixture(scope="module", autouse=True)
def token() -> Iterator[None]:
    """Else Ray writes one into the home folder, where every later ``ray start`` finds it; nor is its mode left to other tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_AUTH_MODE", raising=False)
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        yield


@pytest.fixture(scope="module")
def started(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayReplicas]:
    home = tmp_path_factory.mktemp("cluster") / "adapters"
    home.mkdir()
    settings = ServeSettings(adapters=home, admin_token="adm")
    cluster = ClusterSettings(least=2, most=2)
    with replicas(bundle.folder, settings, BatchSettings(prefix_bytes=0), cluster) as each:
        yield each


def said(url: str, asked: dict[str, Any]) -> str:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=200)
    answer = client.completions.create(**asked)
    return "".join(chunk.choices[0].text for chunk in answer) if asked["stream"] else answer.choices[0].text


def alone_says(session: OrtSession, tokenizer: Tokenizer, asked: dict[str, Any]) -> str:
    session.set_adapter(None if asked["model"] == "base" else asked["model"])
    settings = GenerationSettings(max_new_tokens=asked["max_tokens"], temperature=asked["temperature"], seed=asked["seed"])
    return generate(session, tokenizer, [asked["prompt"]], settings)[0].text


def test_a_replicas_death_loses_no_request(started: RayReplicas, alone: OrtSession, tokenizer: Tokenizer) -> None:
    process, lines = asyncio.run(started.hello()), list[str]()
    with front_of(started, log=lines.append) as url, ThreadPoolExecutor(CLIENTS) as clients:
        stream = stalled(url, lambda: os.kill(process, signal.SIGSTOP), lambda: os.kill(process, signal.SIGCONT))
        answers = [clients.submit(said, url, asked) for asked in ASKED]
        time.sleep(0.5)
        os.kill(process, signal.SIGKILL)
        assert [answer.result() for answer in answers] == [alone_says(alone, tokenizer, asked) for asked in ASKED]
        until(lambda: stream.ended, 60)
        assert stream.error is None and stream.texts[0] == alone_says(alone, tokenizer, LONG)
        lost = re.search(r"reft_replicas_lost_total (\d+)", httpx.get(f"{url}/metrics").text)
    assert lost is not None and int(lost[1]) > 0
    assert not [line for line in lines if '"error"' in line]


def test_without_a_second_attempt_requests_are_lost(started: RayReplicas, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault of the test before."""
    monkeypatch.setattr("runtimes.serving.front.ATTEMPTS", 1)
    process = asyncio.run(started.hello())
    with front_of(started) as url:
        stream = stalled(url, lambda: os.kill(process, signal.SIGSTOP), lambda: os.kill(process, signal.SIGCONT))
        os.kill(process, signal.SIGKILL)
        until(lambda: stream.ended, 60)
    assert ATTEMPTS > 1 and stream.error == "replica_lost"


def test_an_adapter_that_one_replica_takes_is_every_ones(started: RayReplicas, tmp_path: Path) -> None:
    save_adapter(NEW, tmp_path / "mine")
    files = {name: (name, (tmp_path / "mine" / name).read_bytes()) for name in ("adapter.json", "adapter.safetensors")}
    asked = {"model": "mine", "prompt": "The fox", "max_tokens": 8, "temperature": 0}
    with front_of(started, ServeSettings(admin_token="adm")) as url, httpx.Client(base_url=url, timeout=60) as client:
        client.headers["Authorization"] = "Bearer adm"
        assert client.post("/v1/completions", json=asked).status_code == 404
        assert client.put("/v1/adapters/mine", files=files).status_code == 201
        with ThreadPoolExecutor(CLIENTS) as clients:
            told = set(clients.map(lambda _: client.post("/v1/completions", json=asked).json()["choices"][0]["text"], range(40)))
        base = client.post("/v1/completions", json={**asked, "model": "base"}).json()["choices"][0]["text"]
        assert len(told) == 1 and base not in told
        assert client.delete("/v1/adapters/mine").status_code == 200
        assert {client.post("/v1/completions", json=asked).status_code for _ in range(20)} == {404}


def test_the_command_serves_by_replicas_until_it_is_told_to_stop(bundle: Bundle) -> None:
    command = [sys.executable, "-m", "reft_export.cli.main", "serve", str(bundle.folder), "--port", "0", "--replicas", "1-2"]
    # RAY_ADDRESS is another cluster's: without --ray-address the replicas have one of their own.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "RAY_ADDRESS": "127.0.0.1:9"}
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
    assert running.stderr is not None
    try:
        lines: list[str] = []
        while not (found := re.fullmatch(r"serving .* at (http://127.0.0.1:\d+)/v1\n", lines[-1] if lines else "")):
            lines.append(running.stderr.readline())
            assert lines[-1], lines
        assert len(lines) == 1  # nor does Ray say anything
        client = openai.OpenAI(base_url=f"{found[1]}/v1", api_key="none", max_retries=0)
        assert client.completions.create(model="all", prompt="Hi", max_tokens=3).usage.completion_tokens == 3
        running.send_signal(signal.SIGTERM)  # of SIGINT: test_machines
        assert running.wait(60) == 0
        assert "Traceback" not in running.stderr.read()
    finally:
        running.kill()
        running.wait()


def test_what_does_not_answer_costs_one_line(bundle: Bundle) -> None:
    command = [sys.executable, "-m", "reft_export.cli.main", "serve", str(bundle.folder), "--port", "0"]
    refused = {
        ("--replicas", "0"): "expected a number of at least 1",
        ("--replicas", "3-2"): "expected a number of at least 1",
        ("--ray-address", "here:1"): "pass --replicas, too",
        ("--replicas", "2", "--ray-address", "here"): "expected HOST:PORT",
        ("--replicas", "2", "--ray-address", "127.0.0.1:9"): "no Ray cluster answers at 127.0.0.1:9",
    }
    for arguments, words in refused.items():
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode and words in done.stderr, done.stderr
        assert done.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr
