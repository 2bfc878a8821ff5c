"""The adapters of a batch's rows, bound to an onnxruntime session: the bank's arrays, read where they lie, and the rows' rules."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnxruntime as ort

from runtimes.artifacts.ort_adapter_file import ort_value
from runtimes.bank import RULE
from runtimes.rows import AdapterRows


class BoundRows:
    """Rows in an IOBinding. The bank's arrays stay bound until it replaces them; rules are written where they are bound.

    A GPU is given copies, when they are bound: there every change is bound again.
    """

    def __init__(self, binding: ort.IOBinding, rows: AdapterRows, device: str) -> None:
        self.rows = rows
        self._binding = binding
        self._copies = device != "cpu"
        self._banks: list[ort.OrtValue] = []
        """Kept: the binding itself keeps no array alive."""
        self._banks_of = (-1, -1)
        self._rules = np.zeros((len(RULE), 0), np.int64)
        self._rules_of = (-1, range(0))

    def bind(self, rows: range) -> None:
        """The next run is of these rows of the batch."""
        stacked = self.rows.bank.stacked  # read once: another thread's load may replace it
        state = (stacked.version, stacked.writes if self._copies else 0)
        if state != self._banks_of:
            self._banks = self._bind(stacked.arrays)
            self._banks_of = state
        if (self.rows.changes, rows) != self._rules_of:
            self._bind_rules(rows)
            self._rules_of = (self.rows.changes, rows)

    def _bind_rules(self, rows: range) -> None:
        rules = self.rows.rules(rows)
        if rows == self._rules_of[1] and not self._copies:
            self._rules[:] = rules
            return
        self._rules = rules.copy()
        self._bind(dict(zip(RULE, self._rules, strict=True)))

    def _bind(self, arrays: Mapping[str, np.ndarray]) -> list[ort.OrtValue]:
        values = []
        for name, array in arrays.items():
            values.append(ort_value(array))
            self._binding.bind_ortvalue_input(name, values[-1])
        return values
