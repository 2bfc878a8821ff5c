"""Which adapter steers which row of a batch, while rows come, go and change."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from types import TracebackType

import numpy as np

from runtimes.bank import RULE, AdapterBank, ExplicitSlots, count
from runtimes.edits.op import FIRST_SLOT, NOT_EXPLICIT, PROMPT_LENGTH
from runtimes.edits.positions import slots_of
from runtimes.edits.strength import Steering
from runtimes.errors import InputError


class AdapterRows:
    """The adapters of a batch's rows, in order: names of ``bank``, ``Scaled(name, strength)``, or None for the base. Those that are not
    resident are loaded.

    They may change between two steps: ``rows[i] = name``, ``append``, ``remove``. What they name stays resident until ``release``, or the
    end of a ``with``. One thread at a time changes them, or steps a session with them.

    Raises what ``AdapterBank.load`` raises.
    """

    def __init__(self, bank: AdapterBank, names: Iterable[Steering | None] = ()) -> None:
        self.bank = bank
        self.changes = 0
        """Counts up where a row changes."""
        self.released = False
        self._names: list[Steering | None] = []
        self._explicit: list[ExplicitSlots | None] = []
        self._any_explicit = False
        """Since there are these rows: what one step was handed would serve the next."""
        self._rules = np.zeros((len(RULE), 0), np.int64)
        """[7, rows or more]"""
        try:
            for name in names:
                self.append(name)
        except BaseException:
            self.release()
            raise

    @property
    def names(self) -> tuple[Steering | None, ...]:
        return tuple(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, row: int) -> Steering | None:
        return self._names[row]

    def __setitem__(self, row: int, name: Steering | None) -> None:
        """Raises what ``AdapterBank.load`` raises; the row is then as it was."""
        self._check()
        before = self._names[row]
        self._rules[:, range(len(self))[row]] = self.bank.pin(name)
        self._names[row], self._explicit[row] = name, self._explicit_of(name)
        self.bank.unpin(before)
        self.changes += 1

    def append(self, name: Steering | None) -> None:
        """Another row, behind the last one."""
        self._check()
        rule, row = self.bank.pin(name), len(self)
        if row == self._rules.shape[1]:
            self._rules = np.pad(self._rules, [(0, 0), (0, row + 8)])
        self._rules[:, row] = rule
        self._names.append(name)
        self._explicit.append(self._explicit_of(name))
        self.changes += 1

    def remove(self, row: int) -> None:
        """Takes a row out, and moves the last one into its place, as rows of a KV cache stay without gaps."""
        self._check()
        row, last = range(len(self))[row], len(self) - 1
        self.bank.unpin(self._names[row])
        self._rules[:, row] = self._rules[:, last]
        self._names[row], self._explicit[row] = self._names[last], self._explicit[last]
        self._names.pop()
        self._explicit.pop()
        self.changes += 1

    def swap(self, one: int, other: int) -> None:
        """Two rows change places."""
        self._check()
        for rules in self._rules:
            rules[one], rules[other] = int(rules[other]), int(rules[one])
        self._names[one], self._names[other] = self._names[other], self._names[one]
        self._explicit[one], self._explicit[other] = self._explicit[other], self._explicit[one]
        self.changes += 1

    def rules(self, rows: range) -> np.ndarray:
        """int64 [7, n]: the numbers of these rows' rules, by ``runtimes.bank.RULE``; good until a row changes."""
        return self._rules[:, rows.start : rows.stop]

    def slots(
        self, rows: range, attention_mask: np.ndarray, width: int, prompt_length: np.ndarray, marks: np.ndarray | None = None
    ) -> np.ndarray | None:
        """``reft.slots`` of a step of these rows, int32 [n, S], or [1, 1] where the graph computes them all; None where it always did."""
        if not self._any_explicit:
            return None
        explicit = self._explicit[rows.start : rows.stop]
        if not any(explicit):
            return np.array([[NOT_EXPLICIT]], np.int32)
        found = np.full((len(rows), width), NOT_EXPLICIT, np.int32)
        for each in {each for each in explicit if each is not None}:
            mine = [row for row, other in enumerate(explicit) if other == each]
            found[mine] = each.of(attention_mask, width, prompt_length, marks)[mine]
        return found

    def own_slots(self, row: int, prompt_length: int, count: int) -> np.ndarray:
        """int32 [count]: of a row's first tokens, as if its adapter's slots began at 0."""
        length, mask = np.array([prompt_length], np.int64), np.ones((1, count), np.int64)
        if (explicit := self._explicit[row]) is not None:
            return replace(explicit, first=0).of(mask, count, length)[0]
        rule = dict(zip(RULE, self.rules(range(row, row + 1)), strict=True))
        return slots_of(rule | {FIRST_SLOT: np.zeros(1, np.int64), PROMPT_LENGTH: length}, mask, count)[0]

    def _explicit_of(self, name: Steering | None) -> ExplicitSlots | None:
        found = self.bank.explicit_slots(name)
        self._any_explicit |= found is not None
        return found

    def release(self) -> None:
        """Once or more often: its adapters may be evicted, and no session steps with it any more."""
        for name in self._names:
            self.bank.unpin(name)
        self._names.clear()
        self._explicit.clear()
        self.released = True

    def __enter__(self) -> AdapterRows:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

    def check(self, batch: int) -> None:
        """Raises InputError unless these are the rows of a batch of that size."""
        self._check()
        if batch != len(self):
            raise InputError(f"the batch has {count(batch, 'row')}, and adapters are set for {len(self)}; append or remove rows")

    def _check(self) -> None:
        if self.released:
            raise InputError("these rows were released, and their adapters may be gone; make others with AdapterRows")
