"""The KV cache of an engine whose steps give out their new columns alone: those are written behind the past, and nothing else moves.

All tensors lie in one buffer, one behind the other. A tensor [B, heads, C, dim] holds the cache in its first ``width`` columns and zeros
behind it: pads that a mask of 0 must cover. (Pads are zeros, as attention multiplies what it masked by 0, and 0 * NaN is NaN.) A step
writes what is new, [B, heads, S, dim] of every tensor, into another buffer, from where copies of S columns a row bring it to its place:
one copy for all tensors that lie alike, so that a decode step queues one or a few.

Not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from runtimes.tensorrt.cuda_device import CudaDevice
from runtimes.tensorrt.device_cache import CacheTensor, DeviceBuffers

ALIGNMENT = 256
"""Bytes that TensorRT wants addresses to be multiples of."""
NEW = "cache/new"


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """Rows that lie one behind the other in both of two layouts: where they begin, and bytes of a column."""

    source: int
    target: int
    column: int
    count: int


class ColumnCache:
    """The KV cache of one batch."""

    def __init__(self, device: CudaDevice, buffers: DeviceBuffers, tensors: tuple[CacheTensor, ...]) -> None:
        self._device = device
        self._buffers = buffers
        self._tensors = tensors
        self._live = 0
        self.batch = self.columns = self.width = 0

    def start(self, batch: int) -> None:
        """An empty cache for ``batch`` rows."""
        self.batch, self.columns, self.width = batch, 0, 0
        self._buffers.reserve(_side(self._live), 1)

    def shapes(self) -> dict[str, tuple[int, int, int, int]]:
        """The shape of every tensor of the past."""
        return self._of_width(self.columns)

    def new_shapes(self, added: int) -> dict[str, tuple[int, int, int, int]]:
        """Of what a step of ``added`` columns writes."""
        return self._of_width(added)

    def past_addresses(self) -> Mapping[str, int]:
        return self._addresses(_side(self._live), self.columns)

    def present_addresses(self, added: int) -> Mapping[str, int]:
        """Where a step of ``added`` columns writes them."""
        self._buffers.reserve(NEW, self._layout(added)[1])
        return self._addresses(NEW, added)

    def append(self, added: int, columns: int) -> None:
        """Queues the copies of what the step wrote to behind the past, which gets ``columns`` where it has no room for it."""
        if self.width + added > self.columns:
            self.lay_out(columns)
        source, target = self._buffers.address(NEW), self._buffers.address(_side(self._live))
        for rows in self._rows(added, self.columns):
            start, size = target + rows.target + self.width * rows.column, added * rows.column
            self._device.copy_rows(start, self.columns * rows.column, source + rows.source, size, size, rows.count)
        self.width += added

    def lay_out(self, columns: int) -> None:
        """The same cache with as many columns, pads included."""
        if columns == self.columns:
            return
        before, size = self._live, self._layout(columns)[1]
        if self.width:
            self._live = 1 - self._live
        address = self._buffers.reserve(_side(self._live), size)
        self._device.zero(address, size)
        if self.width:
            source = self._buffers.address(_side(before))
            for rows in self._rows(self.columns, columns):
                pitch, width = self.columns * rows.column, self.width * rows.column
                self._device.copy_rows(address + rows.target, columns * rows.column, source + rows.source, pitch, width, rows.count)
            self._buffers.release(_side(before))
        self.columns = columns

    def _of_width(self, columns: int) -> dict[str, tuple[int, int, int, int]]:
        return {t.name: (self.batch, t.heads, columns, t.dim) for t in self._tensors}

    def _addresses(self, name: str, columns: int) -> dict[str, int]:
        start = self._buffers.address(name)
        return {t.name: start + offset for t, offset in zip(self._tensors, self._layout(columns)[0], strict=True)}

    def _layout(self, columns: int) -> tuple[list[int], int]:
        """(where every tensor of so many columns begins, bytes of them all)."""
        offsets, end = [], 0
        for t in self._tensors:
            offsets.append(end)
            end += -(-self.batch * t.heads * columns * t.dim * t.itemsize // ALIGNMENT) * ALIGNMENT
        return offsets, end

    def _rows(self, source: int, target: int) -> Iterator[_Rows]:
        """All rows, in the layouts of ``source`` and ``target`` columns, as few runs of them as these leave."""
        run: _Rows | None = None
        for t, at_source, at_target in zip(self._tensors, self._layout(source)[0], self._layout(target)[0], strict=True):
            rows = _Rows(source=at_source, target=at_target, column=t.dim * t.itemsize, count=self.batch * t.heads)
            if run is not None and _follows(run, rows, source, target):
                run = replace(run, count=run.count + rows.count)
                continue
            if run is not None:
                yield run
            run = rows
        if run is not None:
            yield run


def _follows(run: _Rows, rows: _Rows, source: int, target: int) -> bool:
    """Whether ``rows`` begin where ``run`` ends, in both layouts."""
    ends = run.source + run.count * source * run.column, run.target + run.count * target * run.column
    return run.column == rows.column and ends == (rows.source, rows.target)


def _side(number: int) -> str:
    """The buffer that holds the cache, and the one that it moves to when it grows."""
    return f"cache/{number}"
