"""Frozen dataclasses to JSON and back, strictly: a missing, unknown or wrongly typed key is an error that names its place."""

from __future__ import annotations

import errno
import functools
import json
import os
import re
import stat
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from runtimes.errors import AdapterError, ReftError

T = TypeVar("T")
HALF = re.compile("[\ud800-\udfff]")


class RecordError(ValueError):
    """What is wrong with a record and where in the file; the reader of the file turns it into its own error class."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For ``json.loads``'s ``object_pairs_hook``: ValueError for a key that stands twice, of which it would keep the last."""
    record: dict[str, Any] = {}
    for key, value in pairs:
        if key in record:
            raise ValueError(f"key {key!r} is given twice")
        record[key] = value
    return record


def parse_json(text: str, *, keys_once: bool = False) -> Any:
    """``json.loads`` whose every refusal is a ValueError: a file of a hundred thousand brackets exhausts its stack."""
    try:
        return json.loads(text, object_pairs_hook=unique_keys if keys_once else None)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def to_json(value: Any) -> Any:
    """A dataclass as JSON-ready dicts, lists and scalars."""
    if is_dataclass(value):
        return {f.name: to_json(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(v) for v in value]
    return value


def from_json(kind: type[T], value: Any, where: str = "") -> T:
    """``value`` as ``kind``: a dataclass, scalar, Literal, ``X | None``, ``tuple[X, ...]``, ``dict[str, X]`` or Any.

    Keys with a default may be absent; unknown keys raise RecordError.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None  # type: ignore[return-value]
        return from_json(next(a for a in arguments if a is not type(None)), value, where)
    if origin is typing.Literal:
        if not any(value == known and type(value) is type(known) for known in arguments):
            raise RecordError(f"{where or 'value'} is {value!r}, which is unknown; known: {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        return tuple(from_json(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(_typed(list, value, where)))  # type: ignore[return-value]
    if origin in (dict, Mapping, typing.get_origin(Mapping[str, Any])):
        return {k: from_json(arguments[1], v, f"{where}.{k}") for k, v in _typed(dict, value, where).items()}  # type: ignore[return-value]
    if is_dataclass(kind):
        return _record(kind, _typed(dict, value, where), where)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)  # type: ignore[return-value]
        except OverflowError:
            raise RecordError(f"{where or 'value'} is a number that no float holds") from None
    return _typed(kind, value, where)


_hints = functools.cache(typing.get_type_hints)  # a third of the time that reading an adapter takes


def _record(kind: Any, value: dict[str, Any], where: str) -> Any:
    hints = _hints(kind)
    known = {f.name: f for f in fields(kind)}
    prefix = f"{where}: " if where else ""
    unknown = sorted(set(value) - set(known))
    if unknown:
        raise RecordError(f"{prefix}unknown keys {unknown}; it was written by a newer version or edited by hand")
    missing = [n for n, f in known.items() if n not in value and f.default is MISSING and f.default_factory is MISSING]
    if missing:
        raise RecordError(f"{prefix}lacks {missing}")
    return kind(**{n: from_json(hints[n], v, f"{where}.{n}" if where else n) for n, v in value.items()})


def _typed(kind: Any, value: Any, where: str) -> Any:
    # JSON's true is a Python int as well: a number must not be a bool.
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise RecordError(f"{where or 'value'} is {value!r}, expected {kind.__name__}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise RecordError(f"{where or 'value'} is a whole number of more than 64 bits")
    if isinstance(value, str) and HALF.search(value):
        raise RecordError(f"{where or 'value'} is {value!r}, which holds half of a surrogate pair, and that is no character")
    return value


def read_regular(path: Path) -> bytes:
    """The bytes of a regular file, or of what a link leads to. Raises OSError for a folder, and for a pipe or device, which may not end."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        return file.read()


def read_json_object(path: Path, error: type[ReftError] = AdapterError, remedy: str = "") -> dict[str, Any]:
    """Raises ``error``, in one line that ends in ``remedy``, for what cannot be read, is not JSON, or is JSON other than an object."""
    value = read_json(path, error, remedy)
    if not isinstance(value, dict):
        raise error(_with(f"{path} holds a JSON {type(value).__name__}, expected an object", remedy))
    return value


def read_json(path: Path, error: type[ReftError] = AdapterError, remedy: str = "") -> Any:
    """Raises ``error``, in one line that ends in ``remedy``, for what cannot be read or is not JSON."""
    try:
        return parse_json(read_regular(path).decode("utf-8-sig"))
    except OSError as e:
        raise error(_with(f"{path} cannot be read ({e.strerror})", remedy)) from None
    except ValueError as e:
        raise error(_with(f"{path} is not JSON: {e}", remedy)) from None


def _with(what: str, remedy: str) -> str:
    return f"{what}; {remedy}" if remedy else what
