"""safetensors files written one tensor at a time: a checkpoint of a large base is never in memory whole."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import numpy as np

ENTRY_ROOM = 160
"""Bytes of a tensor's entry in the header, beside its name: type, four sizes and two offsets of 20 digits at most, and their keys."""


class TensorWriter:
    """8 bytes of length, a JSON header padded with spaces, then the data. The header is written last, into room for ``names``."""

    def __init__(self, path: Path, names: Collection[str]) -> None:
        self._room = -(-(ENTRY_ROOM * (1 + len(names)) + sum(len(json.dumps(name)) for name in names)) // 8) * 8
        self._entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._file = path.open("wb")
        self._start = 8 + self._room
        self._file.seek(self._start)

    def append(self, name: str, dtype: str, shape: tuple[int, ...], data: np.ndarray) -> None:
        """``data``: the values of a tensor of ``shape``, or their bytes; ``dtype`` by safetensors' name."""
        begin = self._file.tell() - self._start
        self._entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, begin + data.nbytes]}
        self._file.write(np.ascontiguousarray(data).data)

    def close(self) -> None:
        with self._file as file:
            file.seek(0)
            file.write(self._room.to_bytes(8, "little") + json.dumps(self._entries).encode().ljust(self._room))
