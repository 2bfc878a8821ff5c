"""The buffers of a KV cache that every step writes in place: who may go on from where, and whether they fit in memory.

One buffer for each layer's keys and one for its values, [rows, heads, capacity, dim]. A row's tokens are its first columns, without gaps,
whatever pads its caller keeps between them (runtimes/in_place.py lays them out).

A past stays good for as long as nobody else has written into its columns: two answers can go on from one prompt in turn, but not from
each other's columns. Steps are numbered, and each column knows the last one that wrote it (``KvCache.check``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from runtimes.artifacts.manifest import TensorRecord
from runtimes.errors import BundleError, InputError
from runtimes.memory import available_memory
from runtimes.precision import ELEMENT_TYPES, ElementType

LEAST_CAPACITY = 64
"""Columns of a cache whose caller did not say how many it will need."""
ALIGNMENT = 64
"""Bytes: the width of the widest vector registers."""


@dataclass(frozen=True, kw_only=True)
class CacheTensor:
    """A layer's keys or values: ``name`` is the graph's input, ``output`` the graph's output that is the same memory."""

    name: str
    output: str
    heads: int
    dim: int
    element: ElementType

    def size(self, rows: int, columns: int) -> int:
        """Bytes."""
        return rows * self.heads * columns * self.dim * self.element.dtype.itemsize


def bytes_per_token(tensors: Sequence[CacheTensor]) -> int:
    """Of one row's token, in all layers."""
    return sum(tensor.size(1, 1) for tensor in tensors)


def stated_bytes_per_token(inputs: Sequence[TensorRecord]) -> int:
    """The same, by a manifest's records of the graph's inputs. Raises BundleError for a cache that is not [batch, heads, past, dim]."""
    types = {e.name: e.dtype.itemsize for e in ELEMENT_TYPES.values()}
    caches = [record for record in inputs if record.name.startswith("past_key_values.")]
    total = 0
    for record in caches:
        heads, dim = (record.shape[1], record.shape[3]) if len(record.shape) == 4 else (None, None)
        if not isinstance(heads, int) or not isinstance(dim, int) or record.dtype not in types:
            raise BundleError(
                f"manifest.json says {record.name} is {record.dtype} {list(record.shape)}, expected [batch, heads, past, dim] with heads "
                "and dim fixed; export the bundle again"
            )
        total += heads * dim * types[record.dtype]
    return total


class Buffer(Protocol):
    """Memory of one tensor on its device, zeros at first."""

    @property
    def address(self) -> int: ...

    def widened(self, shape: tuple[int, int, int, int]) -> Buffer:
        """A wider buffer with the same columns in front."""
        ...

    def read_row(self, row: int, columns: int) -> np.ndarray:
        """A copy [heads, columns, dim] of a row's first columns."""
        ...

    def write_row(self, row: int, columns: np.ndarray) -> None: ...

    def copy_row(self, source: int, target: int, columns: int) -> None: ...


class Memory(Protocol):
    """Where buffers come from."""

    def buffer(self, shape: tuple[int, int, int, int], element: ElementType) -> Buffer: ...

    def available(self) -> int | None:
        """Bytes that are left; None where nobody tells."""
        ...


class HostBuffer:
    """A numpy array at an aligned address. Pages that no token has touched take no memory."""

    def __init__(self, shape: tuple[int, int, int, int], element: ElementType) -> None:
        self._element = element
        size = math.prod(shape) * element.dtype.itemsize
        memory = np.zeros(size + ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % ALIGNMENT
        self.array = memory[start : start + size].view(element.dtype).reshape(shape)

    @property
    def address(self) -> int:
        return self.array.ctypes.data

    def read_row(self, row: int, columns: int) -> np.ndarray:
        return self.array[row, :, :columns].copy()

    def write_row(self, row: int, columns: np.ndarray) -> None:
        self.array[row, :, : columns.shape[1]] = columns

    def copy_row(self, source: int, target: int, columns: int) -> None:
        self.array[target, :, :columns] = self.array[source, :, :columns]

    def widened(self, shape: tuple[int, int, int, int]) -> HostBuffer:
        wider = HostBuffer(shape, self._element)
        held = np.moveaxis(self.array, 2, 0)
        np.moveaxis(wider.array, 2, 0)[: len(held)] = held
        return wider


class HostMemory:
    """``lazily``: whoever allocates watches over how much of it is written; untouched pages are none."""

    def __init__(self, *, lazily: bool = False) -> None:
        self._lazily = lazily

    def buffer(self, shape: tuple[int, int, int, int], element: ElementType) -> HostBuffer:
        return HostBuffer(shape, element)

    def available(self) -> int | None:
        return None if self._lazily else available_memory()


class KvCache:
    """The buffers of ``rows`` rows, of ``capacity`` columns each, at most ``limit``: the model's context.

    Raises InputError, before anything is allocated, for a capacity beyond the context and for one that does not fit in memory.
    """

    def __init__(self, tensors: Sequence[CacheTensor], rows: int, capacity: int, *, limit: int, memory: Memory) -> None:
        self.tensors = tuple(tensors)
        self.rows = rows
        self.limit = limit
        self.capacity = 0
        self._memory = memory
        self._buffers: list[Buffer] = []
        self._written = np.zeros((rows, 0), np.int64)
        """[rows, capacity]: the number of the last step that wrote each column."""
        self._step = 0
        self._allocate(capacity)

    @property
    def addresses(self) -> list[int]:
        return [buffer.address for buffer in self._buffers]

    def size(self, capacity: int) -> int:
        """Bytes of all buffers."""
        return self.rows * capacity * bytes_per_token(self.tensors)

    def reserve(self, columns: int) -> None:
        """Room for so many tokens a row: where there is none, twice the capacity, or what is needed where that does not fit."""
        if columns <= self.capacity:
            return
        doubled = min(max(columns, 2 * self.capacity), self.limit)
        room = self._memory.available()
        fits = room is None or self.size(doubled) - self.size(self.capacity) <= room
        self._allocate(doubled if fits else columns)

    def _allocate(self, capacity: int) -> None:
        if capacity > self.limit:
            raise InputError(f"a KV cache of {capacity} tokens a row is beyond the model's context ({self.limit}); ask for fewer tokens")
        added, room = self.size(capacity) - self.size(self.capacity), self._memory.available()
        if room is not None and added > room:
            raise InputError(
                f"a KV cache of {self.rows} x {capacity} tokens takes {_megabytes(self.size(capacity))} "
                f"({bytes_per_token(self.tensors) / 1e3:.1f} kB a token), and {_megabytes(room)} of memory are left; "
                "run fewer rows at once, a shorter prompt, or fewer new tokens"
            )
        shapes = [(self.rows, t.heads, capacity, t.dim) for t in self.tensors]
        if not self._buffers:
            self._buffers = [self._memory.buffer(s, t.element) for s, t in zip(shapes, self.tensors, strict=True)]
        for i, shape in enumerate(shapes):  # one by one: only one tensor is there twice
            if capacity > self.capacity > 0:
                self._buffers[i] = self._buffers[i].widened(shape)
        self._written = np.pad(self._written, [(0, 0), (0, capacity - self.capacity)])
        self.capacity = capacity

    def copy_row(self, source: int, target: int, columns: int) -> None:
        """The first ``columns`` of a row over those of another."""
        for buffer in self._buffers:
            buffer.copy_row(source, target, columns)

    def swap_rows(self, one: int, other: int, columns: int) -> None:
        """The first ``columns`` of two rows change places."""
        kept = self.read_row(one, columns)
        self.copy_row(other, one, columns)
        self.write_row(other, kept)

    def read_row(self, row: int, columns: int) -> list[np.ndarray]:
        """A copy of a row's first ``columns`` in host memory: [heads, columns, dim] of each tensor."""
        return [buffer.read_row(row, columns) for buffer in self._buffers]

    def write_row(self, row: int, columns: Sequence[np.ndarray], first: int | None = None) -> None:
        """What ``read_row`` gave, or its ``first`` columns, as the row's first ones."""
        for buffer, array in zip(self._buffers, columns, strict=True):
            buffer.write_row(row, array[:, :first])

    def check(self, past: CachePast) -> None:
        """Raises InputError where a column of ``past`` has been written since."""
        for row, length in enumerate(past.lengths):
            if self._written[row, :length].max(initial=0) > past.step:
                raise InputError(
                    "this KV cache has been overwritten: another step went on from an earlier point of it; feed the tokens again"
                )

    def write(self, rows: slice, starts: np.ndarray, stops: np.ndarray) -> None:
        """Notes that the step under way writes columns ``starts`` to ``stops`` of these rows."""
        for row, start, stop in zip(range(self.rows)[rows], starts, stops, strict=True):
            self._written[row, start:stop] = self._step

    def begin_step(self) -> int:
        self._step += 1
        return self._step


@dataclass(frozen=True, kw_only=True, eq=False)
class CachePast:
    """A cache after the step numbered ``step``. ``lengths`` [B]: tokens of each row; ``mask`` [B, width]: the columns as its caller has
    them, pads included; ``prompt_length`` [B] as given at the first step."""

    cache: KvCache
    step: int
    lengths: np.ndarray
    mask: np.ndarray
    prompt_length: np.ndarray

    @property
    def width(self) -> int:
        return self.mask.shape[1]

    def first(self, columns: int) -> CachePast:
        """The same without what stands behind its first ``columns``, which a step from here overwrites."""
        mask = self.mask[:, :columns]
        return replace(self, mask=mask, lengths=mask.sum(1))


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.0f} MB"
