"""Folders that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runtimes.errors import InputError, ReftError


@contextmanager
def atomic_folder(destination: Path, *, force: bool = False) -> Iterator[Path]:
    """Yields a temporary sibling folder; on success it becomes ``destination`` in one rename, else it is removed.

    An existing ``destination`` is refused before any work unless ``force``; with it the old folder is swapped out only when the
    new one is complete and synced, and swapped back if the rename fails. Ctrl-C counts as a failure. A full disk is an error
    that names the folder.
    """
    destination = Path(os.path.abspath(destination))
    check_destination(destination, force=force)
    destination.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", suffix=".partial", dir=destination.parent))
    try:
        yield work
        _sync(work)
        _swap(work, destination)
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ReftError(f"no space left on the disk while writing {destination}; nothing was written") from e
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def check_destination(destination: Path, *, force: bool) -> None:
    """Refuses an output that exists (without ``force``), or that a folder could not replace."""
    destination = Path(os.path.abspath(destination))
    if destination.exists() and not destination.is_dir():
        raise InputError(f"{destination} is a file; an output folder is expected")
    if destination.is_dir() and any(destination.iterdir()) and not force:
        raise InputError(f"{destination} exists; choose another output or pass --force to replace it")
    ancestor = next(p for p in (destination.parent, *destination.parent.parents) if p.exists())
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK):
        raise InputError(f"{destination} cannot be written: {ancestor} is not a writable folder")


def _swap(work: Path, destination: Path) -> None:
    os.chmod(work, 0o777 & ~_umask())  # mkdtemp makes 0700, a folder that a service user could not read
    if not destination.exists():
        os.rename(work, destination)
        _sync_folder(destination.parent)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", suffix=".old", dir=destination.parent)) / "old"
    try:
        os.rename(destination, old)
        try:
            os.rename(work, destination)
        except BaseException:
            os.rename(old, destination)
            raise
        _sync_folder(destination.parent)
    finally:
        shutil.rmtree(old.parent, ignore_errors=True)


def _umask() -> int:
    current = os.umask(0o022)
    os.umask(current)
    return current


def _sync(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as f:
                os.fsync(f.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
