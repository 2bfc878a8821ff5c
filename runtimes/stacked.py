"""The edits of many adapters at one op node, stacked: which slots are taken, and the arrays that the op takes as its bank."""

from __future__ import annotations

from bisect import bisect, bisect_left, insort
from collections import Counter
from collections.abc import Sequence

import numpy as np

from runtimes.edits.op import Bank, EditNode, no_edit_bank, rank_rows

SPARE = 16
"""A bank that grows gets one slot more than it needs for every so many: 6 % at most are not used, and its growth is copied that many
times in all."""


class Slots:
    """Runs of slots, given out first fit. No slot ends them: behind the last one taken all are free."""

    def __init__(self) -> None:
        self._gaps: list[tuple[int, int]] = []
        """(start, stop), in order, never next to each other."""
        self._end = 0

    def first_fit(self, count: int) -> range:
        """Where so many would go; nothing is taken."""
        start = next((start for start, stop in self._gaps if stop - start >= count), self._end)
        return range(start, start + count)

    def take(self, slots: range) -> None:
        if slots.start >= self._end:
            gap = (self._end, slots.start)
            self._end = slots.stop
            if gap[0] < gap[1]:
                self._gaps.append(gap)
            return
        at = bisect(self._gaps, (slots.start, self._end)) - 1
        start, stop = self._gaps[at]
        self._gaps[at : at + 1] = [gap for gap in ((start, slots.start), (slots.stop, stop)) if gap[0] < gap[1]]

    def give_back(self, slots: range) -> None:
        start, stop = slots.start, slots.stop
        at = bisect_left(self._gaps, (start, stop))
        if at < len(self._gaps) and self._gaps[at][0] == stop:
            stop = self._gaps.pop(at)[1]
        if at and self._gaps[at - 1][1] == start:
            at -= 1
            start = self._gaps.pop(at)[0]
        if stop == self._end:
            self._end = start
        else:
            self._gaps.insert(at, (start, stop))


class StackedNode:
    """One node's bank: ``arrays``, one for each parameter, [N, r, D], [N, r] or [N, D].

    Arrays that are too small are replaced, never changed in size: whoever holds the old ones reads there what was there. A node that
    nobody uses has the bank that edits nothing, of one slot; a slot behind the last one passes through, as the op has it.
    """

    def __init__(self, node: EditNode, width: int, dtype: np.dtype) -> None:
        self.node = node
        self._width, self._dtype = width, dtype
        self._ends: list[int] = []
        """Of the runs that hold edits here, in order."""
        self._ranks: Counter[int] = Counter()
        self.arrays = no_edit_bank(width, dtype, node.op)
        self._held = (0, 0)
        """(N, r) of ``arrays``; none is held in the bank that edits nothing."""

    @property
    def size(self) -> int:
        """Bytes of ``arrays``; 0 where they are the bank that edits nothing."""
        return self._size(*self._held)

    def needed(self) -> tuple[int, int]:
        """The least (N, r) that holds what is taken."""
        return (self._ends[-1], max(self._ranks)) if self._ends else (0, 0)

    def least_size(self) -> int:
        """Bytes of such arrays."""
        return self._size(*self.needed())

    def size_alone(self, slots: int, rank: int) -> int:
        """Bytes of arrays that hold so many slots of ``rank``, and nothing else."""
        return self._size(slots, rank)

    def take(self, slots: range, rank: int) -> None:
        """Notes an edit of ``rank`` in ``slots``; ``reserve`` makes room, ``write`` puts it there."""
        insort(self._ends, slots.stop)
        self._ranks[rank] += 1

    def give_back(self, slots: range, rank: int) -> None:
        del self._ends[bisect_left(self._ends, slots.stop)]
        self._ranks[rank] -= 1
        if not self._ranks[rank]:
            del self._ranks[rank]

    def reserve(self, *, exactly: bool = False) -> bool:
        """Room for what is taken, and for some more; ``exactly``: not a slot or row more. Whether ``arrays`` are others now."""
        slots, rank = self.needed()
        if not exactly and slots <= self._held[0] and rank <= self._held[1]:
            return False
        wanted = (slots if exactly else slots + slots // SPARE, rank)
        if wanted == self._held:
            return False
        self._replace(*wanted)
        return True

    def write(self, slots: range, edits: Sequence[np.ndarray] | None) -> None:
        """``edits``: the parameters [n, r, D], [n, r] or [n, D] of the edits of ``slots``, n their number, r of any size that was taken;
        None: no edit, where the node has these slots."""
        at = slice(slots.start, min(slots.stop, self._held[0]))
        for bank, array, value in zip(self.node.spec.banks, self.arrays, edits or (None,) * len(self.arrays), strict=True):
            array[at] = bank.no_edit
            if value is not None:
                array[(at, *self._rows(bank, value.shape[1]))] = value

    def edits(self, slots: range, rank: int) -> tuple[np.ndarray, ...]:
        """What ``write`` put there."""
        at = slice(slots.start, slots.stop)
        return tuple(array[(at, *self._rows(bank, rank))] for bank, array in zip(self.node.spec.banks, self.arrays, strict=True))

    def _rows(self, bank: Bank, rank: int) -> tuple[np.ndarray, ...]:
        """Where the rows of an edit of ``rank`` stand on the axis r; nothing for a parameter without one."""
        return (rank_rows(rank, self._held[1], self.node.activated),) if "r" in bank.axes else ()

    def _replace(self, slots: int, rank: int) -> None:
        old, (held, before) = self.arrays, self._held
        self._held = (slots, rank)
        if not slots:
            self.arrays = no_edit_bank(self._width, self._dtype, self.node.op)
            return
        size = {"r": rank, "D": self._width}
        kept, rows = min(held, slots), rank_rows(min(before, rank), rank, self.node.activated)
        arrays = []
        for bank, array in zip(self.node.spec.banks, old, strict=True):
            wider = _filled((slots, *(size[axis] for axis in bank.axes)), bank.no_edit, self._dtype)
            if "r" not in bank.axes:
                wider[:kept] = array[:kept]
            elif kept:
                wider[:kept, rows] = array[:kept, rank_rows(len(rows), before, self.node.activated)]
            arrays.append(wider)
        self.arrays = tuple(arrays)

    def _size(self, slots: int, rank: int) -> int:
        size = {"r": rank, "D": self._width}
        values = sum(int(np.prod([size[axis] for axis in bank.axes])) for bank in self.node.spec.banks)
        return slots * values * self._dtype.itemsize


def _filled(shape: tuple[int, ...], value: float, dtype: np.dtype) -> np.ndarray:
    """Zeros come from the system without being written, and take no memory until they are."""
    return np.full(shape, value, dtype) if value or np.signbit(value) else np.zeros(shape, dtype)
