"""The JSON that lies beside foreign weights. Nothing in it is trusted; a byte order mark, which some editors put first, is no error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runtimes.errors import AdapterError
from runtimes.files.records import parse_json


def read_json_object(path: Path) -> dict[str, Any]:
    """Raises AdapterError, in one line, for what cannot be read, is not JSON, or is JSON other than an object."""
    try:
        value = parse_json(path.read_text(encoding="utf-8-sig"))
    except OSError as e:
        raise AdapterError(f"{path} cannot be read ({e.strerror})") from None
    except ValueError as e:
        raise AdapterError(f"{path} is not JSON: {e}") from None
    if not isinstance(value, dict):
        raise AdapterError(f"{path} does not hold a JSON object")
    return value
