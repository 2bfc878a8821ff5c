"""Who is let in: by which key, how many at once, and until when. What answers requests in this process, or hands them on, is a Doors."""

from __future__ import annotations

import asyncio
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

from runtimes.serving.metrics import RequestMetrics
from runtimes.serving.refusals import Refusal
from runtimes.serving.settings import Keys, ServeSettings

MOST_RETRY = 60
"""Seconds."""


class Doors(ABC):
    metrics: RequestMetrics

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        self.keys = Keys((*settings.api_keys, *filter(None, (settings.admin_token,)))) if settings.api_keys else Keys(())
        """Of /v1; none: it is open."""
        self.admin = Keys(filter(None, (settings.admin_token,)))
        self.stopping = False
        self.admitted_now = 0
        self._seconds = 1.0
        """That a request takes, lately."""

    @property
    def retry_after(self) -> int:
        """Seconds, for those who are sent away."""
        return max(1, min(MOST_RETRY, math.ceil(self._seconds)))

    def took(self, seconds: float) -> None:
        """A request did."""
        self._seconds += 0.1 * (seconds - self._seconds)

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """A request for text, from when it is read to when it is answered; on the event loop.

        Raises Refusal where too much runs already, or the server stops.
        """
        if self.stopping:
            raise self.stops()
        if self.admitted_now >= self.settings.concurrency:
            message = f"{self.admitted_now} requests run or wait already; ask again later"
            raise Refusal(429, message, code="too_many_requests", headers={"Retry-After": str(self.retry_after)})
        self.admitted_now += 1
        try:
            yield
        finally:
            self.admitted_now -= 1

    def stop(self, after: float) -> None:
        """On the event loop: takes no more requests, and ends in so many seconds what runs then."""
        self.stopping = True
        asyncio.get_running_loop().call_later(after, self.end_all)

    def stops(self) -> Refusal:
        """What those are told who come, or still run, when it stops."""
        return Refusal(503, "the server stops; ask again later", code="stopping", headers={"Retry-After": str(self.retry_after)})

    @abstractmethod
    def end_all(self) -> None:
        """Ends what runs."""
