"""Time of a classifier's forward pass, of the base and of every adapter: one session, alternating runs, as in runtimes/bench.py."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from runtimes.bench import BASE, peak_memory
from runtimes.errors import InputError
from runtimes.files.records import to_json


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
    session_factory: Callable[[], Any],
    *,
    tokens: int,
    repeats: int,
    adapters: Sequence[str] | None = None,
    on_run: Callable[[int, int], None] | None = None,
) -> ClassifierBench:
    """Times one text of ``tokens`` random tokens, ``repeats`` pairs of base and steered runs per adapter (None: all of the bundle).

    Raises InputError where the tokens exceed what the model takes.
    """
    if min(tokens, repeats) < 1:
        raise InputError(f"tokens and repeats are {tokens} and {repeats}; each must be at least 1")
    started = time.perf_counter()
    session = session_factory()
    load_seconds = time.perf_counter() - started
    model = session.bundle.manifest.model
    if tokens > model.context_length:
        raise InputError(f"{tokens} tokens do not fit {model.name}, which takes {model.context_length}; ask for fewer (--prompt-tokens)")
    names = list(session.bundle.adapter_names if adapters is None else adapters)
    ids = np.random.default_rng(0).integers(0, model.vocab_size, (1, tokens))
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in names or [BASE]}
    for name in {BASE, *names}:
        _timed(session, name, ids)
    for repeat in range(repeats):
        for number, (name, found) in enumerate(pairs.items()):
            order = (BASE, name) if repeat % 2 == 0 else (name, BASE)
            first, second = (_timed(session, which, ids) for which in order)
            found.append((first, second) if repeat % 2 == 0 else (second, first))
            if on_run is not None:
                on_run(repeat * len(pairs) + number + 1, repeats * len(pairs))
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


def _timed(session: Any, name: str, ids: np.ndarray) -> float:
    session.set_adapter(None if name == BASE else name)
    started = time.perf_counter()
    session.classify(ids, np.ones_like(ids))
    return (time.perf_counter() - started) * 1e3


def _forward(name: str, pairs: Sequence[tuple[float, float]]) -> Forward:
    steered = [s for _, s in pairs]
    return Forward(name=name, minimum=min(steered), median=median(steered), ratio=median(s / b for b, s in pairs))
