"""Who writes where: one process an output, and scratch folders that do not outlive the process that made them for long.

``.NAME.writing`` beside an output NAME is locked, by flock, while it is written. A scratch folder ``.NAME.xxxxxxxx.SUFFIX`` beside it is
locked itself, so that whoever finds one that is not knows that its process is gone, were it killed or in another container.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from runtimes.errors import InputError

PARTIAL = ".partial"
"""Suffix of an output that is being written."""
OLD = ".old"
"""Suffix of an output that is being replaced, where the system cannot do that in one step."""

LOOK_SECONDS = 0.1
"""Between two looks at what another one writes."""

SECRETS = ("--api-key", "--admin-token")
"""Options whose values are told to nobody."""

_claims: ContextVar[frozenset[Path]] = ContextVar("claims", default=frozenset())
"""The outputs that this thread writes."""
_RANDOM = r"[a-z0-9_]{8}"
"""What tempfile puts into a name."""


@contextmanager
def sole_writer(destination: Path, *, wait: bool = False) -> Iterator[None]:
    """Within, nobody else writes ``destination``; what a killed writer of it left behind is removed first.

    Raises InputError, at once, where another process or thread is writing it; with ``wait`` it waits for that one. Where the file system
    has no locks it goes on without.
    """
    destination = _real(destination)
    held = _claims.get()
    if destination in held:
        yield
        return
    made = _make_parents(destination)
    try:
        with _locked(destination, wait=wait):
            token = _claims.set(held | {destination})
            try:
                _restore_old(destination)
                yield
            finally:
                _claims.reset(token)
    finally:
        for folder in made:
            try:
                folder.rmdir()
            except OSError:
                break  # it is used


@contextmanager
def scratch_folder(beside: Path, suffix: str) -> Iterator[Path]:
    """A new folder ``.NAME.xxxxxxxx.SUFFIX`` beside the path ``beside``, gone afterwards; those of dead processes are removed first."""
    remove_left_overs(beside, suffix)
    folder, lock = _make_locked(beside, suffix)
    try:
        yield folder
    finally:
        remove(folder)
        if lock is not None:
            os.close(lock)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """``scratch_folder`` where the system keeps what is temporary."""
    with scratch_folder(Path(tempfile.gettempdir()) / "reft-export", ".tmp") as folder:
        yield folder


def remove(path: Path) -> None:
    """A folder with all that is in it, or a link; what cannot be removed stays."""
    try:
        if path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)
    except OSError:
        pass


def remove_left_overs(beside: Path, suffix: str) -> None:
    """Removes the scratch folders of ``beside`` whose process is gone."""
    for folder in _siblings(beside, suffix):
        if (lock := _lock(folder)) is not None:
            remove(folder)
            os.close(lock)


def _restore_old(destination: Path) -> None:
    """A process that was killed between the two steps of a replacement left the old output under another name."""
    for old in _siblings(destination, OLD):
        if os.path.lexists(destination):
            remove(old)
        else:
            old.rename(destination)


def _siblings(beside: Path, suffix: str) -> list[Path]:
    pattern = re.compile(rf"\.{re.escape(beside.name)}\.{_RANDOM}{re.escape(suffix)}")
    try:
        return [Path(entry) for entry in os.scandir(beside.parent) if pattern.fullmatch(entry.name)]
    except OSError:
        return []


def _make_locked(beside: Path, suffix: str) -> tuple[Path, int | None]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{beside.name}.", suffix=suffix, dir=beside.parent))
        lock = _lock(folder)
        if folder.is_dir():  # else somebody took it for a left-over before it was locked
            return folder, lock
        if lock is not None:
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """The locked folder's descriptor; None where another process holds it, it is somebody else's, or there are no locks."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        return None
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        if os.fstat(handle).st_uid == os.geteuid():
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
    except OSError:
        pass
    os.close(handle)
    return None


def _real(path: Path) -> Path:
    absolute = Path(os.path.abspath(path))
    return absolute.parent.resolve() / absolute.name


def _make_parents(destination: Path) -> list[Path]:
    """The folders above ``destination`` that had to be made, innermost first."""
    missing = []
    for parent in destination.parents:
        if parent.is_dir():
            break
        missing.append(parent)
    destination.parent.mkdir(parents=True, exist_ok=True)
    return missing


@contextmanager
def _locked(destination: Path, *, wait: bool) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    path = destination.with_name(f".{destination.name}.writing")
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 500).decode(errors="replace") or "another process"
            os.close(handle)
            if wait:
                time.sleep(LOOK_SECONDS)
                continue
            raise InputError(f"{destination} is being written by {holder}; wait for it, or choose another output") from None
        except OSError:  # a file system without locks
            os.close(handle)
            path.unlink(missing_ok=True)
            yield
            return
        if _is(path, handle):
            break
        os.close(handle)  # its holder removed it between the two calls
    try:
        _introduce(handle)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _is(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def _without_secrets(words: Sequence[str]) -> Iterator[str]:
    before = ""
    for word in words:
        name, equals, _ = word.partition("=")
        yield ".." if before in SECRETS else f"{name}=.." if equals and name in SECRETS else word
        before = word


def _introduce(handle: int) -> None:
    """Says in the lock's file who holds it: the second writer repeats it."""
    words = " ".join([os.path.basename(sys.argv[0]), *_without_secrets(sys.argv[1:])])
    try:
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} ({words if len(words) <= 200 else words[:200] + '..'})".encode(errors="replace"))
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
