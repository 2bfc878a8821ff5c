"""What a batch of concurrent requests gives: the base alone, one adapter in every row, and a mixture of many, in turn.

Requests of random tokens come all at once and run on one Batcher (runtimes/batching.py), as a server's do; end tokens end none, so that
every case does the same work. The adapters of the mixture are the bundle's own, copied under other names where it has fewer: what they
hold does not change the time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np

from runtimes.bank import AdapterBank, BankMemory
from runtimes.batching import Batcher
from runtimes.bench import BASE, PROMPT_TOKENS, OnRun
from runtimes.errors import InputError
from runtimes.files.records import to_json
from runtimes.generation import GenerationSettings
from runtimes.ort.session import OrtSession
from runtimes.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class BatchBenchSettings:
    adapters: int = 32
    """Of the mixture, all resident."""
    concurrency: int = 16
    """Requests of a round, which run at once."""
    prompt_tokens: int | None = None
    """None: PROMPT_TOKENS, or as many as fit."""
    new_tokens: int = 32
    repeats: int = 3

    def __post_init__(self) -> None:
        for name in ("adapters", "concurrency", "new_tokens", "repeats"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least 1")


@dataclass(frozen=True, kw_only=True)
class BatchMeasurement:
    """``throughput``: new tokens a second of all requests, by round; ``ratio``: the median over the rounds' own ratios to the base.
    Milliseconds: ``ttft`` from request to first token, ``between`` two tokens of one request; median and 99th percentile."""

    name: str
    throughput: float
    ratio: float | None
    ttft: float
    ttft_p99: float
    between: float
    between_p99: float


@dataclass(frozen=True, kw_only=True)
class BatchBench:
    model: str
    kernel: str
    prompt_tokens: int
    new_tokens: int
    concurrency: int
    repeats: int
    bank: BankMemory
    measurements: tuple[BatchMeasurement, ...]

    HEADER = ("", "tokens/s", "/ base", "TTFT ms", "TTFT p99", "between tokens ms", "between p99")

    @property
    def title(self) -> str:
        tokens = f"{self.prompt_tokens} prompt and {self.new_tokens} new tokens"
        return f"{self.model}, {self.kernel}: {self.concurrency} requests at once, {tokens}, {self.repeats} rounds"

    def to_json(self) -> str:
        return json.dumps(to_json(self) | {"bank_factor": self.bank.factor}, indent=1)

    def rows(self) -> list[tuple[str, ...]]:
        """One row of texts per measurement, under ``HEADER``."""
        return [
            (
                m.name,
                f"{m.throughput:.1f}",
                "" if m.ratio is None else f"{m.ratio:.3f}",
                *(f"{x:.1f}" for x in (m.ttft, m.ttft_p99, m.between, m.between_p99)),
            )
            for m in self.measurements
        ]


@dataclass(frozen=True, kw_only=True)
class _Round:
    seconds: float
    tokens: int
    ttft: list[float]
    between: list[float]


def bench_batch(
    session: OrtSession, tokenizer: Tokenizer, settings: BatchBenchSettings = BatchBenchSettings(), *, on_run: OnRun | None = None
) -> BatchBench:
    """Raises InputError for a bundle without adapters, tokens that do not fit the context, and what AdapterBank and Batcher refuse."""
    bundle = session.bundle
    if not bundle.adapter_names:
        raise InputError(f"{bundle.folder} has no adapter that could be mixed; add one with `reft-export add`")
    room = bundle.manifest.model.context_length - settings.new_tokens
    prompt_tokens = min(PROMPT_TOKENS, room) if settings.prompt_tokens is None else settings.prompt_tokens
    if not 1 <= prompt_tokens <= room:
        raise InputError(
            f"{prompt_tokens} prompt and {settings.new_tokens} new tokens do not fit the context of {bundle.manifest.model.name} "
            f"({bundle.manifest.model.context_length}); ask for fewer"
        )
    bank = AdapterBank(bundle)
    for name in bundle.adapter_names[: settings.adapters]:
        bank.load(name)
    names = [*bank.resident]
    for number in range(len(names), settings.adapters):
        names.append(bank.copy(names[number % len(bundle.adapter_names)], f"copy-{number}"))
    cases: dict[str, Sequence[str | None]] = {BASE: [None], names[0]: names[:1], f"{len(names)} adapters": names}
    random = np.random.default_rng(0)
    prompts = random.integers(0, bundle.manifest.model.vocab_size, (settings.concurrency, prompt_tokens)).tolist()
    endless = replace(tokenizer, stop_token_ids=frozenset())
    batcher = Batcher(session, endless, bank, most_rows=settings.concurrency, queue=settings.concurrency, prefix_bytes=0)
    rounds: dict[str, list[_Round]] = {name: [] for name in cases}
    done, total = 0, (settings.repeats + 1) * len(cases)
    for turn in range(settings.repeats + 1):
        for name in list(cases) if turn % 2 else reversed(cases):
            chosen = [cases[name][i] for i in random.permutation(settings.concurrency) % len(cases[name])]
            rounds[name].append(_round(batcher, prompts, chosen, settings.new_tokens))
            done += 1
            if on_run:
                on_run(done, total)
    memory = bank.memory
    batcher.close()
    measured = {name: found[1:] for name, found in rounds.items()}  # the first round takes memory and binds
    return BatchBench(
        model=bundle.manifest.model.name,
        kernel=session.kernel,
        prompt_tokens=prompt_tokens,
        new_tokens=settings.new_tokens,
        concurrency=settings.concurrency,
        repeats=settings.repeats,
        bank=memory,
        measurements=tuple(_measurement(name, found, measured[BASE]) for name, found in measured.items()),
    )


def _round(batcher: Batcher, prompts: Sequence[list[int]], adapters: Sequence[str | None], new_tokens: int) -> _Round:
    ttft: list[float] = []
    between: list[float] = []
    started = time.perf_counter()

    def timed() -> Callable[[int, np.ndarray], None]:
        last = started

        def on_token(*_: object) -> None:
            nonlocal last
            now = time.perf_counter()
            (ttft if last == started else between).append((now - last) * 1e3)
            last = now

        return on_token

    wanted = GenerationSettings(max_new_tokens=new_tokens)
    tickets = [batcher.submit(prompt, wanted, adapter=adapter, on_token=timed()) for prompt, adapter in zip(prompts, adapters, strict=True)]
    while batcher.step():
        pass
    seconds = time.perf_counter() - started
    return _Round(seconds=seconds, tokens=sum(len(ticket.result(0).tokens) for ticket in tickets), ttft=ttft, between=between)


def _measurement(name: str, rounds: Sequence[_Round], base: Sequence[_Round]) -> BatchMeasurement:
    speeds, of_base = ([each.tokens / each.seconds for each in found] for found in (rounds, base))
    ttft, between = ([x for each in rounds for x in getattr(each, kind)] for kind in ("ttft", "between"))
    return BatchMeasurement(
        name=name,
        throughput=median(speeds),
        ratio=None if name == BASE else median(a / b for a, b in zip(speeds, of_base, strict=True)),
        ttft=median(ttft),
        ttft_p99=float(np.quantile(ttft, 0.99)),
        between=median(between or [0.0]),
        between_p99=float(np.quantile(between or [0.0], 0.99)),
    )
