"""sha256 of files, with a memory for large ones: 2.3 GB take over a second at each start otherwise."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path

LARGE = 256 * 2**20
"""Files above this size are hashed once and remembered by (path, size, mtime, inode)."""


def sha256_of(path: Path, *, remember: bool = False) -> str:
    """Hex digest of a file. With ``remember``, a large file that has not changed is not read again."""
    stat = path.stat()
    if not remember or stat.st_size <= LARGE:
        return _digest(path)
    # The time of change, unlike that of modification, no program sets: a copy that keeps its source's times is another file here.
    key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ctime_ns}|{stat.st_ino}"
    known = _read_cache()
    if key not in known:
        known[key] = _digest(path)
        _write_cache(known)
    return known[key]


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))  # one buffer for all of the file: a new one per read costs more than the reading
    with path.open("rb", buffering=0) as f:
        while count := f.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def _cache_file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reft-export" / "hashes.json"


def _read_cache() -> dict[str, str]:
    try:
        content = json.loads(_cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in content.items() if isinstance(v, str)} if isinstance(content, dict) else {}


def _write_cache(known: dict[str, str]) -> None:
    """The cache is a convenience: where it cannot be written (a read-only home), the file is hashed again next time."""
    path = _cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as f:
            json.dump(dict(list(known.items())[-200:]), f)
        os.replace(temporary, path)
    except OSError:
        return
