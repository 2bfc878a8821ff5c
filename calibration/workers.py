"""Weights side by side on all cores."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

MOST_WORKERS = 16
"""onnxruntime's own quantizer starts as many threads again for each weight."""


def on_all_cores(work: Callable[[_Item], _Result], items: Sequence[_Item]) -> Iterator[_Result]:
    """``work`` of every item, in order, in threads: numpy and onnxruntime let go of Python while they compute.

    No more items are in memory at a time than there are workers. The first failure is raised, and what was not begun is left.
    """
    with ThreadPoolExecutor(max(1, min(_cores(), len(items)))) as pool:
        try:
            yield from pool.map(work, items)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _cores() -> int:
    """Those that this process may use, up to ``MOST_WORKERS``."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, MOST_WORKERS)
