"""/v1/models, /v1/chat/completions, /v1/completions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from runtimes.serving.answers import Shape, shape_of
from runtimes.serving.flight import Flight, Piece
from runtimes.serving.gate import GONE, RECORD, Receive, Send, asker, place_of
from runtimes.serving.refusals import UNUSABLE, Refusal, json_response, json_text, refusal_of
from runtimes.serving.requests import ChatRequest, CompletionRequest, TextRequest
from runtimes.serving.server import TextServer

LAST_WORDS = 5.0
"""Seconds that a stream's reader has to take why it ended early."""


def text_routes(server: TextServer) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["text"])

    @router.get("/models", summary="The base, and every adapter by two names")
    def models() -> Response:
        names = ["base", *(name for each in server.bank.names for name in (each, f"base:{each}"))]
        return json_response({"object": "list", "data": [_model(server, name) for name in names]})

    @router.get("/models/{model:path}", summary="One model")
    def model(model: str) -> Response:
        server.adapter(model)
        return json_response(_model(server, model))

    @router.post("/chat/completions", summary="Answer a conversation")
    async def chat(request: Request, asked: ChatRequest) -> Response:
        return await _answer(server, request, asked)

    @router.post("/completions", summary="Continue a text")
    async def completions(request: Request, asked: CompletionRequest) -> Response:
        return await _answer(server, request, asked)

    return router


def _model(server: TextServer, name: str) -> dict[str, Any]:
    own = {"root": server.bank.bundle.manifest.model.name, "parent": None if name == "base" else "base"}
    return {"id": name, "object": "model", "created": server.started, "owned_by": "reft-export", **own}


async def _answer(server: TextServer, request: Request, asked: TextRequest) -> Response:
    record = request.scope[RECORD]
    with ExitStack() as stack:
        stack.enter_context(server.admitted())
        try:
            grammar = await server.grammar(asked)
            asks = await asyncio.to_thread(server.asks, asked, asker(request.scope), grammar)
        except UNUSABLE as e:
            raise _refusal(e, server, record) from e
        record["adapter"] = asks[0].adapter
        shape = shape_of(asked, asks, server.tokenizer, server.fingerprint)
        flight = stack.enter_context(server.flight(asks, best=asked.best, streams=bool(asked.stream)))
        stack.callback(lambda: record.update(prompt_tokens=shape.prompt_tokens, completion_tokens=shape.completion_tokens))
        try:
            await server.submit(flight)
        except Exception as e:
            raise _refusal(e, server, record) from e
        if asked.stream:
            return EventStream(flight, _events(flight, shape, server, record), stack.pop_all(), record)
        whole = asyncio.ensure_future(_ends(flight))
        if not await unless_gone(whole, request.receive):
            record["status"] = GONE
            return Response(status_code=GONE)
        try:
            return json_response(await asyncio.to_thread(shape.whole, whole.result()))  # log-probabilities are many words
        except Exception as e:
            raise _refusal(e, server, record) from e


def _refusal(error: Exception, server: TextServer, record: dict[str, Any]) -> Refusal:
    """What the client is told; the log is told of a failure of ours where it was."""
    refusal = refusal_of(error, server.retry_after)
    if refusal is not error and refusal.status_code == 500:
        record["error"] = str(error) if isinstance(error, UNUSABLE) else place_of(error)
    return refusal


async def _ends(flight: Flight) -> list[Piece]:
    return [piece async for piece in flight.pieces() if piece.end is not None]


async def unless_gone(work: asyncio.Future[Any], receive: Receive, *others: asyncio.Future[Any]) -> bool:
    """Waits for ``work`` or one of ``others``; False, and the work is cancelled, where the client hung up first."""
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({work, gone, *others}, return_when=asyncio.FIRST_COMPLETED)
        return work.done() or not gone.done()
    finally:
        if gone.done() and not work.done():
            work.cancel()
        gone.cancel()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _events(flight: Flight, shape: Shape, server: TextServer, record: dict[str, Any]) -> AsyncIterator[str]:
    """The data of each event."""
    for chunk in shape.opening(len(flight.asks)):
        yield json_text(chunk)
    try:
        async for piece in flight.pieces():
            for chunk in shape.chunks(piece):
                yield json_text(chunk)
    except Exception as e:  # the status is sent: what is left is an event
        yield json_text(_refusal(e, server, record).content)
        return
    if shape.tells_usage:
        yield json_text(shape.closing())
    yield "[DONE]"


class EventStream(Response):
    """Server-sent events of a flight, which ends with it, however that ends."""

    media_type = "text/event-stream"

    def __init__(self, flight: Flight, events: AsyncIterator[str], landing: ExitStack, record: dict[str, Any]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._flight, self._events, self._landing, self._record = flight, events, landing, record

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        with self._landing:
            sent = asyncio.ensure_future(self._send(send))
            try:
                there = await unless_gone(sent, receive, self._flight.failure)
                if there and not sent.done():
                    await asyncio.wait({sent}, timeout=LAST_WORDS)
                if not there or not sent.done():
                    self._record["ended"] = "hung up" if not there else "did not read"
                elif self._flight.failure.done():
                    self._record["ended"] = _code(self._flight.failure.result())
                if sent.done() and not sent.cancelled() and (error := sent.exception()) is not None:
                    raise error
            finally:
                sent.cancel()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for data in self._events:
            await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _code(error: BaseException) -> str:
    return error.content["error"]["code"] or "refused" if isinstance(error, Refusal) else refusal_of(error).content["error"]["code"]
