"""One step over a KV cache that is written in place: ids and mask of the caller's rectangle become calls that the operator takes.

GroupQueryAttention counts the ones of a row's mask and takes as many columns of its cache as full, so a row's tokens are its first
columns, whatever pads its caller keeps between them:

    mask [rows, T]     a row's past tokens first, its new ones in the last columns, zeros between: the operator counts ones, the rule
                       of the edits reads the last columns
    a first call       of several rows has a mask exactly S wide, right padded
    several new tokens on a past     of one row alone, as a batch of one on the row's slice of the buffer
    a row without a new token        is fed one all the same, behind its last one, which its next real token overwrites: the operator
                                     takes no row without tokens
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from runtimes.errors import InputError
from runtimes.kv_cache import CachePast, KvCache

MOST_TOGETHER = 512
"""Tokens of several rows' prompts, pads included, that go into one call: more of them gain nothing by it, and every one has logits."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StepRequest:
    """What a caller asks of one step: ids [B, S], mask [B, past + S], prompt_length [B], marks [B, P] and position_ids [B, S] or None.

    ``last``: logits of each row's last so many tokens alone; None: of all. ``only_last``: the graph has those of a call's last column.
    """

    ids: np.ndarray
    mask: np.ndarray
    prompt_length: np.ndarray
    marks: np.ndarray | None = None
    position_ids: np.ndarray | None = None
    last: int | None = None
    only_last: bool = False

    @property
    def window(self) -> np.ndarray:
        """[B, S]: which of the new columns are real."""
        return self.mask[:, self.mask.shape[1] - self.ids.shape[1] :]


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """One run of the graph, of the cache's rows ``rows``: ids [n, S] and mask [n, T] as the graph takes them.

    ``columns`` [n, S]: the column of the caller's step that each token came from; -1 is a pad, or a token that nobody asked for.
    ``starts``, ``stops`` [n]: the cache's columns that it writes.
    """

    rows: slice
    ids: np.ndarray
    mask: np.ndarray
    columns: np.ndarray
    starts: np.ndarray
    stops: np.ndarray

    def request(self, step: StepRequest) -> StepRequest:
        """What the graph is asked in this call of ``step``."""
        positions = None
        if step.position_ids is not None:
            positions = np.take_along_axis(step.position_ids[self.rows], self.columns.clip(0), 1)
        marks = None if step.marks is None else step.marks[self.rows]
        return StepRequest(ids=self.ids, mask=self.mask, prompt_length=step.prompt_length[self.rows], marks=marks, position_ids=positions)


def calls(ids: np.ndarray, window: np.ndarray, lengths: np.ndarray, *, limit: int, most: int) -> Iterator[Call]:
    """The calls that feed ids [B, S], real where ``window`` [B, S] is 1, to rows that hold ``lengths`` [B] tokens.

    ``most``: tokens that several rows' first call may have in all, pads included. ``limit``: the model's context.
    """
    batch, width = ids.shape
    counts = window.sum(1)
    longest = int(counts.max())
    right_padded = bool((window[:, 1:] <= window[:, :-1]).all())
    if batch > 1 and width == 1:
        yield _decode(ids, window, lengths, limit)
    elif batch > 1 and not lengths.any() and counts.all() and right_padded and batch * longest <= most:
        columns = np.where(window[:, :longest] > 0, np.arange(longest), -1)
        yield Call(
            rows=slice(0, batch),
            ids=ids[:, :longest],
            mask=window[:, :longest],
            columns=columns,
            starts=lengths,
            stops=lengths + longest,  # pads leave keys and values, too
        )
    else:
        for row in np.flatnonzero(counts):
            columns = np.flatnonzero(window[row])[None]
            start = lengths[row : row + 1]
            yield Call(
                rows=slice(int(row), int(row) + 1),
                ids=ids[row, columns],
                mask=np.ones((1, int(start[0]) + columns.size), np.int64),
                columns=columns,
                starts=start,
                stops=start + columns.size,
            )


def _decode(ids: np.ndarray, window: np.ndarray, lengths: np.ndarray, limit: int) -> Call:
    """One token of every row; a row that has ended is fed one behind its last, in the last column of a full context."""
    past = np.minimum(lengths, limit - 1)
    mask = (np.arange(int(past.max()) + 1) < past[:, None]).astype(np.int64)
    mask[:, -1] = 1
    return Call(rows=slice(0, len(ids)), ids=ids, mask=mask, columns=np.where(window > 0, 0, -1), starts=past, stops=past + 1)


RunCall = Callable[[KvCache, Call, int], np.ndarray]
"""(cache, call, first) -> logits [n, R, V] of the call's last R tokens, R at least S - first (all that a graph of the last logits has: 1);
good until the next call."""


def step_in_place(request: StepRequest, past: CachePast | None, cache: KvCache, run: RunCall) -> tuple[np.ndarray, CachePast]:
    """(logits float32, what to go on from). Logits [B, S, V], zeros at pads; with ``last`` n [B, n, V], of the last n real tokens.

    Raises InputError where a column of ``past`` was overwritten, and where the mask says another thing of its columns than before.
    """
    batch, width = request.ids.shape
    lengths = np.zeros(batch, np.int64)
    if past is not None:
        _check(past, request)
        cache.check(past)
        lengths = past.lengths
    after = lengths + request.window.sum(1)
    cache.reserve(int(after.max()))
    number = cache.begin_step()
    logits = _Logits(request)
    unequal = request.only_last and np.ptp(after) > 0
    for call in calls(request.ids, request.window, lengths, limit=cache.limit, most=0 if unequal else MOST_TOGETHER):
        cache.reserve(int(call.stops.max()))
        cache.write(call.rows, call.starts, call.stops)
        logits.add(call, run(cache, call, logits.first(call)))
    return logits.result(), CachePast(cache=cache, step=number, lengths=after, mask=request.mask, prompt_length=request.prompt_length)


def _check(past: CachePast, request: StepRequest) -> None:
    if len(past.lengths) != len(request.ids):
        raise InputError(f"the KV cache has {len(past.lengths)} rows, the new tokens {len(request.ids)}; a row cannot join or leave")
    if not np.array_equal(past.mask, request.mask[:, : past.width]):
        raise InputError("the attention mask of columns that are in the KV cache has changed; in place it cannot: feed the tokens again")


class _Logits:
    """The logits of one step, gathered from its calls."""

    def __init__(self, request: StepRequest) -> None:
        self._request = request
        self._batch, width = request.ids.shape
        self._columns = 1 if request.only_last else width if request.last is None else min(request.last, width)
        self._every = request.last is None and not request.only_last
        self._found: np.ndarray | None = None

    def first(self, call: Call) -> int:
        """The first token of the call whose logits anybody reads."""
        if self._every:
            return 0
        wanted = [self._wanted(columns) for columns in call.columns]
        return min((int(tokens[0]) for tokens in wanted if tokens.size), default=call.ids.shape[1] - 1)

    def _wanted(self, columns: np.ndarray) -> np.ndarray:
        """Which of a row's tokens in a call; ``columns`` [S] as of Call."""
        return np.flatnonzero(columns >= 0)[-self._columns :]

    def add(self, call: Call, logits: np.ndarray) -> None:
        if self._found is None:
            self._found = np.zeros((self._batch, self._columns, logits.shape[2]), np.float32)
        skipped = call.ids.shape[1] - logits.shape[1]
        for row, columns, own in zip(range(self._batch)[call.rows], call.columns, logits, strict=True):
            tokens = self._wanted(columns)
            tokens = tokens[tokens >= skipped]
            places = columns[tokens] if self._every else np.arange(self._columns - tokens.size, self._columns)
            self._found[row, places] = own[tokens - skipped]

    def result(self) -> np.ndarray:
        if self._found is None:
            raise InputError("a step needs at least one token in its new columns; the attention mask has none there")
        return self._found
