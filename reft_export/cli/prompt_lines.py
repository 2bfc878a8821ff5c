"""JSONL that a user hands to ``run``: every line with the place it stands at."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> list[tuple[str, Any]]:
    """(file and line, JSON value) of every line that is not blank; "-" is stdin. Raises InputError with the line's number."""
    from runtimes.errors import InputError

    where = "stdin" if str(path) == "-" else str(path)
    try:
        content = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{where} cannot be read: {e}") from None
    lines = [(f"{where}:{number}", line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
    if not lines:
        raise InputError(f"{where} is empty; give it one JSON object a line")
    return [(place, _parse_line(line, place)) for place, line in lines]


def _parse_line(line: str, where: str) -> Any:
    """The JSON value of one line; raises InputError for what is no JSON, and for half of a surrogate pair, which no tokenizer takes."""
    from runtimes.errors import InputError
    from runtimes.records import parse_json

    try:
        value = parse_json(line, keys_once=True)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{where}: holds half of a surrogate pair (\\ud800 to \\udfff), which is no character") from None
    except ValueError as e:
        raise InputError(f"{where}: not JSON ({e}); give it one JSON object a line") from None
    return value
