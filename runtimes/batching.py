"""Continuous batching: requests join and leave a running batch between steps, each with its own adapter, settings and length.

    bank = AdapterBank(session.bundle)
    with Batcher(session, tokenizer, bank) as batcher:              # or runtimes.open_batcher; a thread of its own runs the steps
        one = batcher.submit("Once upon a time", adapter="pirate")
        two = batcher.submit("Dear sir,", GenerationSettings(max_new_tokens=32), on_text=print)
        print(one.result().text)

A step feeds waiting prompts, at most one chunk of columns in all, and then one token of every row that decodes, so that a request that
joins costs the running ones no more than a chunk. Rows own rows of a KV cache that is written in place (RowPool), of the least capacity
class, a power of two, that holds prompt and answer; every class is one run of a step. Prompts take turns, chunk by chunk.

A row that runs alone may be fed tokens ahead (runtimes/speculation.py), of which it keeps those that it chooses.

Every row computes what it would compute alone, to rounding: its chunks are those that it would be fed alone, but for what an earlier prompt
left in the cache.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from threading import Condition, RLock, Thread
from types import TracebackType
from typing import TYPE_CHECKING, TypeGuard

import numpy as np

from runtimes.bank import AdapterBank, BankFull
from runtimes.batch_rows import BatchPool, BatchRow, Ticket
from runtimes.edits.strength import at_strength
from runtimes.errors import InputError, ReftError
from runtimes.generation import Continuation, GenerationSettings, prefill_columns
from runtimes.kv_cache import bytes_per_token
from runtimes.memory import available_memory
from runtimes.prefixes import Prefixes
from runtimes.rows import AdapterRows
from runtimes.session import Session
from runtimes.speculation import check_speculation, proposed
from runtimes.text.tokenizer import Tokenizer, check_token_ids

if TYPE_CHECKING:
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


class Batcher:
    """Runs requests on ``session`` in one batch that changes between steps; a context manager, whose thread runs the steps.

    Without ``with``, ``step`` runs one. The session is the batcher's: nobody else steps it.
    ``bank``: the adapters that requests may name; None: base alone. ``most_rows``: requests that run at once. ``cache_bytes``: of all KV
    caches, by default half of the memory that is left; beyond it requests wait. ``queue``: requests that may wait.
    ``prefix_bytes``: of answered prompts, kept for those that begin alike; by default a quarter of ``cache_bytes`` more, up to
    PREFIX_BYTES; 0 keeps none.
    ``prefill_chunk``: prompt columns of a step, by default CHUNK; 0 feeds a prompt at once.
    ``speculate``: tokens at most that a row which runs alone is fed ahead; its answer is the same, to rounding.

    Raises InputError for a bundle whose cache is not written in place, and with ``speculate`` for one that has logits of the last token
    alone; BackendUnavailable on a GPU.
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
        speculate: int = 0,
    ) -> None:
        check_speculation(session.bundle, speculate)
        for name, value in {"most_rows": most_rows, "queue": queue}.items():
            if value < 1:
                raise InputError(f"{name} is {value}, expected at least 1")
        self._session, self._tokenizer, self._bank = session, tokenizer, bank
        self._most_rows, self._queue, self._speculate = most_rows, queue, speculate
        fits = prefill_columns(session, prefill_chunk)
        self._chunk = fits if prefill_chunk is not None or fits is None else min(fits, CHUNK)
        self._row_bytes = bytes_per_token(session.cache_tensors)
        room = available_memory()
        self._cache_bytes = cache_bytes if cache_bytes is not None else None if room is None else int(CACHE_SHARE * room)
        self._prefixes = Prefixes(min((self._cache_bytes or 0) // 4, PREFIX_BYTES) if prefix_bytes is None else prefix_bytes)
        self._pools: dict[int, BatchPool] = {}
        self._waiting: deque[tuple[Ticket, Continuation, Callable[[int, np.ndarray], None] | None]] = deque()
        self._prefilling: deque[BatchRow] = deque()
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
        Raises QueueFull, and InputError for a prompt that does not fit the context or the cache, for an unknown adapter, for one at
        positions ``marked``, and for a strength of none, or that is not finite.
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
                self._bank.load_unmarked(steering)
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
        for pool in [pool for pool in self._pools.values() if pool.decoding]:
            ahead = self._proposed(pool.rows[0]) if self._speculate and self._live() == 1 else []
            if ahead:
                self._decode_ahead(pool.rows[0], ahead)
            else:
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
            row = BatchRow(ticket=ticket, continuation=continuation, pool=self._pool_of(size), on_token=on_token)
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

    def _decode(self, pool: BatchPool) -> None:
        rows = pool.rows[: pool.decoding]
        try:
            logits = pool.decode()
        except Exception as e:  # nobody's tokens are known
            for row in rows:
                self._fail(row, e)
            return
        for row, own in zip(rows, logits, strict=True):
            self._push(row, own)

    def _proposed(self, row: BatchRow) -> list[int]:
        said = row.continuation.tokens
        left = row.continuation.settings.max_new_tokens - len(said) - 1  # the last token is said, and not fed
        return proposed([*row.prompt, *said], min(self._speculate, left))

    def _decode_ahead(self, row: BatchRow, ahead: Sequence[int]) -> None:
        """One step of several tokens: what the row would not choose, the next step overwrites."""
        answer = row.continuation
        try:
            logits = row.pool.feed_ahead(row, ahead)
        except Exception as e:  # onnxruntime's own reason
            self._fail(row, e)
            return
        answer.proposed += len(ahead)
        for guess, own in zip([*ahead, None], logits, strict=True):
            row.fed += 1
            self._push(row, own)
            if row.ticket.done or answer.tokens[-1] != guess:
                return
            answer.accepted += 1

    def _push(self, row: BatchRow, logits: np.ndarray) -> None:
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

    def _finish(self, row: BatchRow, reason: str) -> None:
        row.pool.keep(row, self._prefixes)
        self._leave(row)
        self._answer(row.ticket, row.continuation, reason)

    def _answer(self, ticket: Ticket, continuation: Continuation, reason: str) -> None:
        try:
            continuation.finish(reason)
            ticket.end(continuation.result())
        except Exception as e:  # of whoever listens
            ticket.end(error=e)

    def _fail(self, row: BatchRow, error: Exception) -> None:
        self._leave(row)
        row.ticket.end(error=error)

    def _leave(self, row: BatchRow) -> None:
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

    def _pool_of(self, size: int) -> BatchPool:
        if size not in self._pools:
            rows = AdapterRows(self._bank) if self._bank is not None and self._bank.bundle.nodes else None
            pool = BatchPool(self._session.open_pool(rows, self._most_rows, size))
            with self._changed:
                self._pools[size] = pool
        return self._pools[size]
