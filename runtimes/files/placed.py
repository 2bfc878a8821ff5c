"""Single files that are written whole or not at all: reports, figures and pictures beside an output."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runtimes.files.claims import PARTIAL, scratch_folder


@contextmanager
def placed(path: Path) -> Iterator[Path]:
    """Yields a path to write to, which becomes ``path`` in one rename; what a killed process left of it is removed first.

    A link's target is replaced, not the link; a pipe or a device is written to as it is.
    """
    if path.exists() and not path.is_file():  # of /dev/stdout in a pipeline no path says what it is linked to
        yield path
        return
    target = Path(os.path.realpath(path))
    with scratch_folder(target, PARTIAL) as folder:
        yield folder / target.name
        os.replace(folder / target.name, target)


def place(path: Path, content: bytes) -> None:
    """``path`` with ``content``, whole or as it was."""
    with placed(path) as file:
        file.write_bytes(content)
