"""Decode as the context grows: milliseconds a token of bundles, their KV cache in place and copied, base and steered, and of llama.cpp.

    PYTHONPATH=tests python -m evidence.context_bench BUNDLE... [--adapter NAME] [--threads 1] [--threads 2] [--copying] [--llama FILE]

reproduces "Decode as the context grows" of docs/benchmarks.md.

One process a row, since onnxruntime's decode has slow and fast modes from process to process. A row feeds random tokens in chunks up to
every context in turn and decodes from there: minima over the steps; base and steered blocks alternate, the first step behind a swap of
the adapter is not counted. llama.cpp is measured by its own library (llama_cpp.py), without and with flash attention.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

CONTEXTS = (64, 512, 2048, 4000, 7800)
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
"""Processor time, of one thread, is what a busy machine leaves comparable."""
STEPS = 8
BLOCKS = 3


class Fed:
    """One source's tokens and cache so far."""

    def __init__(self, session, adapter: str | None, capacity: int, clock: Callable[[], float]) -> None:
        self._session, self._adapter, self._capacity, self._clock = session, adapter, capacity, clock
        self._past, self._width = None, 0

    def feed(self, columns: int, chunk: int = 512) -> float:
        """Milliseconds of the prefill up to so many columns."""
        vocabulary = self._session.bundle.manifest.model.vocab_size
        random = np.random.default_rng(0)
        self._session.set_adapter(self._adapter)
        started = self._clock()
        while self._width < columns:
            size = min(chunk, columns - self._width)
            self._past = self._step(random.integers(0, vocabulary, size), self._past)
            self._width += size
        return (self._clock() - started) * 1e3

    def _step(self, tokens: np.ndarray, past):
        width = 0 if past is None else past.width
        mask = np.ones((1, width + len(tokens)), np.int64)
        length = np.array([self._width + len(tokens)])
        return self._session.step(tokens[None], mask, past=past, prompt_length=length, last_logits=1, capacity=self._capacity).past

    def decode(self, steps: int) -> list[float]:
        """Milliseconds of each step but the first, from the same past every time."""
        self._session.set_adapter(self._adapter)
        past, times = self._past, []
        for _ in range(steps + 1):
            started = self._clock()
            past = self._step(np.array([7]), past)
            times.append((self._clock() - started) * 1e3)
        return times[1:]


def measure(bundle: Path, arguments: argparse.Namespace, *, copying: bool) -> None:
    from runtimes.artifacts.bundle import open_bundle
    from runtimes.bench import peak_memory
    from runtimes.ort.session import OrtSession

    opened = open_bundle(bundle)
    if copying:
        opened = replace(opened, manifest=replace(opened.manifest, kv_cache="appended"))
    adapters = [None, *([arguments.adapter] if arguments.adapter else [])]
    contexts, clock = arguments.contexts, CLOCKS[arguments.clock]
    with OrtSession(opened, threads=arguments.threads[0]) as session:
        sources = [Fed(session, name, max(contexts) + STEPS + 2, clock) for name in adapters]
        cells, prefill = [], 0.0
        for columns in contexts:
            prefill += [source.feed(columns) for source in sources][0]
            times: list[list[float]] = [[] for _ in sources]
            for block in range(BLOCKS):
                for i in range(len(sources)) if block % 2 == 0 else reversed(range(len(sources))):
                    times[i] += sources[i].decode(STEPS)
            base = min(times[0])
            cells.append(f"{base:.1f}" + (f" (x{min(times[1]) / base:.3f})" if len(times) > 1 else ""))
    cache = "copied" if opened.manifest.kv_cache == "appended" else "in place"
    _row(f"{bundle.name}, {cache}", arguments.threads[0], [*cells, f"{prefill / 1e3:.1f}", f"{(peak_memory() or 0) / 1e6:.0f}"])


def measure_llama(file: Path, home: Path, threads: int, contexts: Sequence[int]) -> None:
    from evidence.llama_cpp import llama_cpp

    for flash in (False, True):
        found = llama_cpp(home).bench(file, contexts, threads=threads, flash=flash)
        cells = [f"{ms:.1f}" for ms in found.decode_ms]
        name = f"llama.cpp, {file.name}" + (", flash attention" if flash else "")
        _row(name, threads, [*cells, f"{found.prefill_s[-1]:.1f}", str(found.peak_mb)])


def _row(name: str, threads: int, cells: Sequence[str]) -> None:
    print(f"| {name} | {threads} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundles", nargs="*", type=Path)
    parser.add_argument("--adapter", help="steered over base is shown behind each time")
    parser.add_argument("--threads", type=int, action="append")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--contexts", type=int, nargs="+", default=list(CONTEXTS))
    parser.add_argument("--copying", action="store_true", help="each bundle with its cache copied, too")
    parser.add_argument("--llama", type=Path, metavar="FILE.gguf", help="by wall clock always")
    parser.add_argument("--llama-home", type=Path, default=Path("real-models"), help="where llama_cpp.py downloads and builds it")
    parser.add_argument("--one", choices=("in-place", "copying"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.threads = threads = arguments.threads or [1]
    if arguments.one:
        measure(arguments.bundles[0], arguments, copying=arguments.one == "copying")
    else:
        print(f"| graph | threads | {' | '.join(map(str, arguments.contexts))} columns | prefill s | peak MB |")
        print("|---" * (len(arguments.contexts) + 4) + "|", flush=True)
        _each(arguments, threads, lambda rest: subprocess.run([sys.executable, "-m", "evidence.context_bench", *rest], check=True))


def _each(arguments: argparse.Namespace, threads: Sequence[int], run: Callable[[list[str]], object]) -> None:
    contexts = ["--clock", arguments.clock, "--contexts", *map(str, arguments.contexts)]
    adapter = ["--adapter", arguments.adapter] if arguments.adapter else []
    for count in threads:
        for bundle in arguments.bundles:
            for kind in ("in-place", "copying") if arguments.copying else ("in-place",):
                run([str(bundle), "--one", kind, "--threads", str(count), *adapter, *contexts])
        if arguments.llama:
            measure_llama(arguments.llama, arguments.llama_home, count, arguments.contexts)


if __name__ == "__main__":
    main()
