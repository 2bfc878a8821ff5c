"""One HTTP request's answers, from the batcher's thread to the event loop's.

The batcher never waits: what it says goes into a bounded queue, and a request whose reader is further behind than that ends. All else that
ends one early (its client hung up, its time is over, the server stops) is ``fail``, on the loop's thread.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from runtimes.batch_rows import Ticket
from runtimes.batching import Batcher
from runtimes.generation import Generation, GenerationSettings
from runtimes.serving.edited import EditedTokens
from runtimes.serving.refusals import Refusal

LEAST_LOGPROB = -9999.0
"""What OpenAI tells of a token that cannot be."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One answer that is wanted."""

    prompt: list[int]
    adapter: str | None
    strength: float
    scope: str
    settings: GenerationSettings
    edited: EditedTokens | None = None
    """Where the client wants to be told."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A token, its log-probability, and those of the likeliest ones, before temperature and all that follows it."""

    token: int
    logprob: float
    best: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, token: int, logits: np.ndarray, best: int) -> Chosen:
        """log softmax(logits [V]) in float64."""
        scores = np.asarray(logits, np.float64)
        scores = scores - scores.max()
        scores -= np.log(np.exp(scores).sum())
        likeliest = np.argpartition(-scores, min(best, scores.size - 1))[:best] if best else np.zeros(0, np.int64)
        likeliest = likeliest[np.argsort(-scores[likeliest], kind="stable")]
        return cls(token=token, logprob=_said(scores[token]), best=tuple((int(i), _said(scores[i])) for i in likeliest))


def _said(logprob: float) -> float:
    return max(float(logprob), LEAST_LOGPROB)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What is new of answer ``index``; ``end`` with the last one, and ``reused``, tokens of its prompt that were in the cache already."""

    index: int
    text: str = ""
    chosen: tuple[Chosen, ...] = ()
    end: Generation | None = None
    reused: int = 0


class SlowReader(Exception):
    """A stream's reader is too far behind."""


class Flight:
    """The answers to ``asks``; made on the event loop, submitted from any thread.

    ``best``: as of ``TextRequest``. ``backlog``: tokens of all answers that may wait for the reader; None: they are told at the end.
    ``on_token``: called on the batcher's thread with each token's answer, by its index.
    """

    def __init__(self, asks: Sequence[Ask], *, best: int | None, backlog: int | None, on_token: Callable[[int], None]) -> None:
        self.asks = asks
        self.failure: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        """Why it ended early."""
        self._loop = asyncio.get_running_loop()
        self._best, self._backlog, self._on_token = best, backlog, on_token
        self._tickets: list[Ticket] = []
        self._pieces: deque[Piece] = deque()
        self._wake = asyncio.Event()
        self._closed = False

    def submit(self, batcher: Batcher) -> None:
        """All of them, or none: raises what ``Batcher.submit`` raises."""
        try:
            for index, ask in enumerate(self.asks):
                answer = _Answer(self, index)
                self._tickets.append(
                    batcher.submit(
                        ask.prompt,
                        ask.settings,
                        adapter=ask.adapter,
                        strength=ask.strength,
                        scope=ask.scope,
                        on_text=answer.on_text,
                        on_token=answer.on_token,
                        on_end=answer.on_end,
                    )
                )
        except BaseException:
            self.close()
            raise
        if self._closed:  # meanwhile
            self.close()

    async def pieces(self) -> AsyncIterator[Piece]:
        """Everything that is said, in the order in which it is; raises the failure once what came before it is told."""
        left = len(self.asks)
        while left:
            while self._pieces:
                piece = self._pieces.popleft()
                left -= piece.end is not None
                yield piece
            if not left:
                return
            if self.failure.done():
                raise self.failure.result()
            self._wake.clear()
            if not self._pieces and not self.failure.done():
                await self._wake.wait()

    def fail(self, error: BaseException) -> None:
        """On the loop's thread: nobody needs the rest."""
        if not self.failure.done():
            self.failure.set_result(error)
        self.close()
        self._wake.set()

    def close(self) -> None:
        """Its rows leave the batch before the next step."""
        self._closed = True
        for ticket in self._tickets:
            ticket.cancel()

    # --- on the batcher's thread ---

    def say(self, piece: Piece) -> None:
        """Raises SlowReader, which ends the answer."""
        if piece.end is None:
            if self._backlog is None:
                return
            if len(self._pieces) >= self._backlog:
                raise SlowReader
        self._pieces.append(piece)
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._wake.set)

    def failed(self, error: BaseException) -> None:
        if isinstance(error, SlowReader):
            error = Refusal(429, f"the reader is {self._backlog} tokens behind; read faster, or ask without stream", code="slow_reader")
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self.fail, error)

    def token(self, index: int, token: int, logits: np.ndarray) -> tuple[Chosen, ...]:
        self._on_token(index)
        return () if self._best is None else (Chosen.of(token, logits, self._best),)

    @property
    def streams(self) -> bool:
        return self._backlog is not None


class _Answer:
    """Listens to one ticket, on the batcher's thread."""

    def __init__(self, flight: Flight, index: int) -> None:
        self._flight, self._index = flight, index
        self._text: list[str] = []
        self._chosen: list[Chosen] = []

    def on_text(self, piece: str) -> None:
        self._text.append(piece)

    def on_token(self, token: int, logits: np.ndarray) -> None:
        self._chosen += self._flight.token(self._index, token, logits)
        if self._flight.streams and (self._text or self._chosen):
            self._flight.say(self._taken())

    def on_end(self, ticket: Ticket) -> None:
        try:
            answer = ticket.result(0)
        except Exception as e:
            self._flight.failed(e)
            return
        if answer.finish_reason != "cancelled":
            self._flight.say(self._taken(answer, ticket.reused))
        else:
            self._flight.failed(Refusal(503, "the server stops; ask again later", code="stopping"))

    def _taken(self, end: Generation | None = None, reused: int = 0) -> Piece:
        piece = Piece(index=self._index, text="".join(self._text), chosen=tuple(self._chosen), end=end, reused=reused)
        self._text, self._chosen = [], []
        return piece
