"""Machines of a Ray cluster, each a raylet with its workers and processors, on this one; and a stream that one of them begins."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import psutil
from served import until

from runtimes.serving.process import bind

RAY = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats", "--object-store-memory=80000000"]
START_SECONDS = 120
ENV = {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
"""Of every process of a cluster. Without a mode Ray takes a token that it finds in the home folder."""


LONG: dict[str, Any] = {"model": "base", "prompt": "Once upon", "max_tokens": 55, "temperature": 1, "seed": 7, "stream": True, "n": 8}
"""The base: an adapter's requests that come one by one go to the replica that has it."""
TRIES = 20
QUIET_SECONDS = 3
"""Without an event: one that goes on may be slow, where other tests run beside it."""


@dataclass
class Stream:
    """The answers of LONG, which a thread reads."""

    url: str
    texts: list[str] = field(default_factory=lambda: [""] * LONG["n"])
    events: int = 0
    error: str | None = None
    """Its code."""
    ended: bool = False

    def __post_init__(self) -> None:
        Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with httpx.stream("POST", f"{self.url}/v1/completions", json=LONG, timeout=200) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    self._event(json.loads(line.removeprefix("data: ")))
        self.ended = True

    def _event(self, event: dict[str, Any]) -> None:
        self.events += 1
        if "error" in event:
            self.error = event["error"]["code"]
        else:
            choice = event["choices"][0]
            self.texts[choice["index"]] += choice["text"]

    def begins(self) -> None:
        until(lambda: self.events > 2)

    def stalls(self) -> bool:
        """Nothing more of it comes, and it has no end."""
        there, since = self.events, time.monotonic()
        while not self.ended and time.monotonic() < since + QUIET_SECONDS:
            time.sleep(0.02)
            if self.events > there:
                there, since = self.events, time.monotonic()
        return not self.ended


def stalled(url: str, freeze: Callable[[], None], thaw: Callable[[], None]) -> Stream:
    """One of ``url`` in whose middle what answers it was frozen: of several that answer, who does is seen by what then happens."""
    for _ in range(TRIES):
        stream = Stream(url)
        stream.begins()
        freeze()
        if stream.stalls():
            return stream
        thaw()
    raise AssertionError(f"of {TRIES} streams none was by what was frozen")


@dataclass
class Machine:
    """``ray start``, and what came of it."""

    started: subprocess.Popen[str]
    cwd: Path
    seen: dict[int, psutil.Process] = field(default_factory=dict)

    def processes(self) -> list[psutil.Process]:
        """That run, workers among them. One whose parent died is remembered where it was seen before."""
        with suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.started.pid)
            self.seen |= {each.pid: each for each in (parent, *parent.children(recursive=True))}
        alive = []
        for each in self.seen.values():
            with suppress(psutil.NoSuchProcess):
                if each.is_running() and each.status() != psutil.STATUS_ZOMBIE:
                    alive.append(each)
        return alive

    def signalled(self, sent: signal.Signals) -> None:
        for each in self.processes():
            with suppress(psutil.NoSuchProcess):
                each.send_signal(sent)

    def kill(self) -> None:
        self.signalled(signal.SIGKILL)
        self.started.wait(30)


@dataclass
class Machines:
    address: str
    folder: Path
    temporary: Path
    machines: list[Machine] = field(default_factory=list)
    """The head first."""

    def add(self, processors: int) -> Machine:
        number = len(self.machines)
        head = ["--head", f"--port={self.address.rpartition(':')[2]}", "--include-dashboard=false", f"--temp-dir={self.temporary}"]
        where = [f"--address={self.address}"] if number else head
        cwd, log = self.folder / f"{number}", self.folder / f"{number}.log"
        cwd.mkdir()
        with log.open("w") as out:
            command = [*RAY, *where, f"--num-cpus={processors}"]
            started = subprocess.Popen(command, stdout=out, stderr=out, text=True, env={**os.environ, **ENV}, cwd=cwd)
        self.machines.append(Machine(started, cwd))
        until(lambda: "Ray runtime started" in log.read_text() or started.poll() is not None, START_SECONDS)
        assert started.poll() is None, log.read_text()
        return self.machines[-1]


@contextmanager
def cluster(folder: Path, *, processors: tuple[int, ...]) -> Iterator[Machines]:
    """A machine of each, the head first. Sockets lie below a short folder: their paths have 107 bytes at most."""
    with bind("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
    machines = Machines(f"127.0.0.1:{port}", folder, Path(tempfile.mkdtemp(prefix="reft-ray-")))
    try:
        for count in processors:
            machines.add(count)
        yield machines
    finally:
        for machine in reversed(machines.machines):
            machine.kill()
        shutil.rmtree(machines.temporary, ignore_errors=True)
