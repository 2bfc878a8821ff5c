"""What every request passes first and last: its key, its size, its line in the log and its place in the metrics."""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi.datastructures import Headers

from runtimes.serving.doors import Doors
from runtimes.serving.refusals import Refusal, refusal_of

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]
RECORD = "reft"
"""Of the scope: what handlers add to the line of the log."""
FORM = 1 << 16
"""Bytes of a form around its files."""
BODY_SECONDS = 60.0
"""That a request may take to come."""
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"})
"""That metrics tell apart: a client may send any word."""
GONE = 499
"""As nginx logs a client that hung up before it was answered."""


def log_to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Gate:
    """An ASGI application around ``app``, which holds the routes. ``log`` takes a line of JSON for each request, without what it asked."""

    def __init__(self, app: Application, server: Doors, log: Callable[[str], None] = log_to_stderr) -> None:
        self._app, self._server, self._log = app, server, log

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, number, status = time.perf_counter(), secrets.token_hex(8), 0
        record: dict[str, Any] = {}
        scope[RECORD] = record

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", number.encode())]
            await send(message)

        try:
            if (refusal := self._refusal(scope)) is not None:
                await refusal.response()(scope, receive, watched)
            else:
                await self._app(scope, self._bounded(scope, receive), watched)
        except Exception as e:  # a bug of ours: its place is told, not its words, which may be a client's
            record["error"] = place_of(e)
            if not status:
                await refusal_of(e).response()(scope, receive, watched)
        finally:
            status = record.pop("status", status) or GONE
            route = getattr(scope.get("route"), "path", "other")
            self._server.metrics.answered(route, scope["method"] if scope["method"] in METHODS else "other", status)
            self._tell(scope, record, number, status, time.perf_counter() - start)

    def _tell(self, scope: Message, record: dict[str, Any], number: str, status: int, seconds: float) -> None:
        client = scope.get("client")
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "id": number,
            "client": client[0] if client else None,
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": status,
            "seconds": round(seconds, 4),
        }
        self._log(json.dumps(line | record))

    def _refusal(self, scope: Message) -> Refusal | None:
        """What is refused before a byte of its body is read."""
        headers, path = Headers(scope=scope), scope["path"]
        if path == "/v1" or path.startswith("/v1/"):
            token = _bearer(headers.get("authorization", ""))
            if path.startswith("/v1/adapters/") and scope["method"] in ("PUT", "DELETE"):
                if (refusal := self._not_admin(token)) is not None:
                    return refusal
            elif self._server.keys and (token is None or token not in self._server.keys):
                return _unknown("an API key is needed, as Authorization: Bearer KEY" if token is None else "the API key is not known")
        length, most = headers.get("content-length", "0"), self._most(scope)
        if not length.isdecimal() or len(length) > 15 or int(length) > most:
            return _too_large(most)
        return None

    def _not_admin(self, token: str | None) -> Refusal | None:
        if not self._server.admin:
            return Refusal(403, "adapters cannot be changed here: the server has no admin token", code="no_admin_token")
        if token is None:
            return _unknown("the admin token is needed, as Authorization: Bearer TOKEN")
        if token in self._server.admin:
            return None
        if token in self._server.keys:
            return Refusal(403, "an API key does not change adapters; send the admin token", code="not_admin")
        return _unknown("the admin token is not known")

    def _most(self, scope: Message) -> int:
        settings = self._server.settings
        upload = scope["method"] == "PUT" and scope["path"].startswith("/v1/adapters/")
        return settings.max_upload + FORM if upload else settings.max_body

    def _bounded(self, scope: Message, receive: Receive) -> Receive:
        """``receive``, which raises Refusal 413 once more has come than may, and 408 where it takes too long."""
        most, got, coming, end = self._most(scope), 0, True, time.monotonic() + BODY_SECONDS

        async def counted() -> Message:
            nonlocal got, coming
            if not coming:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), end - time.monotonic())
            except asyncio.TimeoutError:
                raise Refusal(408, "the request took too long to come", code="timeout", headers={"Connection": "close"}) from None
            coming = bool(message.get("more_body"))
            got += len(message.get("body", b""))
            if got > most:
                raise _too_large(most)
            return message

        return counted


def place_of(error: BaseException) -> str:
    """Its class and the functions that it came through, innermost first."""
    frames = traceback.extract_tb(error.__traceback__)[:-9:-1]
    return f"{type(error).__name__} at {' < '.join(f'{frame.name}:{frame.lineno}' for frame in frames)}"


def asker(scope: Message) -> str:
    """What stands for a request's key, which it does not tell."""
    return hashlib.sha256((_bearer(Headers(scope=scope).get("authorization", "")) or "").encode("utf-8", "surrogateescape")).hexdigest()


def _bearer(header: str) -> str | None:
    kind, _, token = header.partition(" ")
    return token.strip() if kind.lower() == "bearer" and token.strip() else None


def _unknown(message: str) -> Refusal:
    return Refusal(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _too_large(most: int) -> Refusal:
    return Refusal(413, f"the request is larger than {most:,} bytes", code="too_large", headers={"Connection": "close"})
