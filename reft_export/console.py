"""What is said and how: progress on stderr, JSON and tables on stdout; a Ctrl-C that was lost is noticed at the next step."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


class LazyConsole:
    """rich's Console, made when something is first said: an answer on stdout needs none."""

    def __init__(self, *, stderr: bool) -> None:
        self._stderr = stderr

    @cached_property
    def _console(self) -> Console:
        from rich.console import Console

        # Without emoji: module:x:function is a name, not a picture.
        console = Console(emoji=False, stderr=self._stderr, highlight=False, soft_wrap=True)
        if not self._stderr and not console.is_terminal and "COLUMNS" not in os.environ:
            console.width = 160  # a log file has no width; 80 columns would cut the tables
        return console

    def __getattr__(self, name: str) -> Any:
        return getattr(self._console, name)

    def print(self, *objects: Any, **options: Any) -> None:
        """rich's, without the characters that would steer the terminal."""
        self._console.print(*(plain(each) if isinstance(each, str) else each for each in objects), **options)


_STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_HALVES = re.compile(r"[\ud800-\udfff]")


def plain(text: str) -> str:
    """``text`` without control characters but newline and tab, whatever file it came from, and without lone surrogates, which no terminal
    can show."""
    return _HALVES.sub("\ufffd", _STEERING.sub("", text))


def say(text: str) -> None:
    """On stdout as it is; ``plain`` where that is a terminal."""
    sys.stdout.write(plain(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


err, out = LazyConsole(stderr=True), LazyConsole(stderr=False)


STOPPED = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "hung up"}
"""Signals that end a verb as Ctrl-C does, with what it left removed; what is said then."""


class Interrupt:
    """Remembers Ctrl-C, SIGTERM and SIGHUP, each a KeyboardInterrupt. Python drops one that is raised inside a callback of native code or a
    finalizer (torch's exporter has many), and the command would go on as if nobody had pressed anything: the next step asks here."""

    def __init__(self) -> None:
        self.seen: signal.Signals | None = None

    def listen(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for name in STOPPED:
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            # nohup has SIGHUP ignored, and means it.
            if number is not None and (name == "SIGINT" or signal.getsignal(number) is not signal.SIG_IGN):
                signal.signal(number, self._on_signal)

    def check(self) -> None:
        if self.seen:
            raise KeyboardInterrupt

    @property
    def exit_code(self) -> int:
        """128 and the signal's number, what a shell expects."""
        return 128 + (self.seen or signal.SIGINT)

    @property
    def said(self) -> str:
        return STOPPED[(self.seen or signal.SIGINT).name]

    def _on_signal(self, number: int, *_: object) -> None:
        self.seen = signal.Signals(number)
        raise KeyboardInterrupt


interrupt = Interrupt()


def escape(text: str) -> str:
    """``text`` as rich's markup that shows it as it is.

    rich halves the backslashes before a tag and drops one of those before any other bracket; its own escape leaves the latter alone.
    """
    return re.sub(r"(\\*)\[(?=([a-z#/@][^\[]*?\])?)", lambda m: (2 * m[1] if m[2] else m[1]) + r"\[", plain(text))


HELD_SECONDS = 30.0
"""So long a log says nothing: what is refused by then ends in its one line."""
CLOSE_SECONDS = 2.0
"""Lines of a step that is counted are no closer: ten of each of many short steps would be all of a log."""
SILENT_SECONDS = 30.0
"""A step that is counted says where it is after so long, if not every tenth before."""


class StageLog:
    """The stages as lines, each with the seconds since the start, for a stderr that no one watches.

    The first lines are held back for HELD_SECONDS: a refusal drops them, work that is done sooner shows them at its end.
    """

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._say, self._clock = say, clock
        self._started = self._told = clock()
        self._tenths = 0
        self._lock = threading.Lock()
        self._held: list[str] | None = []
        self._timer = threading.Timer(HELD_SECONDS, self.release)  # the first stage may be the long one
        self._timer.daemon = True
        self._timer.start()

    def line(self, text: str) -> None:
        """One line, now or when the held ones are shown."""
        self._told, self._tenths = self._clock(), 0
        stamped = f"[{self._told - self._started:6.1f} s] {' '.join(text.split())}"
        with self._lock:
            if self._held is None:
                self._say(stamped)
            else:
                self._held.append(stamped)

    def count(self, text: str, done: int, total: int) -> None:
        """A line at every tenth of ``total`` where the last line is CLOSE_SECONDS old, and where it is SILENT_SECONDS old."""
        tenths, since = 10 * done // max(total, 1), self._clock() - self._told
        if (tenths > self._tenths and since >= CLOSE_SECONDS) or since >= SILENT_SECONDS:
            self.line(text)
            self._tenths = tenths

    def release(self) -> None:
        """Shows the held lines, and every later one at once."""
        with self._lock:
            for stamped in self._held or ():
                self._say(stamped)
            self._held = None

    def close(self, *, completed: bool) -> None:
        self._timer.cancel()
        if completed:
            self.line("done")
            self.release()


def _say_plainly(line: str) -> None:
    err.print(line, markup=False)


class Progress:
    """Says what is being done and how long it took, on stderr: a terminal's status line, or lines of a log; nothing where ``silent``."""

    def __init__(self, *, silent: bool = False) -> None:
        self._status = err.status("") if err.is_terminal and not silent else None
        self._log = None if err.is_terminal or silent else StageLog(_say_plainly)
        self._step: tuple[str, float] | None = None

    def __call__(self, step: str) -> None:
        interrupt.check()
        self._finish()
        self._step = (step, time.monotonic())
        if self._status:
            self._status.update(escape(step))
            self._status.start()
        elif self._log:
            self._log.line(step)

    def update(self, text: str, done: int = 0, total: int = 0) -> None:
        """Another text for the step under way; with a ``total``, one of many such, of which a log shows some."""
        interrupt.check()
        if self._status:
            self._status.update(escape(text))
        elif self._log and total:
            self._log.count(text, done, total)
        elif self._log:
            self._log.line(text)

    def _finish(self) -> None:
        if self._step and self._status:
            self._status.stop()
            name, started = self._step
            err.print(f"[green]✓[/] {escape(name)} [dim]{time.monotonic() - started:.1f} s[/]")
        self._step = None

    def close(self, *, completed: bool) -> None:
        if self._log:
            self._log.close(completed=completed)
        elif completed:
            self._finish()
        elif self._status:
            self._status.stop()


def count(report: Callable[[str], None], text: str, done: int, total: int) -> None:
    """``Progress.update`` where ``report`` is one; a plain function, which is told of stages alone, hears nothing."""
    if update := getattr(report, "update", None):
        update(text, done, total)


@contextmanager
def progress(*, silent: bool = False) -> Iterator[Progress]:
    steps = Progress(silent=silent)
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
    from rich.table import Table

    table = Table(title=escape(title) or None, title_justify="left", show_edge=False)
    for name in header:
        table.add_column(escape(name), no_wrap=name != "note")
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
    for each in report.quality:
        out.print(str(each), markup=False)
    for note in report.notes:
        out.print(f"[yellow]note:[/] {escape(note)}")


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


def cache_size(token: int, context: int) -> str:
    """What the KV cache of one row takes, by the bytes of a token."""
    return f"{size(token)} a token, {size(token * context)} at the full context of {context} tokens"


def duration(seconds: float) -> str:
    for unit, each in (("s", 60), ("min", 60), ("h", 24)):
        if seconds < 2 * each or unit == "h":
            return f"{seconds:.1f} {unit}"
        seconds /= each
    return ""


def size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return ""
