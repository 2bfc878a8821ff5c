"""Checkpoints that were made of others' files and are kept: within a bound those used last, and whatever a process uses.

A process that uses one holds a shared lock on its folder for as long as it runs. One that is taken away is renamed under the exclusive lock
first, so that nobody sees half of it. Where a file system has no locks nothing is taken away.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from reft_export.console import err, size
from runtimes.errors import InputError
from runtimes.files.claims import remove_left_overs, scratch_folder

KINDS = ("quantized", "gguf")
MOST_GB = 100.0
VARIABLE = "REFT_CACHE_GB"
MAKING = ".making"
"""Suffix of the scratch folder that one is made in."""
REMOVING = ".removing"
"""Of that from which what was taken away is removed."""

_held: dict[Path, int] = {}
"""Descriptors of the folders that this process uses."""


def kept_folder(kind: str) -> Path:
    """Where checkpoints of one of KINDS lie."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reft-export" / kind


def hold(folder: Path) -> bool:
    """Whether ``folder`` is there. Then it is the one used last, and stays while this process runs."""
    if (handle := _held.get(folder)) is not None:
        if not _is(folder, handle):
            os.close(_held.pop(folder))
            return hold(folder)
    else:
        try:
            handle = os.open(folder, os.O_RDONLY)
        except OSError:  # nor does Windows open folders, which has no locks of this kind
            return folder.is_dir()
        if not _lock(handle, shared=True):
            os.close(handle)
            return folder.is_dir()
        if not _is(folder, handle):  # it was taken away between the two calls
            os.close(handle)
            return hold(folder)
        _held[folder] = handle
    with suppress(OSError):  # somebody else's
        os.utime(folder)
    return True


def hold_if_kept(folder: Path) -> None:
    """One that is named by its own path."""
    if folder.resolve().parent in {kept_folder(kind).resolve() for kind in KINDS}:
        hold(folder.resolve())


def take_away_oldest() -> None:
    """Until what is kept is within the bound, or in use. What killed processes were making goes, too. Raises InputError for a bound that
    is no number."""
    most = _most()
    _remove_half_made()
    found = [path for kind in KINDS if kept_folder(kind).is_dir() for path in kept_folder(kind).iterdir() if _is_kept(path)]
    sizes = {path: _bytes(path) for path in sorted(found, key=_used)}
    total = sum(sizes.values())
    for path, count in sizes.items():
        if total <= most:
            return
        if _take_away(path):
            total -= count
            err.print(f"{path.parent.name} {path.name[:12]} ({size(count)}) is no longer kept: {VARIABLE} is {most / 1e9:g}", markup=False)


def _remove_half_made() -> None:
    """Each would go when the same one is made again, and that may never be. What they were removing goes with it."""
    form = re.compile(rf"\.(\w+)\.\w{{8}}({re.escape(MAKING)}|{re.escape(REMOVING)})")
    for kind in filter(Path.is_dir, map(kept_folder, KINDS)):
        for name, suffix in {found.groups() for path in kind.iterdir() if (found := form.fullmatch(path.name))}:
            remove_left_overs(kind / name, suffix)


def _most() -> float:
    """Bytes."""
    stated = os.environ.get(VARIABLE) or f"{MOST_GB}"
    try:
        most = float(stated)
    except ValueError:
        most = -1.0
    if not 0 <= most < float("inf"):
        raise InputError(f"{VARIABLE} is {stated!r}, expected GB (10^9 bytes) of dequantized checkpoints that are kept, 0 or more")
    return most * 1e9


def _is_kept(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not path.name.startswith(".")


def _used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # it goes away meanwhile
            total += path.lstat().st_size
    return total


def _take_away(folder: Path) -> bool:
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        if not _lock(handle, shared=False) or not _is(folder, handle):
            return False
        with scratch_folder(folder.with_name("kept"), REMOVING) as scratch:
            folder.rename(scratch / folder.name)
        return True
    except OSError:
        return False
    finally:
        os.close(handle)


def _lock(handle: int, *, shared: bool) -> bool:
    """The shared one is waited for: the exclusive one lasts for a moment."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is(folder: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(folder), os.fstat(handle))
    except OSError:
        return False
