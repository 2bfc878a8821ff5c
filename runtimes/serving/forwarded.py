"""A request on its way to a replica, and an application's answer to it, message by message."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass

from runtimes.errors import InputError
from runtimes.serving.gate import RECORD, Application, Message
from runtimes.serving.requests import adapter_of

TEXT = ("/v1/chat/completions", "/v1/completions")
ADAPTERS, MODELS = "/v1/adapters/", "/v1/models/"
RECORDED = "reft.record"
"""The type of the last message: what the application's own log would have said."""
LAST_SECONDS = 5.0
"""That an application has, once nobody listens any more, to notice it."""
SEED_BYTES = 32
"""By which a body grows at most."""


@dataclass(frozen=True, kw_only=True)
class Forwarded:
    """What ASGI tells of a request, its whole body, and the adapter that it is about."""

    method: str
    path: str
    query: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    client: tuple[str, int] | None
    body: bytes
    adapter: str | None

    @classmethod
    def of(cls, scope: Message, body: bytes) -> Forwarded:
        """A request for text that brings no seed gets one: whoever answers it, and however often, says the same."""
        path, adapter = scope["path"], None
        if path in TEXT:
            body, adapter = _seeded(body)
        elif path.startswith((ADAPTERS, MODELS)):
            name = path.removeprefix(ADAPTERS).removeprefix(MODELS)
            adapter = name if path.startswith(ADAPTERS) else _adapter(name)
        headers, client = tuple((bytes(k), bytes(v)) for k, v in scope["headers"]), scope.get("client")
        return cls(
            method=scope["method"],
            path=path,
            query=scope["query_string"],
            headers=headers,
            client=None if client is None else (client[0], client[1]),
            body=body,
            adapter=adapter,
        )

    @property
    def changes(self) -> bool:
        """Whether it is one that must not be made twice."""
        return self.method in ("PUT", "DELETE")

    def scope(self) -> Message:
        return {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "scheme": "http",
            "method": self.method,
            "path": self.path,
            "raw_path": self.path.encode("utf-8", "surrogateescape"),
            "root_path": "",
            "query_string": self.query,
            "headers": list(self.headers),
            "client": self.client,
            "server": None,
        }


def _seeded(body: bytes) -> tuple[bytes, str | None]:
    """(the body with a seed, its adapter); as it came where it cannot be read: the application says why."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return body, None
    if not isinstance(asked, dict) or not asked:
        return body, None
    end = body.rstrip()
    if asked.get("seed") is None and json.detect_encoding(body).startswith("utf-8"):
        body = end[:-1] + f',"seed":{secrets.randbelow(2**53)}}}'.encode()  # of two fields of a name the last one counts
    model = asked.get("model")
    return body, _adapter(model) if isinstance(model, str) else None


def _adapter(model: str) -> str | None:
    with suppress(InputError):
        return adapter_of(model)
    return None


async def answered(app: Application, request: Forwarded) -> AsyncGenerator[Message, None]:
    """The messages that ``app`` sends, and one of type RECORDED. Closed early, it tells the application that the client hung up."""
    scope, said, gone, fed = request.scope(), asyncio.Queue[Message | None](), asyncio.Event(), False

    async def receive() -> Message:
        nonlocal fed
        if not fed:
            fed = True
            return {"type": "http.request", "body": request.body, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    running = asyncio.ensure_future(app(scope, receive, said.put))
    running.add_done_callback(lambda _: said.put_nowait(None))
    try:
        while (message := await said.get()) is not None:
            yield dict(message)
        await running
        yield {"type": RECORDED, "route": getattr(scope.get("route"), "path", "other"), "record": scope.get(RECORD, {})}
    finally:
        gone.set()
        await asyncio.wait({running}, timeout=LAST_SECONDS)
        running.cancel()
