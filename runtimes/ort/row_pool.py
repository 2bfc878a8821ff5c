"""Rows of one KV cache that come and go between steps, each with an adapter of its own: what a batch of requests runs on.

Rows that decode are the cache's first ones, without gaps; those whose prompt is still being fed stand behind them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnxruntime as ort

from runtimes.in_place import StepRequest
from runtimes.kv_cache import KvCache
from runtimes.ort.bound_cache import BoundCache
from runtimes.ort.bound_rows import BoundRows
from runtimes.rows import AdapterRows


class RowPool:
    """A session's rows in ``cache``, bound apart from the session's own; ``OrtSession.open_pool`` makes it.

    ``run``: logits [n, L, V] of the last columns of some rows, by a run of what is bound; good until the next one.
    """

    def __init__(
        self, run: Callable[[RowPool, range, StepRequest], np.ndarray], binding: ort.IOBinding, cache: KvCache, rows: AdapterRows | None
    ) -> None:
        self.binding = binding
        self.cache = cache
        self.rows = rows
        self.in_place = tuple(tensor.output for tensor in cache.tensors)
        self._run_bound = run
        self._bound_cache = BoundCache(binding, "cpu")
        self._bound_rows = None if rows is None else BoundRows(binding, rows, "cpu")

    def feed(self, row: int, ids: np.ndarray, before: int, prompt_length: int, *, last: int = 1) -> np.ndarray:
        """Logits [last, V] behind the last of ids [S], a row's tokens after the ``before`` that it holds.

        A view, good until the next call.
        """
        mask = np.ones((1, before + len(ids)), np.int64)
        return self._run(range(row, row + 1), ids[None], mask, np.array([prompt_length], np.int64), last)[0]

    def decode(self, tokens: np.ndarray, lengths: np.ndarray, prompt_length: np.ndarray) -> np.ndarray:
        """Logits [n, V] behind one token [n] each of the first n rows, which hold ``lengths`` [n]; a view, good until the next call."""
        mask = (np.arange(int(lengths.max()) + 1) < lengths[:, None]).astype(np.int64)
        mask[:, -1] = 1
        return self._run(range(len(tokens)), tokens[:, None], mask, prompt_length, 1)[:, -1]

    def _run(self, rows: range, ids: np.ndarray, mask: np.ndarray, prompt_length: np.ndarray, last: int) -> np.ndarray:
        self._bound_cache.bind(self.cache, rows)
        if self._bound_rows is not None:
            self._bound_rows.bind(rows)
        return self._run_bound(self, rows, StepRequest(ids=ids, mask=mask, prompt_length=prompt_length, last=last))
