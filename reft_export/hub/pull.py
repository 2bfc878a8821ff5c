"""``reft-export pull``: an adapter or a bundle from a Hugging Face hub, as it was pushed, bit for bit.

Nothing is fetched but the files of an adapter, or those that a bundle's manifest lists: what else lies in a repository is never asked for.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from reft_export.base.hub import without_progress_bars
from reft_export.hub.client import KINDS, asking, check_repository, check_revision
from reft_export.importing.foreign import Report
from runtimes.artifacts.bundle import Bundle, open_bundle
from runtimes.artifacts.listed_files import check_listed_name
from runtimes.artifacts.manifest import MANIFEST_FILE, read_manifest
from runtimes.edits.adapter import CONFIG_FILE, PROBES_FILE, TENSOR_FILE, Adapter, load_adapter, read_adapter_config
from runtimes.errors import AdapterError, BundleError, InputError
from runtimes.files.folders import UNPROVEN, atomic_folder, claimed, marker

UNLISTED = "genai_config.json"
"""Of a bundle's folder: its user may edit it, so that no manifest lists it."""
RECORDS = {CONFIG_FILE, MANIFEST_FILE, UNLISTED, PROBES_FILE}
LARGEST_RECORD = 2**26
"""Bytes, as no record lists the size of these: a manifest of many adapters is some hundred kB."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Pulled:
    """What lies in the output now."""

    content: Adapter | Bundle
    commit: str
    """Of the repository."""
    files: int


def pull_folder(
    repository: str,
    output: Path,
    *,
    revision: str | None = None,
    only: str | None = None,
    force: bool = False,
    report: Report = print,
) -> Pulled:
    """Fetches ``repository`` (owner/name) at ``revision`` (a branch, a tag or a commit; None: main) into ``output``, whole or not at all.

    ``only``: adapter or bundle; None: either. Every file but UNLISTED is held against the digests that the adapter or the bundle itself
    records, by its own reader, before it is put in place; what a manifest lists is held against its size before it is fetched.

    Raises InputError for a hub that does not answer or refuses, and for a repository that holds neither; AdapterError and BundleError for
    one that is damaged, of another version, or names files outside of its folder.
    """
    check_repository(repository)
    check_revision(revision)
    with claimed(output, force=force):
        from huggingface_hub import HfApi

        report(f"asking for {repository}")
        with asking(repository, revision):
            info = HfApi().model_info(repository, revision=revision, files_metadata=True)
        sizes = {sibling.rfilename: sibling.size for sibling in info.siblings or ()}
        kind = _kind(repository, set(sizes))
        if only not in (None, kind):
            raise InputError(f"{repository} holds a {kind}, and not an {only}; `reft-export pull` fetches it")
        for name in RECORDS & set(sizes):
            if (sizes[name] or 0) > LARGEST_RECORD:
                raise InputError(
                    f"{repository}: {name} is {sizes[name]} bytes, and {LARGEST_RECORD} at most are read of it; it is none of ours"
                )
        commit = str(info.sha)
        with atomic_folder(output, force=force) as work, without_progress_bars():
            fetched = _Fetched(repository, commit, work, sizes, report)
            try:
                content = _read_adapter(fetched, work) if kind == "adapter" else _read_bundle(fetched, work)
            except (AdapterError, BundleError) as e:  # the scratch folder is gone when this is read
                raise type(e)(str(e).replace(f"{work}{os.sep}", f"{repository}: ").replace(UNPROVEN, "")) from None
    return Pulled(content=content, commit=commit, files=len(fetched.names))


def _read_adapter(fetched: _Fetched, work: Path) -> Adapter:
    fetched.get(CONFIG_FILE, TENSOR_FILE)
    if read_adapter_config(work).probes is not None:
        fetched.get(PROBES_FILE)
    fetched.clear()
    return load_adapter(work)


def _read_bundle(fetched: _Fetched, work: Path) -> Bundle:
    fetched.get(MANIFEST_FILE)
    listed = read_manifest(marker(work, MANIFEST_FILE)).files
    for name in listed:
        check_listed_name(name, work / MANIFEST_FILE)
    for name, record in listed.items():
        if (size := fetched.sizes.get(name)) not in (None, record.size):
            raise BundleError(
                f"{work / name} is {size} bytes, its manifest lists {record.size}, and it was not fetched; push the bundle again"
            )
    fetched.get(*listed, *({UNLISTED} & set(fetched.sizes)))
    fetched.clear()
    return open_bundle(work, verify=True)


def _kind(repository: str, names: set[str]) -> str:
    """Raises InputError for a repository that is neither an adapter nor a bundle, or several things at once."""
    found = [kind for name, kind in KINDS.items() if name in names]
    if "engine" in found:
        raise InputError(f"{repository} holds an engine, which runs on the GPU it was built for, and is trusted code; pull the bundle")
    if len(found) == 1:
        return found[0]
    said = "both adapter.json and manifest.json" if found else "neither adapter.json nor manifest.json"
    raise InputError(f"{repository} holds {said}; an adapter or a bundle has one of them, as `reft-export push` leaves it")


class _Fetched:
    """Files of one commit in the folder that is being written."""

    def __init__(self, repository: str, commit: str, work: Path, sizes: Mapping[str, int | None], report: Report) -> None:
        self._repository, self._commit, self._work, self._report = repository, commit, work, report
        self.sizes = sizes
        """Bytes of every file of the commit, as the hub says; None where it does not."""
        self._fresh = work / ".hub"
        """huggingface_hub keeps a record of its own beside what it fetches."""
        self.names: list[str] = []

    def get(self, *names: str) -> None:
        from huggingface_hub import HfApi

        api = HfApi()
        for name in names:
            self._report(f"fetching {name}")
            with asking(self._repository, self._commit):
                path = api.hf_hub_download(self._repository, name, revision=self._commit, local_dir=self._fresh)
            target = marker(self._work, name) if name in KINDS else self._work / name
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
            self.names.append(name)

    def clear(self) -> None:
        shutil.rmtree(self._fresh)
