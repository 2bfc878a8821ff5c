"""What a server counts, for Prometheus; each server has a registry of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from runtimes.bank import AdapterBank
from runtimes.batching import Batcher, Load

FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
"""Seconds."""
BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
"""Seconds."""


class RequestMetrics:
    """No label holds what a client wrote: routes are templates, and no adapter is named."""

    def __init__(self, running: Callable[[], int]) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("reft_requests", "Requests that were answered.", ("route", "method", "status"), registry=registry)
        self._gauge("reft_requests_running", "Requests for text that are answered or wait.", running)

    def answered(self, route: str, method: str, status: int) -> None:
        self._requests.labels(route, method, str(status)).inc()

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def _gauge(self, name: str, help_: str, value: Callable[[], float]) -> None:
        Gauge(name, help_, registry=self._registry).set_function(value)


class FrontMetrics(RequestMetrics):
    """Of what hands requests to replicas."""

    def __init__(self, running: Callable[[], int]) -> None:
        super().__init__(running)
        self._lost = Counter("reft_replicas_lost", "Requests whose replica was lost before its answer was whole.", registry=self._registry)

    def lost(self) -> None:
        self._lost.inc()


class Metrics(RequestMetrics):
    """Of what answers."""

    def __init__(self, batcher: Batcher, bank: AdapterBank, running: Callable[[], int]) -> None:
        super().__init__(running)
        registry = self._registry
        self._prompt = Counter("reft_prompt_tokens", "Tokens of prompts that were taken.", registry=registry)
        self._completion = Counter("reft_completion_tokens", "Tokens that were generated.", registry=registry)
        self._first = Histogram("reft_time_to_first_token_seconds", "From request to first token.", buckets=FIRST, registry=registry)
        self._between = Histogram(
            "reft_time_between_tokens_seconds", "Between two tokens of one answer.", buckets=BETWEEN, registry=registry
        )
        for name, help_, value in LOAD:
            self._gauge(name, help_, lambda value=value: value(batcher.load))
        self._gauge("reft_resident_adapters", "Adapters in memory.", lambda: len(bank.resident))
        self._gauge("reft_bank_bytes", "Bytes of the adapters in memory, stacked.", lambda: bank.memory.banks)

    def took(self, prompts: Sequence[Sequence[int]]) -> None:
        self._prompt.inc(sum(map(len, prompts)))

    def clock(self) -> Callable[[int], None]:
        """Started with a request, called with each token's answer, by its index; from one thread."""
        start, last = time.perf_counter(), {}

        def token(index: int) -> None:
            now = time.perf_counter()
            self._completion.inc()
            if index in last:
                self._between.observe(now - last[index])
            else:
                self._first.observe(now - start)
            last[index] = now

        return token


LOAD: tuple[tuple[str, str, Callable[[Load], float]], ...] = (
    ("reft_rows_decoding", "Rows that decode.", lambda load: load.decoding),
    ("reft_rows_prefilling", "Rows whose prompt is fed.", lambda load: load.prefilling),
    ("reft_waiting", "Answers that wait for a row.", lambda load: load.waiting),
    ("reft_cache_bytes", "KV cache of rows that were used.", lambda load: load.cache_bytes),
)
