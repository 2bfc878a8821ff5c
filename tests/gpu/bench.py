"""The CUDA kernels alone, through the op library's C interface: microseconds, GB/s, and shares of a copy and of an empty kernel.

    python -m gpu.bench LIBRARY EMPTY RESULT [--dry]        LIBRARY: libreft_ort.so; EMPTY: empty_kernel.cu, compiled; RESULT: a JSON file

A case's time is that of its launches in one CUDA graph, divided by their number: the fastest replay, and the median beside it. Many rows go
through as many buffers in turn as no cache holds, and are held against cudaMemcpyAsync of their bytes in the same way; a few rows are those
of the launch before, which the cache has, and are held against an empty kernel of as many blocks and threads.
"""

from __future__ import annotations

import argparse
import ctypes
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from gpu.device import Device, HostDevice, Queue, open_device

DTYPES = {"float32": (1, 4), "float16": (10, 2), "bfloat16": (16, 2)}
"""ONNX's number, and bytes of a value."""
BEYOND_CACHE = 512 << 20
"""Bytes of rows to go through in turn: four times the largest second-level cache that is known (128 MB)."""
FEW_BYTES = 4 << 20
"""What a case of a few rows moves at most."""
LAUNCHES_OF_FEW, LAUNCHES_OF_MANY = 200, 16
"""In a graph."""
THREADS = 256
"""A block's, of both kernels."""
TILE = 256
"""Rows that are drawn; a large h repeats them."""
COPY_GOAL, EMPTY_GOAL = 0.80, 1.15


@dataclass(frozen=True, kw_only=True)
class Case:
    """``rank`` is None for RED. ``edited`` tokens are the first ones. ``workspace``: whether the launch gets one where it can use it."""

    op: str = "LoReFT"
    dtype: str = "bfloat16"
    tokens: int
    edited: int
    width: int = 4096
    rank: int | None = 4
    in_place: bool = False
    workspace: bool = True
    goal: str | None = None

    @property
    def row_bytes(self) -> int:
        return self.tokens * self.width * DTYPES[self.dtype][1]

    @property
    def moved(self) -> int:
        """Bytes of rows that are read and written: a token that passes through in place costs none."""
        return 2 * (self.edited if self.in_place else self.tokens) * self.width * DTYPES[self.dtype][1]

    @property
    def few(self) -> bool:
        return self.moved <= FEW_BYTES

    @property
    def blocks(self) -> int:
        """Of LoReFT's launch without a workspace: four tokens a block from 1,024 tokens on."""
        return self.tokens if self.tokens < 1024 else -(-self.tokens // 4)


OF_COPY, OF_EMPTY = f"{COPY_GOAL:.0%} of the copy", f"{EMPTY_GOAL} of an empty kernel"
CASES = (
    Case(tokens=8192, edited=8192, goal=OF_COPY),
    *(Case(tokens=8192, edited=8192, rank=rank) for rank in (1, 8, 16)),
    *(Case(tokens=8192, edited=8192, dtype=dtype) for dtype in ("float16", "float32")),
    Case(tokens=8192, edited=8192, in_place=True),
    Case(tokens=8192, edited=0),
    *(Case(op="RED", dtype=dtype, tokens=8192, edited=8192, rank=None) for dtype in DTYPES),
    *(Case(tokens=tokens, edited=8, in_place=True, goal=OF_EMPTY) for tokens in (256, 8192)),
    *(Case(tokens=1, edited=edited, in_place=True) for edited in (0, 1)),
    *(
        Case(tokens=tokens, edited=tokens, rank=rank, in_place=True, workspace=workspace)
        for rank in (32, 64, 256)
        for tokens in (1, 8, 32)
        for workspace in (True, False)
    ),
    Case(op="RED", tokens=1, edited=1, rank=None, in_place=True),
)


class Kernels:
    """The C interface of the op library, and the empty kernel."""

    def __init__(self, library: Path, empty: Path) -> None:
        pointer, integer, text = ctypes.c_void_p, ctypes.c_int64, ctypes.c_char_p
        self._op, self._empty = ctypes.CDLL(str(library)), ctypes.CDLL(str(empty)).launch_empty
        self._op.reft_edit_cuda.argtypes = [ctypes.c_int, *[pointer] * 6, *[integer] * 4, *[text] * 2, *[pointer] * 2]
        self._op.reft_red_cuda.argtypes = [ctypes.c_int, *[pointer] * 5, *[integer] * 3, pointer]
        self._op.reft_edit_cuda_workspace.argtypes = [integer] * 2
        self._op.reft_edit_cuda.restype = self._op.reft_red_cuda.restype = self._op.reft_cuda_architectures.restype = text
        self._op.reft_edit_cuda_workspace.restype = integer
        self._empty.argtypes, self._empty.restype = [integer, ctypes.c_int, pointer], ctypes.c_int

    @property
    def architectures(self) -> str:
        return self._op.reft_cuda_architectures().decode()

    def workspace(self, case: Case) -> int:
        """Bytes that the case's launch may use beside its tensors."""
        if case.rank is None or not case.workspace:
            return 0
        return self._op.reft_edit_cuda_workspace(case.tokens, case.rank)

    def edit(self, case: Case, h: int, y: int, banks: Sequence[int], workspace: int | None, stream: int) -> None:
        """Queues one launch on these addresses; banks: slot and U, A, b or scale, bias. Raises RuntimeError with the library's words."""
        number, _ = DTYPES[case.dtype]
        if case.rank is None:
            error = self._op.reft_red_cuda(number, h, y, *banks, case.tokens, 1, case.width, stream)
        else:
            sizes = (case.tokens, 1, case.rank, case.width)
            error = self._op.reft_edit_cuda(number, h, y, *banks, *sizes, b"", b"all", workspace, stream)
        if error:
            raise RuntimeError(error.decode())

    def empty(self, blocks: int, stream: int) -> None:
        if error := self._empty(blocks, THREADS, stream):
            raise RuntimeError(f"the empty kernel was not launched: CUDA's error {error}")


def values(shape: Sequence[int], dtype: str, scale: float, seed: int) -> np.ndarray:
    """Normal values as the bytes of ``dtype``; bfloat16 is float32 cut off after 16 bits."""
    drawn = (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)
    if dtype == "bfloat16":
        return (drawn.view(np.uint32) >> 16).astype(np.uint16)
    return drawn.astype(dtype)


def inputs(case: Case) -> tuple[np.ndarray, list[np.ndarray]]:
    """h, and slot and banks. Banks are small, so that rows stay finite through thousands of edits in place."""
    tile = values((min(TILE, case.tokens), case.width), case.dtype, 1.0, seed=0)
    h = np.tile(tile, (-(-case.tokens // len(tile)), 1))[: case.tokens]
    slot = np.where(np.arange(case.tokens) < case.edited, 0, -1).astype(np.int32)
    if case.rank is None:
        one = values((1, case.width), "float32", 1e-4, seed=1) + 1  # scale around 1
        scale = (one.view(np.uint32) >> 16).astype(np.uint16) if case.dtype == "bfloat16" else one.astype(case.dtype)
        return h, [slot, scale, values((1, case.width), case.dtype, 1e-4, seed=2)]
    shapes = ((case.rank, case.width), (case.rank, case.width), (case.rank,))
    return h, [slot, *(values(shape, case.dtype, 1e-3, seed) for seed, shape in enumerate(shapes, 1))]


def measure(case: Case, device: Device, kernels: Kernels) -> dict[str, Any]:
    """The case's fields and its ``figures``."""
    h, banks = inputs(case)
    buffers = 1 if case.few else max(2, -(-BEYOND_CACHE // (2 * case.row_bytes)))
    memory = [(device.put(h), device.put(h)) for _ in range(buffers)]
    on_device = [device.put(bank) for bank in banks]
    size = kernels.workspace(case)
    workspace = device.put(np.zeros(size, np.uint8)) if size else None
    addresses = [device.address(bank) for bank in on_device]
    launches = LAUNCHES_OF_FEW if case.few else LAUNCHES_OF_MANY

    def edit(turn: int, stream: int) -> None:
        source, target = memory[turn % buffers]
        at = device.address(source), device.address(source if case.in_place else target)
        kernels.edit(case, *at, addresses, None if workspace is None else device.address(workspace), stream)

    def copy(turn: int, stream: int) -> None:
        source, target = memory[turn % buffers]
        device.copy(target, source, stream)

    def microseconds(one: Callable[[int, int], None]) -> list[float]:
        return [1e3 * each / launches for each in device.times(_queue(one, launches))]

    edits = microseconds(edit)
    if case.few:
        return asdict(case) | figures(case, edits, copies=[], empties=microseconds(lambda _, stream: kernels.empty(case.blocks, stream)))
    return asdict(case) | figures(case, edits, copies=microseconds(copy), empties=[])


def _queue(one: Callable[[int, int], None], launches: int) -> Queue:
    def queue(stream: int) -> None:
        for turn in range(launches):
            one(turn, stream)

    return queue


def figures(case: Case, edits: Sequence[float], copies: Sequence[float], empties: Sequence[float]) -> dict[str, Any]:
    """What follows from the microseconds a launch of every replay; None for what was not timed.

    us: of the fastest replay; gb_per_s: moved / us; of_copy: gb_per_s / copy_gb_per_s; of_empty: us / empty_us.
    """
    us, copy_us, empty_us = (min(each, default=None) for each in (edits, copies, empties))
    rate = case.moved / us / 1e3 if us and case.moved else None
    copy_rate = 2 * case.row_bytes / copy_us / 1e3 if copy_us else None
    of_copy = rate / copy_rate if rate and copy_rate else None
    of_empty = us / empty_us if us and empty_us else None
    met = None
    if case.goal == OF_COPY and of_copy is not None:
        met = of_copy >= COPY_GOAL
    elif case.goal == OF_EMPTY and of_empty is not None:
        met = of_empty <= EMPTY_GOAL
    return {
        "us": us,
        "us_median": median(edits) if edits else None,
        "gb_per_s": rate,
        "copy_us": copy_us,
        "copy_gb_per_s": copy_rate,
        "empty_us": empty_us,
        "of_copy": of_copy,
        "of_empty": of_empty,
        "met": met,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name in ("library", "empty", "result"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--dry", action="store_true", help="make the inputs, launch nothing")
    options = parser.parse_args(arguments)
    kernels, device = Kernels(options.library, options.empty), HostDevice() if options.dry else open_device()
    measured: list[dict[str, Any]] = []
    for case in CASES:
        measured.append(measure(case, device, kernels))
        # After every case: what was measured is kept where the time ends.
        told = {"through": device.name, "architectures": kernels.architectures, "cases": measured}
        options.result.write_text(json.dumps(told), encoding="utf-8")


if __name__ == "__main__":
    main()
