"""RED's kernel against one in-place pass over the same bytes (numpy's negation): the figures of runtimes/native/BENCHMARKS.md.

python tests/native/bench_red.py [WIDTH]     one thread, one process, in turns; minima in cache, medians from memory
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import numpy as np
from native_op import DTYPES, ELEMENTS, cpu_kernels, installed_library, load

ROWS = 256
BEYOND_CACHE = 128 << 20
"""Bytes of rows to go through in turn, so that none is in a cache when its turn comes again."""
REPEATS = 200


def aligned(array: np.ndarray) -> np.ndarray:
    """At a multiple of 64 bytes, as onnxruntime allocates."""
    buffer = np.empty(array.nbytes + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    out = buffer[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    out[...] = array
    return out


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def in_turn(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    turn = itertools.cycle(calls)
    return lambda: next(turn)()


def main(width: int = 2048) -> None:
    library = installed_library()
    slot = np.zeros(ROWS, np.int32)
    for kernels, dtype in itertools.product(cpu_kernels(library), DTYPES):
        random = np.random.default_rng(0)
        rows, scale, bias = (random.standard_normal((n, width)).astype(DTYPES[dtype]) for n in (ROWS, 1, 1))
        scale, bias = aligned(np.ones_like(scale)), aligned(bias * 0)  # the values stay finite however often they are edited
        many = [aligned(rows) for _ in range(max(2, BEYOND_CACHE // rows.nbytes))]
        pointers = [[x.ctypes.data for x in (h, h, slot, scale, bias)] for h in many]
        edits = [partial(load(library).reft_red_cpu, ELEMENTS[dtype], *p, ROWS, 1, width, kernels.encode()) for p in pointers]
        passes = [partial(np.negative, h.view(np.float32), out=h.view(np.float32)) for h in many]
        near = {"edit": float("inf"), "pass": float("inf")}
        for _ in range(REPEATS):
            for name, call in (("edit", edits[0]), ("pass", passes[0])):
                near[name] = min(near[name], seconds(call), seconds(call))  # the second call finds its rows in the cache
        turns = {"edit": in_turn(edits), "pass": in_turn(passes)}
        far = {name: median(seconds(call) for _ in range(2 * len(many))) for name, call in turns.items()}
        cached, memory = (f"{t['edit'] * 1e6:6.1f} us, {t['edit'] / t['pass']:5.2f} of a pass" for t in (near, far))
        print(f"{kernels:9} {dtype:9} in cache {cached}   from memory {memory}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
