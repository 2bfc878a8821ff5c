"""``serve --replicas --ray-address`` on a cluster of two machines, which are two raylets of this one: replicas on both, and one dies."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import httpx
import pytest
from served import until

from runtimes.artifacts.bundle import Bundle
from runtimes.errors import ReftError
from runtimes.ort.session import OrtSession
from runtimes.serving.settings import BatchSettings, ServeSettings
from runtimes.text.tokenizer import Tokenizer

pytest.importorskip("ray", reason="ray is not installed (extra cluster)")

from machines import ENV, LONG, Machine, Machines, Stream, cluster, stalled  # noqa: E402
from ray.exceptions import RayActorError  # noqa: E402
from ray.serve.schema import (  # noqa: E402
    ApplicationStatus,
    DeploymentStatus,
    DeploymentStatusOverview,
    DeploymentStatusTrigger,
    ReplicaState,
)
from test_cluster import ASKED, CLIENTS, alone_says, said  # noqa: E402

from runtimes.serving import cluster as serving_cluster  # noqa: E402
from runtimes.serving.cluster import RayReplicas, Replica  # noqa: E402

pytestmark = pytest.mark.slow

HOLD = """
import sys, time, ray

class Held:
    def here(self): pass

ray.init(address=sys.argv[1], log_to_driver=False)
held = ray.remote(num_cpus=1)(Held).remote()
ray.get(held.here.remote())
print("held", flush=True)
time.sleep(600)
"""
"""Takes a processor of the cluster."""
SCALED = """
import sys
from pathlib import Path
from runtimes.serving.cluster import ClusterSettings, serve_cluster
from runtimes.serving.settings import BatchSettings, ServeSettings
cluster = ClusterSettings(least=1, most=2, address=sys.argv[2], mean_seconds=10.5, more_seconds=0, fewer_seconds=1)
at = lambda address: print("serving at", address + "/v1", file=sys.stderr)
serve_cluster(Path(sys.argv[1]), ServeSettings(), BatchSettings(rows=1, prefix_bytes=0), cluster, port=0, on_start=at)
"""
"""The command, with less patience than its own."""


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    """Each with a processor, and a working folder of its own."""
    with cluster(tmp_path_factory.mktemp("machines"), processors=(1, 1)) as started:
        yield started


def served(bundle: Path | str, machines: Machines, *more: str) -> list[str]:
    command = [sys.executable, "-m", "reft_export.cli.main", "serve", str(bundle), "--port", "0", "--prefix-mb", "0"]
    return [*command, "--ray-address", machines.address, *more]


@contextmanager
def serving(command: list[str], *, end: signal.Signals = signal.SIGTERM) -> Iterator[str]:
    """Its address, until it is sent ``end``. What it says beside its log is asserted to be its first line alone."""
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **ENV, "COLUMNS": "200"})
    assert (stderr := running.stderr) is not None
    lines: list[str] = []
    reading = Thread(target=lambda: lines.extend(iter(stderr.readline, "")), daemon=True)
    reading.start()
    try:
        until(lambda: bool(lines) or running.poll() is not None, 120)
        found = re.fullmatch(r"serving .*at (http://127.0.0.1:\d+)/v1\n", lines[0])
        assert found, lines
        yield found[1]
        running.send_signal(end)
        assert running.wait(60) == 0
        reading.join(10)
        assert not [line for line in lines[1:] if not line.startswith("{")]
    finally:
        running.kill()
        running.wait()


def refused(command: list[str], cwd: Path | None = None) -> str:
    env = {**os.environ, **ENV, "COLUMNS": "1000", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=cwd, env=env)
    assert done.returncode and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def replicas_of(machine: Machine) -> int:
    return sum("ServeReplica" in each.name() for each in machine.processes())


@pytest.mark.long
def test_a_bundle_that_one_machine_lacks_costs_one_line(bundle: Bundle, machines: Machines) -> None:
    """Each process reads the path in its own working folder: the command's and the head's have a bundle, the other machine's has none."""
    head, other = (machine.cwd for machine in machines.machines)
    shutil.copytree(bundle.folder, head / "bundle")
    line = refused(served("/proc/self/cwd/bundle", machines, "--replicas", "2"), cwd=head)
    assert "1 replica(s) started, and another one did not (machine " in line and "/proc/self/cwd/bundle is not a folder" in line
    assert not (other / "bundle").exists()


def test_a_replica_with_other_weights_does_not_start(bundle: Bundle) -> None:
    with pytest.raises(ReftError, match="machine .* has other weights than where serve was called"):
        Replica(bundle.folder, "0" * 64, ServeSettings(), BatchSettings())


def test_processors_that_are_not_there_cost_one_line(bundle: Bundle, machines: Machines) -> None:
    line = refused(served(bundle.folder, machines, "--replicas", "2", "--threads", "2"))
    assert "2 machine(s) with 2 processors, has room for 0 replicas of 2 processors each, expected 2" in line

    def holders() -> int:
        return sum("Held" in each.name() for machine in machines.machines for each in machine.processes())

    command = [sys.executable, "-c", HOLD, machines.address]
    holding = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **ENV})
    try:
        assert holding.stdout is not None and "held" in holding.stdout.readline()
        line = refused(served(bundle.folder, machines, "--replicas", "2"))
    finally:
        holding.kill()
        holding.wait()
    assert "the cluster, 2 machine(s) with 2 processors, has 1 free, expected 2: something else there has the others" in line
    until(lambda: holders() == 0, 30)


def test_what_never_comes_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ray Serve tells of a machine on which replicas fail, and of one that others fill, where a replica runs elsewhere."""
    told = DeploymentStatusOverview(DeploymentStatus.UPDATING, DeploymentStatusTrigger.UNSPECIFIED, {ReplicaState.RUNNING: 1}, "")
    application = SimpleNamespace(status=ApplicationStatus.DEPLOYING, message="", deployments={"Replica": told})
    monkeypatch.setattr(serving_cluster.serve, "status", lambda: SimpleNamespace(applications={"x": application}))
    monkeypatch.setattr(serving_cluster, "FAILING_SECONDS", 0.3)
    monkeypatch.setattr(serving_cluster, "PLACED_SECONDS", 0.3)
    for message, line in (
        (
            "A replica failed to start with exception. Retrying. Error:\n.. InputError: it is full\n",
            "did not \\(.. InputError: it is full\\)",
        ),
        ("1 replicas that have taken more than 30s to be scheduled.", "1 replica\\(s\\) started, and others found no machine"),
    ):
        told.message = message
        with pytest.raises(ReftError, match=line):
            serving_cluster._wait("x")
    application.status = ApplicationStatus.RUNNING
    serving_cluster._wait("x")


def test_replicas_that_cannot_be_asked_cost_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    async def lost() -> AsyncGenerator[int, None]:
        raise RayActorError
        yield 0

    async def silent() -> AsyncGenerator[int, None]:
        await asyncio.sleep(60)
        yield 0

    monkeypatch.setattr(serving_cluster, "HEARD_SECONDS", 0.2)
    for answer, line in ((lost, "the first that was asked was lost"), (silent, "were not heard within 0.2 s; its machines must reach")):
        handle = SimpleNamespace(options=lambda answer=answer, **_: SimpleNamespace(remote=answer))
        with pytest.raises(ReftError, match=line):
            asyncio.run(serving_cluster._hear(RayReplicas(handle)))


@pytest.mark.long
def test_replicas_come_with_requests_and_go_without(bundle: Bundle, machines: Machines, alone: OrtSession, tokenizer: Tokenizer) -> None:
    def count() -> int:
        return sum(replicas_of(machine) for machine in machines.machines)

    until(lambda: count() == 0, 30)
    wanted = {json.dumps(asked): alone_says(alone, tokenizer, asked) for asked in ASKED}
    with serving([sys.executable, "-c", SCALED, str(bundle.folder), machines.address]) as url:
        assert count() == 1
        with ThreadPoolExecutor(CLIENTS) as clients:
            end, most = time.monotonic() + 120, 1
            while most < 2 and time.monotonic() < end:
                for asked, answer in zip(ASKED, clients.map(lambda asked: said(url, asked), ASKED), strict=True):
                    assert answer == wanted[json.dumps(asked)]
                most = max(most, count())
        assert most == 2
        until(lambda: count() == 1, 120)
        assert said(url, ASKED[0]) == wanted[json.dumps(ASKED[0])]


def test_a_machines_death_loses_no_request(bundle: Bundle, machines: Machines, alone: OrtSession, tokenizer: Tokenizer) -> None:
    """One that hangs in the middle of an answer, and then is no more."""
    head, other = machines.machines
    wanted = [alone_says(alone, tokenizer, asked) for asked in ASKED]
    until(lambda: replicas_of(head) + replicas_of(other) == 0, 30)
    command = served(bundle.folder, machines, "--replicas", "2")
    with serving(command, end=signal.SIGINT) as url, ThreadPoolExecutor(CLIENTS) as clients:
        assert replicas_of(head) == replicas_of(other) == 1
        stream = stalled(url, lambda: other.signalled(signal.SIGSTOP), lambda: other.signalled(signal.SIGCONT))
        answers = [clients.submit(said, url, asked) for asked in ASKED]
        time.sleep(0.5)
        other.kill()
        assert [answer.result() for answer in answers] == wanted
        until(lambda: stream.ended, 60)
        again = Stream(url)
        until(lambda: again.ended)
        assert stream.error is None and stream.texts == again.texts and stream.texts[0] == alone_says(alone, tokenizer, LONG)
        lost = re.search(r"reft_replicas_lost_total (\d+)", httpx.get(f"{url}/metrics").text)
        assert lost is not None and int(lost[1]) > 0
        new = machines.add(1)
        until(lambda: replicas_of(new) == 1, 90)
        assert list(clients.map(lambda asked: said(url, asked), ASKED)) == wanted
