"""Buffers in device memory that are kept from step to step, and the KV cache of one batch laid out in them.

Not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from runtimes.tensorrt.cuda_device import CudaDevice

GRANULE = 64
"""Columns: a cache that grows column by column moves to larger buffers every so often only."""
PAGE = 4096
"""Bytes that buffers are multiples of, for the masks, which grow too."""


class DeviceBuffers:
    """Named buffers that are allocated once and replaced where more is asked of them."""

    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        self._buffers: dict[str, tuple[int, int]] = {}

    def reserve(self, name: str, size: int) -> int:
        """The address of at least ``size`` bytes, never 0; a buffer that was too small is replaced, and its content lost."""
        address, capacity = self._buffers.get(name, (0, 0))
        if address and size <= capacity:
            return address
        if address:
            self._device.synchronize()
            del self._buffers[name]
            self._device.free(address)
        size = max(-(-size // PAGE), 1) * PAGE
        self._buffers[name] = (self._device.allocate(size), size)
        return self._buffers[name][0]

    def release(self, name: str) -> None:
        """Gives its memory back once everything that was queued is done."""
        address, _ = self._buffers.pop(name)
        self._device.synchronize()
        self._device.free(address)

    def address(self, name: str) -> int:
        return self._buffers[name][0]


@dataclass(frozen=True, kw_only=True)
class CacheTensor:
    """One key or value tensor [B, heads, columns, dim]: its name without ``past_key_values.`` or ``present.``, and bytes per element."""

    name: str
    heads: int
    dim: int
    itemsize: int


class DeviceCache:
    """The KV cache of one batch in an engine whose steps give out all of it, every tensor on two sides: a step reads one and writes the
    other.

    The live side holds [B, heads, columns, dim], of which the last ``width`` columns are the cache and the others, on the left, zeros:
    pads that a mask of 0 must cover. (Pads are zeros, as attention multiplies what it masked by 0, and 0 * NaN is NaN.)
    """

    def __init__(self, device: CudaDevice, buffers: DeviceBuffers, tensors: tuple[CacheTensor, ...]) -> None:
        self._device = device
        self._buffers = buffers
        self._tensors = tensors
        self._live = 0
        self.batch = self.columns = self.width = 0

    @property
    def pads(self) -> int:
        return self.columns - self.width

    def start(self, batch: int) -> None:
        """An empty cache for ``batch`` rows."""
        self.batch, self.columns, self.width, self._live = batch, 0, 0, 0
        self._reserve(0, 1)

    def shapes(self) -> dict[str, tuple[int, int, int, int]]:
        """The shape of every tensor on the live side."""
        return self.new_shapes(0)

    def new_shapes(self, added: int) -> dict[str, tuple[int, int, int, int]]:
        """Of what a step of ``added`` columns writes: all of the cache, and them."""
        return {t.name: (self.batch, t.heads, self.columns + added, t.dim) for t in self._tensors}

    def past_addresses(self) -> Mapping[str, int]:
        return {t.name: self._buffers.address(_side(t, self._live)) for t in self._tensors}

    def present_addresses(self, added: int) -> Mapping[str, int]:
        """Where a step of ``added`` columns writes the whole cache with its own columns at the end."""
        self._reserve(1 - self._live, self.columns + added)
        return {t.name: self._buffers.address(_side(t, 1 - self._live)) for t in self._tensors}

    def turn(self, added: int) -> None:
        """What the step wrote becomes the live side, without a copy."""
        self._live = 1 - self._live
        self.columns += added
        self.width += added

    def shift(self) -> None:
        """Queues the copy of all but the oldest column of what a step of one column wrote back to the live side, whose shape stays."""
        for t in self._tensors:
            row = self.columns * t.dim * t.itemsize
            column = t.dim * t.itemsize
            source = self._buffers.address(_side(t, 1 - self._live)) + column
            self._device.copy_rows(self._buffers.address(_side(t, self._live)), row, source, row + column, row, self.batch * t.heads)

    def shifted(self) -> None:
        """After ``shift``: the oldest pad is gone and the step's column in. Without a pad the oldest column would be lost, so there the
        side that the step wrote becomes the live one, as in ``turn``."""
        if self.pads:
            self.width += 1
        else:
            self.turn(1)

    def lay_out(self, columns: int) -> None:
        """The same cache with as many columns, pads included."""
        if columns == self.columns:
            return
        target = 1 - self._live
        self._reserve(target, columns)
        for t in self._tensors:
            column = t.dim * t.itemsize
            source = self._buffers.address(_side(t, self._live)) + self.pads * column
            address = self._buffers.address(_side(t, target))
            rows = self.batch * t.heads
            if columns > self.width:
                self._device.zero(address, rows * columns * column)
            if self.width:
                start = address + (columns - self.width) * column
                self._device.copy_rows(start, columns * column, source, self.columns * column, self.width * column, rows)
        self._live, self.columns = target, columns

    def _reserve(self, side: int, columns: int) -> None:
        columns = -(-columns // GRANULE) * GRANULE
        for t in self._tensors:
            self._buffers.reserve(_side(t, side), self.batch * t.heads * columns * t.dim * t.itemsize)


def _side(tensor: CacheTensor, side: int) -> str:
    return f"{tensor.name}/{side}"
