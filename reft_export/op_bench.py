"""The edit op alone: the fused kernel, the function body, and what the machine cannot do faster.

    python -m reft_export.op_bench [--width 2048] [--rank 4] [--slots 1]        reproduces runtimes/native/BENCHMARKS.md

All in one process, on one thread, in turns; of every figure the minimum, since a machine can only ever be slower than itself, and from
memory the median. A node's time is that of a chain of nodes less that of a chain of one, divided by their difference: the session's own
cost falls out. Inside a chain the op edits in place, as it does between the layers of a decoder.
"""

from __future__ import annotations

import ctypes
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TypeVar

import numpy as np
import onnx_ir as ir

from graph_passes.function_body import edit_function
from runtimes.edits.op import DOMAIN, OP_TYPE, OP_VERSION
from runtimes.errors import BackendUnavailable
from runtimes.native_library import find_op_library
from runtimes.precision import NUMPY_DTYPES, TORCH_DTYPES

K = TypeVar("K")

CHAIN = 32
CASES = ((1, 0), (1, 1), (256, 0), (256, 8), (256, 256))
"""(tokens, edited tokens): decode and prefill."""
ROWS = 256
DTYPES = {TORCH_DTYPES[precision]: dtype for precision, dtype in NUMPY_DTYPES.items()}
BEYOND_CACHE = 128 << 20
"""Bytes of rows to go through in turn, so that none is in a cache when its turn comes again."""


@dataclass(frozen=True, kw_only=True)
class NodeTime:
    """Microseconds per node, float32. ``floor``: onnxruntime's Neg on the same tensor."""

    tokens: int
    edited: int
    fused: float | None
    function: float
    floor: float


@dataclass(frozen=True, kw_only=True)
class KernelTime:
    """Microseconds of the fused kernel on 256 of 256 edited rows, and of one pass that reads and writes the same bytes in place."""

    dtype: str
    cached: float
    cached_pass: float
    from_memory: float
    memory_pass: float


def node_times(width: int, rank: int, slots: int = 1, repeats: int = 40) -> list[NodeTime]:
    """One figure per case for the fused op (None without a library), the function and Neg."""
    library = find_op_library()
    kinds = {"floor": ("Neg", None), "function": (OP_TYPE, None)} | ({"fused": (OP_TYPE, library)} if library else {})
    sessions = {(kind, n): _chain_session(op, n, width, lib) for kind, (op, lib) in kinds.items() for n in (1, CHAIN)}
    times = []
    for tokens, edited in CASES:
        feeds = _feeds(tokens, edited, width, rank, slots)
        runs = {key: lambda s=session, f=feeds: s.run(None, f) for key, session in sessions.items()}
        best = _fastest(runs, repeats)
        node = {kind: (best[kind, CHAIN] - best[kind, 1]) / (CHAIN - 1) * 1e6 for kind in kinds}
        times.append(NodeTime(tokens=tokens, edited=edited, fused=node.get("fused"), function=node["function"], floor=node["floor"]))
    return times


def kernel_times(width: int, rank: int, repeats: int = 60) -> list[KernelTime]:
    """256 edited rows of each dtype, through the library's C interface. Raises BackendUnavailable without a library."""
    library = find_op_library()
    if library is None:
        raise BackendUnavailable("there is no op library to measure; install a C++17 compiler and reinstall reft-export")
    edit = _edit_function(library)
    times = []
    for name, dtype in DTYPES.items():
        U, A, b = (_aligned(x.astype(dtype)) for x in _bank(width, rank, 1))
        slot = np.zeros(ROWS, np.int32)
        rows = np.random.default_rng(0).standard_normal((ROWS, width)).astype(dtype)
        many = [_aligned(rows) for _ in range(max(2, BEYOND_CACHE // rows.nbytes))]

        # Bytes are bytes: a float32 pass over rows of any type.
        kind = ir.DataType.from_numpy(dtype).value
        steer = [partial(edit, kind, *_pointers(h, h, slot, U, A, b), ROWS, 1, rank, width, b"", b"all", None) for h in many]
        plain = [partial(np.negative, h.view(np.float32), out=h.view(np.float32)) for h in many]
        best = _fastest({"edit": steer[0], "pass": plain[0]}, repeats)
        # Not the first rows, which the cache holds by now.
        turns = {"edit": _in_turn(steer[1:]), "pass": _in_turn(plain[1:])}
        far = _usual(turns, max(repeats, 2 * len(many)))
        times.append(
            KernelTime(
                dtype=name,
                cached=best["edit"] * 1e6,
                cached_pass=best["pass"] * 1e6,
                from_memory=far["edit"] * 1e6,
                memory_pass=far["pass"] * 1e6,
            )
        )
    return times


def _pointers(*arrays: np.ndarray) -> list[int]:
    return [array.ctypes.data for array in arrays]


def _in_turn(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    turn = itertools.cycle(calls)
    return lambda: next(turn)()


def _fastest(runs: Mapping[K, Callable[[], object]], repeats: int) -> dict[K, float]:
    """Seconds of the fastest call of each; in turns, each twice in a row, so that the second finds its data in the cache."""
    best = dict.fromkeys(runs, float("inf"))
    for key in itertools.chain(*([key, key] for _ in range(repeats) for key in runs)):
        best[key] = min(best[key], _seconds(runs[key]))
    return best


def _usual(runs: Mapping[K, Callable[[], object]], repeats: int) -> dict[K, float]:
    """Median seconds of each, one after the other: for calls that shall find nothing in a cache, where the fastest call found something."""
    return {key: median(_seconds(run) for _ in range(repeats)) for key, run in runs.items()}


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _chain_session(op: str, count: int, width: int, library: Path | None):
    """x -> Neg -> count nodes -> Neg -> y: the chain begins and ends inside the graph, where buffers may be reused."""
    import onnxruntime as ort

    def value(name: str, shape: list, kind: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(kind))

    x = value("x", ["B", "S", width])
    slot = value("slot", ["B", "S"], ir.DataType.INT32)
    bank = [value("U", ["N", "r", width]), value("A", ["N", "r", width]), value("b", ["N", "r"])]
    nodes = [ir.node("Neg", [x])]
    for _ in range(count):
        h = nodes[-1].outputs[0]
        nodes.append(ir.node("Neg", [h]) if op == "Neg" else ir.node(OP_TYPE, [h, slot, *bank], domain=DOMAIN))
    nodes.append(ir.node("Neg", [nodes[-1].outputs[0]]))
    y = nodes[-1].outputs[0]
    y.name, y.shape, y.type = "y", x.shape, x.type
    graph = ir.Graph([x, slot, *bank], [y], nodes=nodes, opset_imports={"": 20, DOMAIN: OP_VERSION}, name="chain")
    model = ir.Model(graph, ir_version=10, functions=[edit_function(opset=20)])
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    # Neg of Neg must not be optimized away.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if library:
        options.register_custom_ops_library(str(library))
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


def _feeds(tokens: int, edited: int, width: int, rank: int, slots: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    slot = np.full((1, tokens), -1, np.int32)
    slot[0, :edited] = random.integers(0, slots, edited)
    U, A, b = _bank(width, rank, slots)
    return {"x": random.standard_normal((1, tokens, width)).astype(np.float32), "slot": slot, "U": U, "A": A, "b": b}


def _bank(width: int, rank: int, slots: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Small enough for a row to stay finite through thousands of edits."""
    random = np.random.default_rng(1)
    draw = lambda *shape: (random.standard_normal(shape) * 1e-3).astype(np.float32)  # noqa: E731
    return draw(slots, rank, width), draw(slots, rank, width), draw(slots, rank)


def _aligned(array: np.ndarray) -> np.ndarray:
    """A copy at a multiple of 64 bytes, where onnxruntime puts its tensors; numpy promises 16."""
    memory = np.empty(array.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def _edit_function(library: Path) -> Callable[..., bytes | None]:
    function = ctypes.CDLL(str(library)).reft_edit_cpu
    function.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 6, *[ctypes.c_int64] * 4, *[ctypes.c_char_p] * 3]
    function.restype = ctypes.c_char_p
    return function


NODE_HEADER = ("tokens", "edited", "fused us", "function us", "Neg us", "fused / Neg", "fused / function")
KERNEL_HEADER = ("type", "in cache us", "/ pass", "from memory us", "/ pass")


def node_rows(times: list[NodeTime]) -> list[tuple[str, ...]]:
    def row(t: NodeTime) -> tuple[str, ...]:
        fused = ("", "", "") if t.fused is None else (f"{t.fused:.2f}", f"{t.fused / t.floor:.2f}", f"{t.fused / t.function:.3f}")
        return (str(t.tokens), str(t.edited), fused[0], f"{t.function:.2f}", f"{t.floor:.2f}", *fused[1:])

    return [row(t) for t in times]


def kernel_rows(times: list[KernelTime]) -> list[tuple[str, ...]]:
    return [
        (t.dtype, f"{t.cached:.1f}", f"{t.cached / t.cached_pass:.2f}", f"{t.from_memory:.1f}", f"{t.from_memory / t.memory_pass:.2f}")
        for t in times
    ]


def main() -> None:
    import argparse

    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    for name, default in (("width", 2048), ("rank", 4), ("slots", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    _print_table(NODE_HEADER, node_rows(node_times(asked.width, asked.rank, asked.slots)))
    if find_op_library():
        _print_table(KERNEL_HEADER, kernel_rows(kernel_times(asked.width, asked.rank)))


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


if __name__ == "__main__":
    main()
