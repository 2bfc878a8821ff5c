"""RED against one in-place pass over the same bytes: the figures of docs/benchmarks.md.

python tests/native/bench_red.py [WIDTH]     one thread, one process, in turns

The node: a chain of nodes less a chain of one, divided by their difference, beside onnxruntime's Neg; float32, minima. The kernel: 256 of
256 rows beside numpy's in-place negation; minima in cache, medians from memory.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median

import numpy as np
from native_op import DTYPES, ELEMENTS, as_model, cpu_kernels, installed_library, load, session
from native_red import bank_inputs, red_node
from onnx import TensorProto, helper

CHAIN = 32
CASES = ((1, 0), (1, 1), (256, 0), (256, 8), (256, 256))
"""(tokens, edited tokens)"""
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


def fastest(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """In turns, each twice in a row, so that the second call finds its rows in the cache."""
    best = dict.fromkeys(calls, float("inf"))
    for name in itertools.chain(*([name, name] for _ in range(REPEATS) for name in calls)):
        best[name] = min(best[name], seconds(calls[name]))
    return best


def in_turn(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    turn = itertools.cycle(calls)
    return lambda: next(turn)()


def chain(kind: str, count: int, width: int):
    """x -> Neg -> count nodes -> Neg -> y: the chain begins and ends inside the graph, where buffers may be reused."""
    nodes = [helper.make_node("Neg", ["x"], ["h0"])]
    for i in range(count):
        nodes.append(red_node(f"h{i}", f"h{i + 1}") if kind == "RED" else helper.make_node("Neg", [f"h{i}"], [f"h{i + 1}"]))
    nodes.append(helper.make_node("Neg", [f"h{count}"], ["y"]))
    info = helper.make_tensor_value_info
    inputs = [info("x", TensorProto.FLOAT, ["S", width]), info("slot", TensorProto.INT32, ["S"]), *bank_inputs(TensorProto.FLOAT)]
    return session(as_model(nodes, inputs, [info("y", TensorProto.FLOAT, ["S", width])]), installed_library())


def nodes(width: int) -> None:
    sessions = {(kind, count): chain(kind, count, width) for kind in ("RED", "Neg") for count in (1, CHAIN)}
    for tokens, edited in CASES:
        slot = np.full(tokens, -1, np.int32)
        slot[:edited] = 0
        feeds = {"x": np.ones((tokens, width), np.float32), "slot": slot}
        feeds |= {"scale": np.ones((1, width), np.float32), "bias": np.zeros((1, width), np.float32)}
        best = fastest({key: partial(s.run, None, feeds) for key, s in sessions.items()})
        red, neg = ((best[kind, CHAIN] - best[kind, 1]) / (CHAIN - 1) * 1e6 for kind in ("RED", "Neg"))
        print(f"node, {tokens:3} tokens, {edited:3} edited: {red:6.2f} us, Neg {neg:6.2f} us, ratio {red / neg:5.2f}")


def kernel(width: int) -> None:
    library = installed_library()
    slot = np.zeros(ROWS, np.int32)
    for kernels, dtype in itertools.product(cpu_kernels(library), DTYPES):
        rows = np.random.default_rng(0).standard_normal((ROWS, width)).astype(DTYPES[dtype])
        # The identity: rows stay finite however often they are edited.
        scale, bias = aligned(np.ones((1, width), rows.dtype)), aligned(np.zeros((1, width), rows.dtype))
        many = [aligned(rows) for _ in range(max(2, BEYOND_CACHE // rows.nbytes))]
        pointers = [[x.ctypes.data for x in (h, h, slot, scale, bias)] for h in many]
        edits = [partial(load(library).reft_red_cpu, ELEMENTS[dtype], *p, ROWS, 1, width, kernels.encode()) for p in pointers]
        # Bytes are bytes: a float32 pass over rows of any type.
        passes = [partial(np.negative, h.view(np.float32), out=h.view(np.float32)) for h in many]
        near = fastest({"edit": edits[0], "pass": passes[0]})
        turns = {"edit": in_turn(edits[1:]), "pass": in_turn(passes[1:])}
        far = {name: median(seconds(call) for _ in range(2 * len(many))) for name, call in turns.items()}
        cached, memory = (f"{t['edit'] * 1e6:6.1f} us, {t['edit'] / t['pass']:5.2f} of a pass" for t in (near, far))
        print(f"{kernels:9} {dtype:9} in cache {cached}   from memory {memory}")


if __name__ == "__main__":
    chosen = int(sys.argv[1]) if len(sys.argv) > 1 else 2048
    nodes(chosen)
    kernel(chosen)
