"""Where training data lies: JSONL files, or records in memory; line by line, each with its place for messages."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtimes.errors import InputError
from runtimes.files.records import unique_keys

Records = Sequence[Mapping[str, Any]]
Data = str | Path | Sequence[str | Path] | Records
"""A JSONL file, several as if they were one, or the records of one that are in memory."""
IN_MEMORY = "data"
"""What records in memory are called where a file has its name."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of JSONL."""

    raw: bytes
    number: int
    where: str
    """For messages."""


class Source:
    """The lines of a file, or of records in memory as ``json.dumps`` would write them. ``sha256`` is of those that were read."""

    def __init__(self, content: str | Path | Records) -> None:
        self._path, self._records = (Path(content), ()) if isinstance(content, (str, Path)) else (None, content)
        self.name = IN_MEMORY if self._path is None else self._path.name
        self.where = IN_MEMORY if self._path is None else str(self._path)
        self._digest = hashlib.sha256()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def lines(self) -> Iterator[Line]:
        """Raises InputError for a file that is none, and for a record that JSON cannot hold."""
        for line in self._of_memory() if self._path is None else self._of_file(self._path):
            self._digest.update(line.raw)
            yield line

    def _of_memory(self) -> Iterator[Line]:
        for index, record in enumerate(self._records):
            where = f"{self.where}[{index}]"
            try:
                raw = json.dumps(dict(record)).encode() + b"\n"
            except (TypeError, ValueError) as e:
                raise InputError(f"{where} is no record of texts and numbers: {e}") from None
            yield Line(raw=raw, number=index + 1, where=where)

    def _of_file(self, path: Path) -> Iterator[Line]:
        check_file(path)
        with path.open("rb") as f:
            for number, raw in enumerate(f, start=1):
                yield Line(raw=raw, number=number, where=f"{path}:{number}")


def check_file(path: Path) -> None:
    """Raises InputError where there is no such file."""
    if not path.is_file():
        raise InputError(f"{path} is not a file; training data is a JSONL file")


def sources_of(data: Data) -> list[Source]:
    if isinstance(data, (str, Path)):
        return [Source(data)]
    given = list(data)
    paths = [each for each in given if isinstance(each, (str, Path))]
    records = [each for each in given if not isinstance(each, (str, Path))]
    if not paths and not records:
        raise InputError("there is no training data; give at least one JSONL file")
    if paths and records:
        raise InputError("the training data mixes files and records in memory; give either")
    return [Source(path) for path in paths] or [Source(records)]


def read_object(line: Line) -> dict[str, Any] | None:
    """The JSON object of one line; None of an empty one. Raises InputError for anything else."""
    where = line.where
    try:
        text = line.raw.decode("utf-8-sig" if line.number == 1 else "utf-8")
    except UnicodeDecodeError as e:
        raise InputError(f"{where}: byte {e.start + 1} is not UTF-8; save the file as UTF-8") from None
    if not text.strip():
        return None
    try:
        record = json.loads(text, object_pairs_hook=unique_keys)
    except json.JSONDecodeError as e:
        raise InputError(f"{where}: not JSON: {e.msg} at column {e.colno}; each line is one JSON object") from None
    except RecursionError:
        raise InputError(f"{where}: not JSON that can be read: nested too deeply") from None
    except ValueError as e:  # a key that stands twice, or a number of more digits than Python reads
        raise InputError(f"{where}: not JSON that can be read: {e}") from None
    if not isinstance(record, dict):
        raise InputError(f"{where}: holds a {type(record).__name__}, expected a JSON object")
    return record


def check_text(value: Any, what: str, where: str) -> None:
    """Raises InputError for what is no string, empty, or not encodable."""
    if not isinstance(value, str):
        raise InputError(f"{where}: {what} is {type(value).__name__}, expected a string")
    if not value.strip():
        raise InputError(f"{where}: {what} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{where}: {what} holds half of a surrogate pair (\\ud800 to \\udfff), which is no character") from None
