"""Our JSON files: each is its canonical text, byte for byte, and holds that text's digest.

Canonical: keys sorted, one space of indent, ASCII, one newline at the end. ``digest`` is the sha256 of the canonical text without that
key. So no bit can change, and no editor can save the file, without a reader's noticing; any language's JSON library can make the same text.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtimes.errors import ReftError
from runtimes.files.records import parse_json, read_regular

DIGEST = "digest"
FIRST_VERSION = 1
"""Of all our files; it has no digest."""

_noted: set[Path] = set()
_expecting = ContextVar("expecting", default=False)
"""Whether somebody reads version 1 because it is that."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """A kind of sealed file: the key of its version, the version that is written, and what an error tells a reader to do."""

    version_key: str
    version: int
    error: type[ReftError]
    remedy: str


def canonical_text(content: Mapping[str, Any]) -> str:
    """``content`` as its one text. Raises ValueError for what JSON cannot hold: a number that is not finite, or hundreds of levels."""
    try:
        return json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n"
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def digest_of(content: Mapping[str, Any]) -> str:
    """sha256 of the canonical text of ``content`` without its digest."""
    return hashlib.sha256(canonical_text({k: v for k, v in content.items() if k != DIGEST}).encode()).hexdigest()


def sealed_text(content: Mapping[str, Any]) -> str:
    """The canonical text of ``content`` with its digest, whatever digest it held before."""
    return canonical_text({**content, DIGEST: digest_of(content)})


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Raises ValueError for what JSON cannot hold."""
    path.write_text(sealed_text(content), encoding="ascii", newline="\n")


def read_sealed(path: Path, kind: Format) -> dict[str, Any]:
    """The content of ``path`` with its digest; of version 1 as it stands, which a note on stderr tells once.

    Raises the format's error, in one line, for a file that cannot be read, is not JSON, is of another version or was changed.
    """
    try:
        text = read_regular(path).decode()
        content = parse_json(text)
    except OSError as e:
        raise kind.error(f"{path} cannot be read ({e.strerror})") from None
    except ValueError as e:  # of UTF-8, and of json
        raise kind.error(f"{path} is not JSON: {e}; {kind.remedy}") from None
    version = content.get(kind.version_key) if isinstance(content, dict) else None
    if type(version) is int and version == FIRST_VERSION:
        _note_first_version(path)
    elif type(version) is int and version == kind.version:
        _check_seal(path, text, content, kind)
    else:
        known = f"{FIRST_VERSION} and {kind.version}"
        raise kind.error(
            f"{path}: {kind.version_key.replace('_', ' ')} {version!r}; this version reads {known}; update reft-export, or {kind.remedy}"
        )
    return content


def _check_seal(path: Path, text: str, content: dict[str, Any], kind: Format) -> None:
    try:
        canonical, digest = canonical_text(content), digest_of(content)
    except ValueError as e:
        raise kind.error(f"{path} is not JSON: {e}; {kind.remedy}") from None
    stated = content.get(DIGEST)
    if stated != digest:
        what = f"its digest is {str(stated)[:16]!r}, its content's {digest[:16]!r}" if DIGEST in content else "it has no digest"
        raise kind.error(f"{path} was changed after it was written: {what}; {kind.remedy}")
    if text != canonical:
        line = next((i for i, (a, b) in enumerate(zip(_lines(text), _lines(canonical), strict=False), 1) if a != b), 1)
        raise kind.error(f"{path} was changed after it was written: from line {line} on it is spelled in another way; {kind.remedy}")


def _lines(text: str) -> list[str]:
    return [*text.splitlines(keepends=True), ""]


@contextmanager
def expected() -> Iterator[None]:
    """Within, files of version 1 are read without a note."""
    token = _expecting.set(True)
    try:
        yield
    finally:
        _expecting.reset(token)


def _note_first_version(path: Path) -> None:
    resolved = path.resolve()
    if resolved not in _noted and not _expecting.get():
        _noted.add(resolved)
        # Without a handler of anybody's, logging says a warning on stderr.
        logging.getLogger(__name__).warning("%s: version 1, without digests; `reft-export upgrade %s` writes version 2", path, path.parent)
