"""Time to first token, decode speed and peak memory, of the base and of every adapter.

Machines are noisy and runtimes have slow and fast modes from process to process: one session serves base and steered runs, they
alternate, and what an adapter costs is the median over pairs of neighbouring runs, never a quotient of two separate averages.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TypeVar

import numpy as np

from runtimes.artifacts.artifact import Limits
from runtimes.artifacts.golden_schema import BASE_GOLDEN
from runtimes.errors import InputError
from runtimes.files.records import to_json
from runtimes.generation import DecodeBatch
from runtimes.session import ClassifierSession, DecoderSession, Session, as_classifier, as_decoder

BASE = BASE_GOLDEN
WARM_UP_TOKENS = 2
PROMPT_TOKENS = 128
"""Where none are asked for."""
S = TypeVar("S", bound=Session)
R = TypeVar("R")
OnRun = Callable[[int, int], None]
"""Told (done, total)."""


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    prompt_tokens: int | None = None
    """None: PROMPT_TOKENS, or as many as fit."""
    new_tokens: int = 32
    repeats: int = 7
    adapters: Sequence[str] | None = None
    """None: all."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """All times in milliseconds. ``ttft``: prefill to the first token's logits; ``decode``: per token. Ratios are steered over base."""

    name: str
    ttft_min: float
    ttft_median: float
    decode_min: float
    decode_median: float
    ttft_ratio: float | None = None
    decode_ratio: float | None = None

    @property
    def tokens_per_second(self) -> float:
        return 1000 / self.decode_median


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """``peak_memory``: bytes of this process up to the end of the runs, None where the system does not tell."""

    model: str
    provider: str
    kernel: str
    prompt_tokens: int
    new_tokens: int
    repeats: int
    load_seconds: float
    peak_memory: int | None
    measurements: tuple[Measurement, ...]

    @property
    def title(self) -> str:
        tokens = f"{self.prompt_tokens} prompt and {self.new_tokens} new tokens"
        return f"{self.model}, {self.provider}, {self.kernel}: {tokens}, {self.repeats} pairs"

    HEADER = ("", "TTFT ms (min)", "TTFT ms", "decode ms (min)", "decode ms", "tokens/s", "TTFT / base", "decode / base")

    def to_json(self) -> str:
        content = to_json(self)
        for measurement, record in zip(self.measurements, content["measurements"], strict=True):
            record["tokens_per_second"] = measurement.tokens_per_second
        return json.dumps(content, indent=1)

    def rows(self) -> list[tuple[str, ...]]:
        """One row of texts per measurement, under ``HEADER``."""
        return [
            (
                m.name,
                *(f"{x:.2f}" for x in (m.ttft_min, m.ttft_median, m.decode_min, m.decode_median)),
                f"{m.tokens_per_second:.1f}",
                *("" if ratio is None else f"{ratio:.3f}" for ratio in (m.ttft_ratio, m.decode_ratio)),
            )
            for m in self.measurements
        ]


@dataclass(frozen=True, kw_only=True)
class _Run:
    ttft: float
    decode: float


def bench(
    session_factory: Callable[[], Session],
    *,
    prompt_tokens: int = 256,
    new_tokens: int = 32,
    repeats: int = 7,
    adapters: Sequence[str] | None = None,
    base: str = BASE,
    on_run: OnRun | None = None,
) -> BenchResult:
    """Times one row of ``prompt_tokens`` random tokens and ``new_tokens`` decode steps, ``repeats`` pairs per adapter.

    ``adapters``: by default all of the bundle. ``base``: what they are compared with; an adapter's name where there is no base to run.
    ``on_run(done, total)`` reports progress. Raises InputError where the tokens exceed the model's context.
    """
    if min(prompt_tokens, new_tokens, repeats) < 1:
        raise InputError(f"prompt tokens, new tokens and repeats are {prompt_tokens}, {new_tokens}, {repeats}; each must be at least 1")
    session, load_seconds = _load(session_factory)
    model = session.bundle.manifest.model
    if prompt_tokens + new_tokens > model.context_length:
        raise InputError(
            f"{prompt_tokens} prompt and {new_tokens} new tokens exceed the context of {model.name} ({model.context_length}); ask for fewer"
        )
    names = list(session.bundle.adapter_names if adapters is None else adapters)
    prompt = np.random.default_rng(0).integers(0, model.vocab_size, prompt_tokens).tolist()
    decoder = as_decoder(session)
    pairs = _alternate(
        session,
        base,
        names,
        repeats,
        warm_up=lambda name: _timed(decoder, name, prompt, WARM_UP_TOKENS),
        run=lambda name: _timed(decoder, name, prompt, new_tokens),
        on_run=on_run,
    )
    return BenchResult(
        model=model.name,
        provider=session.provider,
        kernel=session.kernel,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeats=repeats,
        load_seconds=load_seconds,
        peak_memory=peak_memory(),
        measurements=(
            _measurement(base, [run for name in pairs for run, _ in pairs[name]]),
            *(_measurement(name, [steered for _, steered in pairs[name]], [run for run, _ in pairs[name]]) for name in names),
        ),
    )


def fitting_tokens(limits: Limits, new_tokens: int) -> int:
    """PROMPT_TOKENS, or as many as fit before ``new_tokens``; at least 1, so that it is the context that is said to be exceeded."""
    return max(1, min(PROMPT_TOKENS, limits.tokens - new_tokens, limits.columns or PROMPT_TOKENS))


def _load(session_factory: Callable[[], S]) -> tuple[S, float]:
    """The session, and the seconds that it took."""
    started = time.perf_counter()
    session = session_factory()
    return session, time.perf_counter() - started


def _alternate(
    session: Session,
    base: str,
    names: Sequence[str],
    repeats: int,
    *,
    warm_up: Callable[[str], object],
    run: Callable[[str], R],
    on_run: OnRun | None,
) -> dict[str, list[tuple[R, R]]]:
    """(base, steered) runs of each adapter, neighbours in time, in turning order; without adapters the base twice."""
    active, done = session.adapter, 0
    opponents = list(names) or [base]
    pairs: dict[str, list[tuple[R, R]]] = {name: [] for name in opponents}
    try:
        for name in {base, *opponents}:
            warm_up(name)
        for repeat in range(repeats):
            for name in opponents:
                first, second = (run(which) for which in ((base, name) if repeat % 2 == 0 else (name, base)))
                pairs[name].append((first, second) if repeat % 2 == 0 else (second, first))
                done += 1
                if on_run is not None:
                    on_run(done, repeats * len(opponents))
    finally:
        session.set_adapter(active)
    return pairs


def _timed(session: DecoderSession, name: str, prompt: Sequence[int], new_tokens: int) -> _Run:
    session.set_adapter(None if name == BASE else name)
    marks = [range(0, len(prompt), 2)]  # of an adapter at positions marked
    batch = DecodeBatch(session, [prompt], marks=marks, new_tokens=new_tokens + 1)
    started = time.perf_counter()
    logits = batch.prefill()
    prefilled = time.perf_counter()
    for _ in range(new_tokens):
        logits = batch.append([int(logits[0].argmax())])
    ended = time.perf_counter()
    return _Run(ttft=(prefilled - started) * 1e3, decode=(ended - prefilled) * 1e3 / new_tokens)


def _measurement(name: str, runs: Sequence[_Run], base: Sequence[_Run] | None = None) -> Measurement:
    ttft, decode = [r.ttft for r in runs], [r.decode for r in runs]
    paired = [] if base is None else list(zip(runs, base, strict=True))
    return Measurement(
        name=name,
        ttft_min=min(ttft),
        ttft_median=median(ttft),
        decode_min=min(decode),
        decode_median=median(decode),
        ttft_ratio=median(steered.ttft / alone.ttft for steered, alone in paired) if paired else None,
        decode_ratio=median(steered.decode / alone.decode for steered, alone in paired) if paired else None,
    )


def peak_memory() -> int | None:
    """Largest resident memory this process has had, in bytes; a device's own memory is not in it."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


@dataclass(frozen=True, kw_only=True)
class Forward:
    """Milliseconds of one text. ``ratio``: median of steered over base, over pairs of neighbouring runs."""

    name: str
    minimum: float
    median: float
    ratio: float | None = None


@dataclass(frozen=True, kw_only=True)
class ClassifierBench:
    """``peak_memory``: bytes of this process up to the end of the runs, None where the system does not tell."""

    model: str
    provider: str
    kernel: str
    tokens: int
    repeats: int
    load_seconds: float
    peak_memory: int | None
    measurements: tuple[Forward, ...]

    @property
    def title(self) -> str:
        return f"{self.model}, {self.provider}, {self.kernel}: one text of {self.tokens} tokens, {self.repeats} pairs"

    HEADER = ("", "forward ms (min)", "forward ms", "texts/s", "forward / base")

    def to_json(self) -> str:
        return json.dumps(to_json(self), indent=1)

    def rows(self) -> list[tuple[str, ...]]:
        """One row of texts per measurement, under ``HEADER``."""
        return [
            (m.name, f"{m.minimum:.2f}", f"{m.median:.2f}", f"{1000 / m.median:.1f}", "" if m.ratio is None else f"{m.ratio:.3f}")
            for m in self.measurements
        ]


def bench_classifier(
    session_factory: Callable[[], Session],
    *,
    tokens: int,
    repeats: int,
    adapters: Sequence[str] | None = None,
    on_run: OnRun | None = None,
) -> ClassifierBench:
    """Times one text of ``tokens`` random tokens, ``repeats`` pairs of base and steered runs per adapter (None: all of the bundle).

    Raises InputError where the tokens exceed what the model takes.
    """
    if min(tokens, repeats) < 1:
        raise InputError(f"tokens and repeats are {tokens} and {repeats}; each must be at least 1")
    session, load_seconds = _load(session_factory)
    model = session.bundle.manifest.model
    if tokens > model.context_length:
        raise InputError(f"{tokens} tokens do not fit {model.name}, which takes {model.context_length}; ask for fewer (--prompt-tokens)")
    names = list(session.bundle.adapter_names if adapters is None else adapters)
    ids = np.random.default_rng(0).integers(0, model.vocab_size, (1, tokens))
    classifier = as_classifier(session)

    def forward(name: str) -> float:
        return _timed_forward(classifier, name, ids)

    pairs = _alternate(session, BASE, names, repeats, warm_up=forward, run=forward, on_run=on_run)
    alone = [base for found in pairs.values() for base, _ in found]
    return ClassifierBench(
        model=model.name,
        provider=session.provider,
        kernel=session.kernel,
        tokens=tokens,
        repeats=repeats,
        load_seconds=load_seconds,
        peak_memory=peak_memory(),
        measurements=(
            Forward(name=BASE, minimum=min(alone), median=median(alone)),
            *(_forward(name, pairs[name]) for name in names),
        ),
    )


def _timed_forward(session: ClassifierSession, name: str, ids: np.ndarray) -> float:
    session.set_adapter(None if name == BASE else name)
    started = time.perf_counter()
    session.classify(ids, np.ones_like(ids))
    return (time.perf_counter() - started) * 1e3


def _forward(name: str, pairs: Sequence[tuple[float, float]]) -> Forward:
    steered = [s for _, s in pairs]
    return Forward(name=name, minimum=min(steered), median=median(steered), ratio=median(s / b for b, s in pairs))
