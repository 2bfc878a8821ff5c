"""Continuous batching: requests join and leave a running batch between steps, each with its own adapter, settings and length.

    bank = AdapterBank(session.bundle)
    with Batcher(session, tokenizer, bank) as batcher:              # or runtimes.open_batcher; a thread of its own runs the steps
        one = batcher.submit("Once upon a time", adapter="pirate")
        two = batcher.submit("Dear sir,", GenerationSettings(max_new_tokens=32), on_text=print)
        print(one.result().text)

A step feeds waiting prompts, at most one chunk of columns in all, and then one token of every row that decodes, so that a request that
joins costs the running ones no more than a chunk. Rows own rows of a KV cache that is written in place (RowPool), of the least capacity
class, a power of two, that holds prompt and answer; every class is one run of a step. Prompts take turns, chunk by chunk.

Every row computes what it would compute alone, to rounding: its chunks are those that it would be fed alone, but for what an earlier prompt
left in the cache.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from threading import Condition, Event, RLock, Thread
from types import TracebackType
from typing import TYPE_CHECKING, TypeGuard

import numpy as np

from runtimes.bank import RULE, AdapterBank, BankFull
from runtimes.edits.op import FIRST_SLOT, PROMPT_LENGTH
from runtimes.edits.positions import slots_of
from runtimes.edits.strength import Steering, at_strength
from runtimes.errors import InputError, ReftError
from runtimes.generation import Continuation, Generation, GenerationSettings, prefill_columns
from runtimes.kv_cache import bytes_per_token
from runtimes.memory import available_memory
from runtimes.prefixes import Prefix, Prefixes
from runtimes.rows import AdapterRows
from runtimes.session import Session
from runtimes.text.tokenizer import Tokenizer, check_token_ids

if TYPE_CHECKING:
    from runtimes.ort.row_pool import RowPool
    from runtimes.ort.session import OrtSession

CHUNK = 128
"""Prompt columns of a step where nobody says: as fast as more of them (SmolLM2, int4: 1.06 s for 512 tokens, in chunks of 512 1.15), and
rows that decode wait a quarter of the time."""
LEAST_CLASS = 128
"""Columns of the smallest rows."""
PREFIX_BYTES = 2**29
"""Of answered prompts at most where nobody says."""
CACHE_SHARE = 0.5
"""Of the memory that is left: what the KV cache may take where nobody says."""


def batchable(session: Session) -> OrtSession:
    """Raises InputError for a session that is no decoder's in onnxruntime."""
    if not _pools(session):
        raise InputError(f"requests are batched in onnxruntime, by a decoder; the session of {session.bundle.folder} is none")
    return session


def _pools(session: Session) -> TypeGuard[OrtSession]:
    return hasattr(session, "open_pool")


class QueueFull(ReftError):
    """As many requests wait as may wait; ask again later."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """``decoding``, ``prefilling`` rows and ``waiting`` requests now; ``cache_bytes`` of KV cache in rows that were used, ``prefix_bytes``
    of answered prompts."""

    decoding: int
    prefilling: int
    waiting: int
    cache_bytes: int
    prefix_bytes: int


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
class _Row:
    """A request that has a row of the cache."""

    ticket: Ticket
    continuation: Continuation
    pool: _Pool
    index: int = 0
    fed: int = 0
    """Tokens in the cache."""
    on_token: Callable[[int, np.ndarray], None] | None = None

    @property
    def prompt(self) -> list[int]:
        return self.ticket.prompt


class _Pool:
    """Rows of one capacity: those that decode first, then those whose prompt is being fed."""

    def __init__(self, pool: RowPool) -> None:
        self._pool = pool
        self.rows: list[_Row] = []
        self.decoding = 0
        self.used = 0
        """Rows that were ever used, whose memory is taken."""

    @property
    def capacity(self) -> int:
        return self._pool.cache.capacity

    def join(self, row: _Row) -> None:
        """Raises what loading its adapter raises."""
        if self._pool.rows is not None:
            self._pool.rows.append(row.ticket.adapter)
        row.index = len(self.rows)
        self.rows.append(row)
        self.used = max(self.used, len(self.rows))

    def feed(self, row: _Row, count: int) -> np.ndarray:
        """Logits behind the next ``count`` tokens of its prompt."""
        ids = np.array(row.prompt[row.fed : row.fed + count], np.int64)
        logits = self._pool.feed(row.index, ids, row.fed, len(row.prompt))
        row.fed += count
        return logits

    def decode(self) -> np.ndarray:
        """Logits [n, V] behind the last token of every row that decodes."""
        rows = self.rows[: self.decoding]
        tokens = np.array([row.continuation.tokens[-1] for row in rows], np.int64)
        lengths, prompts = (np.array(each, np.int64) for each in ([row.fed for row in rows], [len(row.prompt) for row in rows]))
        logits = self._pool.decode(tokens, lengths, prompts)
        for row in rows:
            row.fed += 1
        return logits

    def reuse(self, row: _Row, prefixes: Prefixes) -> None:
        """Begins with what an earlier prompt left."""
        columns, count = prefixes.find(self._key(row), np.array(row.prompt), self._slots(row, len(row.prompt)))
        if count:
            self._pool.cache.write_row(row.index, columns, count)
            row.fed = row.ticket.reused = count

    def keep(self, row: _Row, prefixes: Prefixes) -> None:
        """Keeps what the row's tokens left in the cache."""
        if prefixes.most and row.fed:
            tokens = np.array([*row.prompt, *row.continuation.tokens][: row.fed])
            columns = self._pool.cache.read_row(row.index, row.fed)
            prefixes.keep(Prefix(key=self._key(row), tokens=tokens, slots=self._slots(row, row.fed), columns=columns))

    def _key(self, row: _Row) -> Hashable:
        name, rows = row.ticket.adapter, self._pool.rows
        steering = None if name is None or rows is None else (name, rows.bank.load_number(name))
        return row.ticket.scope, steering

    def _slots(self, row: _Row, count: int) -> np.ndarray:
        """Those of its first ``count`` tokens, as if its adapter's slots began at 0."""
        rule: dict[str, np.ndarray] = {}
        if self._pool.rows is not None:
            rule = dict(zip(RULE, self._pool.rows.rules(range(row.index, row.index + 1)), strict=True))
        rule |= {FIRST_SLOT: np.zeros(1, np.int64), PROMPT_LENGTH: np.array([len(row.prompt)], np.int64)}
        return slots_of(rule, np.ones((1, count), np.int64), count)[0]

    def begin(self, row: _Row) -> None:
        """Its prompt is fed: from the next step on it decodes."""
        self._swap(row.index, self.decoding)
        self.decoding += 1

    def leave(self, row: _Row) -> None:
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

    def _move_out(self, row: _Row, index: int) -> None:
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


class Batcher:
    """Runs requests on ``session`` in one batch that changes between steps; a context manager, whose thread runs the steps.

    Without ``with``, ``step`` runs one. The session is the batcher's: nobody else steps it.
    ``bank``: the adapters that requests may name; None: base alone. ``most_rows``: requests that run at once. ``cache_bytes``: of all KV
    caches, by default half of the memory that is left; beyond it requests wait. ``queue``: requests that may wait.
    ``prefix_bytes``: of answered prompts, kept for those that begin alike; by default a quarter of ``cache_bytes`` more, up to
    PREFIX_BYTES; 0 keeps none.
    ``prefill_chunk``: prompt columns of a step, by default CHUNK; 0 feeds a prompt at once.

    Raises InputError for a bundle whose cache is not written in place, BackendUnavailable on a GPU.
    """

    def __init__(
        self,
        session: OrtSession,
        tokenizer: Tokenizer,
        bank: AdapterBank | None = None,
        *,
        most_rows: int = 16,
        cache_bytes: int | None = None,
        prefix_bytes: int | None = None,
        queue: int = 256,
        prefill_chunk: int | None = None,
    ) -> None:
        for name, value in {"most_rows": most_rows, "queue": queue}.items():
            if value < 1:
                raise InputError(f"{name} is {value}, expected at least 1")
        self._session, self._tokenizer, self._bank = session, tokenizer, bank
        self._most_rows, self._queue = most_rows, queue
        fits = prefill_columns(session, prefill_chunk)
        self._chunk = fits if prefill_chunk is not None or fits is None else min(fits, CHUNK)
        self._row_bytes = bytes_per_token(session.cache_tensors)
        room = available_memory()
        self._cache_bytes = cache_bytes if cache_bytes is not None else None if room is None else int(CACHE_SHARE * room)
        self._prefixes = Prefixes(min((self._cache_bytes or 0) // 4, PREFIX_BYTES) if prefix_bytes is None else prefix_bytes)
        self._pools: dict[int, _Pool] = {}
        self._waiting: deque[tuple[Ticket, Continuation, Callable[[int, np.ndarray], None] | None]] = deque()
        self._prefilling: deque[_Row] = deque()
        self._changed = Condition(RLock())
        self._closing = self._dropping = False
        self._blocked: Ticket | None = None
        """Waits for room in the bank: it is looked at again when a row has left."""
        self._thread: Thread | None = None
        self._pool_of(self._class_of(1))  # what cannot batch is refused now

    # --- asking ---

    def submit(
        self,
        prompt: str | Sequence[int],
        settings: GenerationSettings = GenerationSettings(),
        *,
        adapter: str | None = None,
        strength: float = 1.0,
        scope: Hashable = None,
        on_text: Callable[[str], None] | None = None,
        on_token: Callable[[int, np.ndarray], None] | None = None,
        on_end: Callable[[Ticket], None] | None = None,
    ) -> Ticket:
        """A request, from any thread. ``prompt`` and ``settings`` as of ``generate``; ``adapter``: a name of the bank's, None is the base;
        ``strength``: how much of what it adds is added (runtimes/edits/strength.py); ``scope``: of whose answered prompts it may go on
        from one, as how much was there already tells of it.

        Called on the batcher's thread: ``on_text(piece)``, ``on_token(token, logits)`` with the logits [V] that it was chosen from, good
        until it returns, and ``on_end(ticket)``. One that raises ends its request alone.
        Raises QueueFull, and InputError for a prompt that does not fit the context or the cache, for an unknown adapter, and for a
        strength of none, or that is not finite.
        """
        model = self._session.bundle.manifest.model
        ids = check_token_ids(self._tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else prompt, model.vocab_size, "the prompt")
        columns = len(ids) + settings.max_new_tokens
        if columns > model.context_length:
            raise InputError(
                f"the prompt has {len(ids)} tokens, which with {settings.max_new_tokens} new ones exceed the context of "
                f"{model.name} ({model.context_length}); shorten it, or lower max_new_tokens"
            )
        if self._cache_bytes is not None and (needed := self._class_of(columns) * self._row_bytes) > self._cache_bytes:
            raise InputError(
                f"a row of {columns} tokens takes {needed / 1e6:,.0f} MB of KV cache, and all may take {self._cache_bytes / 1e6:,.0f}; "
                "shorten the prompt, lower max_new_tokens, or allow more"
            )
        if adapter is None and strength != 1:
            raise InputError(f"strength {strength} is an adapter's, and none is asked for; name one, or leave it out")
        steering = None if adapter is None else at_strength(adapter, strength)
        if steering is not None:
            if self._bank is None:
                raise InputError(f"adapter {adapter!r} is asked for, and this batch runs the base alone")
            with suppress(BankFull):  # it waits until some row leaves
                self._bank.load(steering)
        ticket = Ticket(ids, steering, columns, scope=scope, on_end=on_end)
        continuation = Continuation(0, ids, self._tokenizer, settings, None if on_text is None else lambda _, piece: on_text(piece))
        with self._changed:
            if self._closing:
                raise InputError("the batcher is closed; make another one")
            if len(self._waiting) >= self._queue:
                raise QueueFull(f"{len(self._waiting)} requests wait already; ask again later")
            self._waiting.append((ticket, continuation, on_token))
            self._changed.notify()
        return ticket

    @property
    def load(self) -> Load:
        with self._changed:
            return Load(
                decoding=sum(pool.decoding for pool in self._pools.values()),
                prefilling=len(self._prefilling),
                waiting=len(self._waiting),
                cache_bytes=self._taken(),
                prefix_bytes=self._prefixes.size,
            )

    # --- running ---

    def step(self) -> bool:
        """One step of every live row; whether there is anything left to do."""
        self._leave_cancelled()
        self._admit()
        self._feed()
        for pool in list(self._pools.values()):
            if pool.decoding:
                self._decode(pool)
        with self._changed:
            return bool(self._waiting or self._live())

    def __enter__(self) -> Batcher:
        self._thread = Thread(target=self._run, name="reft-batcher", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(wait=error is None)

    def close(self, *, wait: bool = False) -> None:
        """Takes no more requests. ``wait``: those that are there get their answers first; else they end as cancelled."""
        with self._changed:
            self._closing, self._dropping = True, not wait
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        while self.step():
            pass
        with self._changed:
            for pool in self._pools.values():
                pool.close()
            self._pools.clear()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closing and not self._waiting and not self._live():
                    self._changed.wait()
            try:
                left = self.step()
            except Exception as e:  # a bug of ours: nobody waits for ever
                self._fail_all(e)
                continue
            if not left and self._closing:
                return

    def _live(self) -> int:
        return sum(len(pool.rows) for pool in self._pools.values())

    def _tickets(self) -> list[Ticket]:
        return [ticket for ticket, *_ in self._waiting] + [row.ticket for pool in self._pools.values() for row in pool.rows]

    def _fail_all(self, error: Exception) -> None:
        with self._changed:
            tickets = self._tickets()
            self._waiting.clear()
            self._prefilling.clear()
            for pool in self._pools.values():
                pool.close()
            self._pools.clear()
        for ticket in tickets:
            if not ticket.done:
                ticket.end(error=error)

    # --- inside a step ---

    def _leave_cancelled(self) -> None:
        with self._changed:
            if self._dropping:
                for ticket in self._tickets():
                    ticket.cancel()
            gone = [each for each in self._waiting if each[0].cancelled]
            self._waiting = deque(each for each in self._waiting if not each[0].cancelled)
        for ticket, continuation, _ in gone:
            self._answer(ticket, continuation, "cancelled")
        for pool in self._pools.values():
            for row in [row for row in pool.rows if row.ticket.cancelled]:
                self._finish(row, "cancelled")

    def _admit(self) -> None:
        """In the order in which they came: one that does not fit yet is not overtaken, so that none waits for ever."""
        while self._waiting and self._live() < self._most_rows:
            ticket, continuation, on_token = self._waiting[0]
            size = self._class_of(ticket.columns)
            if (ticket is self._blocked and self._live()) or not self._fits(size):
                return
            row = _Row(ticket=ticket, continuation=continuation, pool=self._pool_of(size), on_token=on_token)
            try:
                if ticket.cancelled:  # its adapter may be on its way out
                    self._answer(ticket, continuation, "cancelled")
                else:
                    row.pool.join(row)
            except Exception as e:  # of its adapter
                if isinstance(e, BankFull) and self._live():
                    self._blocked = ticket
                    return
                ticket.end(error=e)
            if not ticket.done:
                row.pool.reuse(row, self._prefixes)
                self._prefilling.append(row)
            with self._changed:
                self._waiting.popleft()

    def _feed(self) -> None:
        """Prompts take turns, a chunk each, until a chunk's columns are used up."""
        left = self._chunk
        while self._prefilling and (left is None or left > 0):
            row = self._prefilling.popleft()
            count = len(row.prompt) - row.fed
            if self._chunk is not None:
                # Its chunks are what they would be alone: sums in another order are other numbers.
                count = min(count, self._chunk)
                if left is not None and count > left and left < self._chunk:
                    self._prefilling.appendleft(row)
                    return
            try:
                logits = row.pool.feed(row, count)
            except Exception as e:  # onnxruntime's own reason
                self._fail(row, e)
                continue
            left = None if left is None else left - count
            if row.fed < len(row.prompt):
                self._prefilling.append(row)
                continue
            row.pool.begin(row)
            self._push(row, logits)

    def _decode(self, pool: _Pool) -> None:
        rows = pool.rows[: pool.decoding]
        try:
            logits = pool.decode()
        except Exception as e:  # nobody's tokens are known
            for row in rows:
                self._fail(row, e)
            return
        for row, own in zip(rows, logits, strict=True):
            self._push(row, own)

    def _push(self, row: _Row, logits: np.ndarray) -> None:
        """Chooses the row's next token; a row that is over leaves."""
        answer = row.continuation
        try:
            answer.push(logits)
            if row.on_token is not None:
                row.on_token(answer.tokens[-1], logits)
        except Exception as e:  # of its logits, or of whoever listens
            self._fail(row, e)
            return
        if answer.finished:
            self._finish(row, answer.finished)
        elif len(answer.tokens) == answer.settings.max_new_tokens:
            self._finish(row, "length")

    def _finish(self, row: _Row, reason: str) -> None:
        row.pool.keep(row, self._prefixes)
        self._leave(row)
        self._answer(row.ticket, row.continuation, reason)

    def _answer(self, ticket: Ticket, continuation: Continuation, reason: str) -> None:
        try:
            continuation.finish(reason)
            ticket.end(continuation.result())
        except Exception as e:  # of whoever listens
            ticket.end(error=e)

    def _fail(self, row: _Row, error: Exception) -> None:
        self._leave(row)
        row.ticket.end(error=error)

    def _leave(self, row: _Row) -> None:
        self._blocked = None
        if row in self._prefilling:
            self._prefilling.remove(row)
        row.pool.leave(row)

    # --- memory ---

    def _class_of(self, columns: int) -> int:
        size = LEAST_CLASS
        while size < columns:
            size *= 2
        return min(size, max(columns, self._session.bundle.manifest.model.context_length))

    def _taken(self) -> int:
        return sum(pool.used * pool.capacity for pool in self._pools.values()) * self._row_bytes

    def _fits(self, size: int) -> bool:
        """Whether one more row of that class does; pools that nobody uses are given up for it."""
        if self._cache_bytes is None:
            return True
        pool = self._pools.get(size)
        if pool is not None and len(pool.rows) < pool.used:
            return True
        if self._taken() + size * self._row_bytes <= self._cache_bytes:
            return True
        with self._changed:
            for other in [other for other, idle in self._pools.items() if not idle.rows and other != size]:
                self._pools.pop(other).close()
        return self._taken() + size * self._row_bytes <= self._cache_bytes

    def _pool_of(self, size: int) -> _Pool:
        if size not in self._pools:
            rows = AdapterRows(self._bank) if self._bank is not None and self._bank.bundle.nodes else None
            pool = _Pool(self._session.open_pool(rows, self._most_rows, size))
            with self._changed:
                self._pools[size] = pool
        return self._pools[size]
