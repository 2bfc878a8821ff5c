"""``reft-export serve``: a bundle, its batch and its application in one process, until it is told to stop."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType

import uvicorn

from runtimes.batching import Batcher, batchable
from runtimes.errors import ReftError
from runtimes.open import open_artifact, open_bank, open_session
from runtimes.serving.app import create_app
from runtimes.serving.doors import Doors
from runtimes.serving.gate import Gate
from runtimes.serving.server import TextServer
from runtimes.serving.settings import BatchSettings, ServeSettings
from runtimes.text.tokenizer import Tokenizer

LAST_SECONDS = 5
"""Beyond the grace, for what was ended to be told so."""


def serve(
    bundle: Path,
    settings: ServeSettings,
    batch: BatchSettings = BatchSettings(),
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    on_start: Callable[[str], None] = lambda _: None,
) -> None:
    """Serves until SIGINT or SIGTERM; ``on_start`` is told the address once it listens.

    Raises what ``text_server`` raises, ReftError where nothing can listen there.
    """
    # The socket first: what fails, fails before anything is loaded.
    with closing(bind(host, port)) as bound, text_server(bundle, settings, batch) as server:
        Running(create_app(server), server, bound, on_start).run(sockets=[bound])


@contextmanager
def text_server(bundle: Path, settings: ServeSettings, batch: BatchSettings) -> Iterator[TextServer]:
    """The bundle, its session and its batch, until they are closed; what runs then ends.

    Raises what opening the bundle raises, InputError for one that cannot batch.
    """
    artifact = open_artifact(bundle, verify=batch.verify)
    bank = open_bank(artifact, max_bytes=batch.bank_bytes)
    tokenizer = Tokenizer.load(artifact.folder, artifact.manifest.model)
    with open_session(artifact, threads=batch.threads, kernel=batch.kernel) as session:
        batcher = Batcher(
            *(batchable(session), tokenizer, bank),
            most_rows=batch.rows,
            cache_bytes=batch.cache_bytes,
            prefix_bytes=batch.prefix_bytes,
            queue=batch.queue,
            prefill_chunk=batch.prefill_chunk,
            speculate=batch.speculate,
        )
        with batcher:
            yield TextServer(batcher, bank, tokenizer, settings)
            batcher.close()


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
    """uvicorn on ``bound`` with ``app``, whose doors are ``server``.

    It stops in two steps: what runs has its grace, then it is told of the end. A second signal ends it at once.
    """

    def __init__(self, app: Gate, server: Doors, bound: socket.socket, on_start: Callable[[str], None]) -> None:
        grace = server.settings.grace_seconds
        super().__init__(
            uvicorn.Config(
                app,
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
