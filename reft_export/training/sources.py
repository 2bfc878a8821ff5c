"""Where training data lies: JSONL files, Parquet files, data sets that Hugging Face's ``save_to_disk`` wrote, or records in memory; line by
line, each with its place for messages.

Rows of Parquet files and data sets are read as the JSON lines that they would be, without their nulls, by pyarrow and datasets (the extra
``data``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from runtimes.errors import BackendUnavailable, InputError
from runtimes.files.records import unique_keys

Records = Sequence[Mapping[str, Any]]
Data = str | Path | Sequence[str | Path] | Records
"""A file, or the folder of a data set; several as if they were one; or records in memory."""
Rewrite = Callable[[dict[str, Any], str], "Mapping[str, Any] | None"]
"""(record, where it stands) to what is read in its place; None leaves the line out."""


IN_MEMORY = "data"
"""What records in memory are called where a file has its name."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Rewritten:
    """Data that is read otherwise than it lies there; names and digests are those of what lies there. ``called``: records in memory."""

    data: Data
    rewrite: Rewrite
    called: str = IN_MEMORY


Lines = Data | Rewritten


PARQUET = ".parquet"
DATASET_FILES = ("state.json", "dataset_dict.json")
"""What ``save_to_disk`` writes: of one data set, and of several splits, each in a folder of its own."""
NEEDS = {PARQUET: "pyarrow", "": "datasets"}
"""By the suffix of a path: what reads it; a folder has none."""
ROWS_AT_ONCE = 1024
"""Of a Parquet file in memory."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of JSONL."""

    raw: bytes
    number: int
    where: str
    """For messages."""


class Source:
    """The lines of a file, or of records in memory as ``json.dumps`` would write them. ``sha256`` is of those that were read."""

    def __init__(self, content: str | Path | Records, rewrite: Rewrite | None = None, called: str = IN_MEMORY) -> None:
        self._rewrite = rewrite
        self._path, self._records = (Path(content), ()) if isinstance(content, (str, Path)) else (None, content)
        self.name = called if self._path is None else self._path.name
        self.where = called if self._path is None else str(self._path)
        self._digest = hashlib.sha256()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def lines(self) -> Iterator[Line]:
        """Raises InputError for a file that is none, and for a record that JSON cannot hold."""
        for line in self._of_records(self._records) if self._path is None else self._of_path(self._path):
            self._digest.update(line.raw)
            record = None if self._rewrite is None else read_object(line)
            if self._rewrite is None or record is None:
                yield line
            elif (changed := self._rewrite(record, line.where)) is not None:
                yield replace(line, raw=json.dumps(dict(changed)).encode() + b"\n")

    def _of_records(self, records: Iterable[Mapping[str, Any]]) -> Iterator[Line]:
        for index, record in enumerate(records):
            where = f"{self.where}[{index}]"
            try:
                raw = json.dumps(dict(record)).encode() + b"\n"
            except (TypeError, ValueError) as e:
                raise InputError(f"{where} is no record of texts and numbers: {e}") from None
            yield Line(raw=raw, number=index + 1, where=where)

    def _of_path(self, path: Path) -> Iterator[Line]:
        check_source(path)
        if path.is_dir():
            yield from self._of_records(_of_dataset(path))
        elif path.suffix == PARQUET:
            yield from self._of_records(_of_parquet(path))
        else:
            with path.open("rb") as f:
                for number, raw in enumerate(f, start=1):
                    yield Line(raw=raw, number=number, where=f"{path}:{number}")


def check_source(path: Path) -> None:
    """Raises InputError where there is no data at ``path``, BackendUnavailable where nothing here reads it."""
    if path.is_dir():
        state, splits = (path / name for name in DATASET_FILES)
        if splits.is_file():
            names = sorted(each.parent.name for each in path.glob("*/state.json"))
            raise InputError(f"{path} holds several splits; name one of them: {', '.join(str(path / name) for name in names)}")
        if not state.is_file():
            raise InputError(f"{path} is a folder without state.json, which save_to_disk of datasets writes; name its files instead")
    elif not path.is_file():
        raise InputError(f"{path} is not a file; training data is a JSONL or Parquet file, or a data set's folder")
    library = NEEDS.get("" if path.is_dir() else path.suffix or ".")
    if library is not None and find_spec(library) is None:
        raise BackendUnavailable(f"{path} needs {library} to be read; pip install 'reft-export[data]', or save it as JSONL")


def _of_parquet(path: Path) -> Iterator[dict[str, Any]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE):
                yield from (_without_nulls(row) for row in batch.to_pylist())
    except (ArrowException, OSError) as e:
        raise InputError(f"{path} is no Parquet file that can be read: {' '.join(str(e).split())[:200]}; write it again") from None


def _of_dataset(folder: Path) -> Iterator[dict[str, Any]]:
    from datasets import Dataset

    try:
        rows = Dataset.load_from_disk(str(folder)).with_format(None)
    except Exception as e:  # damaged files raise what the libraries beneath happen to raise
        raise InputError(f"{folder} is no data set that can be read: {' '.join(str(e).split())[:200]}; save it again") from None
    for index in range(len(rows)):
        yield _without_nulls(rows[index])


def _without_nulls(value: Any) -> Any:
    """A column holds null wherever a row has no such key, at every depth."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def sources_of(data: Lines) -> list[Source]:
    data, rewrite, called = (data.data, data.rewrite, data.called) if isinstance(data, Rewritten) else (data, None, IN_MEMORY)
    if isinstance(data, (str, Path)):
        return [Source(data, rewrite)]
    given = list(data)
    paths = [each for each in given if isinstance(each, (str, Path))]
    records = [each for each in given if not isinstance(each, (str, Path))]
    if not paths and not records:
        raise InputError("there is no training data; give at least one file")
    if paths and records:
        raise InputError("the training data mixes files and records in memory; give either")
    return [Source(path, rewrite) for path in paths] or [Source(records, rewrite, called)]


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
