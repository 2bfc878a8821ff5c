"""``reft-export serve``: a bundle, its batch and its application in one process, until it is told to stop."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from runtimes.batching import Batcher, batchable
from runtimes.errors import ReftError
from runtimes.open import open_artifact, open_bank, open_session
from runtimes.serving.app import create_app
from runtimes.serving.server import TextServer
from runtimes.serving.settings import ServeSettings
from runtimes.text.tokenizer import Tokenizer

LAST_SECONDS = 5
"""Beyond the grace, for what was ended to be told so."""


def serve(
    bundle: Path,
    settings: ServeSettings,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    rows: int = 16,
    queue: int = 256,
    cache_bytes: int | None = None,
    prefix_bytes: int | None = None,
    bank_bytes: int | None = None,
    prefill_chunk: int | None = None,
    threads: int | None = None,
    kernel: str | None = None,
    verify: bool = False,
    on_start: Callable[[str], None] = lambda _: None,
) -> None:
    """Serves until SIGINT or SIGTERM; ``on_start`` is told the address once it listens. Numbers as of Batcher and AdapterBank.

    Raises what opening the bundle raises, InputError for one that cannot batch, ReftError where nothing can listen there.
    """
    bound = bind(host, port)  # what fails, fails before anything is loaded
    try:
        artifact = open_artifact(bundle, verify=verify)
        bank = open_bank(artifact, max_bytes=bank_bytes)
        tokenizer = Tokenizer.load(artifact.folder, artifact.manifest.model)
        with open_session(artifact, threads=threads, kernel=kernel) as session:
            batcher = Batcher(
                *(batchable(session), tokenizer, bank),
                most_rows=rows,
                cache_bytes=cache_bytes,
                prefix_bytes=prefix_bytes,
                queue=queue,
                prefill_chunk=prefill_chunk,
            )
            with batcher:
                server = TextServer(batcher, bank, tokenizer, settings)
                Running(server, bound, on_start).run(sockets=[bound])
                batcher.close()  # what is left ends now
    finally:
        bound.close()


def bind(host: str, port: int) -> socket.socket:
    """A socket that will listen. Raises ReftError where nothing can."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError as e:
        bound.close()
        raise ReftError(f"nothing can listen at {host}:{port} ({e.strerror or e}); choose another --port or --host") from None
    return bound


class Running(uvicorn.Server):
    """uvicorn on ``bound``. It stops in two steps: what runs has its grace, then it is told of the end. A second signal ends it at once.

    ``options``: of ``create_app``.
    """

    def __init__(self, server: TextServer, bound: socket.socket, on_start: Callable[[str], None], **options: Any) -> None:
        grace = server.settings.grace_seconds
        super().__init__(
            uvicorn.Config(
                create_app(server, **options),
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=int(grace) + LAST_SECONDS,
            )
        )
        self._server, self._bound, self._on_start = server, bound, on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        host, port = self._bound.getsockname()[:2]
        self._on_start(f"http://{f'[{host}]' if ':' in host else host}:{port}")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._server.stop(self._server.settings.grace_seconds)
        await super().shutdown(sockets=sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit, self.should_exit = self.should_exit, True
