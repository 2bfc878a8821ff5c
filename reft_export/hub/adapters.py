"""An adapter that is named by its repository on a hub, ``owner/name`` or ``owner/name@revision``, where a folder is asked for.

It is pulled as ``pull`` does it, held against its own digests, into a folder by commit, and read from there the next time:

    HF_HOME/reft-export/adapters/owner--name/<commit>/
    HF_HOME/reft-export/adapters/owner--name/refs/<revision>     the commit that a revision was when the hub was asked last
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from reft_export.importing.foreign import Report
from runtimes.errors import InputError
from runtimes.files.claims import sole_writer
from runtimes.files.placed import place

FORM = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(\S+))?")
COMMIT = re.compile("[0-9a-f]{40}")
MAIN = "main"


def is_on_hub(adapter: Path) -> bool:
    """Whether ``adapter``, or what follows its NAME=, is no path here and has the form of a repository."""
    return not adapter.exists() and not _folder(adapter)[1].exists() and FORM.fullmatch(str(_folder(adapter)[1])) is not None


def local_folders(adapters: Sequence[Path], report: Report) -> list[Path]:
    """``adapters`` with NAME=FOLDER in the place of each that is on a hub; the name is the repository's where none is given.

    Raises InputError for one that is neither a path here nor can be had from the hub, AdapterError for one that is damaged there.
    """
    found = []
    for adapter in adapters:
        if is_on_hub(adapter):
            name, where = _folder(adapter)
            given = FORM.fullmatch(str(where))
            assert given is not None
            adapter = Path(f"{name or given[1].partition('/')[2]}={_cached(given[1], given[2], report)}")
        found.append(adapter)
    return found


def local_folder(adapter: Path, report: Report) -> Path:
    """One adapter's folder, without a name; errors as of ``local_folders``."""
    return Path(str(local_folders([adapter], report)[0]).partition("=")[2]) if is_on_hub(adapter) else adapter


def _folder(adapter: Path) -> tuple[str, Path]:
    name, equals, folder = str(adapter).partition("=")
    return (name, Path(folder)) if equals and "/" not in name else ("", adapter)


def _cached(repository: str, revision: str | None, report: Report) -> Path:
    from huggingface_hub import HfApi, constants

    from reft_export.hub.client import asking, check_revision
    from reft_export.hub.pull import pull_folder

    try:
        check_revision(revision)
    except InputError as e:
        raise InputError(f"{repository}@{revision} is no folder here, and {e}") from None
    kept = Path(constants.HF_HOME) / "reft-export" / "adapters" / repository.replace("/", "--")
    ref = kept / "refs" / quote(revision or MAIN, safe="")
    if constants.HF_HUB_OFFLINE:
        commit = ref.read_text(encoding="utf-8") if ref.is_file() else revision or MAIN
        if COMMIT.fullmatch(commit) and (kept / commit).is_dir():
            return kept / commit
        asked = repository if revision is None else f"{repository}@{revision}"
        raise InputError(f"{asked} is no folder here, nor was it pulled before, and no hub is asked while HF_HUB_OFFLINE is set; unset it")
    try:
        report(f"asking for {repository}")
        with asking(repository, revision):
            commit = str(HfApi().model_info(repository, revision=revision).sha)
        if not COMMIT.fullmatch(commit):  # it becomes the name of a folder
            raise InputError(f"{constants.ENDPOINT} names no commit of it ({commit[:80]!r}); check HF_ENDPOINT")
        if not (kept / commit).is_dir():
            with sole_writer(kept / commit, wait=True):  # another command may be pulling the same
                if not (kept / commit).is_dir():
                    pull_folder(repository, kept / commit, revision=commit, only="adapter", report=report)
    except InputError as e:
        raise InputError(f"{repository} is no folder here, and cannot be had from a hub: {e}") from e
    ref.parent.mkdir(exist_ok=True)
    place(ref, commit.encode())
    return kept / commit
