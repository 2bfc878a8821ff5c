"""What is said and how: progress on stderr, JSON and tables on stdout; a Ctrl-C that was lost is noticed at the next step."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table

# Without emoji: module:x:function is a name, not a picture.
err = Console(emoji=False, stderr=True, highlight=False, soft_wrap=True)
out = Console(emoji=False, highlight=False, soft_wrap=True)
if not out.is_terminal and "COLUMNS" not in os.environ:
    out.width = 160  # a log file has no width; 80 columns would cut the tables


class Interrupt:
    """Remembers Ctrl-C. Python drops a KeyboardInterrupt that is raised inside a callback of native code or a finalizer (torch's exporter
    has many), and the command would go on as if nobody had pressed anything: the next step asks here."""

    def __init__(self) -> None:
        self.seen = False

    def listen(self) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._on_signal)

    def check(self) -> None:
        if self.seen:
            raise KeyboardInterrupt

    def _on_signal(self, *_: object) -> None:
        self.seen = True
        raise KeyboardInterrupt


interrupt = Interrupt()


def escape(text: str) -> str:
    """``text`` as rich's markup that shows it as it is.

    rich halves the backslashes before a tag and drops one of those before any other bracket; its own escape leaves the latter alone.
    """
    return re.sub(r"(\\*)\[(?=([a-z#/@][^\[]*?\])?)", lambda m: (2 * m[1] if m[2] else m[1]) + r"\[", text)


class Progress:
    """Says what is being done and how long it took, on stderr; nothing where stderr is not a terminal."""

    def __init__(self) -> None:
        self._status = err.status("") if err.is_terminal else None
        self._step: tuple[str, float] | None = None

    def __call__(self, step: str) -> None:
        interrupt.check()
        self._finish()
        self._step = (step, time.monotonic())
        if self._status:
            self._status.update(escape(step))
            self._status.start()

    def update(self, text: str) -> None:
        """Another text for the step under way."""
        interrupt.check()
        if self._status:
            self._status.update(escape(text))

    def _finish(self) -> None:
        if self._step and self._status:
            self._status.stop()
            name, started = self._step
            err.print(f"[green]✓[/] {escape(name)} [dim]{time.monotonic() - started:.1f} s[/]")
        self._step = None

    def close(self, *, completed: bool) -> None:
        if completed:
            self._finish()
        elif self._status:
            self._status.stop()


@contextmanager
def progress() -> Iterator[Progress]:
    steps = Progress()
    try:
        yield steps
    except BaseException:
        steps.close(completed=False)
        raise
    steps.close(completed=True)


def print_json(value: Any) -> None:
    """One JSON document on stdout; everything else went to stderr."""
    sys.stdout.write(json.dumps(value, indent=1) + "\n")


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """``title`` may be empty. Only a column called "note" wraps: a figure that is cut says nothing."""
    table = Table(title=title or None, title_justify="left", show_edge=False)
    for name in header:
        table.add_column(name, no_wrap=name != "note")
    for row in rows:
        styled = [f"[red]{escape(c)}[/]" if c == "FAIL" else escape(c) for c in row]
        table.add_row(*styled)
    out.print(table)


WIDE = 120
NARROW_OMITS = ("against", "max abs", "KL", "delta norm", "budget", "note")
"""What a parity table leaves out on a terminal narrower than WIDE columns; --json and --report have it."""


def print_parity(report: Any, *, title: str = "parity", full: bool = False, compact: bool = False) -> None:
    """The report's table, ``compact`` as on a narrow terminal; unless ``full``, rungs of one family are shown by their worst member.

    Where notes are left out, those of missed rungs stand below the table.
    """
    rows = report.rows() if full else worst_rows(report)
    header = report.HEADER
    omitted = NARROW_OMITS if compact or out.width < WIDE else ()
    keep = [i for i, name in enumerate(header) if name not in omitted and any(row[i] for row in rows)]
    print_table(title, [header[i] for i in keep], [[row[i] for i in keep] for row in rows])
    if "note" in omitted:
        for row in rows:
            if row[header.index("result")] == "FAIL":
                out.print(f"{escape(row[0])}: {escape(row[header.index('note')])}")


def worst_rows(report: Any) -> list[tuple[str, ...]]:
    """One row per name before the colon: the first rung's deltas and greedy tokens with the worst figures of its kin."""
    from dataclasses import replace

    from runtimes.parity.figures import ParityReport

    groups: dict[tuple[str, str, str], list[Any]] = {}
    for rung in report.rungs:
        groups.setdefault((rung.name.partition(": ")[0], rung.against, rung.budget.name), []).append(rung)
    merged = []
    for (name, _, _), rungs in groups.items():
        figures = replace(
            rungs[0].figures,
            max_abs=max(r.figures.max_abs for r in rungs),
            max_relative=max(r.figures.max_relative for r in rungs),
            kl=max((r.figures.kl for r in rungs if r.figures.kl is not None), default=None),
            top1=min((r.figures.top1 for r in rungs if r.figures.top1 is not None), default=None),
        )
        failed = [r for r in rungs if not r.passed]
        note = f"worst of {len(rungs)} ways to feed the tokens" if len(rungs) > 1 else rungs[0].note
        if failed:
            note = f"{len(failed)} of {len(rungs)} missed: {', '.join(r.name.partition(': ')[2] or r.name for r in failed)}"
        merged.append(replace(rungs[0], name=name, figures=figures, passed=not failed, note=note))
    return ParityReport(rungs=tuple(merged)).rows()


def size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return ""
