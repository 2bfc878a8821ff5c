"""What adapters by row cost: a decode step of a batch with many adapters against none, few resident against ten thousand, a switch.

    PYTHONPATH=tests python -m evidence.bank_bench BUNDLE [--rows 32] [--resident 512 10000] [--threads 1] [--rank 1] [--clock processor]

Random LoReFT adapters, edited at every token, on all plain nodes of the bundle (edits in place of training: a step does the same work).
Cases share one session and one KV cache and take turns in blocks, forward and backward; the first step of a block, which binds, is not
counted. Ratios are of the medians of all steps, and in brackets the lower and upper quartile of the blocks' own ratios.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from runtimes.artifacts.bundle import Bundle
from runtimes.edits.adapter import Adapter, BaseModel, save_adapter
from runtimes.edits.op import EditNode
from runtimes.edits.positions import PositionRule
from runtimes.open import open_artifact, open_bank
from runtimes.ort.session import OrtSession
from runtimes.rows import AdapterRows

DISTINCT = 64
"""Adapters of values of their own; the others are links to them."""
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
"""Processor time, of one thread, is what a busy machine leaves comparable."""
PROMPT = 16
STEPS = 8


def write_adapters(bundle: Bundle, folder: Path, count: int, rank: int) -> None:
    model = bundle.manifest.model
    base = BaseModel(
        name=model.name, fingerprint=model.fingerprint, num_hidden_layers=model.num_hidden_layers, hidden_size=model.hidden_size
    )
    sites = tuple(node.site for node in bundle.nodes if node == EditNode(site=node.site))
    for number in range(count):
        at = folder / f"a{number}"
        if number >= DISTINCT:
            at.mkdir()
            for file in ("adapter.json", "adapter.safetensors"):
                os.link(folder / f"a{number % DISTINCT}" / file, at / file)
            continue
        random = np.random.default_rng(number)
        tensors = {}
        for site in sites:
            rotation = np.linalg.qr(random.standard_normal((model.hidden_size, rank)))[0].T
            source = random.standard_normal((rank, model.hidden_size)) * model.hidden_size**-0.5
            values = {"R": rotation, "W": source, "b": random.standard_normal(rank)}
            tensors |= {f"{site}.{name}": np.ascontiguousarray(value, np.float32) for name, value in values.items()}
        made = Adapter(
            method="loreft", rank=rank, sites=sites, positions=PositionRule(everywhere=True), tied=True, base=base, tensors=tensors
        )
        save_adapter(made, at)


class Decoding:
    """A batch that has read a prompt; ``block`` decodes from there."""

    def __init__(self, session: OrtSession, rows: int, clock: Callable[[], float]) -> None:
        self._session, self._clock = session, clock
        vocabulary = session.bundle.manifest.model.vocab_size
        self._ids = np.random.default_rng(0).integers(0, vocabulary, (rows, PROMPT + 1))
        self._mask = np.ones((rows, PROMPT), np.int64)
        session.set_adapter(None)
        self._past = session.step(self._ids[:, :PROMPT], self._mask, last_logits=1, capacity=PROMPT + STEPS + 2).past

    def block(self, choose: Callable[[], object], between: Callable[[], object] | None = None) -> list[float]:
        """Milliseconds of each step but the first, ``between`` before each."""
        choose()
        past, mask, times = self._past, self._mask, []
        for _ in range(STEPS + 1):
            started = self._clock()
            if between is not None:
                between()
            mask = np.pad(mask, [(0, 0), (0, 1)], constant_values=1)
            past = self._session.step(self._ids[:, -1:], mask, past=past, last_logits=1).past
            times.append((self._clock() - started) * 1e3)
        return times[1:]


def measure(decoding: Decoding, cases: dict[str, tuple[Callable[[], object], Callable[[], object] | None]], blocks: int) -> None:
    times: dict[str, list[list[float]]] = {name: [] for name in cases}
    for block in range(blocks):
        for name in list(cases) if block % 2 == 0 else reversed(cases):
            times[name].append(decoding.block(*cases[name]))
    first = next(iter(cases))
    for name, found in times.items():
        each = [np.median(a) / np.median(b) for a, b in zip(found, times[first], strict=True)]
        low, high = np.quantile(each, [0.25, 0.75])
        ratio = np.median(np.concatenate(found)) / np.median(np.concatenate(times[first]))
        print(f"| {name} | {np.median(np.concatenate(found)):.2f} | x{ratio:.3f} ({low:.3f} to {high:.3f}) |", flush=True)


def switching(session: OrtSession, rows: AdapterRows, names: Sequence[str]) -> None:
    """Microseconds to give one row of the batch another resident adapter, up to the run."""
    session.set_rows(rows)
    times = []
    for turn in range(2000):
        started = time.perf_counter()
        rows[turn % len(rows)] = names[turn % len(names)]
        session._bind_rows(range(len(rows)))  # what a step does before it runs
        times.append((time.perf_counter() - started) * 1e6)
    print(f"switching one of {len(rows)} rows: {np.median(times):.1f} us, 99 % within {np.quantile(times, 0.99):.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--resident", type=int, nargs="+", default=[512, 10_000])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--blocks", type=int, default=10)
    arguments = parser.parse_args()
    bundle = open_artifact(arguments.bundle)
    if not isinstance(bundle, Bundle):
        sys.exit(f"{arguments.bundle} is an engine, whose rows share one adapter")
    with tempfile.TemporaryDirectory() as scratch, OrtSession(bundle, threads=arguments.threads) as session:
        run(bundle, session, Path(scratch), arguments)


def run(bundle: Bundle, session: OrtSession, folder: Path, arguments: argparse.Namespace) -> None:
    count, random = arguments.rows, np.random.default_rng(1)
    write_adapters(bundle, folder, max(*arguments.resident, count), arguments.rank)
    decoding = Decoding(session, count, CLOCKS[arguments.clock])

    def rows_of(resident: int) -> AdapterRows:
        bank = open_bank(bundle)
        started = time.perf_counter()
        bank.scan(folder)
        scanned, before = time.perf_counter() - started, _memory()
        names = [f"a{number}" for number in range(resident)]
        for name in names:
            bank.load(name)
        loaded = time.perf_counter() - started - scanned
        memory = bank.memory
        print(
            f"{resident} resident: listed {len(bank.names)} in {scanned:.3f} s, loaded in {loaded:.1f} s ({loaded / resident * 1e3:.2f} ms "
            f"each), adapters {memory.adapters / 1e6:.1f} MB, banks {memory.banks / 1e6:.1f} MB (x{memory.factor:.3f}), "
            f"process +{(_memory() - before) / 1e6:.1f} MB",
            flush=True,
        )
        return AdapterRows(bank, random.choice(names, count, replace=resident < count).tolist())

    def drawn(rows: AdapterRows) -> Callable[[], None]:
        names = [name for name in rows.bank.resident if name.startswith("a")]

        def draw() -> None:
            for row, number in enumerate(random.integers(0, len(names), len(rows))):
                rows[row] = names[number]

        return draw

    one, each = rows_of(1), rows_of(count)
    many = {number: rows_of(number) for number in arguments.resident}
    base = AdapterRows(each.bank, [None] * count)
    print(f"\n| {count} rows, {arguments.threads} thread(s), a decode step | ms | over none |\n|---|---|---|", flush=True)
    cases: dict[str, tuple[Callable[[], object], Callable[[], object] | None]] = {
        "none": (lambda: session.set_adapter(None), None),
        "rows of the base": (lambda: session.set_rows(base), None),
        f"{count} adapters": (lambda: session.set_rows(each), None),
        "one adapter, of 1 resident": (lambda: session.set_rows(one), None),
    }
    for number, rows in many.items():
        cases[f"drawn once from {number} resident"] = (lambda rows=rows: session.set_rows(rows), None)
    for number, rows in many.items():
        cases[f"all rows drawn anew each step from {number}"] = (lambda rows=rows: session.set_rows(rows), drawn(rows))
    measure(decoding, cases, arguments.blocks)
    print(f"\n| {count} rows, {arguments.threads} thread(s), a decode step | ms | over 1 resident |\n|---|---|---|", flush=True)
    last = many[max(many)]
    paired: dict[str, tuple[Callable[[], object], Callable[[], object] | None]] = {
        "1 resident": (lambda: session.set_rows(one), None),
        f"{max(many)} resident": (lambda: session.set_rows(last), None),
    }
    measure(decoding, paired, 2 * arguments.blocks)
    switching(session, last, last.bank.resident[-count:])
    print(f"peak of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB")


def _memory() -> int:
    """Bytes that the process has in memory."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    main()
