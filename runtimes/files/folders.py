"""Folders that are written whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from runtimes.errors import InputError, ReftError
from runtimes.files.claims import OLD, PARTIAL, remove, scratch_folder, sole_writer

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a system says where a file cannot grow: the disk, a quota or ulimit -f."""
TORCH_CANNOT_WRITE = ("PytorchStreamWriter failed", "inline_container.cc", "iostream error")
"""Of its errors, what they say where a file that it writes cannot grow."""
NO_SPACE = "no space left on the disk, or for so large a file (ulimit -f)"
FICLONE = 0x40049409
"""Of linux/fs.h: one file's bytes shared with another until either changes, where the file system can."""
MARKERS = (
    "manifest.json",
    "adapter.json",
    "engine.json",
    "report.html",
    "reft.json",
    "reft_export.json",
    "archive.json",
    "evaluation.json",
)
"""A folder that ``force`` may replace holds one of these: it was written by this project, not by anybody's hand."""


UNPROVEN = ".unproven"
"""Behind the name of the file that tells a folder's kind, until the folder is put in place: no reader takes one that is not."""

_making: set[Path] = set()
"""The folders that this process is writing."""


@contextmanager
def atomic_folder(destination: Path, *, force: bool = False) -> Iterator[Path]:
    """Yields a temporary sibling folder; on success it becomes ``destination`` in one rename, else it is removed.

    An existing ``destination`` is refused before any work unless ``force``, and what appears there during the work is not touched; with
    ``force`` the new folder, complete and synced, is exchanged with the old one, which is deleted after that. One process at a time writes
    a ``destination``. Ctrl-C counts as a failure. A full disk is an error that names the folder.
    """
    destination = Path(os.path.abspath(destination))
    check_destination(destination, force=force)
    try:
        with sole_writer(destination), unproven_folder(destination) as work:
            check_destination(destination, force=force)  # another writer may have been done just before this one's claim
            yield work
            for name in MARKERS:
                if (pending := marker(work, name)).is_file():
                    os.replace(pending, work / name)
            _make_readable(work)
            _sync(work)
            _put_in_place(work, destination, force=force)
    except Exception as e:
        if disk_is_full(e) and not isinstance(e, ReftError):
            raise ReftError(f"{NO_SPACE} while writing {destination}; nothing was written") from e
        raise


def disk_is_full(error: BaseException | None) -> bool:
    """Whether a file could not grow, of which safetensors and SQLite tell in errors of their own, and torch in ones that do not say why."""
    while error is not None:
        said = str(error)
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        if type(error).__name__ == "SafetensorError" and any(f"(os error {code})" in said for code in FULL):
            return True
        if isinstance(error, RuntimeError) and any(each in said for each in TORCH_CANNOT_WRITE):
            return True
        if type(error).__name__ == "OperationalError" and ("database or disk is full" in said or "disk I/O error" in said):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def claimed(destination: Path, *, force: bool = False, inputs: Sequence[Path] = ()) -> Iterator[None]:
    """``check_destination``, and within nobody else writes ``destination``: for what takes a while before its ``atomic_folder``."""
    check_destination(destination, force=force, inputs=inputs)
    with sole_writer(destination):
        yield


@contextmanager
def unproven_folder(beside: Path) -> Iterator[Path]:
    """A scratch folder beside the output ``beside``, whose ``marker`` no other process knows."""
    with scratch_folder(beside, PARTIAL) as work:
        _making.add(work)
        try:
            yield work
        finally:
            _making.discard(work)


def marker(folder: Path, name: str) -> Path:
    """Where ``folder`` holds ``name``, the file that tells its kind: under another name while this process writes it."""
    return folder / (name + UNPROVEN if folder in _making else name)


def name_of(folder: Path) -> str:
    """What ``folder`` is called; of a snapshot in the hub's cache, whose folder is a commit, the repository's name."""
    path = folder.resolve()
    repository = path.parent.parent.name
    if path.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.rpartition("--")[2]
    return path.name


def copy_file(source: Path, target: Path) -> None:
    """A new file of the same bytes: a reflink where the file system has them, else a copy. Never a link: onnx refuses linked weights."""
    with source.open("rb") as read, target.open("wb") as written:
        if _reflink(read.fileno(), written.fileno()):
            return
    shutil.copyfile(source, target)


def _reflink(source: int, target: int) -> bool:
    """Whether the system knows the call, and the file system of both can."""
    try:
        from fcntl import ioctl
    except ImportError:  # not on Windows
        return False
    try:
        ioctl(target, FICLONE, source)
    except OSError:
        return False
    return True


def check_destination(destination: Path, *, force: bool, inputs: Sequence[Path] = ()) -> None:
    """Refuses an output that exists (without ``force``), that this project did not write, that holds one of ``inputs``, or that cannot be
    written. ``inputs`` that are no paths here (hub ids) do no harm."""
    destination = Path(os.path.abspath(destination))
    if destination.exists() and not destination.is_dir():
        raise InputError(f"{destination} is a file; an output folder is expected")
    if os.path.ismount(destination):
        raise InputError(f"{destination} is a mount point, which cannot be replaced whole; name a folder inside it")
    for above in destination.parents:
        if any((above / name).is_file() for name in MARKERS[:3]):
            raise InputError(f"{destination} lies inside {above}, which is a bundle, an engine or an adapter; choose an output beside it")
    for source in inputs:
        if source.exists() and source.resolve().is_relative_to(destination.resolve()):
            raise InputError(f"{destination} holds the input {source}, which writing the output would replace; choose another output")
    if destination.is_dir() and any(destination.iterdir()):
        if not force:
            raise InputError(f"{destination} exists; choose another output or pass --force to replace it")
        if not any((destination / name).is_file() for name in MARKERS):
            raise InputError(f"{destination} holds other files than ours, and --force would delete them; choose another output")
    ancestor = next(p for p in (destination.parent, *destination.parent.parents) if p.exists())
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK):
        raise InputError(f"{destination} cannot be written: {ancestor} is not a writable folder")


def _put_in_place(work: Path, destination: Path, *, force: bool) -> None:
    """One rename, or with ``force`` where a folder is in the way one exchange: afterwards ``work`` is the old folder, or gone."""
    if not force or not os.path.lexists(destination):
        _rename_to_nothing(work, destination)
    else:
        check_destination(destination, force=True)  # somebody may have put something of their own there meanwhile
        if not _exchange(work, destination):
            _replace_in_two_steps(work, destination)
    _sync_folder(destination.parent)


def _rename_to_nothing(work: Path, destination: Path) -> None:
    """POSIX's rename of a folder replaces an empty folder at most. Raises InputError for anything else that has appeared."""
    try:
        os.rename(work, destination)
    except OSError as e:
        if not os.path.lexists(destination):
            raise
        raise InputError(
            f"{destination} appeared while it was being written ({e.strerror}), and stays as it is; choose another output, or pass --force"
        ) from None


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two folders in one step that neither a crash nor Ctrl-C can divide; False where the system has no such call."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of linux/fs.h
    return renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _replace_in_two_steps(work: Path, destination: Path) -> None:
    """For systems without an exchange: whatever happens between the steps, the old folder comes back, or the error says where it is."""
    old = destination.with_name(work.name.removesuffix(PARTIAL) + OLD)
    try:
        os.rename(destination, old)
        os.rename(work, destination)
    except BaseException:
        if old.exists() and not destination.exists():
            try:
                os.rename(old, destination)
            except OSError as e:
                raise ReftError(f"{destination} could not be replaced ({e.strerror}); its old content is in {old}") from e
        raise
    remove(old)


def _make_readable(folder: Path) -> None:
    """Modes as any new file has them: mkdtemp makes 0700, and safetensors 0600, which a service user could not read."""
    mask = _umask()
    for path in (folder, *folder.rglob("*")):
        os.chmod(path, (0o777 if path.is_dir() else 0o666) & ~mask)


def _umask() -> int:
    current = os.umask(0o022)
    os.umask(current)
    return current


def _sync(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as f:
                os.fsync(f.fileno())
        elif path.is_dir():
            _sync_folder(path)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
