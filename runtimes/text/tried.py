"""A tokenizer.json is read in a process of its own once: one that is damaged on purpose ends the process that reads it, or never ends.

What was read well is remembered by its sha256 in the user's cache, and by path, size, time and inode, so that it is not hashed again.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from runtimes.errors import BundleError
from runtimes.files.hashes import sha256_of

CODE = """
import sys
sys.path = [folder for folder in sys.path if folder]  # not the folder that the user is in
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]), int(sys.argv[2])))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
except (ImportError, OSError, ValueError):
    pass
import tokenizers
tokenizer = tokenizers.Tokenizer.from_file(sys.argv[1])
tokenizer.decode(tokenizer.encode("Hello, world: 12 + 3 = 15.").ids)
"""
SECONDS = 10.0
"""And one for each MB of the file."""
MEMORY = 4 << 30
"""Bytes of address space, and 64 for each byte of the file: the largest vocabularies take 30."""
ONE_THREAD = {"RAYON_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
"""Threads take address space of their own."""
REMEMBERED = 500


def try_tokenizer(path: Path) -> None:
    """Raises BundleError, in one line, for a tokenizer.json that cannot be read, ends its reader, or takes too long or too much memory."""
    stat = path.stat()
    key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ino}"
    known = _read()
    if key in known:
        return
    digest = sha256_of(path)
    if digest not in known:
        _try(path, stat.st_size)
    _write([*known, *({digest, key} - set(known))])


def _try(path: Path, size: int) -> None:
    command, seconds = [sys.executable, "-c", CODE, str(path), str(MEMORY + 64 * size)], SECONDS + size / 1e6
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, timeout=seconds, env=os.environ | ONE_THREAD
        )
    except subprocess.TimeoutExpired:
        raise BundleError(f"{path} takes more than {seconds:.0f} s to be read; copy the bundle again") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1].removeprefix("Exception: ")
        died = f"it ends its reader with {signal.Signals(-done.returncode).name}" if done.returncode < 0 else last[:300]
        raise BundleError(f"{path} cannot be read by tokenizers: {died}; copy the bundle again")


def _file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reft-export" / "tokenizers.json"


def _read() -> list[str]:
    try:
        content = json.loads(_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [each for each in content if isinstance(each, str)] if isinstance(content, list) else []


def _write(known: list[str]) -> None:
    """A convenience: where it cannot be written (a read-only home), the file is tried again next time."""
    path = _file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(known[-REMEMBERED:], file)
        os.replace(temporary, path)
    except OSError:
        return
