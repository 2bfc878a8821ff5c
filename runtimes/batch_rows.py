"""A running batch's rows: what each was asked, where it stands in the cache, and how it moves while others join and leave."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from threading import Event
from typing import TYPE_CHECKING

import numpy as np

from runtimes.edits.strength import Steering
from runtimes.generation import Continuation, Generation
from runtimes.prefixes import Prefix, Prefixes

if TYPE_CHECKING:
    from runtimes.ort.row_pool import RowPool


class Ticket:
    """One request's place in the batch, and its answer."""

    def __init__(
        self,
        prompt: list[int],
        adapter: Steering | None,
        columns: int,
        *,
        scope: Hashable = None,
        on_end: Callable[[Ticket], None] | None = None,
    ) -> None:
        self.prompt = prompt
        self.scope = scope
        self.adapter = adapter
        """By its name, or at a strength; None: the base."""
        self.columns = columns
        """That its row needs in the end."""
        self.cancelled = False
        self.reused = 0
        """Tokens of the prompt whose keys and values were there already."""
        self._done = Event()
        self._answer: Generation | None = None
        self._error: BaseException | None = None
        self._on_end = on_end

    def cancel(self) -> None:
        """Leaves the batch before its next step; the answer is then what there was, with finish_reason "cancelled"."""
        self.cancelled = True

    @property
    def done(self) -> bool:
        return self._done.is_set()

    def result(self, timeout: float | None = None) -> Generation:
        """Waits for the answer. Raises what ended the request without one, and TimeoutError."""
        if not self._done.wait(timeout):
            raise TimeoutError(f"no answer within {timeout} s")
        if self._error is not None:
            raise self._error
        assert self._answer is not None
        return self._answer

    def end(self, answer: Generation | None = None, error: BaseException | None = None) -> None:
        """Called by the batcher, once."""
        self._answer, self._error = answer, error
        self._done.set()
        if self._on_end is not None:
            with suppress(Exception):  # the batch goes on, whatever its listeners do
                self._on_end(self)


@dataclass(kw_only=True, eq=False)
class BatchRow:
    """A request that has a row of the cache."""

    ticket: Ticket
    continuation: Continuation
    pool: BatchPool
    index: int = 0
    fed: int = 0
    """Tokens in the cache."""
    on_token: Callable[[int, np.ndarray], None] | None = None

    @property
    def prompt(self) -> list[int]:
        return self.ticket.prompt


class BatchPool:
    """Rows of one capacity: those that decode first, then those whose prompt is being fed."""

    def __init__(self, pool: RowPool) -> None:
        self._pool = pool
        self.rows: list[BatchRow] = []
        self.decoding = 0
        self.used = 0
        """Rows that were ever used, whose memory is taken."""

    @property
    def capacity(self) -> int:
        return self._pool.cache.capacity

    def join(self, row: BatchRow) -> None:
        """Raises what loading its adapter raises, and InputError for one at positions ``marked``."""
        if self._pool.rows is not None:
            if (adapter := row.ticket.adapter) is not None:
                self._pool.rows.bank.load_unmarked(adapter)
            self._pool.rows.append(row.ticket.adapter)
        row.index = len(self.rows)
        self.rows.append(row)
        self.used = max(self.used, len(self.rows))

    def feed(self, row: BatchRow, count: int) -> np.ndarray:
        """Logits behind the next ``count`` tokens of its prompt."""
        ids = np.array(row.prompt[row.fed : row.fed + count], np.int64)
        logits = self._pool.feed(row.index, ids, row.fed, len(row.prompt))[-1]
        row.fed += count
        return logits

    def feed_ahead(self, row: BatchRow, ahead: Sequence[int]) -> np.ndarray:
        """Logits [1 + n, V] behind its last token and behind each of n that may follow; the caller counts in ``fed`` those that do."""
        ids = np.array([row.continuation.tokens[-1], *ahead], np.int64)
        return self._pool.feed(row.index, ids, row.fed, len(row.prompt), last=len(ids))

    def decode(self) -> np.ndarray:
        """Logits [n, V] behind the last token of every row that decodes."""
        rows = self.rows[: self.decoding]
        tokens = np.array([row.continuation.tokens[-1] for row in rows], np.int64)
        lengths, prompts = (np.array(each, np.int64) for each in ([row.fed for row in rows], [len(row.prompt) for row in rows]))
        logits = self._pool.decode(tokens, lengths, prompts)
        for row in rows:
            row.fed += 1
        return logits

    def reuse(self, row: BatchRow, prefixes: Prefixes) -> None:
        """Begins with what an earlier prompt left."""
        columns, count = prefixes.find(self._key(row), np.array(row.prompt), self._slots(row, len(row.prompt)))
        if count:
            self._pool.cache.write_row(row.index, columns, count)
            row.fed = row.ticket.reused = count

    def keep(self, row: BatchRow, prefixes: Prefixes) -> None:
        """Keeps what the row's tokens left in the cache."""
        if prefixes.most and row.fed:
            tokens = np.array([*row.prompt, *row.continuation.tokens][: row.fed])
            columns = self._pool.cache.read_row(row.index, row.fed)
            prefixes.keep(Prefix(key=self._key(row), tokens=tokens, slots=self._slots(row, row.fed), columns=columns))

    def _key(self, row: BatchRow) -> Hashable:
        name, rows = row.ticket.adapter, self._pool.rows
        steering = None if name is None or rows is None else (name, rows.bank.load_number(name))
        return row.ticket.scope, steering

    def _slots(self, row: BatchRow, count: int) -> np.ndarray:
        """Those of its first ``count`` tokens, as if its adapter's slots began at 0."""
        if self._pool.rows is None:
            return np.full(count, -1, np.int32)
        return self._pool.rows.own_slots(row.index, len(row.prompt), count)

    def begin(self, row: BatchRow) -> None:
        """Its prompt is fed: from the next step on it decodes."""
        self._swap(row.index, self.decoding)
        self.decoding += 1

    def leave(self, row: BatchRow) -> None:
        if row.index < self.decoding:
            self.decoding -= 1
            self._move_out(row, self.decoding)
        self._move_out(row, len(self.rows) - 1)
        self.rows.pop()
        if self._pool.rows is not None:
            self._pool.rows.remove(len(self.rows))

    def close(self) -> None:
        if self._pool.rows is not None:
            self._pool.rows.release()

    def _move_out(self, row: BatchRow, index: int) -> None:
        """``row``, which is over, changes places with the one at ``index``: that one's columns alone matter."""
        if row.index != index:
            other = self.rows[index]
            self._pool.cache.copy_row(index, row.index, other.fed)
            self._exchange(row.index, index)

    def _swap(self, one: int, other: int) -> None:
        if one != other:
            self._pool.cache.swap_rows(one, other, max(self.rows[one].fed, self.rows[other].fed))
            self._exchange(one, other)

    def _exchange(self, one: int, other: int) -> None:
        rows, adapters = self.rows, self._pool.rows
        rows[one], rows[other] = rows[other], rows[one]
        rows[one].index, rows[other].index = one, other
        if adapters is not None:
            adapters.swap(one, other)
