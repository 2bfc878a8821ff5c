"""A real server of the toy bundle on a free port of this machine, in a thread."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import openai

sys.path.insert(0, str(Path(__file__).parent.parent / "runtimes"))

from toy_bundle import ADAPTERS, change_manifest, write_toy_bundle  # noqa: E402

from runtimes.artifacts.bundle import Bundle  # noqa: E402
from runtimes.bank import AdapterBank  # noqa: E402
from runtimes.batching import Batcher  # noqa: E402
from runtimes.ort.session import OrtSession  # noqa: E402
from runtimes.serving.app import create_app  # noqa: E402
from runtimes.serving.process import Running, bind  # noqa: E402
from runtimes.serving.server import TextServer  # noqa: E402
from runtimes.serving.settings import ServeSettings  # noqa: E402
from runtimes.text.tokenizer import Tokenizer  # noqa: E402

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"


@dataclass(kw_only=True)
class Served:
    url: str
    server: TextServer
    running: Running
    lines: list[str] = field(default_factory=list)
    """Of the log."""

    def client(self, key: str = "none", **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60, **options)

    def http(self, token: str | None = None) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={} if token is None else {"Authorization": f"Bearer {token}"}, timeout=60)

    def metric(self, name: str) -> float:
        text = self.http().get("/metrics").text
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith((f"{name} ", f"{name}{{")))


def toy(folder: Path) -> Bundle:
    """With a chat template."""
    bundle = write_toy_bundle(folder, in_place=True, adapters=ADAPTERS)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return change_manifest(bundle)


class SlowBatcher(Batcher):
    """Whose steps take ``seconds`` beside their own."""

    seconds = 0.0

    def step(self) -> bool:
        time.sleep(self.seconds)
        return super().step()


@contextmanager
def serving(
    bundle: Bundle, settings: ServeSettings = ServeSettings(), *, slow: float = 0.0, bank_bytes: int | None = None, **batcher: Any
) -> Iterator[Served]:
    """``slow``: seconds that every step takes beside its own. ``batcher``: options of Batcher."""
    session = OrtSession(bundle, threads=1)
    tokenizer, bank = Tokenizer.load(bundle.folder, bundle.manifest.model), AdapterBank(bundle, max_bytes=bank_bytes)
    lines: list[str] = []
    started: list[str] = []
    with SlowBatcher(session, tokenizer, bank, **batcher) as running_batch:
        running_batch.seconds = slow
        server = TextServer(running_batch, bank, tokenizer, settings)
        with bind("127.0.0.1", 0) as bound:
            running = Running(create_app(server, log=lines.append), server, bound, started.append)
            thread = Thread(target=lambda: running.run(sockets=[bound]), daemon=True)
            thread.start()
            until(lambda: bool(started))
            try:
                yield Served(url=started[0], server=server, running=running, lines=lines)
            finally:
                running.should_exit = True
                thread.join(30)
                assert not thread.is_alive()
        running_batch.close()


def until(there: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.005)


def toy_bundle_of_version_1(folder: Path) -> Path:
    """Whose rows share one rule."""
    return write_toy_bundle(folder, in_place=True, adapters=ADAPTERS, one_rule=True).folder
