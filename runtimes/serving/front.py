"""What stands before replicas: one gate, and every request handed to one of them, again where it was lost.

It holds no bundle and runs no model. ``runtimes/serving/cluster.py`` has Ray Serve's replicas.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import ExitStack, aclosing
from types import SimpleNamespace
from typing import Protocol

from runtimes.serving.app import operated
from runtimes.serving.doors import Doors
from runtimes.serving.forwarded import RECORDED, TEXT, Forwarded
from runtimes.serving.gate import GONE, RECORD, Gate, Message, Receive, Send, log_to_stderr
from runtimes.serving.metrics import FrontMetrics
from runtimes.serving.refusals import Refusal, json_text
from runtimes.serving.resumed import Resumed
from runtimes.serving.settings import ServeSettings
from runtimes.serving.text_routes import unless_gone

ATTEMPTS = 4
"""Replicas that a request may be lost with: one that kills what answers it must not go round for ever."""
OK = 200
OWN = ("/", "/health", "/ready", "/metrics")
LATE = 5.0
"""Seconds beyond a request's own, within which its replica says itself that it is late."""


class ReplicaLost(Exception):
    """The replica that answered is no more."""


class Replicas(Protocol):
    def ask(self, request: Forwarded) -> AsyncGenerator[Message, None]:
        """As of ``answered``, by one of them. Raises ReplicaLost."""
        ...


def create_front(replicas: Replicas, settings: ServeSettings, *, log: Callable[[str], None] = log_to_stderr) -> tuple[Gate, Front]:
    """An ASGI application, and its doors."""
    front = Front(replicas, settings)
    return Gate(front, front, log), front


class Front(Doors):
    def __init__(self, replicas: Replicas, settings: ServeSettings) -> None:
        super().__init__(settings)
        self.metrics: FrontMetrics = FrontMetrics(lambda: self.admitted_now)
        self._replicas = replicas
        self._own = operated(self)
        self._running: set[asyncio.Future[None]] = set()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OWN:
            await self._own(scope, receive, send)
            return
        relay, start = _Relay(send), time.monotonic()
        with ExitStack() as stack:
            try:
                if scope["path"] in TEXT:
                    stack.enter_context(self.admitted())
                request = Forwarded.of(scope, await _body(receive))
                relaying = asyncio.ensure_future(self._relayed(request, relay, scope))
                self._running.add(relaying)
                relaying.add_done_callback(self._running.discard)
                if not await unless_gone(relaying, receive):
                    scope[RECORD].update({"ended": "hung up"} if relay.begun else {"status": GONE})
                elif relaying.cancelled():
                    raise self.stops()
                else:
                    relaying.result()
                    if relay.answered and scope["path"] in TEXT:
                        self.took(time.monotonic() - start)
            except Refusal as e:
                await relay.refuse(e, scope, receive)

    async def _relayed(self, request: Forwarded, relay: _Relay, scope: Message) -> None:
        try:
            await asyncio.wait_for(self._answered(request, relay, scope), self.settings.request_seconds + LATE)
        except asyncio.TimeoutError:
            seconds = self.settings.request_seconds
            raise Refusal(504, f"no answer within {seconds:g} s; ask for less", code="timeout") from None

    async def _answered(self, request: Forwarded, relay: _Relay, scope: Message) -> None:
        for lost in range(1, ATTEMPTS + 1):
            try:
                async with aclosing(self._replicas.ask(request)) as messages:
                    await relay.take(messages, scope)
                return
            except ReplicaLost:
                self.metrics.lost()
                scope[RECORD]["replicas_lost"] = lost
                if request.changes:
                    message = "the replica that made the change was lost; look whether it is made, and ask again"
                    raise Refusal(503, message, code="replica_lost") from None
                relay.again()
        raise Refusal(503, f"{ATTEMPTS} replicas were lost with this request; the cluster's logs say why", code="replica_lost")

    def end_all(self) -> None:
        for relaying in self._running:
            relaying.cancel()


async def _body(receive: Receive) -> bytes:
    parts = []
    while (message := await receive())["type"] == "http.request":
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            break
    return b"".join(parts)


class _Relay:
    """One request's answer on its way to the client: whole answers once they are whole, streams as they come."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._events = Resumed()
        self.begun = False
        """Of a stream: the client has its status."""
        self.answered = False
        """It was not refused."""

    def again(self) -> None:
        self._events.again()

    async def take(self, messages: AsyncGenerator[Message, None], scope: Message) -> None:
        """All that one replica says. Raises ReplicaLost, and Refusal where it says other than the one before it."""
        start, parts, streams = None, [], False
        async for message in messages:
            if message["type"] == "http.response.start":
                start = dict(message) | {"headers": [each for each in message["headers"] if each[0] != b"x-request-id"]}
                streams = any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in start["headers"])
                if streams and not self.begun:
                    self.begun = True
                    await self._send(start)
            elif message["type"] == RECORDED:
                scope[RECORD].update(message["record"])
                scope["route"] = SimpleNamespace(path=message["route"])
            elif streams:
                await self._event(message["body"])
            else:
                parts.append(message.get("body", b""))
        if start is None:
            raise ReplicaLost
        self.answered = start["status"] == OK
        if self.begun:
            if not streams:  # it was refused where a part of it was told already
                await self._say(b"".join(parts).decode())
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})
        else:
            await self._send(start)
            await self._send({"type": "http.response.body", "body": b"".join(parts), "more_body": False})

    async def refuse(self, refusal: Refusal, scope: Message, receive: Receive) -> None:
        if self.begun:
            scope[RECORD]["ended"] = refusal.content["error"]["code"] or "refused"
            await self._say(json_text(refusal.content))
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})
        else:
            await refusal.response()(scope, receive, self._send)

    async def _event(self, body: bytes) -> None:
        """``body``: one event, or nothing."""
        if body and (data := self._events.new(body.decode().removeprefix("data: ").removesuffix("\n\n"))) is not None:
            await self._say(data)

    async def _say(self, data: str) -> None:
        await self._send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})
