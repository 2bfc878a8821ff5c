"""The adapters of a batch's rows, bound to an onnxruntime session: the bank's arrays, read where they lie, and the rows' rules."""

from __future__ import annotations

import onnxruntime as ort

from runtimes.artifacts.ort_adapter_file import ort_value
from runtimes.rows import AdapterRows


class BoundRows:
    """Rows in an IOBinding. Arrays stay bound until the bank replaces them, rules until a row changes.

    A GPU is given copies, when they are bound: there every change of the bank is bound again.
    """

    def __init__(self, binding: ort.IOBinding, rows: AdapterRows, device: str) -> None:
        self.rows = rows
        self._binding = binding
        self._copies = device != "cpu"
        self._banks: dict[str, ort.OrtValue] = {}
        self._rules: dict[str, ort.OrtValue] = {}
        """Kept: the binding itself keeps no array alive."""
        self._bound: tuple[int, int] = (-1, -1)
        self._bound_rules: tuple[int, range] = (-1, range(0))

    def bind(self, rows: range) -> None:
        """The next run is of these rows of the batch."""
        bank = self.rows.bank
        with bank.lock:  # another session's load may replace the arrays
            state = (bank.version, bank.writes if self._copies else 0)
            if state != self._bound:
                self._banks = {name: ort_value(array) for name, array in bank.arrays().items()}
                self._bind(self._banks)
                self._bound = state
            if (self.rows.changes, rows) != self._bound_rules:
                self._rules = {name: ort_value(numbers) for name, numbers in self.rows.rules(rows).items()}
                self._bind(self._rules)
                self._bound_rules = (self.rows.changes, rows)

    def _bind(self, values: dict[str, ort.OrtValue]) -> None:
        for name, value in values.items():
            self._binding.bind_ortvalue_input(name, value)
